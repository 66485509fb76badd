#!/usr/bin/env bash
# The whole line on this machine: corpus -> shards -> two stages of pre-training -> zero-shot retrieval -> report.
#
#   bash jobs/quickstart.sh [--data DIR|LIST.json [--media-root DIR]] [--out RUNS] [--clips N] [key=value ...]
#
# Without --data it renders the built-in corpus. DIR may hold WebDataset shards (KEY.mp4 KEY.txt KEY.json), or lists
# video_train.json, image_train.json, video_test.json of {"video": path, "caption": text}; LIST.json is one such list.
# key=value goes to both stages and wins over jobs/experiments/quickstart_*.yaml. Needs Python 3.11 or 3.12 and a C++
# compiler; GPUs are used if there are any, else two ranks share the CPU. An interrupted run goes on where it stopped.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

told="" data="" media_root="" out="runs/quickstart" clips="" overrides=()
while [ $# -gt 0 ]; do
    case "$1" in
        --data | --media-root | --out | --clips)
            [ $# -gt 1 ] || fail "$1 needs a value"
            case "$1" in
                --data) [ -e "$2" ] || fail "--data $2 does not exist"; data=$(realpath "$2") ;;
                --media-root) media_root=$(realpath -m "$2") ;;
                --out) out=$(realpath -m "$2") ;;
                --clips) [[ $2 =~ ^[0-9]+$ ]] || fail "--clips $2 is not a number"; clips=$2 ;;
            esac
            shift 2 ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *=*) overrides+=("$1"); shift ;;
        *) fail "$1 is neither an option nor key=value; see --help" ;;
    esac
done

[ -n "$data" ] || [ -z "$media_root" ] || fail "--media-root $media_root is where the files of --data lie: give --data"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
began=(--started "$(date +%s)")

if [ ${#overrides[@]} -gt 0 ]; then # wrong keys and values are told before minutes are spent on the corpus
    python - "${overrides[@]}" <<'PY' || exit 2
import sys
from smaug_ds.config import ConfigError, parse
from smaug_ds.engine.train import PretrainConfig
try:
    for stage in (1, 2):
        parse(PretrainConfig, f"jobs/experiments/quickstart_stage{stage}.yaml", sys.argv[1:])
except ConfigError as error:
    sys.exit(f"error: {error}")
PY
fi

if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    ranks=2 engine=(run.deepspeed=ds_configs/cpu.json)
else
    ranks=$(python -c 'import torch; print(torch.cuda.device_count())') engine=(run.deepspeed=ds_configs/zero2_bf16.json)
fi

echo "== 1/5 corpus"
python tools/prepare_corpus.py ${data:+--data "$data"} ${media_root:+--media-root "$media_root"} \
    ${clips:+--clips "$clips"} --out "$out" --ranks "$ranks" --workers "$(nproc)"
corpus=(); while IFS= read -r line; do corpus+=("$line"); done < "$out/corpus.args"

follow() { # COMMAND ...: runs it to its end, hands signals on to it, and returns its code
    local code=0 child signal
    set -m # a process group of its own: Ctrl-C reaches it once, from here, and is not ignored as in the background
    "$@" &
    child=$!
    set +m
    # shellcheck disable=SC2064 # these values
    for signal in INT TERM USR1; do trap "told=$signal; kill -$signal $child 2>/dev/null || true" "$signal"; done
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true
    done
    wait "$child" || code=$?
    trap - INT TERM USR1
    return $code
}

launch() { # stage, further key=value: starts or resumes it under the launcher, unless it is finished
    local stage=$1 settings code=0
    shift
    settings=$(cat "jobs/experiments/quickstart_$stage.yaml"; printf '%s\n' "${corpus[@]}" "$@" "${overrides[@]}")
    if [ -f "$out/$stage/summary.json" ] && [ "$(cat "$out/$stage/finished.with" 2>/dev/null)" = "$settings" ]; then
        echo "finished before, see $out/$stage"
        began=() # the report then adds up what the stages took
        return
    fi
    follow env TASK=pretrain RUN="$out/$stage" RANKS="$ranks" RESTARTS=0 PREFLIGHT=0 bash jobs/launch_local.sh \
        --config "jobs/experiments/quickstart_$stage.yaml" "${engine[@]}" "${corpus[@]}" "$@" "${overrides[@]}" || code=$?
    [ $code != 85 ] || echo "== stopped and saved: the same command goes on from here"
    [ $code = 0 ] || exit $code
    printf '%s\n' "$settings" > "$out/$stage/finished.with"
    [ -z "$told" ] || { echo "== stopped, $stage is finished: the same command goes on from here"; exit 85; }
}

first=() # what stage 1 trains on, if not on all
[ -n "$data" ] || first=("data.train=[\"$out/shards/image_train\"]") # one shape each
echo "== 2/5 stage 1: one frame"
launch stage1 "${first[@]}"
echo "== 3/5 stage 2: four frames, two kept"
launch stage2 run.init_from="$out/stage1"
echo "== 4/5 pictures"
python tools/visualise.py "$out/stage2" --out "$out/pictures"
echo "== 5/5 report"
python tools/report.py "$out/stage1" "$out/stage2" --pictures "$out/pictures" "${began[@]}" --out "$out/report.json"
