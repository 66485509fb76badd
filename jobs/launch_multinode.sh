#!/usr/bin/env bash
# Pre-trains on several hosts without a scheduler.
#
#   HOSTS=FILE [VARIABLE=value ...] bash jobs/launch_multinode.sh [--config FILE] [key=value ...]
#
# HOSTS names a file of lines `HOST slots=RANKS`. Checkout, environment, data and RUN have the same paths on all of them.
# Run on the first host, it starts the ranks of all by ssh (with pdsh); ssh must work without a password. Or run it on
# every host with NODE_RANK=0, 1, ...: the place of that host in HOSTS; then no ssh is needed.
#   NUM_NODES    hosts to use, the first ones of HOSTS (all)
#   MASTER_ADDR  name or address of the first host that all know (as in HOSTS)
#   MASTER_PORT  open between them (29500)
# RUN, RESTARTS, PREFLIGHT, NETWORK and, with NODE_RANK, CONTAINER: see jobs/functions.sh. Stopping and exit codes as in
# jobs/launch_local.sh. To stop it, signal this script or `touch RUN/stop`; never signal `deepspeed` itself: its answer is
# to end every DeepSpeed job on these hosts.
set -euo pipefail
: "${HOSTS:?names the file of hosts}"
HOSTS=$(realpath "$HOSTS")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/functions.sh
[ -n "$CONTAINER" ] || source jobs/environment.sh

mapfile -t names < <(awk 'NF { print $1 }' "$HOSTS")
NUM_NODES=${NUM_NODES:-${#names[@]}}
[ "$NUM_NODES" -le "${#names[@]}" ] || fail "NUM_NODES is $NUM_NODES, but $HOSTS names ${#names[@]} hosts"
network_settings "${names[@]:0:NUM_NODES}"
export HOSTS MASTER_ADDR=${MASTER_ADDR:-${names[0]}} MASTER_PORT=${MASTER_PORT:-29500}

start() { # MODULE ARGUMENT ...
    if [ -n "${NODE_RANK:-}" ]; then
        export NODE_RANK
        exec setsid "${container[@]}" bash jobs/node.sh --num_nodes "$NUM_NODES" "${rank_logs[@]}" --module "$@"
    fi
    # ssh carries a part of the environment only; the launcher adds what this file holds.
    export DS_ENV_FILE=$logs/deepspeed_env
    env | grep -E '^(GLOO_|NCCL_|TORCH_|OMP_|DS_ACCELERATOR|CUDA_HOME)' > "$DS_ENV_FILE"
    exec setsid deepspeed --log_level error --hostfile "$HOSTS" --num_nodes "$NUM_NODES" --force_multi \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "${rank_logs[@]}" --module "$@"
}

keep_running smaug_ds.pretrain "$@" run.folder="$RUN"
