#!/usr/bin/env bash
# Pre-trains, fine-tunes or evaluates (TASK) on several hosts without a scheduler.
#
#   HOSTS=FILE [VARIABLE=value ...] bash jobs/launch_multinode.sh [--config FILE] [key=value ...]
#
# HOSTS names a file of lines `HOST slots=RANKS`. Checkout, environment, data and RUN have the same paths on all of them.
# Run on the first host, it starts the ranks of all by ssh (with pdsh); ssh must work without a password. Or run it on
# every host with NODE_RANK=0, 1, ...: the place of that host in HOSTS; then no ssh is needed.
#   NUM_NODES    hosts to use, the first ones of HOSTS (all)
#   MASTER_ADDR  name or address of the first host that all know (as in HOSTS)
#   MASTER_PORT  open between them (with NODE_RANK 29500, else the first free one from there on)
# TASK, RUN, RESTARTS, PREFLIGHT, JOIN_SECONDS, NETWORK and, with NODE_RANK, CONTAINER and BIND: see jobs/functions.sh.
# Stopping and exit codes as in jobs/launch_local.sh. To stop it, signal this script or `touch RUN/stop`; never signal
# `deepspeed` itself: its answer is to end every DeepSpeed job on these hosts.
set -euo pipefail
[ -f "${HOSTS:-}" ] || { echo "error: HOSTS has to name a file of lines HOST slots=RANKS" >&2; exit 2; }
HOSTS=$(realpath "$HOSTS")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/functions.sh

mapfile -t names < <(awk 'NF && $1 !~ /^#/ { print $1 }' "$HOSTS")
NUM_NODES=${NUM_NODES:-${#names[@]}}
[ "$NUM_NODES" -le "${#names[@]}" ] || fail "NUM_NODES is $NUM_NODES, but $HOSTS names ${#names[@]} hosts"
names=("${names[@]:0:NUM_NODES}") hosts=(--hosts "$(IFS=,; echo "${names[*]:0:NUM_NODES}")")
export HOSTS MASTER_ADDR=${MASTER_ADDR:-${names[0]}} MASTER_PORT=${MASTER_PORT:-}
if [ -n "${NODE_RANK:-}" ]; then
    export NODE_RANK MASTER_PORT=${MASTER_PORT:-29500}
    BIND=${BIND:+$BIND,}$HOSTS
    [ -z "$CONTAINER" ] || mkdir -p "$RUN"
    enter_container
else
    [ -z "$CONTAINER" ] || fail "CONTAINER needs NODE_RANK: run this on every host with its place in $HOSTS"
    [ -n "$(command -v pdsh)" ] || fail "pdsh is not installed here: install it, or run this on every host with NODE_RANK"
    # A host that is gone ends its session after a minute. pdsh waits for the sessions of all hosts.
    export PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND:--o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=4}
fi
[ -n "$CONTAINER" ] || source jobs/environment.sh
network_settings "${names[@]}"

start() { # MODULE ARGUMENT ...
    [ "${NODE_RANK:-0}" != 0 ] || [ -z "$MASTER_PORT" ] || require_port "$MASTER_PORT"
    if [ -n "${NODE_RANK:-}" ]; then
        exec setsid "${container[@]}" bash jobs/node.sh --num_nodes "$NUM_NODES" "${rank_logs[@]}" --module "$@"
    fi
    # ssh carries a part of the environment only; the launcher adds what this file holds.
    export DS_ENV_FILE=$logs/deepspeed_env
    remote_settings > "$DS_ENV_FILE"
    exec setsid deepspeed --log_level error --hostfile "$HOSTS" --num_nodes "$NUM_NODES" --force_multi \
        --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-$(open_port 29500)}" "${rank_logs[@]}" --module "$@"
}

if [ -z "${NODE_RANK:-}" ]; then
    # By hand what `deepspeed` does too broadly: the sessions to the hosts first, then, on each, this start's launcher.
    end_now() {
        kill -KILL -- "-$child" 2>/dev/null || true
        PDSH_RCMD_TYPE=ssh pdsh -w "$(IFS=,; echo "${names[*]}")" "pkill -TERM -f '[w]orld_info.*rank_log=$logs'" || true
    }

    reach_hosts() { # ATTEMPT: whether ssh reaches all hosts; after a crash one may take JOIN_SECONDS to come back
        local attempt=$1 deadline=$((SECONDS + JOIN_SECONDS)) missing=("${names[@]}") name process
        while :; do
            local -A asked=()
            for name in "${missing[@]}"; do
                ssh -o BatchMode=yes -o ConnectTimeout=20 "$name" true > "$logs/ssh_$name.txt" 2>&1 < /dev/null &
                asked[$name]=$!
            done
            missing=()
            for name in "${!asked[@]}"; do
                process=${asked[$name]}
                wait "$process" || missing+=("$name")
            done
            [ -z "$stopping" ] || return 0
            if [ ${#missing[@]} = 0 ] || [ "$attempt" = 0 ] || [ $SECONDS -ge $deadline ]; then break; fi
            sleep 5
        done
        for name in "${missing[@]}"; do
            echo "error: preflight: $name: ssh from $(hostname) does not reach it: $(tail -n 1 "$logs/ssh_$name.txt")"
        done | tee "$logs/preflight.log"
        [ ${#missing[@]} = 0 ] || return 2
    }
fi

keep_running "$@"
