"""The ranks of a measured run: ``smaug_ds.pretrain`` as it is, its collectives timed, ended after so many steps."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

import torch

from smaug_ds.engine.monitor import PHASES, Monitor, Stopwatch
from tools.profiling.machine import peak_memory
from tools.profiling.processes import run_together

_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
    *("barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "monitored_barrier", "recv"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send"),
)
_GRACE = 30.0  # seconds that the other ranks may go on after one has failed


class Measured(SystemExit):
    """Ends a run when its last timed step is over; the watchdog takes no leave of this kind for a failure."""


def run_ranks(ranks: int, settings: list[str], steps: int) -> None:
    """Starts the ranks and waits for them. Raises ConfigError when one fails, which has said why by then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, ranks, port, settings, steps)) for rank in range(ranks)]
    run_together(processes, _GRACE)


def _rank(rank: int, ranks: int, port: int, settings: list[str], steps: int) -> None:
    """One rank of the run, in a process of its own."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if "OMP_NUM_THREADS" not in os.environ:  # more threads than cores make every rank wait
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    with watched_communication() as spent:
        from smaug_ds import pretrain  # DeepSpeed keeps the collectives that it finds when it is imported

        _log_communication(spent, steps)
        try:
            code = pretrain.main(settings)
        except Measured:
            return
    raise SystemExit(code or 1)  # it never reached the last timed step


def _end_with_parent() -> None:
    """Nobody waits for a rank whose parent has been killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def watched_communication() -> Iterator[Callable[[], float]]:
    """Within it the collectives of ``torch.distributed`` are timed; yields what tells their seconds so far."""
    spent, inside = 0.0, False

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent, inside
            if inside:  # one collective made of others counts once
                return function(*args, **kwargs)
            inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside, spent = False, spent + time.perf_counter() - began

        return call

    places = [(torch.distributed, name) for name in _COLLECTIVES] + [(torch.distributed.Work, "wait")]
    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, function in originals:
        setattr(place, name, timed(function))
    try:
        yield lambda: spent
    finally:
        for place, name, function in originals:
            setattr(place, name, function)


def _log_communication(spent: Callable[[], float], steps: int) -> None:
    """Adds to each line of metrics.jsonl what the collectives took by phase; ends the run after ``steps``."""
    by_phase: dict[str, float] = defaultdict(float)
    original_call, original_log = Stopwatch.__call__, Monitor.log
    kernels = _NcclKernels()

    @contextmanager
    def call(self: Stopwatch, phase: str) -> Iterator[None]:
        before = spent()
        with original_call(self, phase):
            yield
        by_phase[phase] += spent() - before

    def log(self: Monitor, step: int, figures: dict[str, float]) -> None:
        told = {f"communication/{phase}": by_phase[phase] for phase in PHASES}
        if kernels.on_gpu:
            told = {f"communication/{phase}": 0.0 for phase in PHASES} | {"communication/kernels": kernels.read()}
        by_phase.clear()
        device = torch.device("cuda" if kernels.on_gpu else "cpu")
        original_log(self, step, {**figures, **told, "peak_memory_bytes": float(peak_memory(device))})
        if step == steps:
            raise Measured

    Stopwatch.__call__ = call  # type: ignore[method-assign]
    Monitor.log = log  # type: ignore[method-assign,assignment]


class _NcclKernels:
    """Seconds of NCCL's kernels on this rank's GPU since they were last asked for."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        self._profile: torch.profiler.profile | None = None

    def read(self) -> float:
        seconds = 0.0
        if self._profile is not None:
            torch.cuda.synchronize()
            self._profile.stop()
            seconds = (
                sum(e.self_device_time_total for e in self._profile.key_averages() if "nccl" in e.key.lower()) / 1e6
            )
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.start()
        return seconds
