"""Checkpoints that are whole or absent, written while training goes on.

Training waits for the copy into host memory (``snapshot``). A thread of each rank then writes, hashes and syncs its
files into a folder aside. When all ranks are done, which they learn from the exchange that ends every step, a thread
of the main rank writes the manifest, renames the folder, moves the pointer ``latest`` and removes what need not stay.
Whatever breaks off on the way leaves the previous checkpoint and the pointer to it untouched.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import smaug_ds
from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.engine import files as on_disk
from smaug_ds.engine.files import ARCHITECTURE, ASIDE, STATE, WEIGHTS, Retention, as_json, step_of
from smaug_ds.engine.snapshot import HostCopy

_POLL_SECONDS = 0.02


class SaveError(ConfigError):
    """A checkpoint could not be written; the one before is whole. Raised on all ranks, with bytes needed and free."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint has cost."""

    step: int
    bytes: int
    blocking_seconds: float  # that training waited on this rank
    total_seconds: float  # until it was the latest one


@dataclass
class _UnderWay:
    step: int
    final: Path
    aside: Path
    best: dict[str, Any] | None
    needed: int  # bytes, of all ranks
    free: int  # bytes, when it began
    began: float
    blocking: float = 0.0
    publishing: bool = False
    waited_from: float | None = None  # since when training waits for the end
    work: Future[Any] | None = None  # of this rank, if it has any


