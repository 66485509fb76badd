"""Clips, images and captions rendered for measurements, as indexed shards.

What a decoder costs depends on what it decodes. The clips pan over a random texture with a moving square and grain:
at the default size about 360 kbit/s, in the range of stock footage at that size. Same number, same bytes.
"""

from __future__ import annotations

import functools
import io
import tarfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from smaug_ds.data.indexing import build_index
from smaug_ds.data.sample import MEDIA, Medium
from smaug_ds.text import train_vocabulary

PER_SHARD = 16
_WORDS = "a the red blue small large dog cat bird child woman man runs walks sits beside near over under table tree"
_X264 = {"crf": "23", "preset": "medium", "sc_threshold": "0"}
_GRAIN = 6  # standard deviation, of 255


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
