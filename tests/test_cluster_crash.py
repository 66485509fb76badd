"""Ranks that die and hang in real runs under jobs/launch_local.sh: named, started again, and no loss differs."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from smaug_ds.engine.preempt import EXIT_CODE
from tests.cluster.runs import PATIENCE, arguments, await_step, end, finish, launch_local, rank_process
from tests.launching import figures

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_killed_rank_is_named_and_the_run_goes_on(
    toy_shards: Path, toy_media: Path, whole_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = launch_local(folder, arguments(toy_shards, toy_media, folder), PREFLIGHT="0")
    try:
        await_step(folder, 12, alive=lambda: process.poll() is None)
        rank_process(process, 1).kill()
        output = finish(process, folder)
    finally:
        end(process)
    died = re.search(r"error: .* rank 1 on \S+ died after step (\d+) without a word", output)
    assert died and 12 <= int(died[1]) < 60, output
    assert died[0] in (folder / "logs" / "deaths.txt").read_text()
    assert "== ended with code 0 after start 1" in output and "resumed from" in output
    assert figures(folder) == figures(whole_run)


def test_a_hung_rank_ends_the_run_with_its_stacks_and_the_run_goes_on(
    toy_shards: Path, toy_media: Path, whole_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    own = [*arguments(toy_shards, toy_media, folder), "run.hang_seconds=20"]
    process = launch_local(folder, own, PREFLIGHT="0")
    try:
        await_step(folder, 12, alive=lambda: process.poll() is None)
        rank_process(process, 1).send_signal(signal.SIGSTOP)
        output = finish(process, folder)
    finally:
        end(process)
    stacks = (folder / "logs" / "hang_rank_00000.txt").read_text()
    assert re.search(r"rank 0 on \S+ hangs: no step for 20 s \(run.hang_seconds\) after step \d+", stacks)
    assert "in train" in stacks and "Thread" in stacks
    assert "== ended with code 86 after start 0" in output and "== ended with code 0 after start 1" in output
    assert figures(folder) == figures(whole_run)


def test_a_signal_to_the_script_saves_and_the_next_start_goes_on(
    toy_shards: Path, toy_media: Path, whole_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    own = arguments(toy_shards, toy_media, folder)
    process = launch_local(folder, own)
    try:
        await_step(folder, 3, alive=lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        output = finish(process, folder, EXIT_CODE)
        assert "told to stop: saved after step" in output and not (folder / "stop").exists()
        (log,) = folder.glob("logs/*/launcher.log")
        assert "exits with return code = 85" in log.read_text()  # what DeepSpeed's launcher calls an error
        assert "exits with return code" not in output and "== stopped as asked, which is no error" in output
        process = launch_local(folder, own, PREFLIGHT="0")
        assert "resumed from" in finish(process, folder)
    finally:
        end(process)
    assert figures(folder) == figures(whole_run)


def test_an_evaluation_that_is_told_to_stop_ends_at_once(whole_run: Path) -> None:
    before = {path.name for path in (whole_run / "logs").iterdir()}
    process = launch_local(whole_run, [], TASK="evaluate", PREFLIGHT="0")
    try:
        deadline = time.monotonic() + PATIENCE
        while not (logs := [path for path in whole_run.glob("logs/*/*_rank1.log") if path.parent.name not in before]):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        end(process)
    assert process.returncode not in (0, 85) and "== told to stop: ended at once" in output
    assert f"after start 0; logs in {logs[0].parent}" in output
    assert not (whole_run / "stop").exists()  # which a run in that folder would obey
