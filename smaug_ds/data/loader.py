"""Batches on the device, in the order that ``Order`` names: workers read and decode, a thread runs the DALI graph.

The state of a training loader is the step that comes next; everything else follows from it. Workers run ahead, but what
they report is believed, and the step counted, only when the training loop takes the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from smaug_ds import distributed
from smaug_ds.data.index import Corpus
from smaug_ds.data.order import Order
from smaug_ds.data.quarantine import Budget, DataError, Ledger
from smaug_ds.data.reader import DataConfig, EvalReader, RawBatch, TrainReader
from smaug_ds.data.sample import Batch, BatchShape
from smaug_ds.text import Tokenizer

if TYPE_CHECKING:
    from smaug_ds.data.dali import Pixels

__all__ = ["DataConfig", "DataError", "EvalLoader", "TrainLoader"]

_BUDGET_WINDOW = 1000  # samples
_PATIENCE_SECONDS = 10.0  # for a batch that is being made when the loader is closed


class TrainLoader:
    """Endless micro batches of this rank, ``accumulation`` for each step, from the step in the state on.

    Use it as a context manager, or call ``close``: its workers end with it.

    Args:
        corpus, order: which samples, and when. The order's global batch is micro batch * accumulation * ranks.
        shape: what the model needs of a batch.
        seed: of the random draws of samples.
        ledger: gets a line for every sample that cannot be used.
    """

    def __init__(
        self,
        corpus: Corpus,
        order: Order,
        tokenizer: Tokenizer,
        data_config: DataConfig,
        shape: BatchShape,
        seed: int,
        micro_batch: int,
        accumulation: int,
        device: torch.device,
        ledger: Ledger,
    ) -> None:
        # Workers import this module, too: they need no DALI.
        from smaug_ds.data.dali import Pixels, choose_decoder

        world_size = distributed.world_size()
        if micro_batch * accumulation * world_size != order.global_batch:
            raise ValueError(
                f"the order's global batch is {order.global_batch}, but {micro_batch} (micro batch) * {accumulation} "
                f"(accumulation) * {world_size} (ranks) are {micro_batch * accumulation * world_size}"
            )
        self.decoder = choose_decoder(data_config.decoder, device)
        self._reader = TrainReader(
            corpus,
            order,
            tokenizer,
            data_config,
            shape,
            seed,
            micro_batch,
            accumulation,
            distributed.rank(),
            world_size,
            self.decoder.codecs,
        )
        self._pixels = Pixels(shape.image_size, micro_batch, device, data_config.dali_threads)
        self._config = data_config
        self._ledger = ledger
        self._budget = Budget(data_config.max_failed_share, _BUDGET_WINDOW)
        self._step = 0
        self._pipeline: _Pipeline | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Begins at the step in the state; a second iteration ends the first.

        Raises DataError when too many samples fail.
        """
        self.close()
        accumulation = self._reader.accumulation
        indices = itertools.count(self._step * accumulation)
        config = self._config
        self._pipeline = _Pipeline(self._reader, indices, self._pixels, config.workers, config.prefetch)
        for place, (raw, batch) in enumerate(self._pipeline):
            self._account(raw)
            assert batch is not None, "a micro batch without samples ends the run in _account"
            if place % accumulation == accumulation - 1:
                self._step = raw.step + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The step whose first micro batch comes next, or which is under way."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes effect at the next ``iter``."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends workers and thread. May be called twice; the loader can be iterated again."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _account(self, raw: RawBatch) -> None:
        for failure in raw.failures:
            self._ledger.write(failure)
        if raw.batch is None:
            raise DataError(
                f"{len(raw.failures)} candidates for one place of step {raw.step} failed in a row, "
                f"data.max_consecutive_failures is {self._config.max_consecutive_failures}; see {self._ledger.path}"
            )
        if not self._budget.spend(len(raw.batch.keys), len(raw.failures)):
            raise DataError(
                f"more than {self._config.max_failed_share:.0%} of the latest {_BUDGET_WINDOW} samples failed "
                f"(data.max_failed_share); see {self._ledger.path}"
            )


class EvalLoader:
    """This rank's share of a split: every sample once, centre crop, frames from the middles of the segments.

    Each ``iter`` begins anew. What shares a batch does not depend on the number of ranks. Samples that cannot be used
    are left out: ``failed`` counts those of the last iteration on this rank, ``ledger`` gets a line for each.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        data_config: DataConfig,
        shape: BatchShape,
        batch_size: int,
        device: torch.device,
        ledger: Ledger,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        from smaug_ds.data.dali import Pixels, choose_decoder

        self.decoder = choose_decoder(data_config.decoder, device)
        self._reader = EvalReader(
            corpus,
            tokenizer,
            shape,
            batch_size,
            distributed.rank() if rank is None else rank,
            distributed.world_size() if world_size is None else world_size,
            self.decoder.codecs,
        )
        self._pixels = Pixels(shape.image_size, batch_size, device, data_config.dali_threads)
        self._config = data_config
        self._ledger = ledger
        self.failed = 0

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._reader)

    def __iter__(self) -> Iterator[Batch]:
        self.failed = 0
        workers = min(self._config.workers, len(self))
        pipeline = _Pipeline(self._reader, range(len(self)), self._pixels, workers, self._config.prefetch)
        with contextlib.closing(pipeline) as batches:
            for raw, batch in batches:
                self.failed += len(raw.failures)
                for failure in raw.failures:
                    self._ledger.write(failure)
                if batch is not None:
                    yield batch


_Item = tuple[RawBatch, "Batch | None"]


class _Pipeline:
    """Workers -> DALI in a thread -> a short queue. Iterates over (raw batch, batch on the device), in order.

    An error anywhere is raised where the iteration is.
    """

    def __init__(
        self, reader: Dataset[RawBatch], indices: Iterable[int], pixels: Pixels, workers: int, prefetch: int
    ) -> None:
        before = set(multiprocessing.active_children())
        source = iter(_data_loader(reader, indices, workers, prefetch))
        self._workers = [process for process in multiprocessing.active_children() if process not in before]
        self._ready: queue.Queue[_Item | Exception | None] = queue.Queue(prefetch)
        self._stop = threading.Event()
        arguments = (source, pixels, self._ready, self._stop)
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


def _data_loader(
    reader: Dataset[RawBatch], indices: Iterable[int], workers: int, prefetch: int
) -> DataLoader[RawBatch]:
    # Not fork: this process has threads. The server imports once what all workers need.
    context = multiprocessing.get_context("forkserver") if workers else None
    if context is not None:
        context.set_forkserver_preload(["smaug_ds.data.reader"])
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


def _begin_worker(worker: int) -> None:
    """A signal to stop goes to all processes of a job: the rank needs its workers until it has saved."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _produce(
    source: Iterator[RawBatch],
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
            batch = None
            if raw.batch is not None:
                frames = pixels(raw.clips.unpack())
                batch = dataclasses.replace(raw.batch, frames=frames).to(pixels.device)
            put((raw, batch))
            if stop.is_set():
                return
        put(None)
    except Exception as error:  # not handled here, only carried to the training loop
        put(error)


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
