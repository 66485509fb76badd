"""Builds WebDataset shards out of a corpus's own files, in steps that a kill at any moment cannot spoil.

While it is built everything lies in ``OUT.partial``: shards as ``00000.tar``, work of the build in ``.build``::

    lock                 keeps a second command out; removed once ``OUT`` is in place
    build.json           what is built: digests of the lists, options. Another command is refused.
    report.json          totals; from then on all is there, and ``.build`` is no longer needed
    .build/plan.jsonl    every media file with its captions (``plan``)
    .build/00000.json    shard 0 is finished: its bytes, and what was left out of it; written after the tar is on disk

The bytes of the shards depend on ``build.json`` and the media only. Once all are there and indexed, the folder gets its
name ``OUT``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from smaug_ds.data.corpora import Reading, Split
from smaug_ds.data.indexing import IndexReport, build_index, read_report
from smaug_ds.data.members import find_media, sample_members
from smaug_ds.data.parallel import LOCK, alone_in, clear, on_processes, room_in, write_whole
from smaug_ds.data.plan import BAD_ROWS, Plan, make_plan, read_span
from smaug_ds.data.reencode import Reencoding
from smaug_ds.data.shard import SampleError, ShardError
from smaug_ds.data.signature import SIGNATURE, compare, digest
from smaug_ds.progress import bar

WORK = ".build"
REJECTS, REPORT = "rejects.jsonl", "report.json"


@dataclass(frozen=True)
class BuildReport:
    """What a build made and what it left out."""

    shards: int
    index: IndexReport
    rejects: dict[str, int]  # reason -> rows and media files left out
    source_bytes: int  # of the media files that were used; differs from the index's if they were encoded again
    made: int  # samples made by this command: fewer than all if an earlier one was broken off
    seconds: float  # of this command

    def __str__(self) -> str:
        rate = f"{self.made} samples made in {self.seconds:.1f} s, {self.made / self.seconds:.0f} samples/s"
        rate = rate if self.made else "all made before"
        lines = [f"{self.shards} shards ({rate})", str(self.index)]
        if self.source_bytes != self.index.media_bytes:
            lines.append(
                f"encoded again: {self.source_bytes / 1e6:.1f} MB became {self.index.media_bytes / 1e6:.1f} MB"
            )
        if self.rejects:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejects.items())
            lines.append(f"{sum(self.rejects.values())} rows and media files left out: {reasons}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Task:
    """One shard to write."""

    folder: Path
    shard: int
    span: tuple[int, int]  # of the plan, bytes
    first: int  # number of the shard's first media file in the whole plan
    media_root: Path
    reencoding: Reencoding | None


def build(
    lists: Sequence[str | Path],
    media_root: str | Path,
    out: str | Path,
    samples_per_shard: int = 256,
    workers: int = 1,
    progress: bool = False,
    form: str = "auto",
    media_name: str = "",
    split: Split = "train",
    reencoding: Reencoding | None = None,
) -> BuildReport:
    """Builds shards of ``samples_per_shard`` media files each (fewer where files are left out), and their index.

    ``form``, ``media_name`` and ``split`` say how the lists are read (``corpora``). The same command goes on where an
    earlier one was broken off.

    Raises:
        SourceError: a list that cannot be read.
        ShardError: a missing media root, an ``out`` that holds something else, nothing to put there, no room, another
            command at work.
    """
    started = time.monotonic()
    media_root, out = Path(media_root), Path(out)
    if samples_per_shard < 1:
        raise ShardError(f"--samples-per-shard is {samples_per_shard}: must be at least 1")
    if not media_root.is_dir():
        raise ShardError(f"media root {media_root} is no folder: the paths in the lists start there")
    partial = out.parent / f"{out.name}.partial"
    signature = {
        "lists": [digest(Path(path), {out.resolve(), partial.resolve()}) for path in lists],
        "media_root": str(media_root.resolve()),
        "samples_per_shard": samples_per_shard,
        "format": form,
        "media_name": media_name,
        "split": split,
        "reencode": asdict(reencoding) if reencoding else None,
    }
    if _is_in_place(out, signature):
        return _reported(out, 0, started)
    with alone_in(partial), room_in(partial):
        if _is_in_place(out, signature):  # another command has put it there in the meantime
            clear(partial)
            return _reported(out, 0, started)
        (partial / WORK).mkdir(exist_ok=True)
        _resume_or_clear(partial, signature)
        made = 0
        if not (partial / REPORT).exists():
            reading = Reading(media_root, media_name, split)
            made = _make(partial, lists, form, reading, samples_per_shard, reencoding, workers, progress)
        shutil.rmtree(partial / WORK)
        os.replace(partial, out)
        (out / LOCK).unlink()  # now whoever gets it finds ``out``
    return _reported(out, made, started)


def _is_in_place(out: Path, signature: dict[str, Any]) -> bool:
    """Whether ``out`` is what this command builds. Raises ShardError if it is anything else but empty or missing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / SIGNATURE).is_file():
        raise ShardError(f"{out} exists and is not empty: remove it or give another --out")
    compare(out, signature)
    if (out / LOCK).exists():  # a command ended between its last two steps
        (out / LOCK).unlink(missing_ok=True)
    return True


def _reported(out: Path, made: int, started: float) -> BuildReport:
    outcome = json.loads((out / REPORT).read_text())
    return BuildReport(**outcome, index=read_report(out), made=made, seconds=time.monotonic() - started)


