"""The shard index: where every sample of a folder of WebDataset tars lies, and the facts about its media.

Layout, beside the tars of ``FOLDER``::

    FOLDER/index/manifest.json   format, shards (name, bytes, samples), skipped tars (name, bytes, reason),
                                 vocabularies, totals, rejects by reason
    FOLDER/index/samples.npy     one SAMPLE_DTYPE record per sample, in the order of the tars
    FOLDER/index/medium.npy      (N,) uint8, position in MEDIA          } apart from the records, because choosing a
    FOLDER/index/bucket.npy      (N,) uint32, hash of the media id      } split reads these columns as a whole
    FOLDER/index/keys.npy        (bytes,) uint8, the keys one after the other
    FOLDER/index/rejects.jsonl   one line per sample that was left out: shard, key, reason, detail

Nothing as long as the corpus is held in memory: the two columns of the split are memory-mapped, so the processes of a
node share them; records and keys are read one at a time. ``smaug_ds.data.indexing.build_index`` writes an index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smaug_ds.data.media import MediaFacts
from smaug_ds.data.quarantine import DataError
from smaug_ds.data.sample import MEDIA, Medium, Sample
from smaug_ds.data.shard import Entry, ShardError, ShardFile, tar_sizes

FORMAT = 1
SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "u4"),
        ("key_offset", "u8"),  # into keys.npy
        ("key_size", "u4"),
        ("medium", "u1"),  # position in MEDIA
        ("suffix", "u1"),  # position in the manifest's suffixes
        ("media_offset", "u8"),  # of the member's data in the tar, bytes; so are text and json
        ("media_size", "u8"),
        ("text_offset", "u8"),
        ("text_size", "u4"),  # 0: the captions are in the json
        ("json_offset", "u8"),
        ("json_size", "u4"),  # 0: the json adds nothing that a reader needs
        ("media_hash", "u8"),  # stable_hash of the json's media_id, or of the media's bytes
        ("captions", "u4"),
        # MediaFacts, in the order of its fields
        ("codec", "u1"),  # position in the manifest's codecs
        ("pixel_format", "u1"),  # position in the manifest's pixel formats
        ("width", "u4"),
        ("height", "u4"),
        ("frames", "u4"),
        ("declared_frames", "i8"),
        ("fps", "f4"),
        ("duration_s", "f4"),
        ("rotation", "u2"),
        ("key_frames", "u4"),
    ]
)
COLUMNS = ("samples", "medium", "bucket")

_OPEN_SHARDS = 32  # file descriptors kept open per process
_CACHED_ROWS = 256  # shards whose filtered rows are kept, about 30 kB each


class ShardIndex:
    """One indexed folder of tars. Open it with ``ShardIndex.open``; a pickled copy maps the index again.

    The copy does not look at the tars: what happened to one since the run began is its samples' affair, not the end of
    a worker that starts anew. But it has to be the same index: in another a row is another sample.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict,
        digest: str,  # of the manifest's file
        samples: _Records,
        medium: np.ndarray,
        bucket: np.ndarray,
        keys: _Records,
    ) -> None:
        self.folder, self.manifest, self._digest = folder, manifest, digest
        self.medium, self.bucket = medium, bucket
        self.shards = [str(folder / shard["name"]) for shard in manifest["shards"]]
        self.starts = np.cumsum([0] + [shard["samples"] for shard in manifest["shards"]]).tolist()
        self._samples, self._keys = samples, keys
        self._shard_file = lru_cache(_OPEN_SHARDS)(ShardFile)

    @classmethod
    def open(cls, folder: str | Path) -> ShardIndex:
        """Maps the index of ``folder`` after comparing it with the tars that lie there.

        Raises:
            ShardError: no folder, no tar, no index, or tars that changed since they were indexed.
        """
        folder = Path(folder)
        present = tar_sizes(folder)
        remedy = _remedy(folder)
        opened = cls._map(folder, len(present))
        for shard in opened.manifest["shards"]:
            name, size = shard["name"], present.pop(shard["name"], None)
            if size is None:
                raise ShardError(f"{folder / name} is in the index but missing; bring it back, or {remedy}")
            if size != shard["bytes"]:
                raise ShardError(f"{folder / name} has {size} bytes, {shard['bytes']} when it was indexed; {remedy}")
        for tar in opened.manifest.get("skipped", ()):  # left out on purpose, as long as it is the same
            if present.get(tar["name"]) == tar["bytes"]:
                del present[tar["name"]]
        if present:
            raise ShardError(f"{folder / min(present)} and {len(present) - 1} more tars are not in the index; {remedy}")
        return opened

    @classmethod
    def _map(cls, folder: Path, tars: int = 0, expected: str = "") -> ShardIndex:
        """Maps the index of ``folder``, which holds so many ``tars``, without looking at them. ``expected``: digest of
        its manifest, if it has to be a certain one."""
        index, remedy = folder / "index", _remedy(folder)
        try:
            written = (index / "manifest.json").read_bytes()
            manifest = json.loads(written)
        except FileNotFoundError:
            raise ShardError(f"{folder} has {tars} tars but no index; {remedy}") from None
        except ValueError as error:
            raise ShardError(f"{index / 'manifest.json'} is damaged ({error}); {remedy}") from error
        digest = hashlib.sha256(written).hexdigest()
        if expected not in ("", digest):
            raise ShardError(f"{folder} was indexed anew while it is in use: start again with what is there now")
        if manifest["format"] != FORMAT:
            raise ShardError(f"{index} has format {manifest['format']}, this version reads {FORMAT}; {remedy}")
        total = sum(shard["samples"] for shard in manifest["shards"])
        samples, medium, bucket = (_mapped(index / f"{name}.npy", total, remedy) for name in COLUMNS)
        keys = _mapped(index / "keys.npy", manifest["key_bytes"], remedy)
        return cls(folder, manifest, digest, _Records(samples), np.asarray(medium), np.asarray(bucket), _Records(keys))

    def __reduce__(self) -> tuple:
        return ShardIndex._map, (self.folder, 0, self._digest)

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def totals(self) -> dict[str, Any]:
        """Counts of the whole index, as ``IndexReport`` has them: "samples", "captions", "rejects" ..."""
        return self.manifest["totals"]

    def entry(self, row: int) -> Entry:
        """The sample at ``row``, in the order of the tars. Raises DataError if a file of the index cannot be read."""
        # fmt: off
        (shard, key_offset, key_size, medium, suffix, media_offset, media_size, text_offset, text_size, json_offset,
         json_size, media_hash, captions, codec, pixel_format, *facts) = self._samples.read(row, 1)[0].item()
        # fmt: on
        names = self.manifest
        return Entry(
            shard=self.shards[shard],
            key=self._keys.read(key_offset, key_size).tobytes().decode("utf-8"),
            medium=MEDIA[medium],
            suffix=names["suffixes"][suffix],
            media_offset=media_offset,
            media_size=media_size,
            text_offset=text_offset,
            text_size=text_size,
            json_offset=json_offset,
            json_size=json_size,
            media_hash=media_hash,
            captions=captions,
            facts=MediaFacts(names["codecs"][codec], names["pixel_formats"][pixel_format], *facts),
        )

    def read_sample(self, entry: Entry) -> Sample:
        """The media and captions of ``entry``, in one read of the tar.

        Raises:
            ShardError: the tar cannot be read, or something else than ``entry`` stands there.
        """
        try:
            try:
                return self._shard_file(entry.shard).read(entry)
            except OSError:  # handles go stale when the storage was away; perhaps a new one can be had
                self._shard_file.cache_clear()
                return self._shard_file(entry.shard).read(entry)
        except OSError as error:
            raise ShardError(f"{entry.shard} cannot be read at sample {entry.key}: {error}") from error


