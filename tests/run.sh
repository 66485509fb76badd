#!/usr/bin/env bash
# Installs what the tests need and runs them, all but those that need a GPU or a cluster. Arguments go to pytest:
#   bash tests/run.sh [-m "not slow and not gpu"] [tests/test_losses.py] ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
export OMP_NUM_THREADS=1
case " $* " in
    *" -m "*) exec python -m pytest "$@" ;;
    *) exec python -m pytest -m "not gpu and not cluster" "$@" ;;
esac