class Saver:
    """Writes the checkpoints of a run into ``folder``, one at a time. All ranks make it and call it together.

    Args:
        model: whose weights are written once more as safetensors, with ``architecture``.
        keep_best: metric of an evaluation's report whose best checkpoint stays; empty: none.
        background: whether training goes on while files are written.
        go_on: whether a checkpoint that could not be written is told as a warning instead of raised.
        tell: takes such a warning, on every rank.
        report: takes what each checkpoint has cost, on every rank.
    """

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        folder: Path,
        architecture: Mapping[str, Any],
        retention: Retention,
        keep_best: str = "",
        background: bool = True,
        go_on: bool = False,
        tell: Callable[[str], object] = print,
        report: Callable[[Saved], object] = lambda saved: None,
    ) -> None:
        self._engine, self._model, self._folder, self._architecture = engine, model, folder, architecture
        self._retention, self._background, self._go_on = retention, background, go_on
        self._tell, self._report = tell, report
        self._host = HostCopy(copies=background)
        self._version = code_version() if distributed.is_main() else {}
        self._under_way: _UnderWay | None = None
        self.latest: str | None  # name of the checkpoint that a run goes on from
        self._best: dict[str, Any] | None
        if distributed.is_main():
            on_disk.finish_best(folder)
        self.latest, best = distributed.gather_objects((on_disk.read_pointer(folder), on_disk.read_best(folder)))[0]
        self._keep_best = keep_best
        # One that the run went back behind comes again.
        reached = best and (self.latest == best["checkpoint"] or step_of(self.latest) > best["step"])
        self._best = best if reached and best["metric"] == keep_best else None
        self._better: dict[str, Any] | None = None  # the best one, if it is not saved yet

    def begin(self, step: int, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Starts the checkpoint of ``step`` finished steps; one that is under way is finished first.

        state: of the whole run, JSON-able. rank_state: of this rank beside its random states, loadable with
        ``weights_only=True``.

        Raises SaveError on all ranks when there is no room, unless the run is to go on without.
        """
        self.finish()
        if self.latest == f"step_{step}":  # stopped again before another step was done
            return
        final, aside = self._folder / f"step_{step}", self._folder / f"{ASIDE}step_{step}"
        best = self._better if self._better and self._better["step"] == step else None
        save = _UnderWay(step, final, aside, best, needed=0, free=0, began=time.perf_counter())
        trouble = self._make_room(save) if distributed.is_main() else None
        own = {**rank_state, "random": random_state()}
        model = self._model if distributed.is_main() else None
        self._host.take(self._engine, aside, f"rank_{distributed.rank():05d}.pt", own, model)
        told = distributed.gather_objects((self._host.bytes(), save.free, trouble))
        (_, save.free, trouble), save.needed = told[0], sum(size for size, _, _ in told)
        if trouble or save.needed > save.free:
            self._fail(save, trouble or "there is no room")
            return
        whole = {**state, "step": step, "world_size": distributed.world_size(), **self._version}
        texts = {ARCHITECTURE: as_json(self._architecture), STATE: as_json(whole)} if distributed.is_main() else {}
        save.work = _in_background(lambda: self._write(aside, texts))
        self._under_way, save.blocking = save, time.perf_counter() - save.began
        if not self._background:
            self.finish()

    @property
    def writing(self) -> bool:
        """Whether this rank has work under way that the others have to wait for."""
        return self._under_way is not None and self._under_way.work is not None and not self._under_way.work.done()

    def advance(self, writing: bool) -> None:
        """Takes the save a stage further. writing: whether any rank is ``writing``, the same on all of them.

        Raises SaveError on all ranks when writing has failed on one, unless the run is to go on without.
        """
        save = self._under_way
        if save is None or writing:
            return
        result, trouble = {}, None
        if save.work is not None:
            try:
                result = save.work.result()
            except OSError as error:
                trouble = f"{error.strerror or error}"
        told = distributed.gather_objects((result, trouble))
        troubles = [text for _, text in told if text]
        if troubles:
            self._fail(save, troubles[0])
        elif save.publishing:
            self._finished(save, told[0][0])
        else:
            self._host.release()
            files = {name: facts for part, _ in told for name, facts in part.items()}
            save.publishing, save.work = True, None
            if distributed.is_main():
                save.work = _in_background(lambda: self._publish(save, files))

    def finish(self) -> None:
        """Waits until what is under way is the latest checkpoint. Raises as ``advance`` does."""
        while (save := self._under_way) is not None:
            save.waited_from = save.waited_from or time.perf_counter()
            self.advance(distributed.any_rank(self.writing))
            if self.writing:
                time.sleep(_POLL_SECONDS)

    def judge(self, step: int, report: Mapping[str, Any]) -> bool:
        """Whether an evaluation after ``step`` steps is the best so far by ``keep_best``, so that its checkpoint stays.

        Raises ConfigError on all ranks when the report has no such metric.
        """
        if not self._keep_best:
            return False
        report = distributed.gather_objects(dict(report))[0]
        known = [name for name, value in report.items() if type(value) in (int, float)]
        if self._keep_best not in known:
            raise ConfigError(f"run.keep_best is {self._keep_best}: the evaluation yields {', '.join(known)}")
        value, sign = report[self._keep_best], -1 if self._keep_best.endswith("rank") else 1
        rival = (self._under_way.best if self._under_way else None) or self._best
        if rival is not None and sign * value <= sign * rival["value"]:
            return False
        self._better = {"checkpoint": f"step_{step}", "metric": self._keep_best, "value": value, "step": step}
        if self.latest == f"step_{step}":
            self._best = self._better
            if distributed.is_main():
                try:
                    on_disk.replace_text(self._folder / on_disk.BEST, as_json(self._best))
                except OSError as error:
                    self._tell(f"WARNING: {self._folder / on_disk.BEST} does not name step_{step}: {error.strerror}")
                on_disk.retain(self._folder, step, self._retention)
        return True

    def _make_room(self, save: _UnderWay) -> str | None:
        """Removes what broken saves have left, and makes the folder aside; returns what went wrong with that."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            on_disk.clear(self._folder)
            shutil.rmtree(save.final, ignore_errors=True)
            save.aside.mkdir()
            save.free = shutil.disk_usage(self._folder).free
        except OSError as error:
            return error.strerror
        return None

    def _write(self, aside: Path, texts: Mapping[str, str]) -> dict[str, Any]:
        files = {}
        for name, content in self._host.files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            files[name] = on_disk.write_tensors(aside / name, content)
        if self._host.weights:
            files[WEIGHTS] = on_disk.write_weights(aside / WEIGHTS, self._host.weights)
        return files | {name: on_disk.write_text(aside / name, text) for name, text in texts.items()}

    def _publish(self, save: _UnderWay, files: Mapping[str, Any]) -> int:
        size = on_disk.publish(save.aside, save.final, files, save.best)
        on_disk.retain(self._folder, save.step, self._retention)
        return size

    def _finished(self, save: _UnderWay, size: int) -> None:
        now = time.perf_counter()
        self._under_way, self.latest, self._best = None, save.final.name, save.best or self._best
        waited = now - save.waited_from if save.waited_from else 0.0
        self._report(Saved(save.step, size, save.blocking + waited, now - save.began))

    def _fail(self, save: _UnderWay, trouble: str) -> None:
        """Removes what there is of a checkpoint; the one before stays. All ranks have ended their work on it."""
        self._under_way = None
        self._host.release()
        if distributed.is_main():
            on_disk.clear(self._folder)
            if on_disk.read_pointer(self._folder) != save.final.name:
                shutil.rmtree(save.final, ignore_errors=True)
        room = f"{save.needed / 1e6:.1f} MB needed, {save.free / 1e6:.1f} MB free when it began"
        message = (
            f"{self._folder}: the checkpoint of step {save.step} was not written: {trouble} ({room}); "
            f"the latest one is {self.latest or 'none'}"
        )
        if not self._go_on:
            raise SaveError(f"{message}. Make room and start again, or set run.on_full_disk=continue")
        self._tell(f"WARNING: {message}. Training goes on, the next save tries again")


def save(
    engine: Any,
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    model: nn.Module,
    architecture: Mapping[str, Any],
    keep: int,
) -> Path:
    """One checkpoint, see ``Saver``; returns once it is the latest. keep: number to leave, this one included."""
    saver = Saver(engine, model, folder, architecture, Retention(keep), background=False)
    saver.begin(step, state, rank_state)
    return folder / f"step_{step}"


def random_state() -> dict[str, Any]:
    """States of the global generators of Python, NumPy and torch, made of tensors and plain numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def code_version() -> dict[str, Any]:
    """Versions of this package, its git commit where there is one, and torch."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # not a checkout, or no git
        commit = None
    return {"version": smaug_ds.__version__, "commit": commit, "torch": torch.__version__}


def _in_background(work: Callable[[], Any]) -> Future[Any]:
    """Runs it in a thread that does not keep a rank alive whose main thread has failed; the future raises what it
    raises."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whatever it is, the main thread meets it
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