class Corpus:
    """One split of several indexed folders, their shards numbered through: what the order and the loader see."""

    def __init__(self, indexes: Sequence[ShardIndex], holdout: float, split: Literal["train", "test"]) -> None:
        self.indexes, self.holdout, self.split = tuple(indexes), holdout, split
        self._limit = np.uint64(round(holdout * 2**32))  # 64 bits: all buckets of 32 bits lie below a hold-out of 1
        self._shards = [(index, shard) for index in self.indexes for shard in range(len(index.shards))]
        self._by_path = {path: index for index in self.indexes for path in index.shards}
        self._rows = lru_cache(_CACHED_ROWS)(self._rows_of_shard)
        self._sizes: dict[Medium, np.ndarray] = {
            medium: np.array([np.count_nonzero(self._chosen(medium, shard)) for shard in range(len(self._shards))])
            for medium in MEDIA
        }
        self._ends = {medium: np.cumsum(sizes) for medium, sizes in self._sizes.items()}
        if not len(self):
            raise ShardError(
                f"no {split} samples in {', '.join(str(index.folder) for index in self.indexes)}: "
                f"{sum(map(len, self.indexes))} samples with data.holdout={holdout}"
            )

    @classmethod
    def open(cls, folders: Sequence[str | Path], holdout: float, split: Literal["train", "test"]) -> Corpus:
        """Opens the indexes of ``folders`` and keeps one split.

        A sample belongs to "test" if the hash of its media id falls into the share ``holdout`` (0 to 1), else to
        "train": all samples of one media go the same way, whatever else is in the corpus. So 0 trains on everything
        and, for folders that are a test set as they are, 1 tests on everything.

        Raises:
            ShardError: no folder given, one that ``ShardIndex.open`` refuses, or a split without samples.
        """
        if not folders:
            raise ShardError(f"no shard folders: set data.{split}")
        if not 0 <= holdout <= 1:
            raise ShardError(f"data.holdout is {holdout}: give a share from 0 to 1")
        return cls([ShardIndex.open(folder) for folder in folders], holdout, split)

    def __reduce__(self) -> tuple:
        return Corpus, (self.indexes, self.holdout, self.split)

    def __len__(self) -> int:
        return sum(self.count(medium) for medium in MEDIA)

    def count(self, medium: Medium) -> int:
        """Number of samples of this medium in the split."""
        return int(self._ends[medium][-1])

    def sizes(self) -> dict[Medium, np.ndarray]:
        """(shards,) samples of each medium in each shard: what ``Order`` is built from."""
        return dict(self._sizes)

    def entry(self, medium: Medium, shard: int, index: int) -> Entry:
        """The ``index``-th sample of ``medium`` of this split in shard number ``shard``."""
        return self._shards[shard][0].entry(self._rows(medium, shard)[index])

    def nth(self, medium: Medium, number: int) -> Entry:
        """The ``number``-th sample of ``medium`` (0 to ``count`` - 1) in the order of the shards, as tests go."""
        ends = self._ends[medium]
        shard = int(np.searchsorted(ends, number, side="right"))
        return self.entry(medium, shard, number - (int(ends[shard - 1]) if shard else 0))

    def read_sample(self, entry: Entry) -> Sample:
        """See ``ShardIndex.read_sample``."""
        return self._by_path[entry.shard].read_sample(entry)

    def _chosen(self, medium: Medium, shard: int) -> np.ndarray:
        """(samples of the shard,) True where the sample is of this medium and split."""
        index, local = self._shards[shard]
        rows = slice(index.starts[local], index.starts[local + 1])
        held_out = index.bucket[rows] < self._limit
        return (index.medium[rows] == MEDIA.index(medium)) & (held_out if self.split == "test" else ~held_out)

    def _rows_of_shard(self, medium: Medium, shard: int) -> np.ndarray:
        index, local = self._shards[shard]
        return np.flatnonzero(self._chosen(medium, shard)) + index.starts[local]


class _Records:
    """Rows of a .npy file read by offset. Through the map, the pages touched would count as memory of every worker and
    grow over an epoch to the size of the file."""

    def __init__(self, column: np.memmap) -> None:
        self._dtype, self._start, self._path = column.dtype, column.offset, str(column.filename)
        self._descriptor = os.open(self._path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, first: int, count: int) -> np.ndarray:
        size = self._dtype.itemsize
        try:
            data = os.pread(self._descriptor, count * size, self._start + int(first) * size)
        except OSError as error:
            raise DataError(f"{self._path} can no longer be read ({error}): mend it and start again") from error
        if len(data) < count * size:
            raise DataError(f"{self._path} was cut short while it was open; index the folder again")
        return np.frombuffer(data, self._dtype)


def _remedy(folder: Path) -> str:
    return f"run: python tools/index_shards.py {folder}"


def _mapped(path: Path, length: int, remedy: str) -> np.memmap:
    try:
        column = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} cannot be read ({error}); {remedy}") from error
    if len(column) != length:
        raise ShardError(f"{path} has {len(column)} rows instead of {length}; {remedy}")
    return column
