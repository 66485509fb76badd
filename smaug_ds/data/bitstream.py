"""What the first bytes of a coded picture say about it: where decoding may start, what may be left out, what is hidden.

Container flags do not suffice: MP4 and Matroska mark open-GOP pictures as key frames, few files mark disposable ones.
Sources: H.264 (ITU-T H.264, 7.4.1), HEVC (ITU-T H.265, 7.4.2.2), VP8 (RFC 6386, 9.1), VP9 (bitstream specification, 6.2
and annex B), AV1 (bitstream specification, 5.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

HIDING_CODECS = frozenset({"vp8", "vp9"})  # whose packets may hold a picture that is not shown


class Picture(NamedTuple):
    """Roles of the picture in one packet."""

    restarts: bool  # the decoder needs nothing from before it
    unreferenced: bool  # no other picture needs it
    shown: bool  # it gives a frame
    layer: int  # temporal layer: an unreferenced picture may still be needed by those of higher layers


_ORDINARY = Picture(restarts=False, unreferenced=False, shown=True, layer=0)


def read_picture(codec: str, data: memoryview, nal_length_size: int) -> Picture:
    """Roles of the picture coded in ``data``. Of codecs not listed above, and of damaged data, the cautious answer."""
    if len(data) == 0:
        return _ORDINARY
    if codec == "h264":
        nal = _first_picture_nal(data, nal_length_size, lambda header: 1 <= header & 31 <= 5)
        if nal is None:
            return _ORDINARY
        return Picture(restarts=nal[0] & 31 == 5, unreferenced=nal[0] >> 5 & 3 == 0, shown=True, layer=0)
    if codec == "hevc":
        nal = _first_picture_nal(data, nal_length_size, lambda header: header >> 1 & 63 < 32)
        if nal is None:
            return _ORDINARY
        kind = nal[0] >> 1 & 63
        return Picture(
            restarts=kind in (19, 20), unreferenced=kind < 16 and kind % 2 == 0, shown=True, layer=nal[1] & 7
        )
    if codec == "vp8":
        return Picture(restarts=not data[0] & 1, unreferenced=False, shown=bool(data[0] >> 4 & 1), layer=0)
    if codec == "vp9":
        return _read_vp9(data)
    if codec == "av1":
        start = 2 if data[0] >> 3 & 15 == 2 else 0  # a temporal delimiter may come first
        restarts = len(data) > start and data[start] >> 3 & 15 == 1
        return _ORDINARY._replace(restarts=restarts)
    return _ORDINARY._replace(restarts=codec == "mjpeg")


def nal_length_size(codec: str, extradata: bytes | None) -> int:
    """Bytes of the length before each NAL unit as avcC and hvcC state it; 0: start codes (annex B)."""
    place = {"h264": 4, "hevc": 21}.get(codec)
    if place is None or not extradata or len(extradata) <= place or extradata[0] != 1:
        return 0
    return (extradata[place] & 3) + 1


def _first_picture_nal(data: memoryview, length_size: int, is_picture: Callable[[int], bool]) -> memoryview | None:
    """The first NAL unit that is a slice: parameter sets, delimiters and messages may come before it."""
    place = 0
    while place + length_size + 2 <= len(data):
        if length_size:
            length = int.from_bytes(data[place : place + length_size], "big")
            start = place + length_size
            place = start + length
        else:
            start = bytes(data).find(b"\0\0\1", place) + 3
            if start < 3:
                return None
            place = start
        if start + 2 <= len(data) and is_picture(data[start]):
            return data[start:]
    return None


def _read_vp9(data: memoryview) -> Picture:
    """Uncompressed header of the first frame; a superframe always ends in a frame that is shown."""
    bits = int.from_bytes(data[:2], "big") if len(data) > 1 else data[0] << 8
    if bits >> 12 & 3 == 3:  # profile 3 has one more bit in front
        bits <<= 1
    repeats, inter, shown = bits >> 11 & 1, bits >> 10 & 1, bits >> 9 & 1
    superframe = data[len(data) - 1] & 0xE0 == 0xC0
    return Picture(
        restarts=not repeats and not inter, unreferenced=False, shown=bool(superframe or repeats or shown), layer=0
    )
