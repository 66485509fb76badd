"""Trimmed decoding against decoding everything, on real clips of every codec; broken files end in MediaError."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from smaug_ds.data.bitstream import read_picture
from smaug_ds.data.image import decode_image
from smaug_ds.data.media import IMAGE_SUFFIXES, MediaError
from smaug_ds.data.video import Video, choose_frames, decode, probe, trim

SPREAD = [  # codec, number of packets that trimming to frames 3 and 5 leaves at most (None: cannot be trimmed), file
    ("h264", 6, "open/exo_face.mp4"),
    ("h264", 6, "open/intel_oneperson_03.mp4"),
    ("h264", 6, "open/intel_asl_bird.mkv"),
    ("h264", 8, "open/exo_woodfloor.mp4"),  # its edit list hides a packet
    ("h264", 6, "testasset/moviepy_dog_in_basket_rot180.mp4"),
    ("hevc", 6, "open/exo_hdr10_roof.mp4"),
    ("vp8", 6, "open/tos_12.webm"),
    ("vp9", 6, "open/exo_bear_vp9.webm"),
    ("mpeg4", 10, "testasset/internvid_example1.mp4"),
    ("mpeg4", None, "testasset/mmaction_eyemakeup.avi"),  # its time stamps do not tell the order
    ("mpeg2video", None, "open/exo_bbb.ts"),
    ("gif", None, "open/intel_people.gif"),
]


def full_decode(media: bytes, wanted: Iterable[int]) -> tuple[dict[int, np.ndarray], int]:
    """Reference: decode everything. The frames at ``wanted`` (BT.601 colours, rotation applied), how many came."""
    flags = av.video.reformatter.Interpolation
    how = flags.BILINEAR | flags.ACCURATE_RND | flags.FULL_CHR_H_INT
    pictures, count = {}, 0
    with av.open(io.BytesIO(media)) as container:
        container.streams.video[0].thread_type = "SLICE"
        for frame in container.decode(video=0):
            if count in wanted:
                rgb = frame.to_ndarray(format="rgb24", src_colorspace="ITU601", interpolation=how)
                pictures[count] = np.rot90(rgb, frame.rotation // 90)
            count += 1
    return pictures, count


def check_against_full_decode(media: bytes, generator: np.random.Generator) -> None:
    video = Video(media)
    several, one = choose_frames(len(video), 4, generator), generator.integers(len(video), size=1)
    reference, count = full_decode(media, {*several, *one})
    assert len(video) == count
    for wanted in (several, one):
        frames = video.decode(wanted)
        np.testing.assert_array_equal(frames, np.stack([reference[i] for i in wanted]))
        trimmed, local = video.trim(wanted)
        in_trimmed, _ = full_decode(trimmed, set(local))
        np.testing.assert_array_equal(frames, np.stack([in_trimmed[i] for i in local]))


@pytest.mark.parametrize(("codec", "most_packets", "name"), SPREAD)
def test_trimmed_equals_full_decode(shared_data: Path, codec: str, most_packets: int | None, name: str) -> None:
    media = (shared_data / "videos" / name).read_bytes()
    assert probe(media, "mp4").codec == codec
    check_against_full_decode(media, np.random.default_rng(0))
    trimmed, local = trim(media, [5, 3, 3])
    assert local[1] == local[2] < local[0]
    if most_packets is None:
        assert trimmed == media
    else:
        assert len(trimmed) < len(media)
        assert len(Video(trimmed)) <= most_packets


@pytest.mark.slow
def test_trimmed_equals_full_decode_on_all_real_clips(shared_data: Path) -> None:
    for path in sorted(shared_data.glob("videos/*/*")):
        check_against_full_decode(path.read_bytes(), np.random.default_rng(1))


def encode(codec: str, frames: int, container: str, **options: str) -> bytes:
    """A noisy 64x48 clip, so that wrong references show."""
    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=Fraction(25), width=64, height=48, pix_fmt="yuv420p", options=options)
        picture = generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        for _ in range(frames):
            picture = np.roll(picture, 1, axis=1)
            picture[generator.integers(48)] = generator.integers(0, 255, 3)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "mp4", {"g": "10", "bf": "4", "x264-params": "b-pyramid=normal:scenecut=0"}),
        ("libx264", "mp4", {"g": "10", "bf": "4", "x264-params": "open-gop=1:scenecut=0"}),
        ("libx264", "mpegts", {"g": "10", "bf": "2"}),
        ("libx264", "matroska", {"g": "1"}),
        ("libx265", "mp4", {"x265-params": "keyint=10:open-gop=1:log-level=none"}),
        ("libx265", "mp4", {"x265-params": "keyint=10:open-gop=0:temporal-layers=1:log-level=none"}),
        ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20"}),
        ("libvpx-vp9", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20"}),
        ("libsvtav1", "mp4", {"preset": "12", "g": "10"}),
        ("mpeg4", "mp4", {"g": "10", "bf": "2"}),
        ("mpeg2video", "mpegts", {"g": "10", "bf": "2"}),
        ("mjpeg", "avi", {"strict": "unofficial"}),
    ],
)
def test_trimmed_equals_full_decode_for_group_structures(codec: str, container: str, options: dict[str, str]) -> None:
    media = encode(codec, 40, container, **options)
    for seed in range(4):
        check_against_full_decode(media, np.random.default_rng(seed))


def test_open_groups_are_not_entered_in_the_middle() -> None:
    closed = Video(encode("libx264", 40, "mp4", g="10", **{"x264-params": "scenecut=0"}))
    opened = Video(encode("libx264", 40, "mp4", g="10", bf="4", **{"x264-params": "open-gop=1:scenecut=0"}))
    assert closed.facts().key_frames == 4
    assert opened.facts().key_frames == 1


def hide(media: bytes, hidden: set[int]) -> bytes:
    """A VP8 clip with the show_frame bit of some pictures cleared, as encoders do for alternate references."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(media)) as source, av.open(buffer, "w", format="webm") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for place, packet in enumerate(p for p in source.demux(video=0) if p.size):
            data = bytes(packet)
            copy = av.Packet(bytes([data[0] & 0xEF]) + data[1:] if place in hidden else data)
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            target.mux(copy)
    return buffer.getvalue()


