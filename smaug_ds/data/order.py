"""The order of training as a pure function of (seed, step): no state, no ranks, no workers.

Each set of the mixture has one endless stream of samples per medium: epoch after epoch, every sample once per epoch.
The streams of a medium are laid into one, evenly and in proportion to size times weight. A step takes the next
``global_batch`` positions of one medium's stream; ``Order.medium`` says of which. A position leads to a sample in
O(sets + log shards): a set's shards are permuted per epoch and cut into groups, the samples are permuted within their
group. So reads stay near-sequential (a window of the stream touches a group of shards or two of each set) and nothing
as long as the corpus is ever permuted.

All random numbers come from the raw 64-bit output of counter-based Philox generators, which NumPy keeps stable between
its versions; so an order outlives an upgrade.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from smaug_ds.data.sample import MEDIA, Medium

# What a Philox key is for. Together with the medium it fills the key's top three bits, so no two uses share numbers.
_SAMPLE, _SHARDS, _GROUP, _REPLACEMENT = range(4)
_COUNTER_BITS = 61
_SET_BITS = 13  # the top ones of a counter that belongs to one set

_CACHED_GROUPS = 4  # a micro batch lies in one group or two; the workers of a rank are at most a few steps apart
_CACHED_EPOCHS = 2
_OWN_SET_TRIES = 5  # samples of the set itself that may fail at a position before the others are asked, too


def stable_hash(value: str | bytes) -> int:
    """63-bit hash of a text (or raw bytes), equal on every machine and in every run; fits a signed int64."""
    data = value.encode("utf-8") if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def sample_generator(seed: int, position: int, medium: Medium) -> np.random.Generator:
    """The one generator of all random draws of the sample at ``position`` of the endless stream of ``medium``.

    Different (seed, position, medium) never share a Philox key, so their draws are independent.
    """
    return np.random.Generator(_philox(seed, _SAMPLE, medium, position))


def slots(micro_step: int, rank: int, world_size: int, micro_batch: int) -> range:
    """Slots of a step's global batch that ``rank`` takes in its ``micro_step``-th micro batch.

    Slot ``s`` of step ``k`` is position ``Order.positions(k)[s]``. Over all ranks and micro steps every slot occurs
    once, whatever the layout.
    """
    first = (micro_step * world_size + rank) * micro_batch
    return range(first, first + micro_batch)


def _philox(seed: int, use: int, medium: Medium, counter: int) -> np.random.Philox:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: give one from 0 to 2**64 - 1")
    if not 0 <= counter < 2**_COUNTER_BITS:
        raise ValueError(f"position {counter} is out of range: positions go from 0 to 2**{_COUNTER_BITS} - 1")
    purpose = use * len(MEDIA) + MEDIA.index(medium)
    return np.random.Philox(key=np.array([seed, purpose << _COUNTER_BITS | counter], dtype=np.uint64))


def _permutation(generator: np.random.Philox, length: int) -> np.ndarray:
    """A uniform permutation of ``range(length)``, (length,) uint32.

    The numbers are sorted with random bits above their own: an argsort without ties, several times as fast.
    """
    bits = np.uint64(length.bit_length())
    numbered = generator.random_raw(length) << bits | np.arange(length, dtype=np.uint64)
    numbered.sort()
    return (numbered & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.uint32)


@dataclass(frozen=True)
class SetShards:
    """One set of a mixture: shards ``first`` to ``end`` - 1 of the corpus, each sample ``weight`` times per epoch."""

    first: int
    end: int
    weight: float = 1.0


class _SetStream:
    """The endless stream of one medium of one set. ``sizes`` (shards,) samples of each of its shards; ``first``: number
    of the first of them; ``group`` shards per shuffle group."""

    def __init__(self, medium: Medium, number: int, first: int, sizes: np.ndarray, seed: int, group: int) -> None:
        self.medium, self.first, self.sizes, self.seed, self.group = medium, first, sizes, seed, group
        self._base = number << (_COUNTER_BITS - _SET_BITS)  # no two sets share random numbers
        self.total = int(sizes.sum())
        self.groups = -(-len(sizes) // group)
        self.ends = np.cumsum(sizes).tolist()
        self._epoch = lru_cache(_CACHED_EPOCHS)(self._epoch_layout)
        self._group = lru_cache(_CACHED_GROUPS)(self._group_layout)

    def locate(self, position: int) -> tuple[int, int, int]:
        epoch, offset = divmod(position, self.total)
        _, group_ends = self._epoch(epoch)
        group = bisect_right(group_ends, offset)
        shuffled, shards, shard_ends = self._group(epoch, group)
        place = int(shuffled[offset - (group_ends[group - 1] if group else 0)])
        nth = bisect_right(shard_ends, place)
        return epoch, self.first + shards[nth], place - (shard_ends[nth - 1] if nth else 0)

    def candidate(self, position: int, attempt: int) -> tuple[int, int]:
        _, shard, index = self.locate(position)
        if attempt == 0:
            return shard, index
        stride = self._stride(position)
        own = shard - self.first
        place = (self.ends[own] - int(self.sizes[own]) + index + attempt * stride) % self.total
        nth = bisect_right(self.ends, place)
        return self.first + nth, place - (self.ends[nth - 1] if nth else 0)

    def _stride(self, position: int) -> int:
        """A number coprime to ``total``, so that its multiples visit every sample before one comes again."""
        generator = _philox(self.seed, _REPLACEMENT, self.medium, self._base | position)
        while math.gcd(stride := 1 + int(generator.random_raw()) % self.total, self.total) != 1:
            pass
        return stride

    def _epoch_layout(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The shards in this epoch's order (shards,), and where each group ends in the epoch."""
        shards = _permutation(_philox(self.seed, _SHARDS, self.medium, self._base | epoch), len(self.sizes))
        per_group = np.add.reduceat(self.sizes[shards], np.arange(0, len(shards), self.group))
        return shards, np.cumsum(per_group).tolist()

    def _group_layout(self, epoch: int, group: int) -> tuple[np.ndarray, list[int], list[int]]:
        """The group's samples permuted (samples of the group,), its shards, and where each shard ends in the group."""
        all_shards, _ = self._epoch(epoch)
        shards = all_shards[group * self.group : (group + 1) * self.group]
        ends = np.cumsum(self.sizes[shards]).tolist()
        generator = _philox(self.seed, _GROUP, self.medium, self._base | (epoch * self.groups + group))
        return _permutation(generator, ends[-1]), shards.tolist(), ends


