"""Runs of the smallest model that the tests of launching, pre-emption and crashes share."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.launching import settings
from tests.standin import ROOT

STEPS = 60  # enough of them that one of the middle can be caught
PATIENCE = 400.0  # seconds for anything, on a machine that has other things to do


def arguments(shards: Path, media: Path, folder: Path) -> list[str]:
    """``settings`` with ``STEPS`` steps and a checkpoint every ten; the folder is the launch script's affair."""
    own = [text for text in settings(shards, media, folder) if not text.startswith("run.folder=")]
    return [*own, f"run.max_steps={STEPS}", "run.save_every=10", "run.picture_every=0"]


def launch_local(folder: Path, own: Sequence[str], **variables: str) -> subprocess.Popen:
    """jobs/launch_local.sh, its output in a pipe."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RUN": str(folder), "RANKS": "2", **variables}
    return subprocess.Popen(
        ["bash", "jobs/launch_local.sh", *own], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, folder: Path, code: int = 0) -> str:
    """Its output. Should it not end in time, it is ended with all that it has started, and the test fails."""
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"not ended in {PATIENCE} s:\n{output}\n{logs(folder)}") from None
    assert process.returncode == code, f"code {process.returncode}:\n{output}\n{logs(folder)}"
    return output


def logs(folder: Path) -> str:
    """The ends of all logs of ranks, for a failed test's message."""
    return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("logs/*/*.log")))


def rank_process(process: subprocess.Popen, local_rank: int) -> psutil.Process:
    """The training process of a local rank under ``process``."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.cmdline()[1:5] == ["-u", "-m", "smaug_ds.pretrain", f"--local_rank={local_rank}"]:
            return child
    raise AssertionError(f"rank {local_rank} does not run")


def await_step(folder: Path, step: int, alive: Callable[[], bool]) -> None:
    """Waits until so many steps are logged."""
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert alive(), f"ended before step {step}:\n{logs(folder)}"
        assert time.monotonic() < deadline, f"no step {step} after {PATIENCE} s:\n{logs(folder)}"
        time.sleep(0.01)


def end(process: subprocess.Popen) -> None:
    """Ends it with all that it has started, if it still runs."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
