"""Work over many files on several processes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TypeVar

from smaug_ds.data.shard import ShardError

Item = TypeVar("Item")
Result = TypeVar("Result")

LOCK = "lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems say that know none
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "no larger file allowed"}


@contextmanager
def on_processes(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Iterable[Result]]:
    """``with on_processes(function, items, workers) as results``: the results as they come, in any order.

    One worker is this process itself. More are spawned, because a fork would copy the locks of running threads.

    Raises:
        ShardError: a worker process was killed.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield map(function, items)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
        try:
            futures = [pool.submit(function, item) for item in items]
            yield (future.result() for future in as_completed(futures))
        except BrokenProcessPool:
            raise ShardError(
                "a worker process was killed (out of memory? then use fewer --workers); what is finished is kept, "
                "run the same command again to go on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def die_with_parent() -> None:
    """Ends this process when its parent is gone: a pool's workers would wait for work for ever, or go on writing."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def room_in(folder: Path, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Turns the system's refusal to write more into ``folder`` into a ShardError that says how to go on; ``needed``
    counts the bytes that were to be written, where that is known."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        wanted = f"{needed()} bytes needed, " if needed else ""
        free = f"{shutil.disk_usage(folder).free} bytes free"
        raise ShardError(
            f"cannot write into {folder}: {_FULL[error.errno]} ({error.strerror}; {wanted}{free}); what is finished is "
            "kept: make room and run the same command again"
        ) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes ``folder`` and keeps a second command out of it; the system takes the lock from a process that dies.

    Raises:
        ShardError: another command is at work there, or the folder around it may not be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ShardError(
            f"cannot write into {folder.parent}: {error.strerror} ({error.filename}); get the right to write there, or "
            "work on a copy"
        ) from error
    with file:
        another = ShardError(f"another command is at work in {folder}: wait for it, or end it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise another from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        # A command that ended since the file was opened has removed it (``clear``): then this lock keeps nobody out.
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise another
        yield


def clear(folder: Path) -> None:
    """Removes a folder from within ``alone_in``. The lock goes last: without it another command may begin there."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / LOCK).unlink()
    with suppress(OSError):  # another command has begun there
        folder.rmdir()


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there as a whole or not at all, whatever ends this process or machine."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    os.replace(aside, path)
