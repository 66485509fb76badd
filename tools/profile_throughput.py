"""Where time, memory and arithmetic go. Each subcommand tells more with ``--help``.

python tools/profile_throughput.py model      parameters and arithmetic of the model by part; whole steps on random data
python tools/profile_throughput.py ablation   masking, sparsification and frame selection against the dense model
python tools/profile_throughput.py savings    each saving taken back by itself
python tools/profile_throughput.py compare    our step and somebody else's, in turns
python tools/profile_throughput.py train      a real run from shards: waiting for data, communication, computing
python tools/profile_throughput.py loader     time of the data path, stage by stage, and what limits it
python tools/profile_throughput.py index      size and speed of the index of a corpus, and quality of its shuffle
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Imported when asked for: the data workers import this file, too, and need none of the model's libraries.
SUBCOMMANDS = {
    "model": "tools.profiling.model",
    "ablation": "tools.profiling.ablation",
    "savings": "tools.profiling.savings",
    "compare": "tools.profiling.compare",
    "train": "tools.profiling.train",
    "loader": "tools.profiling.loader",
    "index": "tools.profiling.index",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(SUBCOMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see WHAT --help")
    args = parser.parse_args()
    importlib.import_module(SUBCOMMANDS[args.what]).main(args.arguments, f"{parser.prog} {args.what}")


if __name__ == "__main__":
    main()
