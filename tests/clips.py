"""Clips with something to see in them, in the codecs that NVDEC and DALI's own decoder tell apart."""

from __future__ import annotations

import io

import av
import numpy as np

from smaug_ds.data.video import Video

CONTAINERS = {"h264": "mp4", "hevc": "mp4", "vp8": "webm", "vp9": "webm"}
_ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp8": "libvpx", "vp9": "libvpx-vp9"}
_QUICK = {
    "h264": {"preset": "ultrafast"},
    "hevc": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "vp8": {"deadline": "realtime", "cpu-used": "8"},
    "vp9": {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"},
}


def moving_clip(codec: str, seed: int, size: tuple[int, int] = (128, 128), frames: int = 12, **options: str) -> bytes:
    """A pattern of coloured tiles that wanders to the right; ``size`` is width, height."""
    tiles = np.random.default_rng(seed).integers(16, 240, (9, 9, 3), dtype=np.uint8)
    width, height = size
    picture = np.repeat(np.repeat(tiles, -(-height // 9), 0), -(-width // 9), 1)[:height, :width]
    file = io.BytesIO()
    with av.open(file, "w", format=CONTAINERS[codec]) as container:
        stream = container.add_stream(_ENCODERS[codec], rate=8, options=_QUICK[codec] | options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            shown = np.ascontiguousarray(np.roll(picture, 5 * number, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def damaged(vp9: bytes) -> bytes:
    """The VP9 clip with the frame marker of every packet but the first broken: it demuxes and trims as before."""
    media = bytearray(vp9)
    with av.open(io.BytesIO(vp9)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    for packet in packets[1:]:
        media[vp9.index(packet)] ^= 0xC0
    assert len(Video(bytes(media))) == len(packets)
    return bytes(media)
