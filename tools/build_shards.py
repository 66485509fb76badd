"""Builds WebDataset shards and their index from Singularity-style lists; media are copied bit for bit.

    python tools/build_shards.py --list LIST.json [LIST.json ...] --media-root DIR --out FOLDER [--workers 8]

Shards are ``FOLDER/00000.tar`` and so on, each sample ``KEY.mp4|jpg|... KEY.txt KEY.json``: the first caption in the
txt; all captions, the media id and facts about the media in the json. ``FOLDER/rejects.jsonl`` has one line for each
media file that was left out, with the reason. ``FOLDER`` appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from webdataset import TarWriter

from smaug_ds.data.annotations import Annotation, SourceError, read_lists
from smaug_ds.data.indexing import MAX_MEDIA_BYTES, IndexReport, build_index, parallel_map
from smaug_ds.data.shard import SampleError, ShardError, choose_captions, medium_of
from smaug_ds.data.video import MediaError, probe
from smaug_ds.progress import bar


@dataclass(frozen=True)
class BuildReport:
    """What a build made and what it left out."""

    shards: int
    index: IndexReport
    rejects: dict[str, int]  # reason -> media files left out
    seconds: float

    def __str__(self) -> str:
        samples = self.index.samples
        lines = [
            f"{self.shards} shards in {self.seconds:.1f} s ({samples / self.seconds:.0f} samples/s)",
            str(self.index),
        ]
        if self.rejects:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejects.items())
            lines.append(f"{sum(self.rejects.values())} media files left out: {reasons}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Task:
    """One shard to write."""

    path: Path
    media_root: Path
    first: int  # number of the shard's first annotation in the whole list
    annotations: Sequence[Annotation]


def build(
    lists: Sequence[str | Path],
    media_root: str | Path,
    out: str | Path,
    samples_per_shard: int = 256,
    workers: int = 1,
    progress: bool = False,
) -> BuildReport:
    """Builds shards of ``samples_per_shard`` media files each (fewer where files are left out), and their index.

    The bytes of the shards depend on the lists and the media only, not on ``workers``. They are written to
    ``OUT.partial`` and renamed at the end; what a killed build left there is thrown away.

    Raises:
        SourceError: a list that cannot be read.
        ShardError: a missing media root, an ``out`` that exists, or nothing to put there.
    """
    started = time.monotonic()
    media_root, out = Path(media_root), Path(out)
    if samples_per_shard < 1:
        raise ShardError(f"--samples-per-shard is {samples_per_shard}: must be at least 1")
    if not media_root.is_dir():
        raise ShardError(f"media root {media_root} is no folder: the paths in the lists start there")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ShardError(f"{out} exists and is not empty: remove it or give another --out")
    annotations = read_lists(lists)
    if not annotations:
        raise ShardError(f"no rows in {', '.join(map(str, lists))}")
    partial = out.parent / f"{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tasks = [
        _Task(partial / f"{number:05d}.tar", media_root, first, annotations[first : first + samples_per_shard])
        for number, first in enumerate(range(0, len(annotations), samples_per_shard))
    ]
    rejects: Counter[str] = Counter()
    with (
        (partial / "rejects.jsonl").open("w", encoding="utf-8") as ledger,
        parallel_map(_write_shard, tasks, workers) as results,
    ):
        for lines in bar(results, len(tasks), "build", "shards", shown=progress):
            rejects.update(line["reason"] for line in lines)
            ledger.writelines(json.dumps(line) + "\n" for line in lines)
    shards = len(list(partial.glob("*.tar")))
    if not shards:
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejects.items())
        raise ShardError(f"all {len(annotations)} media files were left out ({reasons}): see {partial}/rejects.jsonl")
    index = build_index(partial, workers, progress)
    os.replace(partial, out)
    return BuildReport(shards, index, dict(rejects.most_common()), time.monotonic() - started)


def _write_shard(task: _Task) -> list[dict[str, str]]:
    """Writes one shard, none if no sample can be used; returns the rejected files as lines of the ledger."""
    rejects = []
    samples = 0
    with task.path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for number, annotation in enumerate(task.annotations, start=task.first):
            try:
                tar.write({"__key__": f"{number:09d}", **_members(task.media_root, annotation)})
                samples += 1
            except SampleError as error:
                rejects.append({"path": annotation.path, "reason": error.reason, "detail": error.detail})
    if not samples:
        task.path.unlink()
    return rejects


def _members(media_root: Path, annotation: Annotation) -> dict[str, bytes]:
    """Suffix -> bytes of one sample. Raises SampleError if its media cannot be used."""
    path = media_root / annotation.path
    suffix = path.suffix[1:].lower()
    medium = medium_of(suffix)
    if medium is None:
        raise SampleError("suffix", f".{suffix} is neither an image nor a video that can be read")
    if medium != annotation.medium:
        raise SampleError("medium", f"listed as {annotation.medium}, but .{suffix} is read as {medium}")
    captions, _ = choose_captions(None, {"captions": list(annotation.captions)})
    try:
        size = path.stat().st_size
        if size > MAX_MEDIA_BYTES:
            raise SampleError("too_large", f"{size} bytes, at most {MAX_MEDIA_BYTES} can be read at once")
        media = path.read_bytes()
        facts = probe(media, suffix)
    except FileNotFoundError as error:
        raise SampleError("missing", str(error)) from error
    except OSError as error:
        raise SampleError("unreadable", str(error)) from error
    except MediaError as error:
        raise SampleError(f"media_{error.stage}", error.reason) from error
    metadata = {
        "captions": captions,
        "media_id": annotation.media_id,
        "source": annotation.path,
        "media_facts": asdict(facts),
    }
    return {
        suffix: media,
        "txt": captions[0].encode("utf-8"),
        "json": json.dumps(metadata).encode("ascii"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", nargs="+", required=True, type=Path, dest="lists", metavar="LIST.json")
    parser.add_argument("--media-root", required=True, type=Path, help="folder that the lists' paths start from")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--samples-per-shard", type=int, default=256)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    try:
        report = build(**vars(options), progress=True)
    except (SourceError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