def _make(
    partial: Path, lists: Sequence[str | Path], form: str, reading: Reading, samples_per_shard: int,
    reencoding: Reencoding | None, workers: int, progress: bool,
) -> int:  # fmt: skip
    """Everything but the last moves; the totals are written last. Returns the number of samples made."""
    plan = Plan.open(partial / WORK) or make_plan(
        partial / WORK, [Path(path) for path in lists], form, reading, samples_per_shard, progress
    )
    if not plan.samples:
        reasons = f" ({_counted(plan.bad_rows)})" if plan.bad_rows else ""
        raise ShardError(f"no rows in {', '.join(map(str, lists))}{reasons}")
    tasks = [
        _Task(partial, shard, plan.span(shard), shard * samples_per_shard, reading.media_root, reencoding)
        for shard in range(plan.shards)
        if not _is_finished(partial, shard)
    ]
    made = _write_shards(tasks, plan, samples_per_shard, workers, progress)
    outcome = _write_rejects(partial, plan)
    if not outcome["shards"]:
        reasons = _counted(outcome["rejects"])
        where = (
            f"; paths start at {reading.media_root}, unless --media-root says otherwise" if "missing" in reasons else ""
        )
        raise ShardError(f"all {plan.samples} media files were left out ({reasons}): see {partial}/{REJECTS}{where}")
    build_index(partial, workers, progress)
    write_whole(partial / REPORT, json.dumps(outcome, indent=1).encode("ascii"))
    return made


def _write_shards(tasks: list[_Task], plan: Plan, samples_per_shard: int, workers: int, progress: bool) -> int:
    """Writes the shards of ``tasks``; returns the number of samples in them."""

    def planned(shard: int) -> int:
        return min(samples_per_shard, plan.samples - shard * samples_per_shard)

    made = 0
    with (
        on_processes(_write_shard, tasks, workers) as results,
        bar(range(0), plan.samples, "build", "samples", shown=progress) as work,
    ):
        done = plan.samples - sum(planned(task.shard) for task in tasks)
        work.initial = work.n = work.last_print_n = done  # no part of the rate
        for shard, samples in results:
            made += samples
            work.update(planned(shard))
    return made


def _write_shard(task: _Task) -> tuple[int, int]:
    """Writes one shard, none if no sample can be used, then the record that it is finished. Returns its number and
    samples."""
    annotations = read_span(task.folder / WORK, task.span)
    path = _tar(task.folder, task.shard)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    rejects = []
    samples = source_bytes = 0

    def needed() -> int:
        files = (task.media_root / find_media(task.media_root, annotation) for annotation in annotations)
        return sum(file.stat().st_size for file in files if file.is_file())

    with room_in(task.folder, needed):
        try:
            with aside.open("wb") as file:
                with TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
                    for number, annotation in enumerate(annotations, start=task.first):
                        try:
                            members, size = sample_members(task.media_root, annotation, task.reencoding)
                        except SampleError as error:
                            rejects.append({"path": annotation.path, "reason": error.reason, "detail": error.detail})
                            continue
                        tar.write({"__key__": f"{number:09d}", **members})
                        samples, source_bytes = samples + 1, source_bytes + size
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            aside.unlink(missing_ok=True)  # room for the others
            raise
        if samples:
            os.replace(aside, path)
        else:
            aside.unlink()
        length = path.stat().st_size if samples else None
        record = {"bytes": length, "samples": samples, "source_bytes": source_bytes, "rejects": rejects}
        write_whole(_record_path(task.folder, task.shard), json.dumps(record).encode("ascii"))
    return task.shard, samples


def _tar(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.tar"


def _record_path(folder: Path, shard: int) -> Path:
    return folder / WORK / f"{shard:05d}.json"


def _record(folder: Path, shard: int) -> dict[str, Any]:
    return json.loads(_record_path(folder, shard).read_text())


def _is_finished(folder: Path, shard: int) -> bool:
    """Whether the record of a shard is there and the tar is as long as it says. A shard all of whose files were out of
    reach is tried again: a storage that was away may be back."""
    tar = _tar(folder, shard)
    if not _record_path(folder, shard).exists():
        return False
    record = _record(folder, shard)
    if not record["samples"] and {line["reason"] for line in record["rejects"]} <= {"missing", "unreadable"}:
        return False
    return record["bytes"] == (tar.stat().st_size if tar.exists() else None)


def _write_rejects(folder: Path, plan: Plan) -> dict[str, Any]:
    """Writes the ledger: rows, then media files in the order of the plan. Returns the totals of all records."""
    counts: Counter[str] = Counter(plan.bad_rows)
    shards = source_bytes = 0
    with (folder / REJECTS).open("w", encoding="ascii") as ledger:
        with (folder / WORK / BAD_ROWS).open(encoding="ascii") as rows:
            shutil.copyfileobj(rows, ledger)
        for shard in range(plan.shards):
            record = _record(folder, shard)
            shards += record["bytes"] is not None
            source_bytes += record["source_bytes"]
            for line in record["rejects"]:
                counts[line["reason"]] += 1
                ledger.write(json.dumps(line) + "\n")
    return {"shards": shards, "source_bytes": source_bytes, "rejects": dict(counts.most_common())}


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def _resume_or_clear(partial: Path, signature: dict[str, Any]) -> None:
    """Keeps what an earlier run of the same command left in ``partial``, less what it was just writing. What another
    command left there goes if not one shard of it was finished: most often it was a typing error."""
    signed = partial / SIGNATURE
    finished = any(path.stem.isdigit() for path in (partial / WORK).glob("*.json"))
    if signed.exists() and (finished or json.loads(signed.read_text()) == signature):
        compare(partial, signature)
        left = [*partial.glob("*.tmp"), *(partial / WORK).glob("*.tmp")]
    else:
        left = [path for path in (*partial.iterdir(), *(partial / WORK).iterdir()) if path.name not in (WORK, LOCK)]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_whole(partial / SIGNATURE, json.dumps(signature, indent=1).encode("ascii"))
