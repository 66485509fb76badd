"""Stopping on request: a signal sets a flag, the loop asks all ranks, saves and leaves with ``EXIT_CODE``."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_CODE = 85  # "saved and ready to go on": the job script requeues on it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this rank was told to stop. Ranks are signalled at different moments: decide with ``any_rank``."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> StopRequest:
        """Makes SIGTERM, SIGUSR1 and SIGINT set the flag; a second SIGINT interrupts at once."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
