"""Corpora made for measurements: rendered clips, images and captions; and indexes of any size that take little space.

What a decoder costs depends on what it decodes. The clips pan over a random texture with a moving square and grain:
at the default size about 360 kbit/s, in the range of stock footage at that size. Same number, same bytes.

The large ones are real indexes over tars that are holes, filled where somebody looks.
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import av
import numpy as np
import yaml
from av.video.stream import VideoStream
from numpy.lib.format import open_memmap
from PIL import Image

from smaug_ds.data.index import FORMAT, SAMPLE_DTYPE
from smaug_ds.data.indexing import IndexReport, build_index
from smaug_ds.data.sample import MEDIA, Medium
from smaug_ds.data.shard import Entry
from smaug_ds.text import train_vocabulary

PER_SHARD = 16
_WORDS = "a the red blue small large dog cat bird child woman man runs walks sits beside near over under table tree"
_X264 = {"crf": "23", "preset": "medium", "sc_threshold": "0"}
_GRAIN = 6  # standard deviation, of 255

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
_KEY_DIGITS = 8
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class ClipStyle:
    """What is rendered."""

    width: int = 320  # pixels
    height: int = 240
    seconds: float = 10.0
    fps: int = 30
    key_frame_each: int = 50  # frames

    def __str__(self) -> str:
        return (
            f"{self.seconds:g} s H.264 {self.width}x{self.height}, {self.fps} frames/s, "
            f"key frame each {self.key_frame_each} frames, x264 preset {_X264['preset']}, crf {_X264['crf']}"
        )


_STYLE = ClipStyle(width=160, height=120, seconds=1.0)  # of the media in a corpus of any size


def render_corpus(folder: Path, samples: int, style: ClipStyle, workers: int) -> None:
    """Writes ``samples`` clips and as many images: indexed shards FOLDER/video and FOLDER/image, FOLDER/vocab.txt"""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for medium in MEDIA:
            (folder / medium).mkdir(parents=True)
            media = pool.map(functools.partial(_render, medium, style), range(samples))
            _write_shards(folder / medium, media, "mp4" if medium == "video" else "jpg")
            build_index(folder / medium)
    train_vocabulary((caption(number) for number in range(samples)), 1000, folder / "vocab.txt")


def caption(number: int) -> str:
    """Eight to sixteen words."""
    generator = np.random.default_rng(number)
    return " ".join(generator.choice(_WORDS.split(), generator.integers(8, 17)))


def _write_shards(folder: Path, media: Iterable[bytes], suffix: str) -> None:
    for number, content in enumerate(media):
        with tarfile.open(folder / f"{number // PER_SHARD:05d}.tar", "a") as tar:
            for name, data in ((suffix, content), ("txt", caption(number).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _render(medium: Medium, style: ClipStyle, number: int) -> bytes:
    return render_clip(style, number) if medium == "video" else render_image(style, number)


def render_image(style: ClipStyle, number: int) -> bytes:
    """Image ``number``, twice as wide and high as the clips, as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    pixels = _texture(np.random.default_rng(number), 2 * style.height, 2 * style.width)
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def render_clip(style: ClipStyle, number: int) -> bytes:
    """Clip ``number`` as the bytes of an MP4 file."""
    generator = np.random.default_rng(number)
    height, width = style.height, style.width
    scene, square = _texture(generator, 2 * height, 2 * width), _texture(generator, height // 3, height // 3)
    grain = generator.normal(0, _GRAIN, (height + 60, width + 60, 1)).astype(np.int16)
    speed = generator.uniform(-1, 1, 2)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = cast(VideoStream, container.add_stream("libx264", rate=style.fps, options=_X264))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size, stream.thread_count = style.key_frame_each, 1
        for frame in range(round(style.seconds * style.fps)):
            top, left = ((0.5 + 0.45 * np.sin(speed * frame / 30)) * (height, width)).astype(int)
            pixels = scene[top : top + height, left : left + width].copy()
            top, left = ((0.33 + 0.3 * np.cos(speed * frame / 9)) * (height, width)).astype(int)
            pixels[top : top + len(square), left : left + len(square)] = square
            top, left = generator.integers(0, 60, 2)
            pixels += grain[top : top + height, left : left + width]
            picture = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _texture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) int16 from 0 to 255: noise in octaves, the coarse ones stronger."""
    total = np.full((height, width, 3), 128.0)
    for cells in (4, 8, 16, 32, 64, 128):
        coarse = generator.normal(128, 60 * (4 / cells) ** 0.6, (cells * height // width + 1, cells, 3))
        picture = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
        total += np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).astype(float) - 128
    return total.clip(0, 255).astype(np.int16)


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