def test_hidden_frames_do_not_count() -> None:
    media = hide(encode("libvpx", 40, "webm", g="20"), {3, 4, 30})
    assert probe(media, "webm").frames == 37
    for seed in range(3):
        check_against_full_decode(media, np.random.default_rng(seed))


def test_roles_of_damaged_pictures_are_cautious() -> None:
    for codec in ("h264", "hevc", "vp8", "vp9", "av1", "anything"):
        for data in (b"", b"\x81", bytes(range(40)), b"\xff" * 9):
            for length_size in (0, 4):
                picture = read_picture(codec, memoryview(data), length_size)
                assert isinstance(picture.restarts, bool)


def test_facts(shared_data: Path) -> None:
    facts = probe((shared_data / "videos/open/exo_portrait_4k60.mp4").read_bytes(), "mp4")
    assert (facts.codec, facts.width, facts.height, facts.frames, facts.rotation) == ("h264", 2160, 3840, 18, 270)
    assert facts.fps == pytest.approx(60, rel=0.01)
    clip = probe((shared_data / "hostile/real/exo_sample.mkv").read_bytes(), "mkv")  # its header claims 1000 fps
    assert clip.fps == pytest.approx(29.97, rel=0.01)
    assert clip.duration_s == pytest.approx(1.0, rel=0.01)
    cut = probe((shared_data / "hostile/derived/truncated_tail_moov_first.mp4").read_bytes(), "mp4")
    assert cut.frames < cut.declared_frames
    image = probe((shared_data / "hostile/images/exif_rotate6.jpg").read_bytes(), "jpg")
    assert (image.codec, image.width, image.height, image.frames) == ("jpeg", 227, 300, 1)


def test_rotation_stands_clips_upright(shared_data: Path) -> None:
    """Three takes of one scene by one phone, held differently: all show the same once turned."""
    upright, *turned = (
        decode((shared_data / f"hostile/real/decord_video_{d}.mov").read_bytes(), [0]) for d in (0, 90, 270)
    )
    for frames in turned:
        assert frames.shape[1:3] == upright.shape[2:0:-1]


def test_hostile_files_end_in_media_errors(shared_data: Path) -> None:
    """Whatever the file, there are frames or a MediaError that survives the way out of a worker; nothing hangs."""
    failed = set()
    for path in sorted(shared_data.glob("hostile/*/*")):
        suffix = path.suffix[1:].lower() if path.parent.name == "images" else "mp4"
        media = path.read_bytes()
        try:
            facts = probe(media, suffix)
            if suffix in IMAGE_SUFFIXES:
                frames = decode_image(media)
            else:
                frames = decode(media, choose_frames(facts.frames, 4, None))
            assert frames.shape[1:] == (facts.height, facts.width, 3)
        except MediaError as error:
            copy = pickle.loads(pickle.dumps(error))
            assert (copy.stage, copy.reason) == (error.stage, error.reason)
            failed.add(path.name)
    assert {"zero_bytes.mp4", "html_404.mp4", "exo_sample.audio.mp4", "exo_invalid-bitstream.webm"} <= failed
    assert {"zero_bytes.jpg", "exo_pixel-motion-photo-jfif-segment-shortened.jpg"} <= failed
    assert not {"bitflips.mp4", "first_key_missing.mkv", "exo_sample.mkv", "cmyk.jpg"} & failed


