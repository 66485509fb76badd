"""Small media and tars made on the spot, for tests of the data path."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from smaug_ds.data.index import ShardIndex
from smaug_ds.data.indexing import build_index
from smaug_ds.data.sample import Sample
from smaug_ds.data.shard import Entry


def make_image(shade: int, suffix: str = "jpg", size: tuple[int, int] = (24, 16)) -> bytes:
    """A picture of one shade of gray (0 to 255); ``size`` is width, height."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(file, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return file.getvalue()


def make_clip(shade: int, frames: int = 4, size: tuple[int, int] = (32, 16)) -> bytes:
    """An H.264 clip in MP4 whose shade of gray rises by one a frame."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), shade + number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, data) in this order, written by ``tarfile`` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def crawled(key: str, media: bytes, suffix: str, caption: str, **fields: object) -> list[tuple[str, bytes]]:
    """The members of one sample as img2dataset and video2dataset write them, in their order."""
    record = {"url": f"https://example.org/{key}.{suffix}", "caption": caption, "key": key, "status": "success"}
    return [
        (f"{key}.json", json.dumps(record | fields).encode()),
        (f"{key}.{suffix}", media),
        (f"{key}.txt", caption.encode()),
    ]


def read_all(index: ShardIndex) -> list[Sample]:
    """Every sample, in the order of the index."""
    return [index.read_sample(index.entry(row)) for row in range(len(index))]


def captioned(folder: Path, shards: int, per_shard: int, tag: str = "") -> Path:
    """Shards of images of which every third has a media id of its own, the others one for two."""
    for shard in range(shards):
        members = []
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            media_id = f"{tag}{number if number % 3 == 0 else -(number // 2)}"
            key = f"{number:05d}"
            members += crawled(key, make_image(number % 256), "jpg", f"caption {key}", media_id=media_id)
        write_tar(folder / f"{shard:05d}.tar", members)
    build_index(folder)
    return folder


def overwrite(entry: Entry, media: bytes) -> None:
    """Puts other bytes where the media of an indexed sample are."""
    with open(entry.shard, "r+b") as shard:
        shard.seek(entry.media_offset)
        shard.write(media)
