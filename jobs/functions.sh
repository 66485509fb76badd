# shellcheck shell=bash disable=SC2034
# What the job scripts share. Source it from bash, in the checkout. Each script says which of these variables it takes:
#   TASK          pretrain, finetune or evaluate (pretrain)
#   RUN           run folder, on storage that all hosts share (runs/TASK); passed on as run.folder, or to evaluate, where it
#                 may be a checkpoint in it, as --checkpoint
#   RESTARTS      times that a run is started again after a crash or a hang, from its last checkpoint (3)
#   PREFLIGHT     0: do not look at the hosts before each start (1)
#   JOIN_SECONDS  to wait for a host that does not come, or does not answer (300)
#   NETWORK       interface by which the ranks meet, such as ib0 (the one towards the other hosts)
#   CONTAINER     image to run in, which has to hold the environment: FILE.sqsh for enroot (under SLURM by pyxis), anything
#                 else is Apptainer's. BIND names folders to show in it, comma separated, beside the checkout and RUN.

fail() { echo "error: $*" >&2; exit 2; }

TASK=${TASK:-pretrain}
case $TASK in
    pretrain | finetune) RUN=${RUN:-runs/$TASK} ;;
    evaluate) [ -n "${RUN:-}" ] || fail "TASK=evaluate needs RUN=FOLDER: the run to evaluate" ;;
    *) fail "TASK is $TASK: it has to be pretrain, finetune or evaluate" ;;
esac
RUN=$(realpath -m "$RUN")
checkpoint=$RUN
[ "$TASK" != evaluate ] || RUN=${RUN%/checkpoints/*} # the logs' place
RESTARTS=${RESTARTS:-3} PREFLIGHT=${PREFLIGHT:-1} JOIN_SECONDS=${JOIN_SECONDS:-300} NETWORK=${NETWORK:-}
CONTAINER=${CONTAINER:-} BIND=${BIND:-}
stopping="" child="" hosts=() rank_logs=() container=()
export TASK RUN NETWORK CONTAINER

enter_container() { # [srun]: fills `container` with what stands before a command, or among srun's options, to run it there
    local folder name folders mounts=()
    [ -n "$CONTAINER" ] || return 0
    IFS=, read -ra folders <<< "$PWD,$RUN${BIND:+,$BIND}"
    case $CONTAINER in
        *.sqsh)
            for folder in "${folders[@]}"; do
                [[ $folder == *:* ]] || folder=$folder:$folder
                mounts+=("$folder")
            done
            if [ "${1:-}" = srun ]; then
                container=(--container-image="$CONTAINER" --container-workdir="$PWD"
                    --container-mounts="$(IFS=,; echo "${mounts[*]}")")
                return
            fi
            container=(enroot start --rw)
            for folder in "${mounts[@]}"; do container+=(--mount "$folder"); done
            # it takes no variable along that it is not told of, and starts in the image's root folder
            for name in $(compgen -e | grep -E '^(TASK|RUN|HOSTS|NODE_RANK|MASTER_|NETWORK|CONTAINER|CUDA_|NCCL_|GLOO_|TORCH_|DS_|OMP_)'); do
                container+=(--env "$name")
            done
            # shellcheck disable=SC2016 # the shell in the container is to expand them
            container+=("$CONTAINER" bash -c 'cd "$0" && exec "$@"' "$PWD")
            ;;
        *) container=(apptainer exec --nv --bind "$(IFS=,; echo "${folders[*]}")" --pwd "$PWD" "$CONTAINER") ;;
    esac
}

remote_settings() { # lines NAME=value for the hosts that are reached by ssh
    env | grep -E '^(GLOO_|NCCL_|TORCH_|OMP_|DS_ACCELERATOR|CUDA_HOME)' || true
    # The launcher reads these itself only where DS_ENV_FILE names no other, and makes a command of every line.
    sed -nE 's/\r$//; s/^\s*([A-Za-z_][A-Za-z_0-9]*)\s*=\s*/\1=/p' ~/.deepspeed_env .deepspeed_env 2>/dev/null || true
}

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

listener() { # PORT: what listens on it on this host, nothing if it is free
    { ss -Hltnp "sport = :$1" 2>/dev/null || true; } | awk 'NR == 1 { print $4, $6 }'
}

open_port() { # PORT: prints it, or the next one that is free on this host
    local port=$1
    while [ -n "$(listener "$port")" ]; do port=$((port + 1)); done
    echo "$port"
}

