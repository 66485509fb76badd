"""Batches on the device, in the order that ``Order`` names.

The state of a training loader is the step that comes next; everything else follows from it. Workers run ahead, but what
they report is believed, and the step counted, only when the training loop takes the batch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from types import TracebackType

import torch

from smaug_ds import distributed
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.order import Order
from smaug_ds.data.pool import Limits
from smaug_ds.data.prefetch import Prefetcher
from smaug_ds.data.quarantine import Budget, Failure, Ledger, TooManyFailuresError, known_bad, pyav_only
from smaug_ds.data.reader import EvalReader, RawBatch, TrainReader
from smaug_ds.data.sample import Batch, BatchShape
from smaug_ds.text import Tokenizer


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
        self.budget = Budget(data_config.max_failed_share, data_config.failure_window)  # of this rank
        self._step = 0
        self._prefetcher: Prefetcher | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Begins at the step in the state; a second iteration ends the first.

        Raises TooManyFailuresError when too many samples fail.
        """
        self.close()
        accumulation = self._reader.accumulation
        indices = itertools.count(self._step * accumulation)
        config = self._config
        limits = Limits(config.sample_seconds)
        self._prefetcher = Prefetcher(self._reader, indices, self._pixels, config.workers, config.prefetch, limits)
        for place, (raw, batch) in enumerate(self._prefetcher):
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

    def honour(self, failures: Iterable[Failure]) -> None:
        """Takes over what earlier parts of the run learnt, on all ranks: samples that failed are passed over without a
        try, samples that only NVDEC refuses are decoded by PyAV. Takes effect at the next ``iter``.

        Failures to read from the storage, and in time, are not taken over (it may be back). What is passed over counts
        as no failure.
        """
        self.close()
        failures = list(failures)
        self._reader.known_bad |= known_bad(failures)
        self._reader.pyav_only |= pyav_only(failures)

    def close(self) -> None:
        """Ends workers and thread. May be called twice; the loader can be iterated again."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

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
            missing = [failure for failure in raw.failures if failure.replaced_by is None]
            tried = {failure.place for failure in missing if failure.position == missing[-1].position}
            raise TooManyFailuresError(
                f"{len(tried)} candidates for one place of step {raw.step} failed in a row, data."
                f"max_consecutive_failures is {self._config.max_consecutive_failures}; {len(self._reader.known_bad)} "
                f"samples are known to be bad and were not tried; see {self._ledger.path}"
            )
        lost = {failure.name for failure in raw.failures if failure.replaced_by != failure.name}
        if not self.budget.spend(len(raw.batch.keys), len(lost)):
            raise TooManyFailuresError(
                f"more than {self.budget.share:.0%} of the latest {self.budget.window} samples failed "
                f"(data.max_failed_share, data.failure_window); see {self._ledger.path}"
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
        config = self._config
        workers, limits = min(config.workers, len(self)), Limits(config.sample_seconds)
        prefetcher = Prefetcher(self._reader, range(len(self)), self._pixels, workers, config.prefetch, limits)
        with contextlib.closing(prefetcher) as batches:
            for raw, batch in batches:
                self.failed += len({failure.name for failure in raw.failures if failure.replaced_by is None})
                for failure in raw.failures:
                    self._ledger.write(failure)
                if batch is not None:
                    yield batch
