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
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from smaug_ds.engine import checkpoint
from smaug_ds.engine.preempt import EXIT_CODE
from tests.cluster.runs import end, launch_local, logs
from tests.cluster.runs import finish as finish_script
from tests.forked import PATIENCE, Forks
from tests.launching import assert_equal_runs, figures, settings

KILLS = int(os.environ.get("SMAUG_KILLS", "20"))  # of one rank, and of all
LAUNCHER_KILLS = int(os.environ.get("SMAUG_LAUNCHER_KILLS", "3"))
STEPS, SAVE_EVERY, RANKS = 60, 2, 2
pytestmark = pytest.mark.slow


def arguments(shards: Path, media: Path, folder: Path) -> list[str]:
    more = [f"run.max_steps={STEPS}", f"run.save_every={SAVE_EVERY}", "run.picture_every=0", "data.test=[]"]
    return [*settings(shards, media, folder), *more]


@pytest.fixture(scope="module")
def whole(forks: Forks, toy_shards: Path, toy_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("kills") / "whole"
    forks.run(RANKS, arguments(toy_shards, toy_media, folder), folder.with_suffix(".log"))
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
                forks.end(ranks, log)
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
        assert_equal_runs(whole, folder)
    print(f"{kills} kills of {victims}: {saving} while saving, {starting} while starting, {runs} runs")
    assert saving >= KILLS // 5


@pytest.mark.cluster
def test_a_script_that_is_told_to_stop_at_any_moment_goes_on_bit_for_bit(
    whole: Path, toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    draw, expected = random.Random(3), figures(whole)
    stops = saved = runs = 0
    while stops < LAUNCHER_KILLS:
        runs += 1
        folder, code = tmp_path / f"run_{runs}", EXIT_CODE
        own = [text for text in arguments(toy_shards, toy_media, folder) if not text.startswith("run.folder=")]
        while code:
            earlier = set(folder.glob("logs/*/*_rank0.log"))

            def steps(folder: Path = folder, earlier: set[Path] = earlier) -> int:
                """That this start has logged."""
                return sum(p.read_text().count("\nstep ") for p in {*folder.glob("logs/*/*_rank0.log")} - earlier)

            process = launch_local(folder, own, PREFLIGHT="0")
            try:
                if stops < LAUNCHER_KILLS:
                    deadline, wanted = time.monotonic() + PATIENCE, draw.randint(0, 3)
                    while steps() < wanted and process.poll() is None:
                        assert time.monotonic() < deadline, logs(folder)
                        time.sleep(0.01)
                    time.sleep(draw.uniform(0, 1))
                    process.send_signal(signal.SIGTERM)
                    output, _ = process.communicate(timeout=PATIENCE)
                    code = process.returncode
                    # Finished already; killed before the script listened.
                    assert code in (EXIT_CODE, 0, -signal.SIGTERM), f"{output}\n{logs(folder)}"
                    stops += code != 0
                    saved += "saved after step" in output
                else:
                    finish_script(process, folder)
                    code = 0
            finally:
                end(process)
            lines = figures(folder) if (folder / "metrics.jsonl").exists() else []
            assert lines == expected[: len(lines)]
        assert figures(folder) == expected
    print(f"{stops} signals to the launch script: {saved} saved, {runs} runs")
