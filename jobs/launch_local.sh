#!/usr/bin/env bash
# Pre-trains, fine-tunes or evaluates on this machine: looks at it first, starts again after a crash, saves and leaves when
# told to stop.
#
#   [VARIABLE=value ...] bash jobs/launch_local.sh [--config FILE] [key=value ...]
#   TASK=finetune [VARIABLE=value ...] bash jobs/launch_local.sh --config FILE run.init_from=RUN [key=value ...]
#   TASK=evaluate RUN=FOLDER bash jobs/launch_local.sh [--data FOLDER] [key=value ...]
#
# RANKS is their number (all GPUs; without a GPU 2). RUN, RESTARTS, PREFLIGHT, CONTAINER and BIND: see jobs/functions.sh.
# Ctrl-C, SIGTERM, SIGUSR1 or `touch RUN/stop` stop it; a second Ctrl-C ends it without saving. Exit codes: 0 finished,
# 85 stopped and saved (run it again to go on), 2 a setting or this machine is wrong, or there is no room, 87 data or a loss
# fail and would again, else the last crash.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/functions.sh
unset HOSTS # one host: jobs/node.sh
if [ -n "$CONTAINER" ]; then
    mkdir -p "$RUN"
    enter_container
else
    source jobs/environment.sh
fi

network_settings localhost
if [ "${DS_ACCELERATOR:-}" != cpu ] && [ -z "${RANKS:-}" ]; then
    RANKS=$("${container[@]}" python -c 'import torch; print(torch.cuda.device_count())')
    [ "$RANKS" != 0 ] || RANKS="" # in an image without a GPU
fi
RANKS=${RANKS:-2}

start() { # MODULE ARGUMENT ...: in a session of its own, so that Ctrl-C is for this script alone
    local launch=(--num_gpus "$RANKS" --master_port "$(open_port $((20000 + RANDOM % 20000)))" "${rank_logs[@]}" --module "$@")
    if [ -n "$CONTAINER" ]; then
        exec setsid "${container[@]}" bash jobs/node.sh "${launch[@]}"
    fi
    exec setsid deepspeed --log_level error "${launch[@]}"
}

keep_running "$@"
