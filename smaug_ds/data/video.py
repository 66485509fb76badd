"""Video files as bytes: probe, trim, decode. One demux tells what a decoder needs; nothing else is decoded.

Packets are read once. To show wanted frames a decoder needs the packets from the key frame before the first of them to
the last of them, less those that are neither wanted nor referred to, which H.264 and HEVC tell. ``Video.decode`` feeds
just these packets, ``Video.trim`` remuxes them for a decoder elsewhere (NVDEC). Where that is not provably safe (open
GOP, missing time stamps, damage, a codec without trustworthy key frames) decoding begins at the start.

Letters: T frames, H height, W width (pixels, after rotation).
"""

from __future__ import annotations

import contextlib
import io
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.codec.context import ThreadType
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

from smaug_ds.data.bitstream import HIDING_CODECS, Picture, nal_length_size, read_picture
from smaug_ds.data.image import probe_image
from smaug_ds.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaError, MediaFacts

# DALI's conversion, which knows BT.601 only and interpolates chroma; with these flags PyAV gives the same bytes.
_AS_DALI = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Containers that DALI reads and that hold what NVDEC decodes.
_MUXER = {"h264": "mp4", "hevc": "mp4", "av1": "mp4", "mpeg4": "mp4", "vp8": "matroska", "vp9": "matroska"}


