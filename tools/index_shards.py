"""Indexes a folder of WebDataset shards (``KEY.mp4|jpg|... KEY.txt KEY.json``) in place; the tars stay untouched.

    python tools/index_shards.py FOLDER [FOLDER ...] [--workers 8]

The index goes into ``FOLDER/index``; what was left out, and why, stands in ``FOLDER/index/rejects.jsonl``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smaug_ds.data.indexing import build_index
from smaug_ds.data.shard import ShardError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder with .tar files")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        try:
            report = build_index(folder, workers=options.workers, progress=True)
        except ShardError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{folder}: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
