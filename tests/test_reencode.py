"""Media encoded again: the same frames at the same times, upright, near key frames; the promised gain is real."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from smaug_ds.data.corpora import Reading
from smaug_ds.data.gain import estimate, frames_to_decode
from smaug_ds.data.image import decode_image
from smaug_ds.data.index import ShardIndex
from smaug_ds.data.media import MediaError
from smaug_ds.data.reencode import Reencoding, reencode
from smaug_ds.data.shard import ShardError
from smaug_ds.data.sharding import build
from smaug_ds.data.video import Video, all_frames, decode, probe
from tests.conftest import ROOT
from tests.shards import make_image


def moving_clip(frames: int = 30, size: tuple[int, int] = (160, 96), times: list[int] | None = None) -> bytes:
    """A bright square that moves to the right, one key frame at the start; ``times`` in 1/600 s. With sound."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 600)
        stream.codec_context.gop_size = 1000
        sound = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 40, np.uint8)
            pixels[20:60, 4 * number : 4 * number + 40] = 220
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[number] if times else 25 * number
            frame.time_base = Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return file.getvalue()


def again(media: bytes, **how: int) -> bytes:
    made, suffix = reencode(media, "mp4", probe(media, "mp4"), Reencoding(**how))
    assert suffix == "mp4"
    return made


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def test_key_frames_are_near_and_frames_small_and_pictures_the_same() -> None:
    media = moving_clip()
    made = again(media, gop=8, short_side=48)
    facts = probe(made, "mp4")
    assert (facts.codec, facts.width, facts.height, facts.frames, facts.key_frames) == ("h264", 80, 48, 30, 4)
    assert Video(media).longest_gap() == 30 and Video(made).longest_gap() == 8
    small = [
        np.asarray(Image.fromarray(frame).resize((80, 48), Image.Resampling.BOX)) for frame in decode(media, range(30))
    ]
    for wanted, found in zip(small, decode(made, range(30)), strict=True):
        assert psnr(wanted, found) > 28
    with av.open(io.BytesIO(made)) as container:
        assert [stream.type for stream in container.streams] == ["video"]  # no sound


def test_time_stamps_of_a_variable_frame_rate_stay() -> None:
    times = [0, 10, 20, 100, 105, 300, 301, 400, 640, 650]
    media = moving_clip(10, times=times)
    found = [frame.pts * frame.time_base for frame in all_frames(again(media, short_side=48))]
    assert found == [Fraction(time, 600) for time in times]
    assert probe(again(media, short_side=48), "mp4").duration_s == pytest.approx(
        probe(media, "mp4").duration_s, rel=0.01
    )


@pytest.mark.parametrize("name", ["decord_video_0.mov", "decord_video_90.mov", "decord_video_270.mov"])
def test_rotated_clips_become_upright(shared_data: Path, name: str) -> None:
    media = (shared_data / "hostile" / "real" / name).read_bytes()
    before = probe(media, "mov")
    made, suffix = reencode(media, "mov", before, Reencoding(short_side=160))
    facts = probe(made, suffix)
    assert facts.rotation == 0 and facts.frames == before.frames
    assert facts.width / facts.height == pytest.approx(before.width / before.height, abs=0.02)
    wanted = Image.fromarray(decode(media, [0])[0]).resize((facts.width, facts.height), Image.Resampling.BOX)
    assert psnr(np.asarray(wanted), decode(made, [0])[0]) > 28


@pytest.mark.parametrize("side", [180, 181])
def test_images_are_made_small_or_left_alone(side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (181, 300, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    media = buffer.getvalue()
    made, suffix = reencode(media, "png", probe(media, "png"), Reencoding(short_side=side))
    if side == 181:
        assert (made, suffix) == (media, "png")
    else:
        assert suffix == "jpg" and decode_image(made).shape == (1, 180, 298, 3)


def test_what_is_short_and_small_already_stays_bit_for_bit() -> None:
    made = again(moving_clip(), gop=8, short_side=48)
    assert again(made, gop=8, short_side=48) is made
    assert again(made, gop=4, short_side=48) != made
    assert again(made, gop=8, short_side=32) != made


def test_the_bytes_are_the_same_in_another_process(shared_data: Path, tmp_path: Path) -> None:
    paths = [shared_data / "hostile" / "real" / name for name in ("moviepy_example.mp4", "mdn_flower-fragmented.mp4")]
    (tmp_path / "moving.mp4").write_bytes(moving_clip(60, (320, 240)))
    paths.append(tmp_path / "moving.mp4")
    script = (
        "import sys, hashlib, pathlib\n"
        "from tests.test_reencode import again\n"
        "for path in sys.argv[1:]: print(hashlib.sha256(again(pathlib.Path(path).read_bytes())).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", script, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    for path, digest in zip(paths, other.stdout.split(), strict=True):
        media = path.read_bytes()
        assert {hashlib.sha256(again(media)).hexdigest() for _ in range(3)} == {digest}, path.name


def test_real_odd_clips_keep_their_frames_and_length_or_say_why_not(shared_data: Path) -> None:
    made_again = 0
    for path in sorted((shared_data / "hostile").rglob("*.m*")):
        suffix, media = path.suffix[1:].lower(), path.read_bytes()
        try:
            before = probe(media, suffix)
            made, suffix = reencode(media, suffix, before, Reencoding(short_side=64))
        except MediaError:
            continue
        after = probe(made, suffix)
        assert (after.codec, after.rotation) == ("h264", 0), path.name
        assert after.frames <= before.frames and after.duration_s == pytest.approx(before.duration_s, rel=0.35), (
            path.name
        )
        assert min(after.width, after.height) <= 64, path.name
        made_again += 1
    assert made_again > 20


def test_the_estimate_is_what_the_build_then_does(tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        (tmp_path / f"{number}.mp4").write_bytes(moving_clip(20 + number))
        rows.append({"video": f"{number}.mp4", "caption": "moves"})
    (tmp_path / "big.png").write_bytes(make_image(3, "png", (400, 300)))
    rows += [{"image": "big.png", "caption": "gray"}, {"video": "gone.mp4", "caption": "x"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    how = Reencoding(gop=4, short_side=48)
    gain = estimate([tmp_path / "list.json"], tmp_path, how, "auto", Reading(tmp_path))
    assert (gain.files, gain.clips, gain.unusable) == (4, 3, 1)
    report = build([tmp_path / "list.json"], tmp_path, tmp_path / "out", reencoding=how)
    assert (gain.before_bytes, gain.after_bytes) == (report.source_bytes, report.index.media_bytes)
    index = ShardIndex.open(tmp_path / "out")
    samples = [index.read_sample(index.entry(row)) for row in range(4)]
    clips = [sample.media for sample in samples if sample.medium == "video"]
    for shown in (1, 4):
        before = [frames_to_decode((tmp_path / f"{number}.mp4").read_bytes(), shown) for number in range(3)]
        assert gain.decoded[shown] == [sum(before), sum(frames_to_decode(clip, shown) for clip in clips)]
    assert gain.decoded[1][0] == 2 * gain.decoded[1][1] == 20
    assert "frames, " in str(gain) and "encoded again" in str(report)


def test_settings_that_cannot_be_are_refused() -> None:
    for setting in ({"gop": 0}, {"short_side": 8}, {"crf": 52}):
        (name, value), *_ = setting.items()
        with pytest.raises(ShardError, match=rf"--{name.replace('_', '-')} is {value}: it must be from"):
            Reencoding(**setting)
