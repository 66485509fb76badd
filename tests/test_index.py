"""The shard index: ready shards are read as they are, samples stay whole, captions and media ids are told."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from smaug_ds.data.index import SAMPLE_DTYPE, ShardIndex
from smaug_ds.data.indexing import build_index, read_report
from smaug_ds.data.media import MediaFacts
from smaug_ds.data.order import stable_hash
from smaug_ds.data.shard import MAX_CAPTION_LENGTH, SampleError, choose_captions
from smaug_ds.data.video import probe
from tests.shards import captioned, crawled, make_clip, make_image, read_all, write_tar


def test_shards_of_img2dataset_and_video2dataset_are_read_unchanged(tmp_path: Path) -> None:
    media = {
        "000000000": ("jpg", make_image(10)),
        "000000001": ("mp4", make_clip(20, frames=5)),
        "000000002": ("webp", make_image(30, "webp")),
        "000000010": ("png", make_image(40, "png")),
    }
    members = {key: crawled(key, data, suffix, f"shows {key}") for key, (suffix, data) in media.items()}
    tars = [
        write_tar(tmp_path / "00000.tar", [*members["000000000"], *members["000000001"], *members["000000002"]]),
        write_tar(tmp_path / "00001.tar", members["000000010"]),
    ]
    before = [hashlib.sha256(tar.read_bytes()).digest() for tar in tars]
    report = build_index(tmp_path)
    assert [hashlib.sha256(tar.read_bytes()).digest() for tar in tars] == before
    assert (report.samples, report.images, report.videos, report.captions, report.rejects) == (4, 3, 1, 4, {})
    assert report.media_bytes == sum(len(data) for _, data in media.values())
    index = ShardIndex.open(tmp_path)
    samples = read_all(index)
    assert [sample.key for sample in samples] == list(media)
    for row, sample in enumerate(samples):
        suffix, data = media[sample.key]
        assert (sample.media, sample.suffix, sample.captions) == (data, suffix, (f"shows {sample.key}",))
        assert sample.medium == ("video" if suffix == "mp4" else "image")
        assert sample.shard == str(tars[row // 3])
        assert vars(index.entry(row).facts) == pytest.approx(vars(probe(data, suffix)))  # rates are kept in float32


def test_keys_in_folders_upper_case_suffixes_and_long_names(tmp_path: Path) -> None:
    keys = ["part/00/a", "./b", "c" * 150, "d" * 300, "grün"]
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        members = [
            member for key in keys for member in ((f"{key}.JPG", make_image(1)), (f"{key}.TXT", f"of {key}".encode()))
        ]
        write_tar(tmp_path / f"{number}.tar", members, form)
    build_index(tmp_path)
    samples = read_all(ShardIndex.open(tmp_path))
    assert [sample.key for sample in samples] == keys * 2
    assert all(sample.captions == (f"of {sample.key}",) and sample.suffix == "jpg" for sample in samples)


@pytest.mark.parametrize(
    ("text", "metadata", "captions", "from_text"),
    [
        (b" a dog \n", {"caption": "x"}, ("a dog",), True),
        (None, {"caption": "from json"}, ("from json",), False),
        (b" \n", {"caption": "from json"}, ("from json",), False),
        (b"one", {"captions": ["one", " two ", "", 3]}, ("one", "two"), False),
        (b"one", {"captions": []}, ("one",), True),
        ("Käse".encode(), {}, ("Käse",), True),
        (b"...", {"caption": "from json"}, ("from json",), False),
        (None, {"captions": ["?!", "one", " - / "]}, ("one",), False),
    ],
)
def test_captions_of_several_then_txt_then_json(
    text: bytes | None, metadata: dict, captions: tuple, from_text: bool
) -> None:
    assert choose_captions(text, metadata) == (captions, from_text)


@pytest.mark.parametrize(
    ("text", "metadata", "reason"),
    [
        (None, {}, "no_caption"),
        (b"", {"caption": None}, "no_caption"),
        (b"...", {"captions": ["?!", " - / "], "caption": "(*)"}, "no_caption"),
        (b"...", {"caption": "x" * (MAX_CAPTION_LENGTH + 1)}, "caption_too_long"),
        ("Käse".encode("latin-1"), {}, "caption_not_utf8"),
        (None, {"caption": "\ud800"}, "caption_not_utf8"),
    ],
)
def test_captions_that_cannot_be_read(text: bytes | None, metadata: dict, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        choose_captions(text, metadata)
    assert caught.value.reason == reason


def test_media_ids_are_stated_or_follow_the_content(tmp_path: Path) -> None:
    same, other = make_image(1), make_image(200)
    members = [
        *crawled("0", same, "jpg", "a", media_id="film 7"),
        *crawled("1", same, "jpg", "b"),
        *crawled("2", same, "jpg", "c", media_id=None),
        *crawled("3", other, "jpg", "d"),
    ]
    write_tar(tmp_path / "0.tar", members)
    build_index(tmp_path)
    ids = [sample.media_id for sample in read_all(ShardIndex.open(tmp_path))]
    assert ids == ["film 7", f"{stable_hash(same):016x}", f"{stable_hash(same):016x}", f"{stable_hash(other):016x}"]


def test_a_video_comes_before_its_thumbnail(tmp_path: Path) -> None:
    clip = make_clip(1)
    write_tar(tmp_path / "0.tar", [("a.jpg", make_image(1)), ("a.mp4", clip), ("a.txt", b"both")])
    assert build_index(tmp_path).samples == 1
    (sample,) = read_all(ShardIndex.open(tmp_path))
    assert (sample.medium, sample.media) == ("video", clip)


def test_sizes_are_counted(tmp_path: Path) -> None:
    shapes = [(10 + number % 12, 20) for number in range(30)] + [(64, 48)] * 5
    members = [
        part for n, size in enumerate(shapes) for part in crawled(str(n), make_image(1, "jpg", size), "jpg", "a")
    ]
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", members[shard * 21 : (shard + 1) * 21])
    report = build_index(tmp_path)
    slow = Counter(f"{width}x{height}" for width, height in shapes)
    assert report.distinct_sizes == len(slow) == 13 and len(report.sizes) == 8
    assert list(report.sizes.values()) == [count for _, count in slow.most_common(8)]
    assert report.sizes.items() <= slow.items() and "64x48 5" in str(report)
    assert read_report(tmp_path) == report


def test_columns_of_the_facts_follow_the_dataclass() -> None:
    names = [field.name for field in fields(MediaFacts)]
    assert list(SAMPLE_DTYPE.names or ())[-len(names) :] == names


def test_workers_change_nothing_and_a_new_index_takes_the_old_ones_place(tmp_path: Path) -> None:
    folder = captioned(tmp_path, shards=3, per_shard=4)
    first = {file.name: file.read_bytes() for file in (folder / "index").iterdir()}
    (folder / ".index.partial").mkdir()  # as a killed build leaves it
    build_index(folder, workers=2)
    assert {file.name: file.read_bytes() for file in (folder / "index").iterdir()} == first
    assert sorted(file.name for file in folder.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", "index"]


def test_no_more_than_a_few_shards_are_open_at_once(tmp_path: Path) -> None:
    index = ShardIndex.open(captioned(tmp_path, shards=50, per_shard=1))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert len(read_all(index)) == 50
    assert len(os.listdir("/proc/self/fd")) <= before + 32
    del index
    assert len(os.listdir("/proc/self/fd")) < before + 5
