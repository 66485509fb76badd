"""Builds WebDataset shards and their index from a corpus's own files; media are copied bit for bit.

    python tools/build_shards.py --list FILE [FILE ...] --media-root DIR --out FOLDER [--workers 8]

Shards are ``FOLDER/00000.tar`` and so on, each sample ``KEY.mp4|jpg|... KEY.txt KEY.json``: the first caption in the
txt; all captions, the media id and facts about the media in the json. ``FOLDER/rejects.jsonl`` has one line for each
row and media file that was left out, with the reason. ``FOLDER`` appears whole or not at all; a command that was broken
off goes on when it is given again. docs/shards.md has a command for each corpus.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smaug_ds.data.annotations import SourceError
from smaug_ds.data.corpora import READERS, SPLITS, Reading
from smaug_ds.data.gain import estimate
from smaug_ds.data.reencode import Reencoding
from smaug_ds.data.shard import ShardError
from smaug_ds.data.sharding import build
from tools.index_shards import add_verification, at_least_one, verified


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", nargs="+", required=True, type=Path, dest="lists", metavar="FILE")
    parser.add_argument("--media-root", type=Path, help="folder that media paths start from; default: the list's")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--format", choices=["auto", *READERS], default="auto", dest="form")
    parser.add_argument("--media-name", default="", help="file names of images listed by url, as '{md5}.jpg'")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of Karpathy's dataset_coco.json")
    parser.add_argument("--samples-per-shard", type=at_least_one, default=256)
    parser.add_argument("--workers", type=at_least_one, default=os.cpu_count(), help="processes (default: cores)")
    parser.add_argument("--reencode", action="store_true", help="encode clips and large images again: not bit for bit")
    parser.add_argument("--estimate", action="store_true", help="with --reencode: what it would gain; writes nothing")
    for name, text in [
        ("gop", "frames from one key frame to the next"),
        ("short-side", "pixels at most"),
        ("crf", "quality of x264, 0 (best) to 51"),
    ]:
        default = getattr(Reencoding, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"with --reencode: {text} (default {default})")
    add_verification(parser)
    options = parser.parse_args(arguments)
    if options.estimate and not options.reencode:
        parser.error("--estimate says what --reencode would gain: give both")
    first = options.lists[0]
    media_root = options.media_root or (first if first.is_dir() else first.parent)
    reencoding = Reencoding(options.gop, options.short_side, options.crf) if options.reencode else None
    try:
        if options.estimate:
            reading = Reading(media_root, options.media_name, options.split)
            print(estimate(options.lists, media_root, reencoding, options.form, reading, progress=True))
            return 0
        report = build(
            options.lists,
            media_root,
            options.out,
            options.samples_per_shard,
            options.workers,
            progress=True,
            form=options.form,
            media_name=options.media_name,
            split=options.split,
            reencoding=reencoding,
        )
        print(f"{options.out}: {report}")
        return verified(options.out, options)
    except (SourceError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
