"""What a loader's worker does: read, decode, tokenise, and put one micro batch together up to its pixels.

Letters: B batch, T frames, N patches, H height, W width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from smaug_ds.data.clip import Clip, PackedClips, make_clip
from smaug_ds.data.config import DataConfig
from smaug_ds.data.draw import Draws, centre_crop, random_resized_crop
from smaug_ds.data.index import Corpus
from smaug_ds.data.media import MediaError
from smaug_ds.data.order import Order, sample_generator, slots, stable_hash
from smaug_ds.data.quarantine import Failure, Spot, Verdict
from smaug_ds.data.sample import Batch, BatchShape, Medium, Place, Sample
from smaug_ds.data.shard import Entry, ShardError
from smaug_ds.text import IGNORED, TextIds, Tokenizer, mask_tokens

EVALUATION_STEP = -1
_MOST_PASSED_OVER = 1000  # samples known to be bad, in a row: so many leave nothing to train on
EVALUATION_ORDER: tuple[Medium, ...] = ("video", "image")


@dataclass
class RawBatch:
    """A batch whose pixels are still missing, with the clips that they are made from."""

    index: int  # of the reader's item that this is
    step: int
    batch: Batch | None  # ``frames`` is empty; None if there is no usable sample
    clips: PackedClips
    failures: list[Failure]
    spots: list[Spot] = dataclasses.field(default_factory=list)  # of the samples of the batch


class _Filled(NamedTuple):
    spot: Spot
    sample: Sample
    clip: Clip
    draws: Draws


class Watched(Dataset[RawBatch]):
    """A reader that tells which sample it is at, and does not touch again what a worker could not finish."""

    def __init__(self) -> None:
        self.watch: Callable[[Spot | None], None] = _unwatched  # called at the beginning and (None) at the end
        self.verdicts: dict[Spot, Verdict] = {}
        self.pyav_only: frozenset[Place | str] = frozenset()  # samples (``Failure.sample``) that NVDEC refuses
        self.elsewhere: Callable[[Watched, int], RawBatch] | None = None  # makes an item in another process

    def again(self, index: int) -> RawBatch:
        """``self[index]`` for the loader's own process, which no sample may hang: made elsewhere if that can be."""
        return self[index] if self.elsewhere is None else self.elsewhere(self, index)

    def condemn(self, verdicts: Mapping[Spot, Verdict]) -> None:
        """Takes these samples as failed."""
        self.verdicts.update(verdicts)

    @contextlib.contextmanager
    def at(self, spot: Spot) -> Iterator[None]:
        """Around all work on a sample. Raises MediaError if there is a verdict on it."""
        if spot in self.verdicts:
            raise MediaError(*self.verdicts[spot])
        self.watch(spot)
        try:
            yield
        finally:
            self.watch(None)


def _unwatched(spot: Spot | None) -> None:
    pass


class TrainReader(Watched):
    """Item i is micro batch ``i % accumulation`` of step ``i // accumulation`` on this rank. Can be pickled."""

    def __init__(
        self,
        corpus: Corpus,
        order: Order,
        tokenizer: Tokenizer,
        config: DataConfig,
        shape: BatchShape,
        seed: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        encoded_codecs: frozenset[str],
    ) -> None:
        super().__init__()
        self.corpus, self.order, self.tokenizer, self.config = corpus, order, tokenizer, config
        self.shape, self.seed, self.micro_batch, self.accumulation = shape, seed, micro_batch, accumulation
        self.rank, self.world_size, self.encoded_codecs = rank, world_size, encoded_codecs
        self.known_bad: frozenset[Place] = frozenset()  # passed over without a try

    def condemn(self, verdicts: Mapping[Spot, Verdict]) -> None:
        """Takes these samples as failed where they were tried, and passes over them elsewhere."""
        super().condemn(verdicts)
        self.known_bad |= {Place(*spot[1:]) for spot in verdicts}

    def __getitem__(self, index: int) -> RawBatch:
        step, micro_step = divmod(index, self.accumulation)
        medium, positions = self.order.medium(step), self.order.positions(step)
        spots: list[Spot] = []
        samples: list[Sample] = []
        clips: list[Clip] = []
        draws: list[Draws] = []
        failures: list[Failure] = []
        for slot in slots(micro_step, self.rank, self.world_size, self.micro_batch):
            found, failed = self._fill(step, medium, positions[slot])
            failures += failed
            if found is None:
                return RawBatch(index, step, None, PackedClips.pack([]), failures)
            spots.append(found.spot)
            samples.append(found.sample)
            clips.append(found.clip)
            draws.append(found.draws)
        captions = [s.captions[int(d.caption * len(s.captions))] for s, d in zip(samples, draws, strict=True)]
        text = self.tokenizer.encode(captions, self.shape.max_text_length)
        mlm_noise = np.concatenate([d.mlm_noise[:length] for d, length in zip(draws, text.lengths, strict=True)])
        mlm_probability = self.shape.mlm_probability
        masked_ids, labels = mask_tokens(text, torch.from_numpy(mlm_noise), mlm_probability, self.tokenizer)
        batch = _batch(step, medium, samples, captions, draws, text, masked_ids, labels)
        if answers := [sample.answer for sample in samples if sample.answer is not None]:
            answer_ids, answer_lengths = self.tokenizer.encode(answers, self.shape.max_text_length)
            batch = dataclasses.replace(batch, answer_ids=answer_ids, answer_lengths=answer_lengths)
        if wrong := [text for sample in samples for text in sample.wrong]:
            wrong_ids, wrong_lengths = self.tokenizer.encode(wrong, self.shape.max_text_length)
            counts = [len(sample.wrong) for sample in samples]
            batch = dataclasses.replace(batch, wrong_ids=wrong_ids, wrong_lengths=wrong_lengths, wrong_counts=counts)
        return RawBatch(index, step, batch, PackedClips.pack(clips), failures, spots)

    def _fill(self, step: int, medium: Medium, position: int) -> tuple[_Filled | None, list[Failure]]:
        """The first usable candidate for ``position``, and the failures before it."""
        failures: list[Failure] = []
        frames = self.shape.frames if medium == "video" else 1
        for place in self._candidates(medium, position):
            draws = Draws.of(sample_generator(self.seed, position, medium), self.shape, frames)
            window = functools.partial(
                random_resized_crop, scale=self.config.crop_scale, ratio=self.config.crop_ratio, uniform=draws.crop
            )
            entry = self.corpus.entry(*place)
            spot = Spot(position, *place)
            try:
                with self.at(spot):
                    sample = self.corpus.read_sample(entry)
                    flip = draws.flip < self.config.flip
                    codecs = frozenset() if place in self.pyav_only else self.encoded_codecs
                    clip = make_clip(sample, entry.facts, frames, draws.generator, flip, window, codecs)
            except (MediaError, ShardError) as error:
                failures.append(_failure(step, position, place, entry, error))
            else:
                name = f"{entry.shard}/{entry.key}"
                return _Filled(spot, sample, clip, draws), [dataclasses.replace(f, replaced_by=name) for f in failures]
        return None, failures

    def _candidates(self, medium: Medium, position: int) -> Iterator[Place]:
        """The samples to try for ``position``, one after the other."""
        most = self.config.max_consecutive_failures
        every = range(min(self.order.samples(medium), most + _MOST_PASSED_OVER))
        places = (Place(medium, *self.order.candidate(medium, position, attempt)) for attempt in every)
        due = (place for place in places if place not in self.known_bad or Spot(position, *place) in self.verdicts)
        return itertools.islice(due, most)


