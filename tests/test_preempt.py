"""Who may tell a rank to stop: a signal, a file, and the clock."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import pytest

from smaug_ds.config import ConfigError
from smaug_ds.engine.preempt import StopRequest, stop_time
from tests.launching import signals_kept


def test_signals_set_the_flag_and_a_second_interrupt_ends_at_once() -> None:
    with signals_kept():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            stop = StopRequest().install()
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_file_tells_to_stop_once(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "stop")
    assert not stop.requested
    (tmp_path / "stop").touch()
    assert stop.requested
    stop.clear()
    assert not stop.requested and not (tmp_path / "stop").exists()
    stop.clear()
    StopRequest().clear()


def test_the_clock_tells_to_stop() -> None:
    assert StopRequest(at=time.time() - 1).requested
    assert not StopRequest(at=time.time() + 60).requested


def test_the_time_to_stop_comes_from_the_setting_or_from_the_job() -> None:
    now = time.time()
    assert stop_time(0, 5, {}) == math.inf
    assert stop_time(60, 5, {}) == pytest.approx(now + 55 * 60, abs=5)
    assert stop_time(0, 5, {"SLURM_JOB_END_TIME": str(int(now) + 3600)}) == pytest.approx(now + 55 * 60, abs=5)
    assert stop_time(60, 5, {"SLURM_JOB_END_TIME": str(int(now) + 7200)}) == pytest.approx(now + 55 * 60, abs=5)


@pytest.mark.parametrize("named", ["run.wall_minutes", "SLURM_JOB_END_TIME"])
def test_no_time_for_a_step_is_told(named: str) -> None:
    by_setting = named == "run.wall_minutes"
    environment = {} if by_setting else {"SLURM_JOB_END_TIME": str(int(time.time()) + 240)}
    with pytest.raises(ConfigError, match=rf"run\.stop_minutes is 5, but by {named} only \d\.\d minutes are left"):
        stop_time(4 if by_setting else 0, 5, environment)
