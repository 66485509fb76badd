"""From measured stages to advice: what limits the data path, and how many workers or NVDEC engines would not.

Arithmetic only. A rate is samples a second of one rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.profiling.stages import NvdecRate, Stage

_TRIMMING = {"order and index", "read", "demux, frame choice", "trim", "draws, tokens"}  # what a worker does for NVDEC
_STEP = "seconds_per_step/"  # in metrics.jsonl; "data" is the wait for the loader


@dataclass(frozen=True)
class Demand:
    """What a model wants of the loader."""

    rate: float  # samples/s
    step_seconds: float  # of its step, the wait for data left out


@dataclass(frozen=True)
class Advice:
    """What limits the loader, in figures and in words."""

    limits: dict[str, float]  # part -> samples/s that it would allow by itself
    bottleneck: str  # the part that allows least
    waiting: float | None  # share of its time that the model waits for data
    workers: int | None  # that the wanted rate needs
    engines: int | None  # of NVDEC that the wanted rate needs
    lines: tuple[str, ...]


def demand_of_run(run: Path) -> Demand:
    """The last logged step of a run. Its wait for data is no part of what the model needs.

    Raises ValueError where the run logged none.
    """
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [line for line in map(json.loads, lines) if "samples_per_second" in line]
    if not logged:
        raise ValueError("metrics.jsonl holds no logged step: let the run log one, or give --step-seconds")
    last = logged[-1]
    phases = {name.removeprefix(_STEP): value for name, value in last.items() if name.startswith(_STEP)}
    whole, step = sum(phases.values()), sum(value for phase, value in phases.items() if phase != "data")
    return Demand(last["samples_per_second"] * whole / step, step)


def advise(
    stages: Sequence[Stage],
    loader_rate: float,
    cpu_ms: float,
    workers: int,
    cores: int,
    demand: Demand | None,
    nvdec: NvdecRate | None,
) -> Advice:
    """Names the part that allows least and what the wanted rate needs of each.

    Args:
        stages: of a sample.
        loader_rate: samples/s of the whole loader, as measured.
        cpu_ms: CPU time of all processes for a sample, as measured.
        workers: that it was measured with; 0 reads and decodes in the rank's process.
        cores: that the processes may run on.
        nvdec: measured or assumed speed of NVDEC on these clips.
    """
    worker_ms, rank_ms = (sum(s.milliseconds for s in stages if s.where == w and s.counted) for w in ("worker", "rank"))
    limits = {
        "workers": max(workers, 1) * 1e3 / worker_ms,
        "rank": 1e3 / (rank_ms if workers else rank_ms + worker_ms),
        "cores": cores * 1e3 / cpu_ms,
    }
    # A little above its own estimate, a part is not what holds the others up: cores win a tie.
    bottleneck = min(limits, key=lambda part: limits[part] * (0.9 if part == "cores" else 1))
    slowest = max((s for s in stages if s.counted), key=lambda s: s.milliseconds)
    parts = ", ".join(f"{part} {limit:.0f}" for part, limit in limits.items())
    lines = [f"each part alone would allow, samples/s: {parts}; together {loader_rate:.0f}"]
    remedy = {
        "workers": f"more data.workers; {slowest.name} takes {slowest.milliseconds / worker_ms:.0%} of a worker's time",
        "rank": "more data.dali_threads, or a GPU for the graph",
        "cores": f"more cores, or NVDEC: workers and graph share {cores} and use {cpu_ms:.1f} ms a sample",
    }
    lines.append(f"bottleneck: {bottleneck} ({remedy[bottleneck]})")
    if demand is None:
        return Advice(limits, bottleneck, None, None, None, tuple(lines))
    needed = workers_for(demand.rate, worker_ms)
    waiting = share_waiting(demand.rate, loader_rate)
    lines.append(
        f"wanted: {demand.rate:.0f} samples/s (a step of {demand.step_seconds:.3f} s); "
        f"the model would wait for data {waiting:.0%} of the time"
    )
    cores_needed = math.ceil(demand.rate * cpu_ms / 1e3)
    lines.append(f"that needs {needed} workers and {cores_needed} cores of this kind for the data path")
    trim = next((stage for stage in stages if stage.name == "trim"), None)
    engines = None
    if nvdec is not None and trim is not None:
        engines = math.ceil(demand.rate / nvdec.one_session)
        without = sum(s.milliseconds for s in stages if s.where == "worker" and s.name in _TRIMMING)
        source = "assumed" if nvdec.all_sessions is None else "measured"
        lines.append(
            f"with NVDEC: {workers_for(demand.rate, without)} workers (they trim: {without:.2f} ms a sample) and "
            f"{engines} engines at {nvdec.one_session:.0f} clips/s each, {source}"
        )
    elif trim is not None:
        lines.append("NVDEC was not measured here; --nvdec-rate CLIPS_PER_S assumes the speed of an engine")
    return Advice(limits, bottleneck, waiting, needed, engines, tuple(lines))


def workers_for(rate: float, worker_ms: float) -> int:
    """Workers that make ``rate`` samples a second when each sample takes one of them ``worker_ms``."""
    return math.ceil(rate * worker_ms / 1e3 - 1e-9)


def share_waiting(wanted: float, given: float) -> float:
    """Share of its time, 0 to 1, that a model waits which could take ``wanted`` samples/s and gets ``given``."""
    return max(0.0, 1 - given / wanted)
