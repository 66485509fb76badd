"""Samples that could not be used: a ledger of them, what a resumed run makes of it, and the point at which there are
too many."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from smaug_ds.data.sample import Medium, Place

_TEMPORARY = ("read", "time")  # stages of what may be the storage's fault: a disk that was away or slow comes back
_REFUSED = "dali"  # stage of samples that the decoder of the DALI graph refuses


class DataError(RuntimeError):
    """Training cannot go on for its data: too many samples or workers fail. The message says what to look at."""


class TooManyFailuresError(DataError):
    """More samples are bad than the settings allow: another start would meet the same ones."""


@dataclass(frozen=True)
class Failure:
    """One sample that could not be used at one place of the order."""

    step: int  # optimizer step, -1 in evaluation
    position: int  # in the endless stream of the medium; in evaluation the number of the sample
    place: Place | None  # of the sample in the order; None in evaluation
    shard: str  # path of the tar
    key: str
    stage: str  # "read", "open", "demux", "decode", "image", "dali", "time" or "crash"
    reason: str
    replaced_by: str | None = None  # shard/key that took its place, itself if PyAV decodes it; None: nothing did

    @property
    def name(self) -> str:
        return f"{self.shard}/{self.key}"

    @property
    def sample(self) -> Place | str:
        """Which sample it is: its place, the same wherever the tars lie, or its name, in evaluation."""
        return self.name if self.place is None else self.place

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Failure:
        """What ``dataclasses.asdict`` or a line of a ledger tells."""
        place = line["place"]
        return cls(**{**line, "place": place if place is None else Place(*place)})


class Spot(NamedTuple):
    """What a worker is at: a sample at one position."""

    position: int
    medium: Medium
    shard: int = -1  # this and ``row`` as in Place; -1 in evaluation
    row: int = -1


class Verdict(NamedTuple):
    """Why a sample that a worker could not finish is not tried again."""

    stage: str
    reason: str


class Ledger:
    """Appends failures to ``FOLDER/quarantine.RANK.jsonl``, one JSON object a line."""

    def __init__(self, folder: Path | str, rank: int) -> None:
        self.path = Path(folder) / f"quarantine.{rank}.jsonl"

    def write(self, failure: Failure) -> None:
        """Raises DataError if the file cannot be written: a failure that is not on record would not be honoured."""
        line = json.dumps(dataclasses.asdict(failure)).encode() + b"\n"  # ASCII: a path need not be Unicode
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a run that was killed wrote half a line
                        line = b"\n" + line
                file.write(line)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written ({error}), and a sample failed: {failure.name} ({failure.stage}: "
                f"{failure.reason}); make room or mend the permissions, then start the run again"
            ) from error


def read_ledgers(folder: Path | str) -> list[Failure]:
    """The failures of all ranks that wrote to ``folder``, as ``merge`` has them.

    Half a line, of a run that was killed while it wrote, is passed over.
    """
    failures = []
    for path in sorted(Path(folder).glob("quarantine.*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                failures.append(Failure.from_dict(json.loads(line)))
    return merge(failures)


def merge(failures: Iterable[Failure]) -> list[Failure]:
    """By step and position, each once: what was done again after a restart and failed again, or is told twice."""
    different = {(f.step, f.position, f.place, f.name, f.stage): f for f in failures}
    return sorted(different.values(), key=lambda failure: (failure.step, failure.position))


def known_bad(failures: Iterable[Failure]) -> frozenset[Place]:
    """The training samples that a resumed run passes over without a try.

    Not those of stages "read" and "time": a storage that was away or slow comes back, and would have condemned whatever
    was read meanwhile. Not those that PyAV decodes.
    """
    return frozenset(
        failure.place
        for failure in failures
        if failure.place is not None and failure.stage not in _TEMPORARY and not _decoded_otherwise(failure)
    )


def pyav_only(failures: Iterable[Failure]) -> frozenset[Place | str]:
    """The samples (``Failure.sample``) that the decoder of the DALI graph refuses and PyAV decodes."""
    return frozenset(failure.sample for failure in failures if _decoded_otherwise(failure))


def summary(failures: Iterable[Failure]) -> dict[str, float]:
    """``quarantine/STAGE``: failures of each stage; ``quarantine/samples``: different samples that failed."""
    failures = list(failures)
    counts = Counter(failure.stage for failure in failures)
    figures = {f"quarantine/{stage}": float(count) for stage, count in sorted(counts.items())}
    return {**figures, "quarantine/samples": float(len({failure.name for failure in failures}))}


def _decoded_otherwise(failure: Failure) -> bool:
    return failure.stage == _REFUSED and failure.replaced_by == failure.name


class Budget:
    """Share of failures among the latest ``window`` samples that is tolerated. Judged once the window is full."""

    def __init__(self, share: float, window: int) -> None:
        self.share, self.window = share, window
        self._batches: deque[tuple[int, int]] = deque()
        self._samples = 0
        self._failures = 0

    def spend(self, samples: int, failures: int) -> bool:
        """Count a batch; False if that is more than the budget allows."""
        self._add(samples, failures)
        return self._samples < self.window or self._failures <= self.share * self._samples

    def state_dict(self) -> list[list[int]]:
        """Samples and failures of the latest batches: part of a checkpoint, or a run that is often started again would
        never fill its window."""
        return [list(batch) for batch in self._batches]

    def load_state_dict(self, state: Iterable[Iterable[int]]) -> None:
        """Goes on from ``state_dict``."""
        self._batches.clear()
        self._samples = self._failures = 0
        for samples, failures in state:
            self._add(samples, failures)

    def _add(self, samples: int, failures: int) -> None:
        self._batches.append((samples, failures))
        self._samples += samples
        self._failures += failures
        while self._samples - self._batches[0][0] >= self.window:
            old_samples, old_failures = self._batches.popleft()
            self._samples -= old_samples
            self._failures -= old_failures