class Video:
    """A demuxed clip. ``len`` is the number of frames it shows; ``indices`` below count these in presentation order.

    Raises ``MediaError`` if the bytes hold no video that can be demuxed.
    """

    def __init__(self, media: bytes) -> None:
        self.media = media
        self._stream = _open(media, quick=True)
        self.codec = self._stream.codec_context.codec.canonical_name
        self._packets = _demux(self._stream)
        self._length_size = nal_length_size(self.codec, self._stream.codec_context.extradata)
        self._pictures: dict[int, Picture] = {}  # read when asked for, which most are not
        keys = [i for i, packet in enumerate(self._packets) if packet.is_keyframe]
        if not keys:
            raise MediaError("demux", f"no key frame in {len(self._packets)} packets")
        self._restarts = [i for i in keys if self._picture(i).restarts]
        # No decoder shows what comes before the first key frame, lies outside the edit list or is a hidden reference.
        shown = [i for i in range(keys[0], len(self._packets)) if self._is_shown(i)]
        stamps = [self._packets[i].pts for i in shown]
        in_avi = self._stream.container.format.name == "avi"  # its time stamps count packets, not presentation
        self.has_order = not in_avi and None not in stamps and len(set(stamps)) == len(stamps)
        self._times = [place if packet.pts is None else packet.pts for place, packet in enumerate(self._packets)]
        self._shown = sorted(shown, key=lambda i: self._times[i]) if self.has_order else shown
        if not shown:
            raise MediaError("demux", f"no frame to show in {len(self._packets)} packets")

    def __len__(self) -> int:
        return len(self._shown)

    def longest_gap(self) -> int:
        """Packets from one frame where decoding may start to the next, or the end, at most."""
        ends = [0, *self._restarts, len(self._packets)]
        return max(end - start for start, end in itertools.pairwise(ends))

    def decode(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Frames ``indices`` (any order, repeats allowed) as RGB, (T, H, W, 3), rotated as displayed.

        Raises ``MediaError`` if one of them cannot be decoded, ``IndexError`` if there is no such frame.
        """
        wanted = self._checked(indices)
        found = self._frames(set(wanted))
        images = {index: _to_rgb(frame) for index, frame in found.items()}
        shapes = {image.shape for image in images.values()}
        if len(shapes) > 1:
            raise MediaError("decode", f"frames change their size within the clip: {sorted(shapes)}")
        return np.stack([images[index] for index in wanted])

    def trim(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """The smallest file that shows frames ``indices``, and their indices (T,) in it. Where trimming is
        not safe, the whole file."""
        wanted = self._checked(indices)
        if not self.has_order or self.codec not in _MUXER:
            return self.media, np.asarray(wanted)
        plan = self._plan(wanted)
        if len(plan) == len(self._packets):
            return self.media, np.asarray(wanted)
        by_time = sorted(plan, key=lambda i: self._times[i])
        rank = {packet: place for place, packet in enumerate(by_time)}
        try:
            trimmed = _remux(
                self._stream, [self._packets[i] for i in plan], [rank[i] for i in plan], _MUXER[self.codec]
            )
        except av.FFmpegError:  # a stream that its own container holds but ours does not
            return self.media, np.asarray(wanted)
        in_file = {packet: place for place, packet in enumerate(p for p in by_time if self._is_shown(p))}
        return trimmed, np.asarray([in_file[self._shown[i]] for i in wanted])

    def facts(self) -> MediaFacts:
        """Decodes the first frame: only it tells the rotation, and that there is anything to decode."""
        first = self._frames({0})[0]
        seconds = self._seconds()
        rotation = rotation_of(first)
        turned = rotation in (90, 270)
        return MediaFacts(
            codec=self.codec,
            pixel_format=first.format.name,
            width=first.height if turned else first.width,
            height=first.width if turned else first.height,
            frames=len(self),
            declared_frames=self._stream.frames,
            fps=len(self) / seconds if seconds else 0.0,
            duration_s=seconds,
            rotation=rotation,
            key_frames=len(self._restarts),
        )

    def _seconds(self) -> float:
        """Duration by the time stamps: headers may claim 1000 fps, or nothing."""
        if self.has_order and len(self) > 1:
            ticks = self._times[self._shown[-1]] - self._times[self._shown[0]]
            return float(ticks * self._packets[0].time_base) * len(self) / (len(self) - 1)
        rate = self._stream.average_rate
        return len(self) / float(rate) if rate else 0.0

    def _checked(self, indices: Sequence[int] | NDArray[np.int64]) -> list[int]:
        wanted = [int(index) for index in indices]
        if not wanted or min(wanted) < 0 or max(wanted) >= len(self):
            raise IndexError(f"frames {wanted} of a clip of {len(self)} frames")
        return wanted

    def _frames(self, wanted: set[int]) -> dict[int, av.VideoFrame]:
        """Decoded frames by index: from the planned packets, or from the start if these do not give them all."""
        if self.has_order:
            index_at = {self._times[self._shown[i]]: i for i in wanted}
            packets = [self._packets[i] for i in self._plan(wanted)]
            found = {}
            with contextlib.suppress(av.FFmpegError):  # a thorough decode decides whether the clip is bad
                for frame in _decode(self._stream, packets):
                    if frame.pts is not None and frame.pts in index_at:
                        found[index_at[frame.pts]] = frame
                    if len(found) == len(wanted):
                        return found
        return self._decode_from_start(wanted)

    def _plan(self, wanted: Iterable[int]) -> list[int]:
        """Packets, in decoding order, that show frames ``wanted``: for each, from the restart before it on."""
        needed = {self._shown[i] for i in wanted}
        ends: dict[int, int] = {}  # packet where decoding begins -> the last one needed after it
        for packet in sorted(needed):
            restarts = bisect_right(self._restarts, packet)
            ends[self._restarts[restarts - 1] if restarts else 0] = packet
        plan: list[int] = []
        for first, last in ends.items():
            pictures = {i: self._picture(i) for i in range(first, last + 1)}
            top_layer = max(picture.layer for picture in pictures.values())
            plan += [
                i
                for i, picture in pictures.items()
                if i in needed or not picture.unreferenced or picture.layer < top_layer
            ]
        return plan

    def _decode_from_start(self, wanted: set[int]) -> dict[int, av.VideoFrame]:
        """Counts frames as they come, without trust in time stamps, after a thorough (slower) opening."""
        found = {}
        for index, frame in enumerate(all_frames(self.media)):
            if index in wanted:
                found[index] = frame
            if len(found) == len(wanted):
                return found
        missing = sorted(wanted - set(found))
        raise MediaError("decode", f"frame {missing[0]} of {len(self)} does not come out of the decoder")

    def _picture(self, packet: int) -> Picture:
        if packet not in self._pictures:
            data = memoryview(self._packets[packet])
            self._pictures[packet] = read_picture(self.codec, data, self._length_size)
        return self._pictures[packet]

    def _is_shown(self, packet: int) -> bool:
        hidden = self.codec in HIDING_CODECS and not self._picture(packet).shown
        return not hidden and not self._packets[packet].is_discard


def all_frames(media: bytes) -> Iterator[av.VideoFrame]:
    """Every frame of a clip in presentation order, as the decoder gives them. Raises ``MediaError`` where it stops."""
    stream = _open(media, quick=False)
    packets = _demux(stream)
    frames = 0
    try:
        for frame in _decode(stream, packets):
            frame.time_base = frame.time_base or packets[0].time_base  # not set on the last frames
            yield frame
            frames += 1
    except av.FFmpegError as error:
        raise MediaError("decode", f"{error.strerror} after {frames} of {len(packets)} frames") from error


def probe(media: bytes, suffix: str) -> MediaFacts:
    """Facts of a file whose name ends in ``suffix`` (lower case, no dot). Reads a video's packets and decodes its first
    frame; reads an image's header. Raises ``MediaError``, also for a suffix that is neither."""
    if suffix in VIDEO_SUFFIXES:
        return Video(media).facts()
    if suffix not in IMAGE_SUFFIXES:
        raise MediaError("open", f"suffix {suffix!r} is none of {', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}")
    return probe_image(media)


def choose_frames(frames: int, wanted: int, generator: np.random.Generator | None) -> NDArray[np.int64]:
    """One frame from each of ``wanted`` equal segments of a clip of ``frames`` frames, ascending, (wanted,).

    At random within its segment if there is a ``generator`` (training; it always draws ``wanted`` numbers), else the
    middle one (evaluation). Clips with too few frames repeat some.
    """
    within = np.full(wanted, 0.5) if generator is None else generator.random(wanted)
    return np.minimum(((np.arange(wanted) + within) * frames / wanted).astype(np.int64), frames - 1)


def trim(media: bytes, indices: Sequence[int] | NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
    """``Video.trim`` of a clip that is not open yet."""
    return Video(media).trim(indices)


def decode(media: bytes, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
    """``Video.decode`` of a clip that is not open yet: (T, H, W, 3)."""
    return Video(media).decode(indices)


def _open(media: bytes, quick: bool) -> VideoStream:
    """The first video stream that is not a cover picture, ready to demux and decode on one thread.

    FFmpeg decodes some frames when it opens a file, which can cost as much as the rest; ``quick`` has it skip them.
    """
    try:
        container = av.open(
            io.BytesIO(media), options={"skip_frame": "all"} if quick else {}, metadata_errors="replace"
        )
    except av.FFmpegError as error:
        raise MediaError("open", str(error.strerror)) from error
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError("open", "no video stream")
    if streams[0].codec_context is None:
        raise MediaError("open", "a codec that this FFmpeg does not know")
    # With frame threads a damaged file can hang for ever when its decoder is freed.
    streams[0].thread_type = ThreadType.NONE
    return streams[0]


def _demux(stream: VideoStream) -> list[av.Packet]:
    try:
        packets = [packet for packet in cast(InputContainer, stream.container).demux(stream) if packet.size]
    except av.FFmpegError as error:
        raise MediaError("demux", str(error.strerror)) from error
    if not packets:
        raise MediaError("demux", "no packets: the file is empty or cut short")
    return packets


def _decode(stream: VideoStream, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    """Frames in presentation order."""
    context = stream.codec_context
    if context.is_open:
        context.flush_buffers()
    for packet in packets:
        yield from context.decode(packet)
    yield from context.decode(None)


def _remux(stream: VideoStream, packets: Sequence[av.Packet], ranks: Sequence[int], muxer: str) -> bytes:
    """Packets, given in decoding order with their ranks in presentation order, as a file of 25 frames a second."""
    buffer = io.BytesIO()
    delay = max(place - rank for place, rank in enumerate(ranks))
    with av.open(buffer, "w", format=muxer) as container:
        track = container.add_stream_from_template(stream, opaque=True)
        for place, (packet, rank) in enumerate(zip(packets, ranks, strict=True)):
            copy = av.Packet(bytes(packet))
            copy.stream = track
            copy.time_base = Fraction(1, 25)
            copy.dts, copy.pts, copy.duration = place, rank + delay, 1
            copy.is_keyframe = place == 0
            container.mux(copy)
    return buffer.getvalue()


def rotation_of(frame: av.VideoFrame) -> int:
    """Degrees counter-clockwise, in right angles, that turn the frame upright."""
    return round(frame.rotation / 90) * 90 % 360


def _to_rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    rgb = frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU601, interpolation=_AS_DALI, threads=1)
    return np.rot90(rgb.to_ndarray(), rotation_of(frame) // 90)