class _Stream:
    """The endless stream of one medium: those of its sets, laid into one.

    A period of the stream holds ``round(weight * samples)`` positions of each set. Bresenham's line spreads the first
    set over it, another the second set over what is left, and so on: any window holds each set's share to within a
    few samples.
    """

    def __init__(self, sets: Sequence[tuple[float, _SetStream]]) -> None:
        self.samples = sum(stream.total for _, stream in sets)
        self._parts = [(max(1, round(weight * stream.total)), stream) for weight, stream in sets]
        self.period = sum(count for count, _ in self._parts)

    def at(self, position: int) -> tuple[_SetStream, int]:
        """The set at ``position``, and the position in the set's own stream."""
        periods, offset = divmod(position, self.period)
        length = self.period
        for count, stream in self._parts:
            before = (offset * count + length // 2) // length  # positions of this set among the first ``offset``
            if ((offset + 1) * count + length // 2) // length > before:
                return stream, periods * count + before
            offset, length = offset - before, length - count
        raise AssertionError("the counts of the sets add up to the period")

    def locate(self, position: int) -> tuple[int, int, int]:
        stream, own = self.at(position)
        return stream.locate(own)

    def candidate(self, position: int, attempt: int) -> tuple[int, int]:
        stream, own = self.at(position)
        in_own_set = min(_OWN_SET_TRIES, stream.total)
        if attempt < in_own_set:
            return stream.candidate(own, attempt)
        # The set may be one sample, or half of it lost: all sets take turns.
        streams = [other for _, other in self._parts]
        turn, nth = divmod(attempt - in_own_set, len(streams))
        other = streams[(streams.index(stream) + 1 + nth) % len(streams)]
        return other.candidate(own, in_own_set + turn if other is stream else turn)


class Order:
    """Which sample stands at which slot of which step.

    Args:
        sizes: per medium the number of training samples in each shard; shards without samples of the medium count 0.
        global_batch: samples of one optimizer step over all ranks.
        seed: of the whole shuffle.
        group: shards per shuffle group. More mixes better, fewer keeps reads closer together.
        sets: the sets of the mixture, which together hold every shard once, in order; by default one set of weight 1.

    An epoch is over when every sample was drawn as often as the weight of its set says. A weight that is no whole
    number gives the set ``round(weight * samples)`` draws per epoch, which go on where the last epoch ended: with 0.5
    every other epoch begins the set anew.

    Picklable; a copy in another process gives the same answers.
    """

    def __init__(
        self,
        sizes: Mapping[Medium, Sequence[int]],
        global_batch: int,
        seed: int,
        group: int = 8,
        sets: Sequence[SetShards] | None = None,
    ) -> None:
        if global_batch < 1 or group < 1:
            raise ValueError(f"global batch ({global_batch}) and shards per shuffle group ({group}) must be at least 1")
        if unknown := set(sizes) - set(MEDIA):
            raise ValueError(f"unknown media {sorted(unknown)}: an order mixes {' and '.join(MEDIA)}")
        self.global_batch, self.seed, self.group = global_batch, seed, group
        self._sizes = {medium: np.asarray(sizes[medium], dtype=np.int64) for medium in MEDIA if medium in sizes}
        shards = max(map(len, self._sizes.values()), default=0)
        self._sets = tuple(sets) if sets is not None else (SetShards(0, shards),)
        _require_partition(self._sets, shards)
        self._streams: dict[Medium, _Stream] = {}
        for medium, counts in self._sizes.items():
            own = [
                (part.weight, _SetStream(medium, number, part.first, counts[part.first : part.end], seed, group))
                for number, part in enumerate(self._sets)
                if counts[part.first : part.end].sum()
            ]
            if own:
                self._streams[medium] = _Stream(own)
        self.total = sum(stream.period for stream in self._streams.values())
        if not self.total:
            raise ValueError("no training samples: every shard is empty (or wholly held out)")

    def __reduce__(self) -> tuple:
        return Order, (self._sizes, self.global_batch, self.seed, self.group, self._sets)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every sample was drawn as often as its weight says, the last step rounded up."""
        return -(-self.total // self.global_batch)

    def samples(self, medium: Medium) -> int:
        """Number of different samples of this medium."""
        return self._streams[medium].samples if medium in self._streams else 0

    def draws(self, medium: Medium) -> int:
        """Number of samples of this medium drawn in an epoch, each as often as its weight says."""
        return self._streams[medium].period if medium in self._streams else 0

    def medium(self, step: int) -> Medium:
        """The one medium of this step's global batch: its share of the steps is exactly its share of the draws."""
        return "video" if self._video_steps(step + 1) > self._video_steps(step) else "image"

    def positions(self, step: int) -> range:
        """The ``global_batch`` consecutive positions of this step in its medium's endless stream."""
        videos = self._video_steps(step)
        nth = videos if self.medium(step) == "video" else step - videos
        return range(nth * self.global_batch, (nth + 1) * self.global_batch)

    def locate(self, medium: Medium, position: int) -> tuple[int, int, int]:
        """(epoch of the set, shard, index among the shard's samples of this medium) at ``position``."""
        return self._streams[medium].locate(position)

    def candidate(self, medium: Medium, position: int, attempt: int) -> tuple[int, int]:
        """(shard, index) for ``position`` after ``attempt`` samples failed there; attempt 0 is ``locate``.

        Replacements are spread over the whole set, since what broke one sample (a lost shard) often broke its
        neighbours; after a few they come from all sets in turn. A set's samples are all visited before one comes again.
        """
        return self._streams[medium].candidate(position, attempt)

    def _video_steps(self, steps: int) -> int:
        """Number of video steps among the first ``steps``: Bresenham's line through (total, videos)."""
        return (steps * self.draws("video") + self.total // 2) // self.total


def _require_partition(sets: Sequence[SetShards], shards: int) -> None:
    """Raises ValueError where ``sets`` do not hold each of so many ``shards`` once, in order, with a weight above 0."""
    end = 0
    for part in sets:
        if part.first != end or part.end < part.first:
            raise ValueError(f"sets must follow one another: one ends at shard {end}, the next begins at {part.first}")
        if not 0 < part.weight < math.inf:
            raise ValueError(
                f"the set of shards {part.first} to {part.end} has weight {part.weight}: it must be above 0"
            )
        end = part.end
    if end != shards or len(sets) >= 2**_SET_BITS:
        raise ValueError(f"{len(sets)} sets (fewer than {2**_SET_BITS} can be) hold {end} shards of {shards}")
