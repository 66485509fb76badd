"""Stopping on request: the loop asks all ranks after every step, saves and leaves with ``EXIT_CODE``.

A rank is told by a signal, the main rank also by a file (``RUN/stop``, which reaches a run on other hosts, too), and
every rank by the clock, some minutes before its wall time is over.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from smaug_ds.config import ConfigError

EXIT_CODE = 85  # "saved and ready to go on": the job script requeues on it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this rank was told to stop. Ranks are told at different moments: decide with ``any_rank``.

    Args:
        file: that tells to stop once it exists; None: no file does.
        at: Unix time to stop at, seconds.
    """

    def __init__(self, file: Path | None = None, at: float = math.inf) -> None:
        self._file, self._at, self._signalled = file, at, False

    @property
    def requested(self) -> bool:
        """Whether this rank was told to stop by now."""
        return self._signalled or time.time() >= self._at or (self._file is not None and self._file.exists())

    def install(self) -> StopRequest:
        """Makes SIGTERM, SIGUSR1 and SIGINT tell this rank to stop; a second SIGINT interrupts at once."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def clear(self) -> None:
        """Removes the file, which was heeded: the next start is not to stop on it."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True


def stop_time(wall_minutes: float, stop_minutes: float, environment: Mapping[str, str] = os.environ) -> float:
    """Unix time, seconds, at which a run that starts now has to stop; infinite if nothing ends it.

    Args:
        wall_minutes: that the run may take from now on; 0: until the end of its SLURM job, if it is in one that ends.
        stop_minutes: that it stops earlier, to save.

    Raises ConfigError when that time is over before the first step.
    """
    now = time.time()
    end = now + 60 * wall_minutes if wall_minutes else float(environment.get("SLURM_JOB_END_TIME") or math.inf)
    if end - 60 * stop_minutes <= now:
        source = "run.wall_minutes" if wall_minutes else "SLURM_JOB_END_TIME"
        raise ConfigError(
            f"run.stop_minutes is {stop_minutes:g}, but by {source} only {(end - now) / 60:.1f} minutes are left, "
            "so that there is no time for a step: lower it or ask for more time"
        )
    return end - 60 * stop_minutes
