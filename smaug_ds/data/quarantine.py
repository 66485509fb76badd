"""Samples that could not be used: a ledger of them, and the point at which there are too many."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smaug_ds.data.sample import Place


class DataError(RuntimeError):
    """Too many samples fail for training to go on; the message names the ledger."""


@dataclass(frozen=True)
class Failure:
    """One sample that could not be used at one place of the order."""

    step: int  # optimizer step, -1 in evaluation
    position: int  # in the endless stream of the medium; in evaluation the number of the sample
    place: Place | None  # of the sample in the order; None in evaluation
    shard: str  # path of the tar
    key: str
    stage: str  # "read", "open", "demux", "decode" or "image"
    reason: str
    replaced_by: str | None = None  # shard/key that took its place; None: nothing did

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Failure:
        """What ``dataclasses.asdict`` or a line of a ledger tells."""
        place = line["place"]
        return cls(**{**line, "place": place if place is None else Place(*place)})


class Ledger:
    """Appends failures to ``FOLDER/quarantine.RANK.jsonl``, one JSON object a line."""

    def __init__(self, folder: Path | str, rank: int) -> None:
        self.path = Path(folder) / f"quarantine.{rank}.jsonl"

    def write(self, failure: Failure) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(failure), ensure_ascii=False) + "\n")


def read_ledgers(folder: Path | str) -> list[Failure]:
    """The failures of all ranks that wrote to ``folder``, by step and position."""
    failures = []
    for path in sorted(Path(folder).glob("quarantine.*.jsonl")):
        with path.open(encoding="utf-8") as file:
            failures += [Failure.from_dict(json.loads(line)) for line in file]
    return sorted(failures, key=lambda failure: (failure.step, failure.position))


class Budget:
    """Share of failures among the latest ``window`` samples that is tolerated. Judged once the window is full."""

    def __init__(self, share: float, window: int) -> None:
        self.share = share
        self._batches: deque[tuple[int, int]] = deque()
        self._window = window
        self._samples = 0
        self._failures = 0

    def spend(self, samples: int, failures: int) -> bool:
        """Count a batch; False if that is more than the budget allows."""
        self._batches.append((samples, failures))
        self._samples += samples
        self._failures += failures
        while self._samples - self._batches[0][0] >= self._window:
            old_samples, old_failures = self._batches.popleft()
            self._samples -= old_samples
            self._failures -= old_failures
        return self._samples < self._window or self._failures <= self.share * self._samples
