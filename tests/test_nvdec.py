"""What NVDEC is given: sizes that it takes, streams without cropping."""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from smaug_ds.data import nvdec
from smaug_ds.data.media import MediaFacts
from smaug_ds.data.video import Video, decode, probe
from tests.clips import moving_clip


def facts(codec: str, width: int, height: int, pixel_format: str = "yuv420p", rotation: int = 0) -> MediaFacts:
    return MediaFacts(codec, pixel_format, width, height, 10, 10, 8.0, 1.25, rotation, 1)


@pytest.mark.parametrize(
    ("clip", "taken"),
    [
        (facts("h264", 640, 360), True),
        (facts("h264", 32, 16), False),
        (facts("h264", 4098, 2160), False),
        (facts("h264", 640, 360, pixel_format="yuv444p"), False),
        (facts("h264", 640, 360, rotation=90), False),
        (facts("hevc", 1280, 720), True),
        (facts("hevc", 1920, 1080), False),
        (facts("hevc", 128, 128), False),
        (facts("vp9", 128, 128), True),
        (facts("vp9", 640, 360), False),
        (facts("vp8", 640, 480), True),
        (facts("av1", 640, 480), False),
        (facts("jpeg", 640, 480, "RGB"), False),
    ],
)
def test_what_nvdec_takes(clip: MediaFacts, taken: bool) -> None:
    assert nvdec.takes(clip, frozenset({"h264", "hevc", "vp8", "vp9"})) == taken
    assert not nvdec.takes(clip, frozenset())


@pytest.mark.parametrize(
    ("size", "options", "coded"),
    [
        ((640, 360), {}, (640, 368)),
        ((596, 336), {"preset": "medium"}, (608, 336)),  # high profile, with B frames
        ((130, 98), {"preset": "medium", "x264-params": "cqm=jvt"}, (144, 112)),  # with scaling matrices
        ((320, 360), {"x264-params": "tff=1"}, (320, 384)),  # two fields to a frame
        ((320, 100), {"preset": "medium", "x264-params": "tff=1"}, (320, 128)),
    ],
)
def test_cropping_is_removed_and_the_picture_stays(
    size: tuple[int, int], options: dict[str, str], coded: tuple[int, int]
) -> None:
    media = moving_clip("h264", 3, size, **options)
    wanted = [2, 7, 11]
    trimmed, local = Video(media).trim(wanted)
    file = nvdec.uncropped("h264", trimmed)
    assert file is not None
    shown = probe(file, "mp4")
    assert (shown.width, shown.height) == coded
    entry = file.index(b"avc1", file.index(b"stsd"))  # what DALI goes by: it does not look into the stream
    assert struct.unpack(">HH", file[entry + 28 : entry + 32]) == coded
    before, after = decode(media, wanted), decode(file, local)[:, : size[1], : size[0]]
    assert np.array_equal(before[:, :-4, :-2], after[:, :-4, :-2])
    assert np.abs(before.astype(int) - after).max() < 40  # at the border, chroma is blended with what lay beyond it
    assert nvdec.uncropped("h264", file) == file


def test_streams_without_cropping_stay_as_they_are() -> None:
    for codec in ("h264", "vp9", "vp8"):
        media = moving_clip(codec, 1, (160, 144), frames=3)
        assert nvdec.uncropped(codec, media) is media


def test_picture_that_does_not_begin_at_the_corner_is_left_to_pyav() -> None:
    media = moving_clip("h264", 1, (160, 144), frames=3)
    file = io.BytesIO()
    with av.open(io.BytesIO(media)) as source, av.open(file, "w", format="mp4") as container:
        stream = source.streams.video[0]
        track = container.add_stream_from_template(stream, opaque=True)
        crop = BitStreamFilterContext("h264_metadata=crop_left=8:crop_top=4", stream, track)
        for packet in source.demux(stream):
            for changed in crop.filter(packet if packet.size else None):
                changed.stream = track
                container.mux(changed)
    assert nvdec.uncropped("h264", file.getvalue()) is None


def test_damaged_parameters_are_left_to_pyav() -> None:
    media = moving_clip("h264", 1, (640, 360), frames=2)
    place = media.index(b"avcC")
    results = set()
    for offset in range(4, 40):
        changed = bytearray(media)
        changed[place + offset] ^= 0xFF
        results.add(type(nvdec.uncropped("h264", bytes(changed))))
    assert results <= {type(None), bytes} and type(None) in results
    assert nvdec.uncropped("h264", b"not a file") is None


def test_a_title_that_is_not_utf8() -> None:
    named = io.BytesIO()
    with av.open(io.BytesIO(moving_clip("h264", 1, (160, 100), frames=3))) as source, av.open(named, "w", "mp4") as out:
        out.metadata["title"] = "QQQQcafe"
        track = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = track
                out.mux(packet)
    media = named.getvalue().replace(b"QQQQcafe", b"QQQQcaf\xe9")
    assert b"caf\xe9" in media
    changed = nvdec.uncropped("h264", media)
    assert changed is not None and probe(changed, "mp4").height == 112
