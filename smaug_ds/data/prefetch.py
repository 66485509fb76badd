"""Between a reader and a loop over batches: workers read and decode ahead, a thread runs the DALI graph on that."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from smaug_ds.data.pool import Limits, Pool
from smaug_ds.data.quarantine import DataError
from smaug_ds.data.reader import RawBatch, Watched
from smaug_ds.data.rescue import Reader, finish
from smaug_ds.data.sample import Batch

if TYPE_CHECKING:  # workers import this package, too: they need no DALI
    from smaug_ds.data.dali import Pixels

_PATIENCE_SECONDS = 10.0  # for a batch that is being made when the iteration is closed
_LOOK_SECONDS = 0.1  # between looks whether it is closed

_Item = tuple[RawBatch, "Batch | None"]


class Prefetcher:
    """Workers -> DALI in a thread -> a short queue. Iterates over (raw batch, batch on the device), in order.

    An error anywhere is raised where the iteration is.

    Args:
        workers: processes; with 0 the thread reads and decodes, and nothing can end a sample that hangs.
        prefetch: items that each worker has ready, and as many again on the device.
        limits: of the workers' time.
    """

    def __init__(
        self, reader: Reader, indices: Iterable[int], pixels: Pixels, workers: int, prefetch: int, limits: Limits
    ) -> None:
        self._ready: queue.Queue[_Item | Exception | None] = queue.Queue(prefetch)
        self._stop = stop = threading.Event()
        pool = Pool(reader, indices, workers, prefetch, limits, stop) if workers else None
        reader.elsewhere = functools.partial(_make_elsewhere, reader, limits, stop) if workers else None
        source = pool if pool is not None else map(reader.__getitem__, indices)
        arguments = (source, reader, pixels, self._ready, stop)
        thread = threading.Thread(target=_produce, args=arguments, name="pixels", daemon=True)
        thread.start()
        # Also when the program ends, or drops this, without ``close``.
        self._finalizer = weakref.finalize(self, _end, stop, thread, pool)

    def __iter__(self) -> Iterator[_Item]:
        """Ends with the indices, or when this is closed."""
        while not self._stop.is_set():
            try:
                item = self._ready.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        self._finalizer()


def _produce(
    source: Iterable[RawBatch],
    reader: Reader,
    pixels: Pixels,
    ready: queue.Queue[_Item | Exception | None],
    stop: threading.Event,
) -> None:
    def put(item: _Item | Exception | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_LOOK_SECONDS)
                return

    try:
        for raw in source:
            put(finish(raw, reader, pixels))
            if stop.is_set():
                return
        put(None)
    except Exception as error:  # not handled here, only carried to the training loop
        put(error)


def _make_elsewhere(reader: Reader, limits: Limits, stop: threading.Event, variant: Watched, index: int) -> RawBatch:
    """``variant[index]``, made by a process of its own; ``reader`` learns what could not be finished there."""
    known = set(variant.verdicts)
    pool = Pool(variant, [index], 1, 1, limits, stop)
    try:
        for raw in pool:
            reader.condemn({spot: verdict for spot, verdict in variant.verdicts.items() if spot not in known})
            return raw
    finally:
        pool.close()
    raise DataError("closed while a batch was read again")


def _end(stop: threading.Event, thread: threading.Thread, pool: Pool | None) -> None:
    """Ends the workers and the thread; one that hangs, in the storage or the GPU's driver, is left to its fate."""
    stop.set()
    thread.join(timeout=_PATIENCE_SECONDS)
    if pool is not None:
        pool.close()
    thread.join(timeout=_PATIENCE_SECONDS)
