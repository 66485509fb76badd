"""A corpus of any size that takes little space: real indexes over tars that are holes, filled where somebody looks."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from numpy.lib.format import open_memmap

from smaug_ds.data.index import FORMAT, SAMPLE_DTYPE
from smaug_ds.data.indexing import IndexReport
from smaug_ds.data.sample import MEDIA, Medium
from smaug_ds.data.shard import Entry
from tools.profiling.clips import ClipStyle, render_clip, render_image

# The sets of the corpus of 17 million pairs, and millions of samples of each.
SETS: dict[str, tuple[Medium, float]] = {
    "webvid": ("video", 2.5),
    "cc3m": ("image", 2.95),
    "cc12m": ("image", 10.77),
    "sbu": ("image", 0.86),
    "vg": ("image", 0.77),
    "coco": ("image", 0.57),
}
CAPTION = "a small red bird sits under the old table"
MANIFEST = "corpus.yaml"
_STYLE = ClipStyle(width=160, height=120, seconds=1.0)
_KEY_DIGITS = 8
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class SyntheticSet:
    """One folder of shards: equal samples of one medium, told apart by their keys (the row, eight digits)."""

    folder: Path
    medium: Medium
    counts: tuple[int, ...]  # samples of each shard

    @cached_property
    def media(self) -> bytes:
        """The media file that every sample holds."""
        return render_clip(_STYLE, 0) if self.medium == "video" else render_image(_STYLE, 0)

    @cached_property
    def starts(self) -> np.ndarray:
        """(shards + 1,) row of each shard's first sample, and the number of all."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def stride(self) -> int:
        """Bytes of a sample in its tar."""
        return sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in (len(self.media), len(CAPTION)))

    @property
    def suffix(self) -> str:
        return "mp4" if self.medium == "video" else "jpg"

    def records(self, rows: np.ndarray) -> np.ndarray:
        """What ``samples.npy`` holds for these rows (n,)."""
        records = np.zeros(len(rows), SAMPLE_DTYPE)
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        begins = (rows - self.starts[shard]) * self.stride
        records["shard"], records["medium"] = shard, MEDIA.index(self.medium)
        records["key_offset"], records["key_size"] = rows * _KEY_DIGITS, _KEY_DIGITS
        records["media_offset"], records["media_size"] = begins + _BLOCK, len(self.media)
        records["text_offset"], records["text_size"] = begins + self.stride - _BLOCK, len(CAPTION)
        records["media_hash"] = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(1)
        records["captions"] = 1
        records["width"], records["height"] = _STYLE.width, _STYLE.height
        records["frames"] = records["key_frames"] = 1 if self.medium == "image" else round(_STYLE.seconds * _STYLE.fps)
        return records

    def write(self, filled: bool) -> None:
        """Tars without content, and the index; ``filled``: with every record and key, else with holes there."""
        index = self.folder / "index"
        index.mkdir(parents=True)
        total = int(self.starts[-1])
        shards = []
        for number, count in enumerate(self.counts):
            path = self.folder / f"{number:05d}.tar"
            with path.open("wb") as tar:
                tar.truncate(count * self.stride + 2 * _BLOCK)
            shards.append({"name": path.name, "bytes": count * self.stride + 2 * _BLOCK, "samples": count})
        open_memmap(index / "samples.npy", "w+", SAMPLE_DTYPE, (total,))
        open_memmap(index / "keys.npy", "w+", np.dtype(np.uint8), (total * _KEY_DIGITS,))
        np.save(index / "medium.npy", np.full(total, MEDIA.index(self.medium), dtype=np.uint8))
        bucket = open_memmap(index / "bucket.npy", "w+", np.dtype(np.uint32), (total,))
        for start, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            rows = np.arange(start, end)
            bucket[start:end] = self.records(rows)["media_hash"] >> np.uint64(31)
            if filled:
                self.fill(rows)
        video = self.medium == "video"
        totals = IndexReport(samples=total, images=0 if video else total, videos=total if video else 0, captions=total)
        codec, pixel_format = ("h264", "yuv420p") if video else ("jpeg", "RGB")
        manifest = {
            "format": FORMAT,
            "shards": shards,
            "key_bytes": total * _KEY_DIGITS,
            "codecs": [codec],
            "pixel_formats": [pixel_format],
            "suffixes": [self.suffix],
            "totals": asdict(totals),
        }
        (index / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    def fill(self, rows: np.ndarray) -> None:
        """Puts the records and keys of these rows (n,) into the index."""
        index = self.folder / "index"
        open_memmap(index / "samples.npy", "r+")[rows] = self.records(rows)
        digits = rows[:, None] // 10 ** np.arange(_KEY_DIGITS - 1, -1, -1) % 10 + ord("0")
        open_memmap(index / "keys.npy", "r+").reshape(-1, _KEY_DIGITS)[rows] = digits

    def put_media(self, entry: Entry) -> None:
        """Writes the members of a sample to where ``entry`` says."""
        with Path(entry.shard).open("r+b") as tar:
            members = ((entry.media_offset, entry.suffix, self.media), (entry.text_offset, "txt", CAPTION.encode()))
            for offset, suffix, data in members:
                header = tarfile.TarInfo(f"{entry.key}.{suffix}")
                header.size = len(data)
                tar.seek(offset - _BLOCK)
                tar.write(header.tobuf() + data)


def write_corpus(folder: Path, samples: int, shards: int, filled: bool) -> list[SyntheticSet]:
    """``SETS`` scaled to so many samples and shards, and a manifest over them, FOLDER/corpus.yaml."""
    millions = sum(count for _, count in SETS.values())
    sets: list[SyntheticSet] = []
    given = np.zeros(2, dtype=int)  # samples, shards
    passed = 0.0
    for name, (medium, count) in SETS.items():
        passed += count
        until = np.rint(np.array([samples, shards]) * passed / millions).astype(int)
        own, own_shards = (until - given).tolist()
        given = until
        edges = np.linspace(0, own, max(own_shards, 1) + 1).astype(int)
        sets.append(SyntheticSet(folder / name, medium, tuple(np.diff(edges).tolist())))
        sets[-1].write(filled)
    manifest = {"sets": [{"name": name, "shards": [str(folder / name)]} for name in SETS]}
    (folder / MANIFEST).write_text(yaml.safe_dump(manifest), encoding="utf-8")
    return sets


def set_of(sets: Sequence[SyntheticSet], entry: Entry) -> SyntheticSet:
    """The set that an entry belongs to."""
    return next(one for one in sets if one.folder == Path(entry.shard).parent)
