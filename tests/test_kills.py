"""Ranks killed at random moments, while a checkpoint is written included: the next start has a whole one, and no loss
that follows differs from the uninterrupted run's.

SMAUG_KILLS and SMAUG_LAUNCHER_KILLS are the numbers of kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from smaug_ds.engine import checkpoint
from smaug_ds.engine.preempt import EXIT_CODE
from tests.cluster.runs import await_step, end, figures, launch_local, logs
from tests.cluster.runs import finish as finish_script
from tests.forked import PATIENCE, Forks
from tests.launching import settings

KILLS = int(os.environ.get("SMAUG_KILLS", "20"))  # of one rank, and of all
LAUNCHER_KILLS = int(os.environ.get("SMAUG_LAUNCHER_KILLS", "3"))
STEPS, SAVE_EVERY, RANKS = 60, 2, 2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


def arguments(shards: Path, media: Path, folder: Path) -> list[str]:
    more = [f"run.max_steps={STEPS}", f"run.save_every={SAVE_EVERY}", "run.picture_every=0", "data.test=[]"]
    return [*settings(shards, media, folder), *more]


@pytest.fixture(scope="module")
def whole(forks: Forks, toy_shards: Path, toy_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("kills") / "whole"
    ranks = forks.start(RANKS, arguments(toy_shards, toy_media, folder), folder.with_suffix(".log"))
    assert [forks.wait(pid) for pid in ranks] == [0] * RANKS, folder.with_suffix(".log").read_text()
    return folder


def logged(folder: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def await_one(rank: int, happened: Callable[[], object]) -> None:
    """Waits until it has happened or the rank has ended."""
    deadline = time.monotonic() + PATIENCE
    while not happened() and not ended(rank):
        assert time.monotonic() < deadline
        time.sleep(0.003)


def ended(pid: int) -> bool:
    """Whether it is over with a process that nobody has waited for yet."""
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("victims", ["one rank", "all ranks"])
def test_whatever_is_killed_goes_on_bit_for_bit(
    forks: Forks, whole: Path, toy_shards: Path, toy_media: Path, tmp_path: Path, victims: str
) -> None:
    draw, expected = random.Random(victims), figures(whole)
    kills = saving = starting = runs = 0
    while kills < KILLS:
        runs += 1
        folder, log, finished = tmp_path / f"run_{runs}", tmp_path / f"run_{runs}.log", False

        def steps(log: Path = log) -> int:
            """That this start has logged."""
            return log.read_text().count("\nstep ")

        def writing(folder: Path = folder) -> bool:
            """Whether a checkpoint is under way, its rename and the pointer included."""
            return any((folder / "checkpoints").glob(".writing-*"))

        while not finished:
            before = checkpoint.open_latest(folder / "checkpoints", print)
            log.write_text("")
            ranks = forks.start(RANKS, arguments(toy_shards, toy_media, folder), log)
            if kills < KILLS:
                moment, wanted = draw.random(), draw.randint(1, 2 * SAVE_EVERY)
                if moment < 0.2:
                    time.sleep(draw.uniform(0, 2))  # while it starts, mostly
                else:
                    await_one(ranks[0], lambda: steps() >= wanted)  # noqa: B023
                    if moment < 0.6:
                        await_one(ranks[0], writing)
                    time.sleep(draw.uniform(0, 0.1))
            if finished := kills == KILLS or all(map(ended, ranks)):
                assert [forks.wait(pid) for pid in ranks] == [0] * RANKS, log.read_text()
            else:
                kills += 1
                forks.kill(*[draw.choice(ranks)] if victims == "one rank" else ranks)
                saving, starting = saving + writing(), starting + (steps() == 0)
                deadline = time.monotonic() + 3  # a launcher would end the others
                while not all(map(ended, forks.alive(ranks))) and time.monotonic() < deadline:
                    time.sleep(0.05)
                forks.kill(*ranks)
            told = log.read_text()
            assert "damaged" not in told and "cannot be read" not in told, told
            if before and steps():
                assert f"resumed from {before[0]}\n" in told, told
            lines = figures(folder) if (folder / "metrics.jsonl").exists() else []
            assert lines == expected[: len(lines)]
        assert figures(folder) == expected
        one, other = checkpoint.load_weights(whole), checkpoint.load_weights(folder)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    print(f"{kills} kills of {victims}: {saving} while saving, {starting} while starting, {runs} runs")
    assert saving >= KILLS // 5


@pytest.mark.cluster
def test_a_script_that_is_told_to_stop_at_any_moment_goes_on_bit_for_bit(
    whole: Path, toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    draw, expected, folder = random.Random(3), figures(whole), tmp_path / "run"
    own = [text for text in arguments(toy_shards, toy_media, folder) if not text.startswith("run.folder=")]
    stops = saved = 0
    code = EXIT_CODE
    while code:
        process = launch_local(folder, own, PREFLIGHT="0")
        try:
            if stops < LAUNCHER_KILLS:
                stops += 1
                before = len(logged(folder))
                if draw.random() < 0.8:
                    await_step(folder, before + draw.randint(0, 2), alive=lambda p=process: p.poll() is None)
                time.sleep(draw.uniform(0, 1))
                process.send_signal(signal.SIGTERM)
                output, _ = process.communicate(timeout=PATIENCE)
                code = process.returncode
                assert code == EXIT_CODE, f"{output}\n{logs(folder)}"
                saved += "saved after step" in output
            else:
                output, code = finish_script(process, folder), 0
        finally:
            end(process)
        lines = figures(folder) if (folder / "metrics.jsonl").exists() else []
        assert lines == expected[: len(lines)]
    print(f"{stops} signals to the launch script: {saved} told of a checkpoint")
    assert stops == LAUNCHER_KILLS and figures(folder) == expected
