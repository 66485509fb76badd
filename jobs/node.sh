#!/usr/bin/env bash
# Starts the ranks of one host under one launcher, without ssh: bash jobs/node.sh LAUNCHER_OPTION ... --module MODULE ...
# The other scripts call it, on each host and if need be in the container. With HOSTS it is one host of several: then
# MASTER_ADDR and MASTER_PORT are set, too, and NODE_RANK unless SLURM tells.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/functions.sh
source jobs/environment.sh

place=()
if [ -n "${HOSTS:-}" ]; then
    mapfile -t names < <(awk 'NF && $1 !~ /^#/ { print $1 }' "$HOSTS")
    network_settings "${names[@]}"
    place=(--hostfile "$HOSTS" --no_ssh --node_rank "${NODE_RANK:-${SLURM_NODEID:?}}"
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
fi
# A scheduler may send these to all processes. The launcher's front end would die of them and take the ranks along.
trap '' TERM USR1
exec deepspeed --log_level error "${place[@]}" "$@"
