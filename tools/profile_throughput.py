"""Where time, memory and arithmetic go. Each subcommand tells more with ``--help``.

python tools/profile_throughput.py model    parameters and arithmetic of the model, part by part
python tools/profile_throughput.py loader   time of the data path, stage by stage, and what limits it
python tools/profile_throughput.py index    size and speed of the index of a corpus, and quality of its shuffle
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Imported when asked for: the data workers import this file, too, and need none of the model's libraries.
SUBCOMMANDS = {"model": "tools.profile_model", "loader": "tools.profile_loader", "index": "tools.profile_index"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(SUBCOMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see WHAT --help")
    args = parser.parse_args()
    importlib.import_module(SUBCOMMANDS[args.what]).main(args.arguments, f"{parser.prog} {args.what}")


if __name__ == "__main__":
    main()
