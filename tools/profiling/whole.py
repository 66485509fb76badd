"""The whole loader: its speed as training uses it, its workers alone, and its memory over a long time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.pool import Limits, Pool
from smaug_ds.data.quarantine import Ledger
from tools.profiling.machine import cpu_seconds, family
from tools.profiling.stages import SEED, Case

SOAK_MARKS = 10


@dataclass(frozen=True)
class Rate:
    """How fast batches come."""

    samples_per_second: float
    cpu_ms: float  # of this process and all that it started, for one sample


def rate_of(batches: Iterator[Any], case: Case, seconds: float) -> Rate:
    """Takes batches for so long, after those that may have been made ahead."""
    for _ in range(2 * max(1, case.data.workers) * case.data.prefetch):
        next(batches)
    began, cpu = time.perf_counter(), cpu_seconds()
    taken, elapsed = 0, 0.0
    while elapsed < seconds:
        next(batches)
        taken += case.batch
        elapsed = time.perf_counter() - began
    return Rate(taken / elapsed, 1e3 * (cpu_seconds() - cpu) / taken)


def make_loader(case: Case, scratch: Path) -> TrainLoader:
    ledger = Ledger(scratch / "quarantine", rank=0)
    return TrainLoader(
        case.corpus, case.order, case.tokenizer, case.data, case.shape, SEED, case.batch, 1, case.device, ledger
    )


def loader_rate(case: Case, seconds: float, scratch: Path) -> Rate:
    """Of ``TrainLoader``."""
    with make_loader(case, scratch) as loader:
        return rate_of(iter(loader), case, seconds)


def workers_rate(case: Case, seconds: float, codecs: frozenset[str]) -> Rate:
    """Of the workers alone, nothing done with what they send; clips of ``codecs`` leave them trimmed, not decoded."""
    config = case.data
    limits = Limits(config.sample_seconds)
    pool = Pool(
        case.reader(codecs), itertools.count(), max(1, config.workers), config.prefetch, limits, threading.Event()
    )
    with closing(pool):
        return rate_of(iter(pool), case, seconds)


def soak(cases: Sequence[Case], samples: int, scratch: Path) -> list[dict[str, Any]]:
    """Takes ``samples`` of each case; prints memory and open files of the processes at ``SOAK_MARKS`` marks."""
    figures = []
    for case in cases:
        print(f"\n{case}\n  {'samples':>8}  process number: resident MB, open files; this process first")
        marks = iter([samples * mark // SOAK_MARKS for mark in range(1, SOAK_MARKS + 1)])
        mark = next(marks)
        with make_loader(case, scratch) as loader:
            for number, _ in enumerate(loader, start=1):
                if number * case.batch < mark:
                    continue
                processes = {pid: asdict(used) for pid, used in family().items()}
                shown = [f"{pid}: {u['resident_mb']:.0f}, {u['descriptors']}" for pid, u in processes.items()]
                print(f"  {number * case.batch:8}  {'   '.join(shown)}", flush=True)
                figures.append({"case": str(case), "samples": number * case.batch, "processes": processes})
                if (mark := next(marks, 0)) == 0:
                    break
    return figures
