"""What is said of media files: suffixes, facts, why one cannot be used. ``video`` and ``image`` read them."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
VIDEO_SUFFIXES = frozenset(
    {"mp4", "webm", "mkv", "mov", "avi", "gif", "m4v", "mpg", "mpeg", "ts", "3gp", "flv", "wmv", "ogv"}
    | {"mts", "m2ts", "3g2"}  # of some of DiDeMo's
)


class MediaError(Exception):
    """A media file that cannot be used. ``stage``: "open", "demux", "decode" or "image"; ``reason``: in words."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(stage, reason)
        self.stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


@dataclass(frozen=True)
class MediaFacts:
    """What an index keeps of a media file. An image is a video of one frame with fps and duration 0."""

    codec: str  # FFmpeg's name for video, PIL's format in lower case for images
    pixel_format: str  # FFmpeg's name ("yuv420p"), PIL's mode for images
    width: int  # pixels as displayed, that is after rotation
    height: int
    frames: int  # frames that the packets in the file can show
    declared_frames: (
        int  # frames that the header claims, 0 if it is silent; more than ``frames``: the file is cut short
    )
    fps: float  # from the time stamps, not from the header
    duration_s: float
    rotation: int  # degrees counter-clockwise that a decoder that ignores it has to turn the frames: 0, 90, 180 or 270
    key_frames: int  # frames at which decoding may start