class EvalReader(Watched):
    """Item i is batch ``rank + i * world_size`` of the split: its samples in the order of the shards, videos first.

    Which samples share a batch does not depend on the number of ranks. Samples that fail are left out, never replaced.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        shape: BatchShape,
        batch_size: int,
        rank: int,
        world_size: int,
        encoded_codecs: frozenset[str],
    ) -> None:
        super().__init__()
        self.corpus, self.tokenizer, self.shape, self.encoded_codecs = corpus, tokenizer, shape, encoded_codecs
        batches: list[tuple[Medium, range]] = []
        for medium in EVALUATION_ORDER:
            count = corpus.count(medium)
            batches += [(medium, range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> RawBatch:
        medium, numbers = self.batches[index]
        frames = self.shape.frames if medium == "video" else 1
        spots: list[Spot] = []
        samples: list[Sample] = []
        clips: list[Clip] = []
        failures: list[Failure] = []
        for number in numbers:
            entry = self.corpus.nth(medium, number)
            spot = Spot(number, medium)
            try:
                with self.at(spot):
                    sample = self.corpus.read_sample(entry)
                    codecs = frozenset() if f"{entry.shard}/{entry.key}" in self.pyav_only else self.encoded_codecs
                    clips.append(make_clip(sample, entry.facts, frames, None, False, centre_crop, codecs))
                    samples.append(sample)
                    spots.append(spot)
            except (MediaError, ShardError) as error:
                failures.append(_failure(EVALUATION_STEP, number, None, entry, error))
        if not samples:
            return RawBatch(index, EVALUATION_STEP, None, PackedClips.pack([]), failures)
        captions = [sample.captions[0] for sample in samples]
        text = self.tokenizer.encode(captions, self.shape.max_text_length)
        labels = torch.full_like(text.input_ids, IGNORED)
        neutral = [Draws.neutral(self.shape, frames)] * len(samples)
        batch = _batch(EVALUATION_STEP, medium, samples, captions, neutral, text, text.input_ids, labels)
        return RawBatch(index, EVALUATION_STEP, batch, PackedClips.pack(clips), failures, spots)


def _batch(
    step: int,
    medium: Medium,
    samples: Sequence[Sample],
    captions: list[str],
    draws: Sequence[Draws],
    text: TextIds,
    masked_ids: Tensor,
    mlm_labels: Tensor,
) -> Batch:
    return Batch(
        step=step,
        medium=medium,
        frames=torch.empty(0, dtype=torch.uint8),
        lengths=text.lengths,
        input_ids=text.input_ids,
        masked_ids=masked_ids,
        mlm_labels=mlm_labels,
        mlm_positions=(mlm_labels != IGNORED).nonzero().squeeze(1),
        media_ids=torch.tensor([stable_hash(sample.media_id) for sample in samples]),
        patch_noise=_stack([draw.patch_noise for draw in draws]),
        frame_noise=_stack([draw.frame_noise for draw in draws]),
        negative_noise=_stack([draw.negative_noise for draw in draws]),
        keys=[f"{sample.shard}/{sample.key}" for sample in samples],
        captions=captions,
        all_captions=[sample.captions for sample in samples],
    )


def _stack(arrays: Sequence[NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _failure(step: int, position: int, place: Place | None, entry: Entry, error: MediaError | ShardError) -> Failure:
    stage, reason = (error.stage, error.reason) if isinstance(error, MediaError) else ("read", str(error))
    return Failure(step, position, place, entry.shard, entry.key, stage, reason)
