"""Readers whose workers may hang or die, and pools of them. Workers import this module."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from smaug_ds.data.pool import Limits, Pool
from smaug_ds.data.quarantine import Spot
from smaug_ds.data.reader import Watched

LIMITS = Limits(sample=0.5, between=30, start=60)


class Told(Watched):
    """Item i is what the worker knows by then: verdicts, and samples that PyAV has to decode."""

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.01)
        return len(self.verdicts), self.pyav_only


class Numbers(Watched):
    """Item i is made of the three samples 3 i to 3 i + 2: their numbers, tens of kilobytes each; -1 for failed ones.

    ``before`` is called with each number while the worker is at that sample, ``between`` with i before them.
    """

    def __init__(self, before: Callable[[int], Any] = abs, between: Callable[[int], Any] = abs) -> None:
        super().__init__()
        self.before, self.between = before, between

    def __getitem__(self, index: int) -> Any:
        self.between(index)
        row, failures = [], []
        for number in range(3 * index, 3 * index + 3):
            spot = Spot(number, "video")
            if verdict := self.verdicts.get(spot):
                failures.append((number, verdict))
                row.append(-1)
                continue
            with self.at(spot):
                self.before(number)
                row.append(number)
        return torch.tensor(row).repeat_interleave(4000), failures


@contextlib.contextmanager
def pool_of(
    reader: Watched, indices: Any, workers: int = 2, prefetch: int = 2, limits: Limits = LIMITS
) -> Iterator[Iterator[Any]]:
    pool = Pool(reader, indices, workers, prefetch, limits, threading.Event())
    try:
        yield iter(pool)
    finally:
        pool.close()
        assert not multiprocessing.active_children()


def expected(index: int, missing: int = -2) -> list[int]:
    return [-1 if number == missing else number for number in range(3 * index, 3 * index + 3)]


def rows(items: Iterable[Any]) -> list[list[int]]:
    return [item[0][::4000].tolist() for item in items]


def doze(number: int, seconds: float = 0.01) -> None:
    time.sleep(seconds * random.random())


def at_seven(act: str, marker: str, number: int) -> None:
    """Does something evil to its process at sample 7; with a marker only the first time."""
    if number != 7:
        return
    if marker:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    if act == "sleep":
        time.sleep(1000)
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL, "crash": signal.SIGSEGV}[act])


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