require_port() { # PORT: ends here, and not in a time-out of all ranks, where it is taken
    local taken
    taken=$(listener "$1")
    [ -z "$taken" ] || fail "MASTER_PORT $1 is taken on $(hostname) ($taken): set another one on all hosts"
}

record() { # FOLDER: what runs, and where
    local inside=("${container[@]}")
    case ${container[0]:-} in --*) inside=(srun --nodes=1 --ntasks=1 "${container[@]}") ;; esac
    {
        date --iso-8601=seconds
        uname -a
        git describe --always --dirty
        "${inside[@]}" python --version
        "${inside[@]}" python -m pip freeze
        nvidia-smi -L
        env | grep -E '^(SLURM|CUDA|NCCL|GLOO|TORCH|DS_|OMP_|TASK=|RUN=|CONTAINER=)' | sort
    } > "$1/environment.txt" 2>&1 || true
    git diff HEAD > "$1/code.diff" 2>/dev/null || true
}

# A request to stop reaches the ranks as a file, which the main rank looks for after every step: signals to the
# launchers would end them before the ranks have saved, and do not cross hosts. An evaluation has nothing to save.
ask_to_stop() { # SIGNAL
    if [ "$TASK" = evaluate ] || [ "$stopping$1" = INTINT ]; then
        echo "== told to stop: ended at once"
        [ -z "$child" ] || end_now
    else
        if [ -e "$RUN/stop" ] || touch "$RUN/stop"; then
            echo "== told to stop: the ranks save after the step that they are in"
        else
            echo "error: told to stop, but $RUN/stop cannot be written, so that the ranks go on: make room there and" \
                "\`touch\` it, send them SIGTERM, or press Ctrl-C twice to end them without saving" >&2
        fi
    fi
    stopping=$1
}

# With NODE_RANK the file of a stop before the first step stays for the scripts of the other hosts, which may yet come.
# Each notes its time when it leaves: by that the host knows it, when it is started again, as an old one. Any other file
# may be what the hosts that were there first obey.
leave_stop() {
    if [ "$TASK" = evaluate ]; then
        return
    elif [ -z "${NODE_RANK:-}" ]; then
        rm -f "$RUN/stop"
    elif [ -e "$RUN/stop" ]; then
        touch -r "$RUN/stop" "$RUN/logs/left-node$NODE_RANK"
    fi
}

stop_is_old() { # whether it is from before this start
    [ -z "${NODE_RANK:-}" ] || [ ! -e "$RUN/stop" ] ||
        [ "$(stat -c %y "$RUN/stop")" = "$(stat -c %y "$RUN/logs/left-node$NODE_RANK" 2>/dev/null)" ]
}

end_now() { # without saving
    kill -TERM -- "-$child" 2>/dev/null || kill -TERM "$child" 2>/dev/null || true
}

