"""Training steps in processes of their own that take turns, so that a slow minute of the machine hits all alike.

While one computes the others wait for their pipe and use nothing but memory. A process holds one step from its
beginning to its end, so its peak memory is that step's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.engine.allocator import keep_freed_memory
from smaug_ds.engine.monitor import Stopwatch
from tools.profiling.machine import forget_peak, peak_memory
from tools.profiling.step import Step, StepConfig

GPU_STEPS = 5  # between two looks at the clock: waiting for the device at each step would slow it down
TRACED_STEPS = 2


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass
class Timing:
    """What one process took."""

    turns: list[list[float]] = field(default_factory=list)  # seconds of each step, turn by turn
    phases: list[dict[str, float]] = field(default_factory=list)  # the same by phase, step by step; empty if unknown

    @property
    def seconds(self) -> Spread:
        """Of a step, over all turns."""
        return Spread.of([seconds for turn in self.turns for seconds in turn])

    @property
    def phase_medians(self) -> dict[str, float]:
        names = self.phases[0] if self.phases else ()
        return {name: statistics.median(step[name] for step in self.phases) for name in names}


@dataclass(frozen=True)
class Facts:
    """What a process tells of its step beside its times."""

    device: str
    flops: float  # multiply-adds count twice; matrix products and attention, forward and backward, as executed
    peak_bytes: int  # GPU: of the allocator; CPU: resident, with interpreter and libraries
    caption_tokens: float | None  # mean, special ones included; None of an external step


@dataclass(frozen=True)
class External:
    """A file with ``make_step(batch, frames, dtype)``, which returns a callable that does one training step."""

    file: Path
    batch: int
    frames: int
    dtype: str


class OutOfMemoryError(ConfigError):
    """The step does not fit onto the device."""


class Runner:
    """A step in a fresh process. Raises ConfigError when it cannot be made there, with the reason in one line."""

    def __init__(self, name: str, what: StepConfig | External, warmup: int) -> None:
        self.name, self.what, self.timing = name, what, Timing()
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, what, warmup), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def turn(self, steps: int) -> float:
        """Times so many steps, keeps what they took, and returns their median, seconds."""
        seconds, phases = self._ask("time", steps)
        self.timing.turns.append(seconds)
        self.timing.phases += phases
        return statistics.median(seconds)

    def facts(self) -> Facts:
        """As of now: ask when all turns are over, so that the peak is that of all steps."""
        return self._ask("facts", None)

    def trace(self, path: Path) -> None:
        """Writes a torch profiler trace of a few more steps, for chrome://tracing or Perfetto."""
        self._ask("trace", str(path))

    def close(self) -> None:
        """Ends the process; its memory is free afterwards."""
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: str, argument: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # its process has ended: the answer says how
            self._pipe.send((request, argument))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, content = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(timeout=30)
            code = self._process.exitcode
            told = "killed, which is what happens when memory runs out: lower batch" if code == -9 else "see above"
            raise ConfigError(f"{self.name}: its process ended with code {code}; {told}") from None
        if kind in ("error", "memory"):
            self.close()
            raise (ConfigError if kind == "error" else OutOfMemoryError)(f"{self.name}: {content}")
        return content


def take_turns(runners: Sequence[Runner], turns: int, steps: int) -> list[list[float]]:
    """``turns`` times one after the other, ``steps`` at a time: medians in seconds, by turn and runner."""
    return [[runner.turn(steps) for runner in runners] for _ in range(turns)]


def executed_flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention that ``function`` runs.

    With activation checkpointing what is computed again counts again.
    """
    # torch counts attention on GPUs; on a CPU it is another operator
    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *args, **kwargs: (
            sdpa_flop_count(query, key, value)
        ),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad_out, query, key, value, *args, **kwargs: sdpa_backward_flop_count(grad_out, query, key, value)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        function()
    return counter.get_total_flops()


def time_steps(
    step: Callable[[], Any], steps: int, device: torch.device, clock: Stopwatch | None
) -> tuple[list[float], list[dict[str, float]]]:
    """Seconds of each step, or of each few on a GPU, and the same by phase where there is a clock."""
    together = GPU_STEPS if device.type == "cuda" else 1
    seconds, phases = [], []
    for _ in range(steps):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(together):
            step()
        _synchronize(device)
        seconds.append((time.perf_counter() - began) / together)
        if clock is not None:
            phases.append({name: value / together for name, value in clock.read().items()})
    return seconds, phases


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Timed:
    """A step as this process times it."""

    def __init__(self, what: StepConfig | External, warmup: int) -> None:
        self.device = distributed.device()
        self.clock: Stopwatch | None = None
        self.caption_tokens: float | None = None
        self.step: Callable[[], Any]
        cycle = 1
        if isinstance(what, External):
            if self.device.type == "cpu":
                keep_freed_memory()  # as our own step does, so that neither side has it alone
            self.step = _load(what)
        else:
            ours = Step(what)
            self.step, self.clock, self.caption_tokens, cycle = ours, ours.clock, ours.caption_tokens, ours.cycle
        self.step()  # the first one makes what later ones reuse, such as the optimizer's state
        self.flops = executed_flops(lambda: [self.step() for _ in range(cycle)]) / cycle
        forget_peak(self.device)  # the counter holds on to tensors, above all to recomputed ones
        for _ in range(warmup):
            self.step()
        if self.clock is not None:
            self.clock.read()

    def time(self, steps: int) -> tuple[list[float], list[dict[str, float]]]:
        """``time_steps`` of this step."""
        return time_steps(self.step, steps, self.device, self.clock)

    def facts(self, _: None) -> Facts:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return Facts(name, self.flops, peak_memory(self.device), self.caption_tokens)

    def trace(self, path: str) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
            for _ in range(TRACED_STEPS):
                self.step()
            _synchronize(self.device)
        profile.export_chrome_trace(path)


def _load(what: External) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(what.file.stem, what.file)
    if spec is None or spec.loader is None or not what.file.is_file():
        raise ConfigError(f"{what.file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[what.file.stem] = module
    spec.loader.exec_module(module)
    make_step = getattr(module, "make_step", None)
    if not callable(make_step):
        raise ConfigError(f"{what.file} has no make_step(batch, frames, dtype)")
    step = make_step(what.batch, what.frames, what.dtype)
    if not callable(step):
        raise ConfigError(f"{what.file}: make_step returned {step!r}, which cannot be called: return a function")
    return step


def _serve(pipe: Connection, what: StepConfig | External, warmup: int) -> None:
    try:
        timed = _Timed(what, warmup)
        pipe.send(("ready", None))
        while True:
            request, argument = pipe.recv()
            pipe.send(("done", getattr(timed, request)(argument)))
    except EOFError:
        pass  # closed at the other end: over
    except ValueError as error:  # what a setting can mend; ConfigError is one
        pipe.send(("error", " ".join(str(error).split())))
    except BaseException as error:  # of foreign code, whatever it is: told, and the process ends
        if not _too_large(error):
            traceback.print_exc()
            raise SystemExit(1) from None
        pipe.send(("memory", f"out of memory: lower batch ({str(error).splitlines()[0]})"))
    finally:
        distributed.shutdown()


def _too_large(error: BaseException) -> bool:
    """Whether the device's memory is what failed: torch's allocator says so by type, libraries that take memory of
    their own (cuBLAS, cuDNN, the CUDA runtime) by a RuntimeError's text alone."""
    told = str(error).lower()
    said = any(text in told for text in ("out of memory", "status_alloc_failed"))
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and said)
