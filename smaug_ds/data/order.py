"""The order of training as a pure function of (seed, step): no state, no ranks, no workers.

Each medium has one endless stream of samples: epoch after epoch, every sample once per epoch. A step takes the next
``global_batch`` positions of one medium's stream; ``Order.medium`` says of which. A position leads to a sample in O(log
shards): the shards are permuted per epoch and cut into groups, the samples are permuted within their group. So reads
stay near-sequential (a window of the stream touches a group of shards or two) and nothing as long as the corpus is
ever permuted.

All random numbers come from the raw 64-bit output of counter-based Philox generators, which NumPy keeps stable between
its versions; so an order outlives an upgrade.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from smaug_ds.data.sample import MEDIA, Medium

# What a Philox key is for. Together with the medium it fills the key's top three bits, so no two uses share numbers.
_SAMPLE, _SHARDS, _GROUP, _REPLACEMENT = range(4)
_COUNTER_BITS = 61

_CACHED_GROUPS = 4  # a micro batch lies in one group or two; the workers of a rank are at most a few steps apart
_CACHED_EPOCHS = 2


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


class _Stream:
    """The endless stream of one medium. ``sizes`` (shards,) samples per shard; ``group`` shards per shuffle group."""

    def __init__(self, medium: Medium, sizes: np.ndarray, seed: int, group: int) -> None:
        self.medium, self.sizes, self.seed, self.group = medium, sizes, seed, group
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
        return epoch, shards[nth], place - (shard_ends[nth - 1] if nth else 0)

    def candidate(self, position: int, attempt: int) -> tuple[int, int]:
        _, shard, index = self.locate(position)
        if attempt == 0:
            return shard, index
        stride = self._stride(position)
        place = (self.ends[shard] - int(self.sizes[shard]) + index + attempt * stride) % self.total
        nth = bisect_right(self.ends, place)
        return nth, place - (self.ends[nth - 1] if nth else 0)

    def _stride(self, position: int) -> int:
        """A number coprime to ``total``, so that its multiples visit every sample before one comes again."""
        generator = _philox(self.seed, _REPLACEMENT, self.medium, position)
        while math.gcd(stride := 1 + int(generator.random_raw()) % self.total, self.total) != 1:
            pass
        return stride

    def _epoch_layout(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The shards in this epoch's order (shards,), and where each group ends in the epoch."""
        shards = _permutation(_philox(self.seed, _SHARDS, self.medium, epoch), len(self.sizes))
        per_group = np.add.reduceat(self.sizes[shards], np.arange(0, len(shards), self.group))
        return shards, np.cumsum(per_group).tolist()

    def _group_layout(self, epoch: int, group: int) -> tuple[np.ndarray, list[int], list[int]]:
        """The group's samples permuted (samples of the group,), its shards, and where each shard ends in the group."""
        all_shards, _ = self._epoch(epoch)
        shards = all_shards[group * self.group : (group + 1) * self.group]
        ends = np.cumsum(self.sizes[shards]).tolist()
        generator = _philox(self.seed, _GROUP, self.medium, epoch * self.groups + group)
        return _permutation(generator, ends[-1]), shards.tolist(), ends


class Order:
    """Which sample stands at which slot of which step.

    Args:
        sizes: per medium the number of training samples in each shard; shards without samples of the medium count 0.
        global_batch: samples of one optimizer step over all ranks.
        seed: of the whole shuffle.
        group: shards per shuffle group. More mixes better, fewer keeps reads closer together.

    Picklable; a copy in another process gives the same answers.
    """

    def __init__(self, sizes: Mapping[Medium, Sequence[int]], global_batch: int, seed: int, group: int = 8) -> None:
        if global_batch < 1 or group < 1:
            raise ValueError(f"global batch ({global_batch}) and shards per shuffle group ({group}) must be at least 1")
        if unknown := set(sizes) - set(MEDIA):
            raise ValueError(f"unknown media {sorted(unknown)}: an order mixes {' and '.join(MEDIA)}")
        self.global_batch, self.seed, self.group = global_batch, seed, group
        self._sizes = {medium: np.asarray(sizes[medium], dtype=np.int64) for medium in MEDIA if medium in sizes}
        self._streams = {
            medium: _Stream(medium, counts, seed, group) for medium, counts in self._sizes.items() if counts.sum()
        }
        self.total = sum(stream.total for stream in self._streams.values())
        if not self.total:
            raise ValueError("no training samples: every shard is empty (or wholly held out)")

    def __reduce__(self) -> tuple:
        return Order, (self._sizes, self.global_batch, self.seed, self.group)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which as many samples were drawn as there are, the last step rounded up."""
        return -(-self.total // self.global_batch)

    def samples(self, medium: Medium) -> int:
        """Number of different samples of this medium: the length of its epoch."""
        return self._streams[medium].total if medium in self._streams else 0

    def medium(self, step: int) -> Medium:
        """The one medium of this step's global batch: its share of the steps is exactly its share of the samples."""
        return "video" if self._video_steps(step + 1) > self._video_steps(step) else "image"

    def positions(self, step: int) -> range:
        """The ``global_batch`` consecutive positions of this step in its medium's endless stream."""
        videos = self._video_steps(step)
        nth = videos if self.medium(step) == "video" else step - videos
        return range(nth * self.global_batch, (nth + 1) * self.global_batch)

    def locate(self, medium: Medium, position: int) -> tuple[int, int, int]:
        """(epoch of the medium, shard, index among the shard's samples of this medium) at ``position``."""
        return self._streams[medium].locate(position)

    def candidate(self, medium: Medium, position: int, attempt: int) -> tuple[int, int]:
        """(shard, index) for ``position`` after ``attempt`` samples failed there; attempt 0 is ``locate``.

        Replacements are spread over the whole medium, since what broke one sample (a lost shard) often broke its
        neighbours; all samples are visited before one comes again.
        """
        return self._streams[medium].candidate(position, attempt)

    def _video_steps(self, steps: int) -> int:
        """Number of video steps among the first ``steps``: Bresenham's line through (total, videos)."""
        return (steps * self.samples("video") + self.total // 2) // self.total
