"""Indexes a folder of WebDataset shards (``KEY.mp4|jpg|... KEY.txt KEY.json``) in place; the tars stay untouched.

    python tools/index_shards.py FOLDER [FOLDER ...] [--workers 8] [--skip-bad-shards] [--verify decode]

The index goes into ``FOLDER/index``; what was left out, and why, stands in ``FOLDER/index/rejects.jsonl``. Tars that
cannot be read are all named at the end, and nothing is indexed unless they may be skipped. A command that was broken
off goes on when it is given again. ``--verify decode`` then decodes every frame of every sample; what fails stands in
``FOLDER/verify.jsonl``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smaug_ds.data.indexing import build_index
from smaug_ds.data.shard import ShardError
from smaug_ds.data.verify import verify


def at_least_one(text: str) -> int:
    """A count of the command line. Raises ArgumentTypeError, which argparse reports, for what is none."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def add_verification(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", choices=["decode"], help="decode all frames of all samples; exit 1 if any fails")
    parser.add_argument("--seconds", type=float, default=60.0, help="that --verify gives one sample (default 60)")


def verified(folder: Path, options: argparse.Namespace) -> int:
    """Decodes the samples of ``folder`` if that is asked for; 1 if any failed, else 0."""
    if not options.verify:
        return 0
    report = verify(folder, options.workers, options.seconds, progress=True)
    print(f"{folder}: {report}")
    return 1 if report.failures else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder with .tar files")
    parser.add_argument("--workers", type=at_least_one, default=os.cpu_count(), help="processes (default: cores)")
    parser.add_argument("--skip-bad-shards", action="store_true", help="index the others when tars cannot be read")
    add_verification(parser)
    options = parser.parse_args(arguments)
    failed = 0
    for folder in options.folders:
        try:
            report = build_index(folder, options.workers, progress=True, skip_bad_shards=options.skip_bad_shards)
            print(f"{folder}: {report}")
            failed = max(failed, verified(folder, options))
        except ShardError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 2
    return failed


if __name__ == "__main__":
    sys.exit(main())
