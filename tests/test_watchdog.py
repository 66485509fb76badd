"""A rank that hangs, dies or fails says so; one that ends in order does not."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smaug_ds.engine.watchdog import EXIT_CODE
from tests.standin import ROOT

PROGRAM = """
import ctypes, os, signal, sys, time
from pathlib import Path
from smaug_ds.config import ConfigError
from smaug_ds.engine.watchdog import Watchdog

def stuck():
    time.sleep(100)

with Watchdog(Path(sys.argv[1]), hang_seconds=float(sys.argv[2]), quiet=(ConfigError,)) as watchdog:
    with watchdog.watching(3):
        for step in (4, 5):
            time.sleep(0.3)
            watchdog.finished(step)
        {ending}
"""
WHO = f"rank 7 on {re.escape(socket.gethostname())}"
WHEN = r"error: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def run(folder: Path, ending: str, hang_seconds: float = 60) -> tuple[int, str]:
    """Exit code and errors of a rank that does ``ending`` after step 5."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending=ending), str(folder), str(hang_seconds)],
        cwd=ROOT, env={"RANK": "7", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_one_that_ends_in_order_says_nothing(tmp_path: Path) -> None:
    assert run(tmp_path / "logs", "pass") == (0, "")
    assert run(tmp_path / "logs", "sys.exit(85)") == (85, "")
    assert not (tmp_path / "logs").exists()


def test_one_that_hangs_is_ended_with_its_stacks(tmp_path: Path) -> None:
    code, errors = run(tmp_path / "logs", "stuck()", hang_seconds=1)
    assert code == EXIT_CODE
    assert re.search(rf"{WHEN}{WHO} hangs: no step for 1 s \(run.hang_seconds\) after step 5; stacks in ", errors)
    stacks = (tmp_path / "logs" / "hang_rank_00007.txt").read_text()
    assert "after step 5" in stacks and "in stuck" in stacks and "in _watch" in stacks
    assert "without a word" not in errors and not (tmp_path / "logs" / "deaths.txt").exists()


def test_one_whose_folder_is_gone_shows_its_stacks_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    code, errors = run(tmp_path / "logs", "stuck()", hang_seconds=1)
    assert code == EXIT_CODE and "in stuck" in errors


def test_one_that_hangs_with_the_interpreters_lock_is_ended_too(tmp_path: Path) -> None:
    code, errors = run(tmp_path / "logs", "ctypes.PyDLL(None).sleep(100)", hang_seconds=1)
    assert code == 1
    assert "Timeout" in errors and "in <module>" in errors
    assert re.search(rf"{WHO} died after step 5 without a word", errors)


def test_one_that_takes_its_time_for_each_step_is_left_alone(tmp_path: Path) -> None:
    assert run(tmp_path / "logs", "[(time.sleep(0.7), watchdog.finished(6)) for _ in range(4)]", 1) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_of_one_that_is_killed_its_witness_tells(tmp_path: Path, number: signal.Signals) -> None:
    code, errors = run(tmp_path / "logs", f"os.kill(os.getpid(), {int(number)})")
    assert code == -number
    line = rf"{WHEN}{WHO} died after step 5 without a word: killed \(out of memory, or by the launcher .*\), or crashed"
    assert re.search(line, errors)
    deaths = tmp_path / "logs" / "deaths.txt"
    deadline = time.monotonic() + 10
    while not deaths.exists() or not deaths.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert re.fullmatch(line + "\n", deaths.read_text())


def test_the_witness_survives_what_ends_the_ranks_of_a_job(tmp_path: Path) -> None:
    ending = "os.kill(watchdog._witness.pid, signal.SIGTERM); time.sleep(0.5); os.killpg(0, signal.SIGKILL)"
    ending = f"os.setsid(); {ending}"
    assert re.search(rf"{WHO} died after step 5", run(tmp_path / "logs", ending)[1])


def test_without_its_witness_a_rank_goes_on(tmp_path: Path) -> None:
    ending = "os.kill(watchdog._witness.pid, signal.SIGKILL); time.sleep(0.5); watchdog.finished(6)"
    assert run(tmp_path / "logs", ending) == (0, "")


def test_one_that_fails_says_where(tmp_path: Path) -> None:
    code, errors = run(tmp_path / "logs", "raise RuntimeError('connection closed' + chr(10) + 'by peer')")
    assert code == 1 and "Traceback" in errors
    assert re.search(rf"{WHEN}{WHO} failed after step 5: RuntimeError: connection closed by peer\n", errors)
    assert "without a word" not in errors


def test_errors_that_the_caller_reports_are_left_to_it(tmp_path: Path) -> None:
    code, errors = run(tmp_path / "logs", "raise ConfigError('batch')")
    assert code == 1 and "failed after" not in errors and "without a word" not in errors
