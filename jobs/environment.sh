# shellcheck shell=bash
# Makes the project's own virtual environment, .venv, or brings it up to date, and activates it. Source from bash.
# PYTHON names another interpreter than python3 (3.11 or 3.12); SMAUG_VENV another folder for the environment.
# With CONTAINER (jobs/functions.sh) this is sourced in the image, which brings its own.

if [ -z "${CONTAINER:-}" ]; then
    project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=${SMAUG_VENV:-$project/.venv}
    # the stamp holds what the environment was made from; a changed setup.cfg or a moved checkout installs again
    wanted=$(cat "$project/setup.cfg" "$project/pyproject.toml"; echo "$project")
    if [ "$(cat "$venv/.made-from" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $venv: some minutes and 6 GB the first time" >&2
        if [ ! -x "$venv/bin/python" ]; then
            "${PYTHON:-python3}" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else
                "error: Python 3.11 or 3.12 is needed, %d.%d was found: set PYTHON to another interpreter" % v)' || exit 1
            "${PYTHON:-python3}" -m venv "$venv"
        fi
        {
            "$venv/bin/python" -m pip install --upgrade pip setuptools wheel &&
                "$venv/bin/python" -m pip install --editable "${project}[test]"
        } > "$venv/install.log" 2>&1 || { tail -n 20 "$venv/install.log" >&2; exit 1; }
        printf '%s\n' "$wanted" > "$venv/.made-from"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
fi

# Without a GPU DeepSpeed must be told so, and each rank computes on its own cores.
if ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    export DS_ACCELERATOR=cpu
fi
