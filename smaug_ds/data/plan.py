"""The plan of a build: every media file with its captions, one line each, on disk: what a corpus of millions lists does
not fit into the memory of every worker. While it is made it costs 8 bytes of memory a row, later 8 bytes a shard."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smaug_ds.data.annotations import Annotation
from smaug_ds.data.corpora import BadRow, Reading, read_corpus
from smaug_ds.data.order import stable_hash
from smaug_ds.data.parallel import write_whole
from smaug_ds.progress import bar

PLAN, HEAD, BAD_ROWS = "plan.jsonl", "plan.json", "bad_rows.jsonl"


@dataclass(frozen=True)
class Plan:
    """A finished plan in ``folder``."""

    folder: Path
    samples: int  # media files, each once
    starts: tuple[int, ...]  # byte in the plan at which each shard begins, and the end
    bad_rows: dict[str, int]  # reason -> rows left out

    @classmethod
    def open(cls, folder: Path) -> Plan | None:
        """The plan in ``folder``; None if there is none, or a half of one."""
        try:
            head = json.loads((folder / HEAD).read_text())
        except FileNotFoundError:
            return None
        return cls(folder, head["samples"], tuple(head["starts"]), head["bad_rows"])

    @property
    def shards(self) -> int:
        return len(self.starts) - 1

    def span(self, shard: int) -> tuple[int, int]:
        """First byte and end of a shard's part."""
        return self.starts[shard], self.starts[shard + 1]


def read_span(folder: Path, span: tuple[int, int]) -> list[Annotation]:
    """The media files of one shard of the plan in ``folder``."""
    with (folder / PLAN).open("rb") as file:
        file.seek(span[0])
        return [_parsed(line) for line in file.read(span[1] - span[0]).splitlines()]


def make_plan(
    folder: Path, lists: Iterable[Path], form: str, reading: Reading, samples_per_shard: int, progress: bool = False
) -> Plan:
    """Reads the lists into a plan in ``folder``: each media file once, at the place of its first row, with the captions
    of all its rows. Bad rows go to ``BAD_ROWS`` there.

    Raises:
        SourceError: as ``read_corpus``.
    """
    reasons: Counter[str] = Counter()
    hashes = array("Q")  # of medium and path
    aside = folder / "rows.jsonl"
    with (
        aside.open("w", encoding="ascii") as rows,
        (folder / BAD_ROWS).open("w", encoding="ascii") as bad,
        bar(range(0), None, "read", "rows", shown=progress) as work,
    ):
        for path in lists:
            for found in read_corpus(path, reading, form):
                if isinstance(found, BadRow):
                    reasons[found.reason] += 1
                    bad.write(json.dumps({"list": str(path), **vars(found)}) + "\n")
                else:
                    hashes.append(_hash(found))
                    rows.write(json.dumps(vars(found)) + "\n")
                work.update()
    starts: list[int] = []
    samples = 0
    with (folder / PLAN).open("wb") as file:
        for line in _merged(aside, hashes):
            if samples % samples_per_shard == 0:
                starts.append(file.tell())
            file.write(line)
            samples += 1
        starts.append(file.tell())
        file.flush()
        os.fsync(file.fileno())
    aside.unlink()
    head = {"samples": samples, "starts": starts, "bad_rows": dict(reasons.most_common())}
    write_whole(folder / HEAD, json.dumps(head).encode("ascii"))  # last: it says that the plan is whole
    plan = Plan.open(folder)
    assert plan
    return plan


def _merged(rows: Path, hashes: array[int]) -> Iterator[bytes]:
    """The lines of ``rows``, those of one file together. Only files that are named again are held in memory."""
    values = np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.zeros(0, np.uint64)
    repeated = set(values[1:][values[1:] == values[:-1]].tolist())
    del values
    found: dict[tuple[str, str], Annotation] = {}
    with rows.open("rb") as file:
        if repeated:
            for number, line in zip(hashes, file, strict=True):
                if number in repeated:
                    new = _parsed(line)
                    old = found.setdefault((new.medium, new.path), new)
                    found[new.medium, new.path] = replace(
                        old, captions=tuple(dict.fromkeys(old.captions + new.captions))
                    )
            file.seek(0)
        for number, line in zip(hashes, file, strict=True):
            if number not in repeated:
                yield line
            else:
                new = _parsed(line)
                if merged := found.pop((new.medium, new.path), None):
                    yield json.dumps(vars(merged)).encode("ascii") + b"\n"


def _hash(annotation: Annotation) -> int:
    return stable_hash(f"{annotation.medium} {annotation.path}")


def _parsed(line: bytes) -> Annotation:
    fields = json.loads(line)
    return Annotation(**fields | {name: tuple(fields[name]) for name in ("captions", "elsewhere")})
