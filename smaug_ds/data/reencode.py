"""Encodes clips and images again so that training reads and decodes less: key frames close together, smaller frames.

A clip of 10 s often has one key frame, so showing its last frame means decoding all others. With one every ``gop``
frames a reader decodes at most that many for each frame it wants; ``gain`` measures what that saves. Not bit for bit,
and slow: the time that x264 needs for every frame.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from smaug_ds.data.image import decode_image
from smaug_ds.data.media import MediaError, MediaFacts
from smaug_ds.data.shard import ShardError, medium_of
from smaug_ds.data.video import Video, all_frames, rotation_of

_CLIP, _IMAGE = "mp4", "jpg"
_AREA = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# One thread, because their number changes what x264 writes. Its tree of macroblocks with B-frames differs from run to
# run on the same frames; without B-frames a reader has less to decode, too.
_X264 = "threads=1:scenecut=0:bframes=0:mbtree=0"


@dataclass(frozen=True)
class Reencoding:
    """How media are encoded again. Clips become H.264 without sound, upright, with their own time stamps."""

    gop: int = 8  # frames from one key frame to the next at most
    short_side: int = 256  # pixels at most; nothing is made larger
    crf: int = 23  # of x264: lower is better and larger, 0 to 51
    jpeg_quality: int = 92

    def __post_init__(self) -> None:
        for name, least, most in (("gop", 1, 250), ("short_side", 16, 4096), ("crf", 0, 51), ("jpeg_quality", 1, 100)):
            if not least <= getattr(self, name) <= most:
                option = name.replace("_", "-")
                raise ShardError(f"--{option} is {getattr(self, name)}: it must be from {least} to {most}")


def reencode(media: bytes, suffix: str, facts: MediaFacts, how: Reencoding) -> tuple[bytes, str]:
    """(bytes, suffix) of the media encoded again; as they are where they have small frames and near key frames already.

    The result depends on the arguments and the version of the codec only. Raises ``MediaError``.
    """
    small = min(facts.width, facts.height) <= how.short_side
    if medium_of(suffix) == "image":
        return (media, suffix) if small else (_image(media, how), _IMAGE)
    if small and facts.codec == "h264" and facts.rotation == 0 and Video(media).longest_gap() <= how.gop:
        return media, suffix
    try:
        return _clip(media, facts, how), _CLIP
    except av.FFmpegError as error:
        raise MediaError("encode", str(error.strerror)) from error


def _image(media: bytes, how: Reencoding) -> bytes:
    image = Image.fromarray(decode_image(media)[0])
    width, height = _fitted(image.width, image.height, how.short_side, even=False)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=how.jpeg_quality)
    return buffer.getvalue()


def _clip(media: bytes, facts: MediaFacts, how: Reencoding) -> bytes:
    width, height = _fitted(facts.width, facts.height, how.short_side, even=True)
    buffer = io.BytesIO()
    stream = None
    # Bit exact: no date, no version of the library.
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        for source, stamp, tick in _stamps(all_frames(media), facts):
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(facts.fps or 25).limit_denominator(1000))
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.time_base = stream.codec_context.time_base = tick
                stream.codec_context.color_range = source.color_range
                stream.options = {"crf": str(how.crf), "preset": "fast", "x264-params": f"keyint={how.gop}:{_X264}"}
            frame = _upright(source, width, height)
            frame.pts, frame.time_base = stamp, tick
            container.mux(stream.encode(frame))
        if stream is None:
            raise MediaError("decode", "no frame comes out of the decoder")
        container.mux(stream.encode())
    return buffer.getvalue()


def _upright(frame: av.VideoFrame, width: int, height: int) -> av.VideoFrame:
    """A frame of ``width`` x ``height`` pixels, turned as it is displayed; without its time stamp."""
    turns = rotation_of(frame) // 90
    size = (height, width) if turns % 2 else (width, height)
    small = frame.reformat(*size, format="yuv420p", interpolation=_AREA, threads=1)
    planes = []
    for plane in small.planes:
        lines = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        planes.append(np.rot90(lines[:, : plane.width], turns).reshape(-1))
    packed = np.concatenate(planes).reshape(-1, width)
    return av.VideoFrame.from_ndarray(packed, format="yuv420p")


def _stamps(frames: Iterator[av.VideoFrame], facts: MediaFacts) -> Iterator[tuple[av.VideoFrame, int, Fraction]]:
    """(frame, time, tick in seconds), times in ticks from 0 and rising: the clip's own, so a variable frame rate stays
    as it is; where they are missing or stand still, one mean frame later than the frame before."""
    start, last = None, -1
    for frame in frames:
        tick = frame.time_base
        assert tick  # all_frames sets it
        step = max(1, round(1 / ((facts.fps or 25) * tick)))
        if frame.pts is None:
            stamp = last + step if last >= 0 else 0
        else:
            start = frame.pts if start is None else start
            stamp = frame.pts - start
        last = stamp if stamp > last else last + step
        yield frame, last, tick


def _fitted(width: int, height: int, short_side: int, even: bool) -> tuple[int, int]:
    """A size with at most ``short_side`` on its short side and the same ratio; H.264 wants even numbers."""
    scale = min(1.0, short_side / min(width, height))
    unit = 2 if even else 1
    return tuple(max(unit, round(side * scale / unit) * unit) for side in (width, height))  # type: ignore[return-value]
