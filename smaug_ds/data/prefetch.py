"""Between a reader and a loop over batches: workers read and decode ahead, a thread runs the DALI graph on that."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import multiprocessing
import os
import queue
import signal
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from smaug_ds.data.quarantine import DataError
from smaug_ds.data.reader import EvalReader, RawBatch, TrainReader
from smaug_ds.data.sample import Batch

if TYPE_CHECKING:  # workers import this module, too: they need no DALI
    from smaug_ds.data.dali import Pixels

_PATIENCE_SECONDS = 10.0  # for a batch that is being made when the iteration is closed
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # they ask a job to save and leave

Reader = TrainReader | EvalReader
_Item = tuple[RawBatch, "Batch | None"]


class Prefetcher:
    """Workers -> DALI in a thread -> a short queue. Iterates over (raw batch, batch on the device), in order.

    An error anywhere is raised where the iteration is.
    """

    def __init__(self, reader: Reader, indices: Iterable[int], pixels: Pixels, workers: int, prefetch: int) -> None:
        before = set(multiprocessing.active_children())
        source = iter(_data_loader(reader, indices, workers, prefetch))
        self._workers = [process for process in multiprocessing.active_children() if process not in before]
        self._ready: queue.Queue[_Item | Exception | None] = queue.Queue(prefetch)
        self._stop = threading.Event()
        arguments = (source, reader, pixels, self._ready, self._stop)
        self._thread = threading.Thread(target=_produce, args=arguments, name="pixels", daemon=True)
        self._thread.start()
        # Also when the program ends, or drops this, without ``close``: workers ignore the signals that would end them.
        self._finalizer = weakref.finalize(self, _end, self._stop, self._thread, self._workers)

    def __iter__(self) -> Iterator[_Item]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, Exception):
                if isinstance(item, (OSError, EOFError)) and (death := self._death()):
                    raise death from item
                raise item
            yield item

    def _death(self) -> DataError | None:
        """A connection breaks when the worker at its other end dies; that is what has to be said."""
        for worker in self._workers:
            worker.join(timeout=1)  # its exit code may come a moment later
            if worker.exitcode:
                return DataError(
                    f"data worker {worker.pid} died with exit code {worker.exitcode} (-9: killed, perhaps for memory; "
                    "fewer data.workers or data.prefetch need less)"
                )
        return None

    def close(self) -> None:
        self._finalizer()


def _data_loader(reader: Reader, indices: Iterable[int], workers: int, prefetch: int) -> DataLoader[RawBatch]:
    # Not fork: this process has threads. The server imports once what all workers need.
    context = multiprocessing.get_context("forkserver") if workers else None
    if context is not None:
        context.set_forkserver_preload(["smaug_ds.data.reader"])
        _start_servers()
    return DataLoader(
        reader,
        batch_size=None,
        sampler=indices,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context=context,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # else it draws from the global one, which a resumed run has to find untouched
    )


def _as_it_is(raw: Any) -> Any:
    return raw


def _start_servers() -> None:
    """Starts the processes that fork the workers and track what they share, deaf to the signals that stop a job.

    Such a signal goes to all processes of a job, and the rank needs its workers until it has saved. These servers are
    programs of their own, with no handlers of ours. They inherit the signal mask of this thread, and the workers
    inherit theirs: what is blocked here stays blocked there. A signal that comes meanwhile is not lost to the rank: it
    waits for the mask to be lifted, or another thread takes it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # again: the tracker's start unblocks some of them
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(worker: int) -> None:
    # A rank that is killed outright cannot end its workers, and the server that forked them lives as long as they do.
    threading.Thread(target=_follow_rank, name="rank", daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _follow_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None, "runs in a worker"
    rank.join()
    os._exit(1)


def _produce(
    source: Iterator[RawBatch],
    reader: Reader,
    pixels: Pixels,
    ready: queue.Queue[_Item | Exception | None],
    stop: threading.Event,
) -> None:
    def put(item: _Item | Exception | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    try:
        for raw in source:
            put(_finish(raw, reader, pixels))
            if stop.is_set():
                return
        put(None)
    except Exception as error:  # not handled here, only carried to the training loop
        put(error)


def _finish(raw: RawBatch, reader: Reader, pixels: Pixels) -> _Item:
    """Adds the pixels. A batch with a clip that NVDEC cannot decode is read again, for PyAV to decode.

    The order and the draws are pure, so that is the same batch; but a clip that PyAV cannot decode either is replaced
    (in evaluation left out) and reported like any other.
    """
    if raw.batch is None:
        return raw, None
    clips = raw.clips.unpack()
    try:
        frames = pixels(clips)
    except RuntimeError as error:
        if all(clip.encoded is None for clip in clips):
            raise
        warnings.warn(f"NVDEC: {error}; PyAV decodes this batch, which is slow", RuntimeWarning, stacklevel=1)
        without_nvdec = copy.copy(reader)
        without_nvdec.encoded_codecs = frozenset()
        return _finish(without_nvdec[raw.index], reader, pixels)
    return raw, dataclasses.replace(raw.batch, frames=frames).to(pixels.device)


def _end(stop: threading.Event, thread: threading.Thread, workers: Sequence[BaseProcess]) -> None:
    """Ends the thread, and with it the worker processes; one that hangs is killed."""
    stop.set()
    thread.join(timeout=_PATIENCE_SECONDS)
    for worker in workers:
        worker.join(timeout=_PATIENCE_SECONDS if not thread.is_alive() else 0)
        if worker.is_alive():
            worker.kill()
            worker.join()
    thread.join()
