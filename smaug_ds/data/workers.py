"""A process that makes a reader's items and can be killed at any moment: how it starts, what it shows, how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import multiprocessing
import os
import pickle
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from mmap import mmap
from multiprocessing import forkserver, reduction, resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch

from smaug_ds.data import wire
from smaug_ds.data.quarantine import Spot, Verdict
from smaug_ds.data.sample import MEDIA, Place

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # they ask a job to save and leave
_GRACE_SECONDS = 5.0  # for the kernel to end a process; one that hangs in a dead storage may take hours
_TIDY_EVERY = 50  # items
_TASK_BYTES = 1 << 18  # at most
UNREADY = -1  # number of the error of a worker that could not begin


class Status(NamedTuple):
    """What a worker does."""

    started: bool
    changed: float  # time.monotonic() of the last change
    number: int  # of the item that it is at, or was at last
    spot: Spot | None  # the sample that it is at


class Board:
    """Memory in which a worker shows its status, without locks: who is killed while he holds one keeps it."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._fields = np.frombuffer(mmap(file, 64), dtype=np.int64)  # started, changed in ns, number, busy, Spot

    @classmethod
    def create(cls) -> Board:
        file = os.memfd_create("status", os.MFD_CLOEXEC)
        os.ftruncate(file, 64)
        return cls(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return _board_of, (reduction.DupFd(self._file),)

    def __del__(self) -> None:
        os.close(self._file)

    def read(self) -> Status:
        started, changed, number, busy, position, medium, shard, row = self._fields.tolist()
        return Status(bool(started), changed / 1e9, number, Spot(position, MEDIA[medium], shard, row) if busy else None)

    def touch(self) -> None:
        """Shows that the worker lives."""
        self._fields[1] = time.monotonic_ns()
        self._fields[0] = 1

    def show_item(self, number: int) -> None:
        self._fields[2] = number
        self.touch()

    def show(self, spot: Spot | None) -> None:
        """Who is killed between these lines was at no sample."""
        self._fields[3] = 0
        self.touch()
        if spot is not None:
            self._fields[4:8] = spot.position, MEDIA.index(spot.medium), spot.shard, spot.row
            self._fields[3] = 1


def _board_of(handle: Any) -> Board:
    return Board(handle.detach())


class Raised(NamedTuple):
    """An error that a worker met, with the traceback that does not travel with it."""

    error: Exception
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> Raised:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception as reason:  # whatever the error's class does wrong
            error = RuntimeError(f"{type(error).__name__}: {error} (the error itself cannot travel: {reason})")
        return cls(error, text)

    def throw(self) -> None:
        raise self.error from WorkerTraceback(self.traceback)


class WorkerTraceback(Exception):
    """Where in a worker an error came up: the cause of the error as the parent raises it."""

    def __str__(self) -> str:
        return f"in a data worker:\n{self.args[0]}"


class Worker:
    """One process. It makes the items that it is given one after the other.

    Args:
        reader: pickled; what its items are goes back.

    Raises OSError or EOFError if the process cannot be started.
    """

    def __init__(self, reader: bytes) -> None:
        start_servers()
        self._pipe, theirs = wire.pair()
        self.board = Board.create()
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_work, args=(theirs, self.board, reader), name="data worker", daemon=True
        )
        try:
            self.process.start()
        except (OSError, EOFError):
            self._pipe.close()
            raise
        finally:
            theirs.close()

    def fileno(self) -> int:
        """Readable when there are results, or the process is gone."""
        return self._pipe.fileno()

    def give(
        self, number: int, index: int, verdicts: Mapping[Spot, Verdict], pyav_only: frozenset[Place | str]
    ) -> bool:
        """Has it make ``reader[index]`` after what it was given before; ``verdicts`` and ``pyav_only`` are new to it.

        False if it has too much in hand. That it is gone is not told here, but where results are read.
        """
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            try:
                self._pipe.send(pickle.dumps((number, index, verdicts, pyav_only)), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
        return True

    def results(self) -> Iterator[tuple[int, Any]]:
        """(number, item or Raised) of what is finished. Raises EOFError after the last if the process is gone."""
        while True:
            try:
                yield wire.receive(self._pipe)
            except BlockingIOError:
                return

    def kill(self) -> None:
        """Ends it at once. What it finished before can still be read."""
        # Not process.kill(): it believes the server that forked the process, which may be gone while this is not.
        if not self._ended(0) and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
            self._ended(_GRACE_SECONDS)

    def exit_code(self) -> int | None:
        """Of a process that is gone; None if nobody can tell."""
        self.process.join(timeout=1)  # it may come a moment later
        return self.process.exitcode

    def close(self) -> None:
        """Ends it, if need be, and drops the connection."""
        self.kill()
        self.exit_code()
        self._pipe.close()

    def _ended(self, seconds: float) -> bool:
        """Whether nobody holds the other end of the connection, after waiting that long for it."""
        poll = select.poll()
        poll.register(self._pipe, 0)  # the end of a connection is told unasked
        return bool(poll.poll(seconds * 1000))


def start_servers() -> None:
    """Starts the processes that fork the workers and track what they share, deaf to the signals that stop a job.

    Such a signal goes to all processes of a job, and the rank needs its workers until it has saved. These servers are
    programs of their own, with no handlers of ours. They inherit the signal mask of this thread, and the workers
    inherit theirs: what is blocked here stays blocked there. A signal that comes meanwhile is not lost to the rank: it
    waits for the mask to be lifted, or another thread takes it.
    """
    forkserver.set_forkserver_preload(["smaug_ds.data.reader", __name__])  # imported once for all workers
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # again: the tracker's start unblocks some of them
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: socket.socket, board: Board, pickled: bytes) -> None:
    # A rank that is killed outright cannot end its workers, and the server that forked them lives as long as they do.
    threading.Thread(target=_follow_rank, name="rank", daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the rank is gone
        _serve(pipe, board, pickled)


def _serve(pipe: socket.socket, board: Board, pickled: bytes) -> None:
    try:
        reader = pickle.loads(pickled)
    except Exception as error:  # not handled here, only carried to the parent; so below
        wire.send(pipe, UNREADY, Raised.of(error), board.touch)
        return
    reader.watch = board.show
    gc.freeze()  # what is there by now stays: ``_tidy`` need not look at it
    board.touch()
    for finished in itertools.count(1):
        task = pipe.recv(_TASK_BYTES)
        if not task:
            return
        number, index, verdicts, pyav_only = pickle.loads(task)
        board.show_item(number)
        reader.condemn(verdicts)
        reader.pyav_only |= pyav_only
        try:
            item = reader[index]
        except Exception as error:
            item = Raised.of(error)
        wire.send(pipe, number, item, board.touch)
        del item  # before the next one needs its memory
        if finished % _TIDY_EVERY == 0:
            _tidy()
        board.touch()


def _tidy() -> None:
    """Gives memory back. Media files that are open in cycles of references wait for the garbage collection, and what
    is allocated meanwhile scatters over the heap, whose holes the C library keeps: megabytes in a thousand samples."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _follow_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None, "runs in a worker"
    rank.join()
    os._exit(1)
