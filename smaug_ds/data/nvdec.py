"""Which clips NVDEC is given, and in what form. Decided in the workers, so without DALI.

DALI keeps the NVDEC decoders that it has built, up to 100 a GPU and process, and takes one again for a clip of the same
codec and size. But it files a decoder under the size that is shown and looks for the size that is coded (DALI 2.4,
``NVDECCache::GetDecoder`` in dali/operators/video/frames_decoder_gpu.cc). H.264 codes whole macroblocks of 16x16 pixels
and crops them to what is shown. So for clips of 640x360, coded as 640x368, one of two things happens:

- Each clip has a decoder built for it, which took 50 to 70 ms on an H100 (meta-pytorch/torchcodec, pull request 1176).
- If clips of 640x368 came before, their decoder is taken. Its frames have their chroma 8 rows further down than DALI
  reads it: wrong colours, and no error.

Neither can happen where the two sizes are equal. That a stream is cropped is one flag of its parameters: ``uncropped``
clears it, DALI then hands out what is coded, and the window of the clip leaves the margin out as the flag did. It also
sorts sizes into buckets of 16 pixels, so that fewer decoders serve more clips. Of the other codecs, which have no such
flag or a header that is long to read, only sizes that need no cropping are taken.
"""

from __future__ import annotations

import io
from typing import NamedTuple, cast

import av
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer
from av.video.stream import VideoStream

from smaug_ds.data.media import MediaFacts

# Smallest (width, height) and largest side that current cards decode. DALI asks the card itself and refuses what lies
# beyond, so a card that can less costs a second reading of such clips, not the clips.
_SMALLEST = {"h264": (48, 16), "hevc": (144, 144), "vp8": (48, 16), "vp9": (128, 128)}
_LARGEST = 4096
_BLOCK = 16  # pixels
_UNCROP = "h264_metadata=crop_left=0:crop_right=0:crop_top=0:crop_bottom=0"
_SEQUENCE_PARAMETERS = 7  # type of the NAL unit
# Profiles of H.264 whose parameters tell the chroma format, the bit depth and scaling matrices.
_HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 134, 135, 138, 139})


def takes(facts: MediaFacts, codecs: frozenset[str]) -> bool:
    """Whether NVDEC gets such a clip, if it decodes ``codecs``."""
    if facts.codec not in codecs or facts.pixel_format != "yuv420p" or facts.rotation:
        return False
    size = (facts.width, facts.height)
    if any(not least <= side <= _LARGEST for side, least in zip(size, _SMALLEST[facts.codec], strict=True)):
        return False
    return facts.codec == "h264" or all(side % _BLOCK == 0 for side in size)


def uncropped(codec: str, file: bytes) -> bytes | None:
    """The file of a trimmed clip so that the size that is shown is the size that is coded.

    The picture stays where it is, at the top left. None where that cannot be done: PyAV has to decode the clip.
    """
    if codec != "h264":
        return file
    try:
        with av.open(io.BytesIO(file), options={"skip_frame": "all"}, metadata_errors="replace") as source:
            stream = source.streams.video[0]
            geometry = _geometry(stream.codec_context.extradata)
            if geometry is None or geometry.left or geometry.top:
                return None
            # Macroblocks of a frame are coded as one picture or as two fields: the size is known either way.
            if (stream.width, stream.height) == (geometry.width, geometry.height):
                return file
            return _rewrite(stream, geometry)
    except av.FFmpegError:
        return None


class Geometry(NamedTuple):
    """What the parameters of an H.264 sequence say about its size, pixels."""

    width: int  # as coded
    height: int
    left: int  # cut off on this side
    top: int


def _rewrite(stream: VideoStream, geometry: Geometry) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        track = container.add_stream_from_template(stream, opaque=True)
        parameters = BitStreamFilterContext(_UNCROP, stream, track)
        track.width, track.height = geometry.width, geometry.height  # DALI believes the container
        for packet in cast(InputContainer, stream.container).demux(stream):
            for changed in parameters.filter(packet if packet.size else None):
                changed.stream = track
                container.mux(changed)
    return buffer.getvalue()


def _geometry(extradata: bytes | None) -> Geometry | None:
    """From the one set of parameters in an avcC record (ISO/IEC 14496-15, 5.3.3.1); None if it is not that simple."""
    if not extradata or len(extradata) < 9 or extradata[0] != 1 or extradata[5] & 31 != 1:
        return None
    length = int.from_bytes(extradata[6:8], "big")
    unit = extradata[8 : 8 + length]
    if len(unit) < 5 or unit[0] & 31 != _SEQUENCE_PARAMETERS:
        return None
    try:
        return _read_sequence_parameters(_Bits(unit[1:].replace(b"\0\0\3", b"\0\0")))
    except IndexError:  # damaged
        return None


def _read_sequence_parameters(bits: _Bits) -> Geometry | None:
    """ITU-T H.264, 7.3.2.1.1. Only 4:2:0 comes here, with 2 chroma columns and rows to a crop unit."""
    profile = bits.fixed(8)
    bits.fixed(16)  # constraints, level
    bits.unsigned()  # its number
    if profile in _HIGH_PROFILES:
        if bits.unsigned() != 1:  # 4:2:0
            return None
        bits.unsigned()  # bits of luma and chroma
        bits.unsigned()
        bits.fixed(1)
        if bits.fixed(1):
            for size in [16] * 6 + [64] * 2:
                if bits.fixed(1):
                    _skip_scaling_list(bits, size)
    bits.unsigned()  # length of frame numbers
    order = bits.unsigned()
    if order == 0:
        bits.unsigned()
    elif order == 1:
        bits.fixed(1)
        bits.signed()
        bits.signed()
        for _ in range(bits.unsigned()):
            bits.signed()
    bits.unsigned()  # reference frames
    bits.fixed(1)
    columns, rows = bits.unsigned() + 1, bits.unsigned() + 1
    fields = 1 - bits.fixed(1)  # rows are then counted in fields, half of a frame each
    if fields:
        bits.fixed(1)
    bits.fixed(1)
    left = top = 0
    if bits.fixed(1):
        left, _, top, _ = (bits.unsigned() for _ in range(4))
    return Geometry(columns * _BLOCK, rows * _BLOCK * (1 + fields), 2 * left, 2 * top * (1 + fields))


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    """ITU-T H.264, 7.3.2.1.1.1."""
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


class _Bits:
    """Reads bits and Exp-Golomb codes (ITU-T H.264, 9.1). Raises IndexError past the end."""

    def __init__(self, data: bytes) -> None:
        self._digits = "".join(f"{byte:08b}" for byte in data)
        self._place = 0

    def fixed(self, count: int) -> int:
        digits = self._digits[self._place : self._place + count]
        if len(digits) < count:
            raise IndexError("no bits left")
        self._place += count
        return int(digits, 2)

    def unsigned(self) -> int:
        zeros = 0
        while not self.fixed(1):
            zeros += 1
        return (1 << zeros) - 1 + (self.fixed(zeros) if zeros else 0)

    def signed(self) -> int:
        code = self.unsigned()
        return (code + 1) // 2 if code % 2 else -(code // 2)
