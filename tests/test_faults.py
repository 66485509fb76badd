"""Disks that fill up or refuse, a port that is taken, a rank that is slow: a clear line or survival, never a hang."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from smaug_ds.engine import checkpoint
from tests.forked import PATIENCE, Forks
from tests.launching import assert_equal_runs, figures, settings

STEPS, RANKS = 24, 2
PROMISED = 60.0  # seconds until a run that cannot go on has ended, start included; run.timeout_seconds of these runs


def arguments(shards: Path, media: Path, folder: Path, *more: str) -> list[str]:
    own = [f"run.max_steps={STEPS}", "run.save_every=2", "run.picture_every=0", "data.test=[]", *more]
    return [*settings(shards, media, folder), *own]


@pytest.fixture(scope="module")
def whole(forks: Forks, toy_shards: Path, toy_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    forks.run(RANKS, arguments(toy_shards, toy_media, folder), folder.with_suffix(".log"))
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB: five checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is free."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(1 << 16))  # the last one but one is a part
    return ballast


def await_text(log: Path, told: Callable[[str], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (log.exists() and told(log.read_text())):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_disk_that_is_full_for_a_while_costs_no_step(
    forks: Forks, whole: Path, toy_shards: Path, toy_media: Path, disk: Path, tmp_path: Path
) -> None:
    """Nor a line of metrics.jsonl; what the ranks print goes to the same disk."""
    folder, log, keys = disk / "run", disk / "log", tmp_path / "keys"

    def begun() -> int:
        """Steps, told beside that disk."""
        return json.loads(Path(f"{keys}.0").read_text().splitlines()[-1])[0]

    ranks = forks.start(RANKS, arguments(toy_shards, toy_media, folder), log, keys=str(keys))
    await_text(log, lambda text: "saved step_2:" in text)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    ballast, reached = fill(disk), begun()
    before = {path.name for path in (folder / "checkpoints").iterdir()}
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    await_text(Path(f"{keys}.0"), lambda text: begun() >= reached + 6)
    latest = checkpoint.open_latest(folder / "checkpoints", print)
    assert latest and latest[0].name in before
    ballast.unlink()
    forks.end(ranks, log)
    assert not list((folder / "checkpoints").glob(".writing-step_*"))
    assert_equal_runs(whole, folder)
    saved = [json.loads(line)["step"] for line in (folder / "checkpoints.jsonl").read_text().splitlines()]
    assert 2 in saved and STEPS in saved and len(saved) < STEPS // 2, "some could not be saved"


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_stops_the_run_or_not(
    forks: Forks, whole: Path, toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    """No file may be as large as the optimizer's state: writing breaks off in the middle of it."""
    for way, steps in (("continue", STEPS), ("stop", 2)):
        folder, log = tmp_path / way, tmp_path / f"{way}.log"
        own = arguments(toy_shards, toy_media, folder, f"run.on_full_disk={way}")
        forks.run(RANKS, own, log, 2, PROMISED, file_bytes=500_000)
        assert len(errors(log)) == 1
        wanted = r"the checkpoint of step 2 was not written: File too large \(\d\.\d MB needed, [\d.]+ MB free"
        assert re.search(wanted, log.read_text()), log.read_text()
        lines = figures(folder)
        assert len(lines) >= steps and lines == figures(whole)[: len(lines)]
        assert list((folder / "checkpoints").iterdir()) == []
        if way == "continue":
            assert "the last checkpoint is none: make room and start it again" in errors(log)[0]
            assert log.read_text().count("Training goes on, the next save tries again") == STEPS // 2
            forks.run(RANKS, own, log)
            assert_equal_runs(whole, folder)


@pytest.mark.cluster
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_run_folder_that_takes_nothing_is_named_at_the_start(
    forks: Forks, toy_shards: Path, toy_media: Path, disk: Path, tmp_path: Path, fault: str
) -> None:
    if fault == "full":
        fill(disk)
    else:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    log = tmp_path / "log"
    forks.run(RANKS, arguments(toy_shards, toy_media, disk / "run"), log, 2, PROMISED)
    told = {
        "full": r"cannot be written: No space left on device \(0\.0 MB free\)",
        "read-only": "Read-only file system",
    }
    assert len(errors(log)) == 1 and re.search(rf"^error: .*run\.folder: .*{told[fault]}", errors(log)[0]), errors(log)
    assert "Traceback" not in log.read_text()


def test_a_port_that_is_taken_is_named(forks: Forks, toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    log, own = tmp_path / "log", arguments(toy_shards, toy_media, tmp_path / "run", "run.timeout_seconds=5")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ranks = forks.start(RANKS, own, log, port=port)
        assert forks.wait(ranks[0], PROMISED) == 2, log.read_text()
        assert forks.wait(ranks[1], PROMISED) != 0
    where = f"MASTER_PORT {port} on 127.0.0.1"
    assert f"error: {where} is taken by another process: give another one, as deepspeed --master_port N" in errors(log)


@pytest.mark.slow
def test_a_rank_that_is_slow_for_a_while_costs_time_alone(
    forks: Forks, whole: Path, toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    ranks = forks.start(RANKS, arguments(toy_shards, toy_media, folder), log)
    await_text(log, lambda text: "step 3/" in text)
    for _ in range(3):
        os.kill(ranks[1], signal.SIGSTOP)
        time.sleep(1)
        os.kill(ranks[1], signal.SIGCONT)
        time.sleep(0.3)
    forks.end(ranks, log)
    assert_equal_runs(whole, folder)


@pytest.mark.slow
def test_a_finished_run_says_so_and_its_best_checkpoint_is_there(
    forks: Forks, toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    more = ("run.max_steps=7", "run.evaluate_every=3", "run.keep_best=t2v_r5", "run.keep_checkpoints=1")
    own = [*arguments(toy_shards, toy_media, folder, *more), f"data.test=[{toy_shards / 'test'}]"]
    forks.run(RANKS, own, log)
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert best["metric"] == "t2v_r5" and best["step"] in (3, 6, 7)
    state = checkpoint.read_state(folder / "checkpoints" / best["checkpoint"])
    assert state["step"] == best["step"]
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == sorted({"step_7", best["checkpoint"]})
    costs = [json.loads(line) for line in (folder / "checkpoints.jsonl").read_text().splitlines()]
    assert [cost["step"] for cost in costs][-1] == 7 and {2, 4, 6} < {cost["step"] for cost in costs}
    assert all(0 < cost["blocking_seconds"] <= cost["total_seconds"] and cost["bytes"] > 1e6 for cost in costs)
    forks.run(RANKS, own, log)
    assert f"{folder} is finished, all 7 steps: to go on raise run.max_steps or optim.epochs" in log.read_text()
    forks.run(RANKS, [*own, "run.max_steps=5"], log)  # fewer than it has
    forks.run(RANKS, [*own, "run.keep_best=t2v_R5"], log, 2)
    assert "run.keep_best is t2v_R5: the evaluation yields t2v_r1" in log.read_text()