follow() { # LOG COMMAND ...: runs it to its end, whatever signals come meanwhile; shows LOG and the main rank's log
    local log=$1 code=0
    shift
    "$@" > "$log" 2>&1 &
    child=$!
    show "$child" "$log" &
    [ ${#rank_logs[@]} = 0 ] || show "$child" "$logs/*_rank0.log" &
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true
    done
    wait "$child" || code=$?
    child=""
    wait
    return "$code"
}

# What launchers call an error where ranks leave with the code of a stop that they have agreed on; the log keeps it.
agreed='\[ERROR\] \[launch\.py:.* exits with return code = 85$'
agreed+='|^(pdsh@\S+|srun: error): .* exited with exit code 85$'

show() { # PROCESS PATTERN: prints the file as it grows while PROCESS lives
    local file
    until file=$(compgen -G "$2"); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.5
    done
    tail -n +1 --follow --sleep-interval=0.2 --pid="$1" "$file" | sed -uE "/$agreed/Id"
}

tell_errors() { # of all ranks, or else of the launcher or the preflight: what one has to read stands last
    local told
    told=$(find "$logs" -name '*_rank*.log' -exec grep -h '^error: ' {} + | sort -u) || true
    # pdsh puts the host before each line
    [ -n "$told" ] || told=$(grep -hivE "$agreed" "$logs"/*.log | grep -oE '(^|: )error: .*' | sed 's/^: //' | sort -u) || true
    [ -z "$told" ] || head -n 20 <<< "$told" >&2
}

reach_hosts() { :; } # ATTEMPT: a script that starts ranks on other hosts itself looks whether it can

look() { # ATTEMPT ARGUMENT ...: the look at the hosts before a start
    local attempt=$1
    shift
    rank_logs=()
    reach_hosts "$attempt" || return
    [ -z "$stopping" ] || return 0
    follow "$logs/preflight.log" start smaug_ds.preflight --for "$TASK" --join_seconds "$JOIN_SECONDS" "${hosts[@]}" "$@"
}

# Runs `start MODULE ARGUMENT ...`, which a script defines, until the run is finished, told to stop, or crashes too often.
keep_running() { # ARGUMENT ...: those of smaug_ds.TASK
    local attempt code argument
    if [ "$TASK" = evaluate ]; then
        set -- --checkpoint "$checkpoint" "$@"
    else
        for argument in "$@"; do
            [[ $argument != run.folder=* ]] || [ "$(realpath -m "${argument#*=}")" = "$RUN" ] ||
                fail "$argument, but RUN is $RUN: leave out run.folder, which follows RUN"
        done
        set -- "$@" run.folder="$RUN"
        if stop_is_old; then rm -f "$RUN/stop" || fail "$RUN/stop cannot be removed"; fi
    fi
    mkdir -p "$RUN/logs" || fail "RUN $RUN cannot be written"
    trap 'ask_to_stop TERM' TERM
    trap 'ask_to_stop INT' INT
    trap 'ask_to_stop USR1' USR1
    for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
        logs=$RUN/logs/$(date +%Y%m%d-%H%M%S)${NODE_RANK:+-node$NODE_RANK} code=0
        mkdir -p "$logs" || fail "$logs cannot be written"
        record "$logs"
        [ "$PREFLIGHT" = 0 ] || look "$attempt" "$@" || code=$?
        # another host may have been told to stop
        if [ "$TASK" != evaluate ] && [ -e "$RUN/stop" ]; then
            [ -n "$stopping" ] || echo "== told to stop by $RUN/stop of $(date -r "$RUN/stop" '+%F %T')"
            stopping=${stopping:-FILE}
        fi
        if [ $code = 0 ] && [ -z "$stopping" ]; then
            rank_logs=("--enable_each_rank_log=$logs")
            follow "$logs/launcher.log" start "smaug_ds.$TASK" "$@" || code=$?
            # told too late: the ranks had removed it and left
            case $TASK,$code in evaluate,*) ;; *,0 | *,85) rm -f "$RUN/stop" ;; esac
        elif [ $code = 0 ] || { [ -n "${NODE_RANK:-}" ] && [ -e "$RUN/stop" ]; }; then
            code=85 # before the first step; hosts that have left on it are missing in the look
        fi
        [ -z "$stopping" ] || leave_stop || true
        [ "$code" != 85 ] || echo "== stopped as asked, which is no error: the same command goes on from there"
        echo "== ended with code $code after start $attempt; logs in $logs"
        tell_errors
        case $code in
            0 | 85 | 2 | 87) return $code ;; # 2 and 87 are nothing that another start would mend
        esac
        [ -z "$stopping" ] || break
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
    mkdir -p "$RUN/logs" || fail "RUN $RUN cannot be written"
    mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export HOSTS=$RUN/logs/hosts.$SLURM_JOB_ID MASTER_ADDR=${names[0]} # the first node, where this runs, leads
    printf "%s slots=$ranks\n" "${names[@]}" > "$HOSTS"
    hosts=(--hosts "$(IFS=,; echo "${names[*]}")")
    enter_container srun
    # `date -d ""` would be today's midnight
    if end=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e) && [ -n "$end" ] &&
        end=$(date -d "$end" +%s 2>/dev/null); then
        export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$end} # from SLURM itself in newer versions
    fi
    echo "== job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NNODES nodes (${names[*]}) of $ranks ranks, run $RUN"
}

on_all_nodes() { # MODULE ARGUMENT ...: one launcher on each; a step that asks for no cores gets one
    # Jobs that share the first node have other ports.
    MASTER_PORT=$(open_port $((20000 + SLURM_JOB_ID % 20000)))
    export MASTER_PORT
    # --wait: once a node is done, well or not, the others have a minute to end by themselves.
    exec srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
        --kill-on-bad-exit=0 --wait=60 "${container[@]}" bash jobs/node.sh "${rank_logs[@]}" --module "$@"
}
