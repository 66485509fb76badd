"""Processes that measure together: all of them end well, or none goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from smaug_ds.config import ConfigError

_TIMEOUT = 3600.0  # seconds that a measurement may take


def run_together(processes: Sequence[BaseProcess], grace: float) -> None:
    """Starts the processes and waits for them; once one has failed, the others for ``grace`` seconds more.

    Raises ConfigError when one fails, which has said why by then.
    """
    for process in processes:
        process.start()
    deadline = time.monotonic() + _TIMEOUT
    try:
        running: dict[Any, BaseProcess] = {process.sentinel: process for process in processes}
        while running and (left := deadline - time.monotonic()) > 0:
            for sentinel in wait(list(running), timeout=left):
                ended = running.pop(sentinel)
                ended.join()  # before that it may have no code yet
                if ended.exitcode:  # the others wait for it in vain
                    deadline = min(deadline, time.monotonic() + grace)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise ConfigError(f"the run ended with the codes {codes} of its ranks; see above")
