#!/usr/bin/env bash
# Pre-trains on this machine: looks at it first, starts again after a crash, saves and leaves when told to stop.
#
#   [VARIABLE=value ...] bash jobs/launch_local.sh [--config FILE] [key=value ...]
#
# RANKS is their number (all GPUs; without a GPU 2). RUN, RESTARTS and PREFLIGHT: see jobs/functions.sh.
# Ctrl-C, SIGTERM, SIGUSR1 or `touch RUN/stop` stop it. Exit codes: 0 finished, 85 stopped and saved (run it again to go
# on), 2 a setting or this machine is wrong, else the last crash.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/functions.sh
source jobs/environment.sh

network_settings localhost
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    RANKS=${RANKS:-2}
else
    RANKS=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
fi

start() { # MODULE ARGUMENT ...: in a session of its own, so that Ctrl-C is for this script alone
    exec setsid deepspeed --log_level error --num_gpus "$RANKS" --master_port "$port" "${rank_logs[@]}" --module "$@"
}

port=$(free_port)
keep_running smaug_ds.pretrain "$@" run.folder="$RUN"
