"""Verification decodes everything: it finds what probing passes, and no sample can keep it for ever."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
import pytest

from smaug_ds.data import verify as verify_module
from smaug_ds.data.index import ShardIndex
from smaug_ds.data.indexing import build_index
from smaug_ds.data.shard import ShardError
from smaug_ds.data.verify import check, verify
from smaug_ds.data.video import probe
from tests.shards import crawled, make_clip, make_image, write_tar
from tools import index_shards


def noisy_clip(frames: int = 12) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(3)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "18", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(frames):
            pixels = noise.integers(0, 255, (64, 96, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def broken_within() -> bytes:
    """A clip whose header, packets and first frame are whole, with noise inside a later frame."""
    media = bytearray(noisy_clip())
    with av.open(io.BytesIO(bytes(media))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][8]
    assert packet.pos is not None
    start = packet.pos + 200
    media[start : start + 800] = np.random.default_rng(1).integers(1, 255, 800, dtype=np.uint8).tobytes()
    return bytes(media)


def indexed(folder: Path, *samples: tuple[str, bytes, str]) -> Path:
    for number in range(0, len(samples), 2):
        members = [
            part for key, media, suffix in samples[number : number + 2] for part in crawled(key, media, suffix, key)
        ]
        write_tar(folder / f"{number // 2}.tar", members)
    build_index(folder)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_clip_that_probing_passes_is_found(tmp_path: Path, workers: int) -> None:
    broken = broken_within()
    assert probe(broken, "mp4").frames == 12
    half = make_image(7, "jpg", (300, 200))[:-300]
    folder = indexed(
        tmp_path,
        ("good", make_clip(1), "mp4"),
        ("broken", broken, "mp4"),
        ("noisy", noisy_clip(), "mp4"),
        ("half", half, "jpg"),
        ("picture", make_image(5), "jpg"),
    )
    report = verify(folder, workers)
    lines = [json.loads(line) for line in (folder / "verify.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["key"], line["reason"]) for line in lines] == [
        ("0.tar", "broken", "decode"),
        ("1.tar", "half", "image"),
    ]
    assert report.samples == 5 and "2 failed (decode 1, image 1)" in str(report)


def serve_badly(pipe: Connection, folder: Path) -> None:
    """A process that hangs on one sample and dies on another."""
    index = ShardIndex.open(folder)
    pipe.send(("up", ""))
    while True:
        for row in pipe.recv():
            sample = index.read_sample(index.entry(row))
            if sample.key == "hang":
                time.sleep(3600)
            if sample.key == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            pipe.send(check(sample))


def test_samples_that_hang_or_kill_their_process_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_serve", serve_badly)
    keys = ["a", "hang", "crash", "d", "e", "f"]
    folder = indexed(tmp_path, *((key, make_image(1), "jpg") for key in keys))
    report = verify(folder, workers=2, seconds=5)
    assert [(failed.key, failed.reason) for failed in report.failures] == [("hang", "time"), ("crash", "crash")]
    assert "after 5 s" in report.failures[0].detail and "code -9" in report.failures[1].detail


def serve_nothing(pipe: Connection, folder: Path) -> None:
    os._exit(3)


def test_no_sample_is_blamed_for_a_process_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_serve", serve_nothing)
    folder = indexed(tmp_path, ("a", make_image(1), "jpg"))
    with pytest.raises(ShardError, match="a decoding process does not start: its process ended with code 3"):
        verify(folder)
    assert not (folder / verify_module.LEDGER).exists()


def test_a_tar_that_changed_under_its_index_fails_in_reading(tmp_path: Path) -> None:
    folder = indexed(tmp_path, ("a", make_image(1), "jpg"), ("b", make_image(1), "jpg"))
    data = bytearray((folder / "0.tar").read_bytes())
    entry = ShardIndex.open(folder).entry(1)
    data[entry.media_offset - 512 : entry.media_offset] = bytes(512)
    (folder / "0.tar").write_bytes(data)
    assert [(failed.key, failed.reason) for failed in verify(folder).failures] == [("b", "read")]
    with pytest.raises(ShardError, match="--seconds is 0"):
        verify(folder, seconds=0)


def test_every_real_clip_is_whole_and_damage_is_told_by_its_stage(shared_data: Path) -> None:
    whole = sorted((shared_data / "videos" / "open").glob("intel_*.mkv"))[:6]
    for path in [*whole, *sorted((shared_data / "images").glob("*.jpg"))[:10]]:
        suffix = path.suffix[1:]
        sample = sample_of(path.read_bytes(), suffix)
        assert check(sample) == ("", ""), path.name
    for name in ("bitflips.mp4", "truncated_tail_moov_first.mp4"):
        assert check(sample_of((shared_data / "hostile" / "derived" / name).read_bytes(), "mp4"))[0] == "decode", name


def sample_of(media: bytes, suffix: str):  # type: ignore[no-untyped-def]
    from smaug_ds.data.sample import Sample
    from smaug_ds.data.shard import medium_of

    medium = medium_of(suffix)
    assert medium
    return Sample("0.tar", "key", "id", medium, suffix, media, ("caption",))


def test_the_tool_ends_with_1_where_a_sample_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "good" / "0.tar", crawled("a", make_clip(1), "mp4", "a"))
    write_tar(tmp_path / "bad" / "0.tar", crawled("b", broken_within(), "mp4", "b"))
    options = ["--workers", "1", "--verify", "decode"]
    assert index_shards.main([str(tmp_path / "good"), *options]) == 0
    assert "1 samples decoded" in (out := capsys.readouterr().out) and "all are whole" in out
    assert index_shards.main([str(tmp_path / "bad"), *options]) == 1
    assert "1 failed (decode 1): see verify.jsonl" in capsys.readouterr().out
