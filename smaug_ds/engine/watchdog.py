"""Nothing dies or hangs in silence: every message names host, rank and the last finished step.

A rank that hangs writes the stacks of all its threads and ends itself; of one that is killed a witness beside it tells
(``witness.py``); one that raises says so itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

EXIT_CODE = 86  # "hung": the job script starts the run again
_WITNESS = Path(__file__).with_name("witness.py")


class Watchdog:
    """Watches over this rank from ``with`` on.

    Args:
        folder: for ``hang_rank_N.txt`` and ``deaths.txt``; made when there is something to write.
        hang_seconds: without a finished step, evaluation and checkpoint in between included, that end the rank;
            0: never.
        quiet: errors that the caller reports itself.
    """

    def __init__(self, folder: Path, hang_seconds: float, quiet: tuple[type[Exception], ...] = ()) -> None:
        self._folder, self._hang_seconds, self._quiet = folder, hang_seconds, quiet
        self._rank = int(os.environ.get("RANK", "0"))
        self._who = f"rank {self._rank} on {socket.gethostname()}"
        self._step = -1
        self._time = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        command = [sys.executable, "-I", "-S", str(_WITNESS), str(self._folder), self._who]
        # A session of its own: what kills the rank's process group is what it has to tell of.
        self._witness = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, (*self._quiet, SystemExit)):
            text = " ".join(f"{type(error).__name__}: {error}".split())
            _complain(f"{_now()} {self._who} failed {self._when()}: {text}")
        self._tell("end")
        with contextlib.suppress(BrokenPipeError):
            self._witness.communicate()

    def finished(self, step: int) -> None:
        """Notes that so many steps are finished."""
        self._step, self._time = step, time.monotonic()
        self._tell(str(step))

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Within it a rank without a finished step for ``hang_seconds`` is ended. step: finished before."""
        self.finished(step)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._hang_seconds:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            if self._hang_seconds:
                thread.join()
                faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self._hang_seconds / 4)):
            # Should a library keep the interpreter's lock, this thread hangs, too. The timer behind this needs no lock.
            faulthandler.dump_traceback_later(self._hang_seconds, exit=True)
            if time.monotonic() - self._time > self._hang_seconds:
                self._give_up()

    def _give_up(self) -> None:
        path = self._folder / f"hang_rank_{self._rank:05d}.txt"
        message = f"{_now()} {self._who} hangs: no step for {self._hang_seconds:g} s (run.hang_seconds) {self._when()}"
        _complain(f"{message}; stacks in {path}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(message + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(all_threads=True)
        self._tell("end")
        os._exit(EXIT_CODE)  # other threads, the main one first, cannot be ended otherwise

    def _tell(self, word: str) -> None:
        assert self._witness.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed the witness: the run matters more
            os.write(self._witness.stdin.fileno(), f"{word}\n".encode())

    def _when(self) -> str:
        return f"after step {self._step}" if self._step >= 0 else "while it started"


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # a file on a full disk; the exit code has to stay
        print(f"error: {text}", file=sys.stderr, flush=True)


def _now() -> str:
    return time.strftime("%F %T")
