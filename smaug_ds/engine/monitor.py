"""What a run shows of itself: meters, TensorBoard, ``metrics.jsonl``, progress and the summary.

Losses are summed where they are computed and read once per logged step, so that the host never waits for the device
in between. The one thing read at every step is whether they are finite, just before the optimizer, which waits anyway.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from smaug_ds import distributed
from smaug_ds.data.sample import MEDIA, Medium
from smaug_ds.engine.reports import Board, JsonLines, show
from smaug_ds.engine.saving import Saved

LOSSES = ("loss", "vtc", "vtm", "mlm", "mvm")
PHASES = ("data", "forward", "backward", "step")
FIRST_AND_LAST = 20  # logged lines at most that the summary's losses_first and losses_last are means of


class NonFiniteError(RuntimeError):
    """Training has diverged: raised on all ranks at the same step, before the optimizer could use the gradient."""


class Meters:
    """Sums of named scalars by medium, on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, medium: Medium, values: Mapping[str, Tensor]) -> None:
        """Adds scalars; the names and the medium are the same on all ranks."""
        for name, value in values.items():
            key, value = f"{name}/{medium}", value.detach().float()
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + 1

    def read(self) -> dict[str, float]:
        """Means since the last call over time and ranks, by ``name/medium``; all ranks call it."""
        if not self._sums:
            return {}
        keys = sorted(self._sums)
        total = distributed.all_reduce_sum(torch.stack([self._sums[key] for key in keys])).tolist()
        means = {key: x / self._counts[key] / distributed.world_size() for key, x in zip(keys, total, strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last ``read`` on this rank: part of a checkpoint between two logged steps."""
        return {"sums": {key: value.cpu() for key, value in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from ``state_dict``."""
        self._sums = {key: value.to(device) for key, value in state["sums"].items()}
        self._counts = dict(state["counts"])


class Finite:
    """Watches that losses stay finite, without reading them one by one."""

    def __init__(self) -> None:
        self._bad: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Looks at the losses of one micro step, all that a gradient flows from; the names are alike on all ranks."""
        for name, value in losses.items():
            if not value.requires_grad:
                continue
            bad = ~torch.isfinite(value.detach())
            self._bad[name] = self._bad[name] | bad if name in self._bad else bad

    def require(self, step: int) -> None:
        """Raises NonFiniteError on every rank if a loss of any rank since the last call was not finite."""
        names = sorted(self._bad)
        flags = torch.stack([self._bad[name] for name in names]).int().cpu()
        self._bad = {}
        bad = distributed.all_reduce_max(flags).tolist()
        if any(bad):
            raise non_finite(step, [name for name, flag in zip(names, bad, strict=True) if flag])


def non_finite(step: int, names: list[str]) -> NonFiniteError:
    """The error that ends a run whose ``names`` are no longer finite in the step after ``step`` finished ones."""
    return NonFiniteError(
        f"step {step + 1}: not finite: {', '.join(names)}. Nothing was updated with it; resume from the last "
        "checkpoint with a lower optim.lr or optim.gradient_clip"
    )


class Stopwatch:
    """Seconds spent in each phase: on a GPU by events, which do not stop the device; waiting for data by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times what is done within."""
        if self._on_gpu and phase != "data":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        for phase, start, end in self._events:
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1000
        seconds = {phase: self._seconds[phase] for phase in PHASES}
        self._seconds.clear()
        self._events.clear()
        return seconds


class Monitor:
    """Writes the run's figures; only the main rank writes, all ranks call ``log``."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        total_steps: int,
        global_batch: int,
        first_step: int = 0,
        earlier_seconds: float = 0.0,  # spent by the processes that did the steps before first_step
    ) -> None:
        self.total_steps, self.global_batch, self.earlier_seconds = total_steps, global_batch, earlier_seconds
        self.meters, self.finite, self.time = Meters(), Finite(), Stopwatch(device)
        self.first_step = self._last_step = first_step
        self._began = self._last_time = time.perf_counter()
        self._first: list[dict[str, Any]] = []
        self._last: deque[dict[str, Any]] = deque(maxlen=FIRST_AND_LAST)
        self._logged = 0
        self._bar: tqdm[Any] | None = None
        if distributed.is_main():
            self._board = Board(folder / "tensorboard", purge_step=first_step + 1)
            for line in truncate_lines(folder / "metrics.jsonl", first_step):
                self._remember(line)
            truncate_lines(folder / "checkpoints.jsonl", first_step)
            self._metrics, self._saves = (JsonLines(folder / f"{name}.jsonl") for name in ("metrics", "checkpoints"))
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the means since the last call, after ``step`` finished steps, and ``figures`` as they are."""
        means, seconds = self.meters.read(), self.time.read()
        if not distributed.is_main():
            return
        now = time.perf_counter()
        steps, elapsed = step - self._last_step, now - self._last_time
        self._last_step, self._last_time = step, now
        rate = steps * self.global_batch / elapsed
        shown = {"step": step, **means, **figures, "samples_per_second": rate}
        shown |= {f"seconds_per_step/{phase}": value / steps for phase, value in seconds.items()}
        # JSON has no NaN: a figure that is not finite is null, as is the gradient norm of a step that fp16 skipped.
        line = {name: value if math.isfinite(value) else None for name, value in shown.items()}
        self._metrics.write(line)
        self._remember(line)
        self._board.scalars(step, {name: x for name, x in line.items() if name != "step" and x is not None})
        self._show(step, means, figures, rate, seconds["data"] / elapsed)

    def _show(
        self, step: int, means: Mapping[str, float], figures: Mapping[str, float], rate: float, wait: float
    ) -> None:
        losses = "  ".join(f"{name} {value:.3f}" for name, value in means.items() if name.startswith("loss/"))
        if self._bar is not None:
            self._bar.set_postfix_str(f"{losses}  lr {figures['lr']:.1e}  {rate:.1f} samples/s")
            self._bar.update(step - self._bar.n)
            return
        left = (self.total_steps - step) * (time.perf_counter() - self._began) / max(1, step - self.first_step)
        done = f"step {step}/{self.total_steps} ({step / self.total_steps:.0%})"
        tail = f"{rate:.1f} samples/s  waiting for data {wait:.0%}  ETA {_clock(left)}"
        show(f"{done}  {losses}  lr {figures['lr']:.2e}  {tail}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures that come more seldom than a logged step, such as an evaluation's: to TensorBoard."""
        if distributed.is_main():
            self._board.scalars(step, values)

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures (H, W, 3) uint8: to TensorBoard."""
        if distributed.is_main():
            self._board.images(step, images)

    def saved(self, saved: Saved) -> None:
        """What a checkpoint has cost: to ``checkpoints.jsonl``, TensorBoard and the terminal."""
        if distributed.is_main():
            line = asdict(saved)
            self._saves.write(line)
            self._board.scalars(line.pop("step"), {f"checkpoint/{name}": value for name, value in line.items()})
            show(
                f"saved step_{saved.step}: {saved.bytes / 1e6:.1f} MB, training waited {saved.blocking_seconds:.2f} s, "
                f"on disk after {saved.total_seconds:.2f} s"
            )

    def flush(self) -> None:
        """Tries to write what had no room before."""
        if distributed.is_main():
            self._metrics.flush()
            self._saves.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if distributed.is_main():
            self._board.close()
            self._metrics.close()
            self._saves.close()
            if self._bar is not None:
                self._bar.close()

    def wall_seconds(self) -> float:
        """Time spent on this run so far, evaluation and checkpoints included, start-up not."""
        return self.earlier_seconds + time.perf_counter() - self._began

    def summary(self) -> dict[str, Any]:
        """Losses of the first and last logged steps, the last learning rate, the mean rate (main rank only)."""
        wall = self.wall_seconds()
        part = max(1, min(FIRST_AND_LAST, self._logged // 4))
        return {
            "losses_first": _mean_losses(self._first[:part]),
            "losses_last": _mean_losses(list(self._last)[-part:]),
            "lr_last": self._last[-1]["lr"] if self._last else None,
            "samples_per_second": self._last_step * self.global_batch / wall,
            "steps": self._last_step,
            "wall_seconds": wall,
        }

    def _remember(self, line: dict[str, Any]) -> None:
        if self._logged < FIRST_AND_LAST:
            self._first.append(line)
        self._last.append(line)
        self._logged += 1


def truncate_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the JSON lines of ``path`` from the first one whose ``step`` is greater: what a run wrote after its last
    checkpoint and before it was killed. So do lines that were cut off in writing, wherever they stand. Returns what
    stays."""
    if not path.exists():
        return []
    texts, lines = [], []
    for text in path.read_bytes().split(b"\n"):  # not at other ends of lines, which a JSON text may hold
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["step"] > step:
            break
        texts.append(text + b"\n")
        lines.append(line)
    aside = path.with_name(f"{path.name}.partial")
    aside.write_bytes(b"".join(texts))
    os.replace(aside, path)  # whoever is killed here loses nothing
    return lines


def _mean_losses(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of each loss over logged lines and media, without those that were not finite."""
    means = {}
    for name in LOSSES:
        values = [line.get(f"{name}/{medium}") for line in lines for medium in MEDIA]
        if known := [value for value in values if value is not None]:
            means[name] = sum(known) / len(known)
    return means


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
