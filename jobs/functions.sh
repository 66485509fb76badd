# shellcheck shell=bash disable=SC2034
# What the job scripts share. Source it from bash, in the checkout. Each script says which of these variables it takes:
#   RUN        run folder, on storage that all hosts share (runs/pretrain); passed on as run.folder
#   RESTARTS   times that a run is started again after a crash or a hang, from its last checkpoint (3)
#   PREFLIGHT  0: do not look at the hosts before each start (1)
#   NETWORK    interface by which the ranks meet, such as ib0 (the one towards the other hosts)
#   CONTAINER  image to run in, FILE.sif or anything else that Apptainer takes; it has to hold the environment.
#              BIND names folders to show in it, comma separated, beside the checkout.

RUN=$(realpath -m "${RUN:-runs/pretrain}")
RESTARTS=${RESTARTS:-3} PREFLIGHT=${PREFLIGHT:-1} NETWORK=${NETWORK:-} CONTAINER=${CONTAINER:-}
stopping="" rank_logs=() container=()
[ -z "$CONTAINER" ] || container=(apptainer exec --nv --bind "$PWD${BIND:+,$BIND}" --pwd "$PWD" "$CONTAINER")

fail() { echo "error: $*" >&2; exit 2; }

network_settings() { # HOST ...: how the ranks of this host talk to those of the others
    local host address
    for host in "$@"; do
        [ -z "$NETWORK" ] || break
        address=$(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }') || true
        NETWORK=$(ip -o route get "${address:-127.0.0.1}" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || true
        [ "$NETWORK" != lo ] || NETWORK=""
    done
    if [ -n "$NETWORK" ]; then
        # Without it gloo takes the address of the host's own name, which Debian makes a loopback one.
        export GLOO_SOCKET_IFNAME=$NETWORK
        # NCCL's way to find the others; data take InfiniBand where there is some.
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK}
    fi
    # Says why a connection failed; INFO also says which way data go.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # A collective that times out leaves what each rank waited for in /tmp/nccl_trace_rank_N.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    # Each rank would start a thread per core of the whole host.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

record() { # FOLDER: what runs, and where
    {
        date --iso-8601=seconds
        uname -a
        git describe --always --dirty
        python --version
        python -m pip freeze
        nvidia-smi -L
        env | grep -E '^(SLURM|CUDA|NCCL|GLOO|TORCH|DS_|OMP_|RUN=|CONTAINER=)' | sort
    } > "$1/environment.txt" 2>&1 || true
    git diff HEAD > "$1/code.diff" 2>/dev/null || true
}

# A request to stop reaches the ranks as a file, which the main rank looks for after every step: signals to the
# launchers would end them before the ranks have saved, and do not cross hosts.
ask_to_stop() {
    stopping=1
    echo "== told to stop: the ranks save after the step that they are in"
    touch "$RUN/stop"
}

follow() { # COMMAND ...: runs it to its end, whatever signals come meanwhile; prints the main rank's log if it has one
    local child code=0
    "$@" &
    child=$!
    [ ${#rank_logs[@]} = 0 ] || show_main_rank "$child" &
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true
    done
    wait "$child" || code=$?
    wait
    return "$code"
}

show_main_rank() { # PROCESS: prints the log of rank 0 while PROCESS lives
    local log
    until log=$(compgen -G "$logs/*_rank0.log"); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.5
    done
    tail -n +1 --follow --pid="$1" "$log"
}

tell_errors() { # of all ranks but the first, whose log was shown
    find "$logs" -name '*_rank*.log' ! -name '*_rank0.log' -exec grep -h '^error: ' {} + | sort -u >&2 || true
}

# Runs `start MODULE ARGUMENT ...`, which a script defines, until the run is finished, told to stop, or crashes too often.
keep_running() { # MODULE ARGUMENT ...
    local module=$1 attempt code
    shift
    mkdir -p "$RUN/logs"
    rm -f "$RUN/stop"
    trap ask_to_stop TERM INT USR1
    for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
        logs=$RUN/logs/$(date +%Y%m%d-%H%M%S)${NODE_RANK:+-node$NODE_RANK} code=0
        mkdir -p "$logs"
        record "$logs"
        if [ "$PREFLIGHT" != 0 ]; then
            rank_logs=()
            follow start smaug_ds.engine.preflight "$@" || code=$?
        fi
        if [ $code = 0 ] && [ -z "$stopping" ]; then
            rank_logs=("--enable_each_rank_log=$logs")
            follow start "$module" "$@" || code=$?
            tell_errors
        fi
        echo "== ended with code $code after start $attempt; logs in $logs"
        case $code in
            0 | 85 | 2) return $code ;; # 2 is nothing that another start would mend
        esac
        [ -z "$stopping" ] || return 85
    done
    return "$code"
}

slurm_job() { # sets up what the ranks of a SLURM job need to meet
    local names ranks end
    # shellcheck disable=SC1090
    [ -z "${SETUP:-}" ] || source "$SETUP"
    [ -n "$CONTAINER" ] || source jobs/environment.sh
    ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    [ -n "$ranks" ] || fail "no GPUs: give sbatch --gpus-per-node=N, or RANKS_PER_NODE for nodes without GPUs"
    mkdir -p "$RUN/logs"
    mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export RUN NETWORK CONTAINER HOSTS=$RUN/logs/hosts.$SLURM_JOB_ID
    printf "%s slots=$ranks\n" "${names[@]}" > "$HOSTS"
    # The first node leads; jobs that share it have other ports.
    export MASTER_ADDR=${names[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    if end=$(date -d "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)" +%s 2>/dev/null); then
        export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$end} # from SLURM itself in newer versions
    fi
    echo "== job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NNODES nodes (${names[*]}) of $ranks ranks, run $RUN"
}

on_all_nodes() { # MODULE ARGUMENT ...: one launcher on each; a step that asks for no cores gets one
    # --wait: once a node is done, well or not, the others have a minute to end by themselves.
    exec srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
        --kill-on-bad-exit=0 --wait=60 "${container[@]}" bash jobs/node.sh "${rank_logs[@]}" --module "$@"
}