def test_undecodable_frame_is_named() -> None:
    media = bytearray(encode("libx264", 20, "mpegts", g="10"))
    media[len(media) // 2 :] = bytes(len(media) - len(media) // 2)
    with pytest.raises(IndexError, match="frames"):
        Video(bytes(media)).decode([19])
    with pytest.raises(MediaError, match="suffix 'txt'"):
        probe(b"hello", "txt")


def test_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    np.testing.assert_array_equal(decode_image(buffer.getvalue()), pixels[None])
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 256 * 100, dtype=np.uint16)).save(buffer, "PNG")
    assert (decode_image(buffer.getvalue()) == 100).all()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    with pytest.raises(MediaError, match="image"):
        decode_image(buffer.getvalue()[:-300])


def test_choose_frames() -> None:
    np.testing.assert_array_equal(choose_frames(100, 4, None), [12, 37, 62, 87])
    np.testing.assert_array_equal(choose_frames(2, 4, None), [0, 0, 1, 1])
    np.testing.assert_array_equal(choose_frames(1, 3, np.random.default_rng(0)), [0, 0, 0])
    drawn = np.stack([choose_frames(10, 2, np.random.default_rng(seed)) for seed in range(300)])
    assert set(drawn[:, 0]) == set(range(5))
    assert set(drawn[:, 1]) == set(range(5, 10))


def tagged(orientation: object, **fields: object) -> bytes:
    """A JPEG of four patches of gray with an EXIF orientation, whose width and height differ."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name, value in fields.items():
        exif[ExifTags.Base[name]] = value
    patches = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 16, 0), 24, 1)
    Image.fromarray(patches).convert("RGB").save(file, "JPEG", exif=exif.tobytes(), quality=95)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 10))
def test_images_stand_upright_as_pil_turns_them(orientation: int) -> None:
    media = tagged(orientation)
    with Image.open(io.BytesIO(media)) as image:
        reference = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    np.testing.assert_array_equal(decode_image(media), reference)
    facts = probe(media, "jpg")
    assert (facts.height, facts.width) == reference.shape[1:3]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_tiff_is_turned_once(orientation: int) -> None:
    file = io.BytesIO()
    pixels = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    Image.fromarray(pixels).save(file, "TIFF", tiffinfo={274: orientation})
    upright = np.rot90(pixels, {1: 0, 3: 2, 6: 3}[orientation])
    np.testing.assert_array_equal(decode_image(file.getvalue())[0], upright)
    facts = probe(file.getvalue(), "jpg")
    assert (facts.height, facts.width) == upright.shape[:2]


def test_an_odd_exif_field_does_not_keep_an_image_from_being_turned() -> None:
    media = tagged(6, XResolution=72.0)
    odd = media.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")  # XResolution is now a text
    with Image.open(io.BytesIO(odd)) as image, pytest.raises(TypeError):
        ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(decode_image(odd), decode_image(media))


@pytest.mark.parametrize("form", ["AVIF", "DDS", "GIF", "PPM", "JPEG2000"])
def test_other_formats_under_an_images_name_are_refused(form: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (24, 16)).save(file, form)
    for media in (file.getvalue(), file.getvalue()[:-20]):
        with pytest.raises(MediaError, match="not an image in a known format"):
            decode_image(media)
        with pytest.raises(MediaError, match="not an image in a known format"):
            probe(media, "jpg")


@pytest.mark.parametrize("kind", [RuntimeError, AttributeError, TypeError, KeyError])
def test_whatever_pil_raises_is_an_error_of_the_media(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    media = tagged(1)

    def damaged(*_: object) -> None:
        raise kind("odd")

    monkeypatch.setattr(Image.Image, "convert", damaged)
    with pytest.raises(MediaError, match=f"^image: {kind.__name__}: .?odd"):
        decode_image(media)


def test_images_of_stereo_cameras_open() -> None:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (9, 9, 9)).save(
        file, "MPO", save_all=True, append_images=[Image.new("RGB", (24, 16), (200, 200, 200))]
    )
    assert probe(file.getvalue(), "jpg").codec == "mpo"
    assert (decode_image(file.getvalue()) == 9).all()
