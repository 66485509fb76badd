"""The shard index: ready shards are read as they are, samples stay whole, damage is named, splits do not overlap."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import tarfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from smaug_ds.data import indexing, scanning
from smaug_ds.data.index import SAMPLE_DTYPE, Corpus, ShardIndex
from smaug_ds.data.indexing import build_index, read_report
from smaug_ds.data.media import MediaFacts
from smaug_ds.data.order import stable_hash
from smaug_ds.data.quarantine import DataError
from smaug_ds.data.sample import MEDIA, Sample
from smaug_ds.data.shard import MAX_CAPTION_LENGTH, MAX_TEXT_BYTES, SampleError, ShardError, choose_captions
from smaug_ds.data.video import probe
from tests.shards import crawled, make_clip, make_image, write_tar


def read_all(index: ShardIndex) -> list[Sample]:
    return [index.read_sample(index.entry(row)) for row in range(len(index))]


def captioned(folder: Path, shards: int, per_shard: int, tag: str = "") -> Path:
    """Shards of images of which every third has a media id of its own, the others one for two."""
    for shard in range(shards):
        members = []
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            media_id = f"{tag}{number if number % 3 == 0 else -(number // 2)}"
            key = f"{number:05d}"
            members += crawled(key, make_image(number % 256), "jpg", f"caption {key}", media_id=media_id)
        write_tar(folder / f"{shard:05d}.tar", members)
    build_index(folder)
    return folder


# --- ready shards ---


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


# --- what is left out ---


def test_bad_samples_are_left_out_with_a_reason_and_the_others_stay_whole(tmp_path: Path) -> None:
    good = make_image(50)
    members = [
        *crawled("good0", good, "jpg", "caption of good0"),
        *crawled("nomedia", b"", "wav", "only words"),
        *crawled("broken", b"\xff\xd8\xff not a picture", "jpg", "caption of broken"),
        *crawled("empty", b"", "mp4", "caption of empty"),
        ("nocaption.jpg", good),
        *crawled("my.dog", good, "jpg", "caption of my.dog"),
        *crawled("good1", make_clip(60), "mp4", "caption of good1"),
        ("latin.jpg", good),
        ("latin.txt", "Käse".encode("latin-1")),
        ("badjson.jpg", good),
        ("badjson.json", b'{"caption": '),
        ("badjson.txt", b"caption of badjson"),
        ("listjson.jpg", good),
        ("listjson.json", b"[1]"),
        *crawled("good2", good, "jpg", "caption of good2"),
    ]
    write_tar(tmp_path / "0.tar", members)
    report = build_index(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "index" / "rejects.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons == {
        "nomedia": "no_media",
        "broken": "media_image",
        "empty": "media_open",
        "nocaption": "no_caption",
        "my": "no_media",
        "latin": "caption_not_utf8",
        "badjson": "json_invalid",
        "listjson": "json_invalid",
    }
    assert all(line["shard"] == "0.tar" and line["detail"] for line in lines)
    assert report.rejects == {reason: list(reasons.values()).count(reason) for reason in set(reasons.values())}
    assert "8 rejected" in str(report)
    samples = read_all(ShardIndex.open(tmp_path))
    assert [sample.key for sample in samples] == ["good0", "good1", "good2"]
    assert all(sample.captions == (f"caption of {sample.key}",) for sample in samples)


def test_a_video_comes_before_its_thumbnail(tmp_path: Path) -> None:
    clip = make_clip(1)
    write_tar(tmp_path / "0.tar", [("a.jpg", make_image(1)), ("a.mp4", clip), ("a.txt", b"both")])
    assert build_index(tmp_path).samples == 1
    (sample,) = read_all(ShardIndex.open(tmp_path))
    assert (sample.medium, sample.media) == ("video", clip)


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", make_image(1))])
    with pytest.raises(ShardError, match="not one usable sample in 1 tars; the first: a: no_caption"):
        build_index(tmp_path)
    assert not (tmp_path / "index").exists()


# --- damage ---


@pytest.mark.parametrize("part", ["first header", "header", "media", "end marker"])
def test_a_truncated_tar_is_named(tmp_path: Path, part: str) -> None:
    path = write_tar(
        tmp_path / "00007.tar", crawled("0", make_image(1), "jpg", "a") + crawled("1", b"x" * 5000, "jpg", "b")
    )
    with tarfile.open(path) as tar:
        last = tar.getmember("1.jpg")
        end = max(member.offset_data for member in tar) + tarfile.BLOCKSIZE
    cut = {"first header": 100, "header": last.offset + 100, "media": last.offset_data + 600, "end marker": end}[part]
    os.truncate(path, cut)
    with pytest.raises(ShardError, match=r"00007\.tar is cut short"):
        build_index(tmp_path)
    assert not (tmp_path / "index").exists()


def test_a_header_damaged_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "0.tar", crawled("0", make_image(1), "jpg", "a") + crawled("1", make_image(2), "jpg", "b")
    )
    with tarfile.open(path) as tar:
        offset = tar.getmember("1.json").offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"0\.tar is damaged: .* at byte {offset}"):
        build_index(tmp_path)


def test_what_open_refuses(tmp_path: Path) -> None:
    def opening(message: str) -> None:
        with pytest.raises(ShardError, match=message):
            ShardIndex.open(folder)

    folder = tmp_path / "shards"
    opening(r"shard folder .*shards does not exist")
    folder.mkdir()
    opening(r"shards holds no \.tar file")
    first, second = (write_tar(folder / f"{n}.tar", crawled(str(n), make_image(n), "jpg", "a")) for n in range(2))
    opening(r"has 2 tars but no index; run: python tools/index_shards\.py .*shards")
    build_index(folder)
    assert len(ShardIndex.open(folder)) == 2

    whole = second.read_bytes()
    second.write_bytes(whole + b"\0" * 512)
    opening(rf"1\.tar has {len(whole) + 512} bytes, {len(whole)} when it was indexed")
    second.unlink()
    opening(r"1\.tar is in the index but missing")
    second.write_bytes(whole)
    write_tar(folder / "2.tar", crawled("2", make_image(2), "jpg", "a"))
    opening(r"2\.tar and 0 more tars are not in the index")
    build_index(folder)
    assert len(ShardIndex.open(folder)) == 3

    manifest = folder / "index" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 1', '"format": 99'))
    opening("format 99, this version reads 1")
    manifest.write_text(text[:50])
    opening("manifest.json is damaged")
    manifest.write_text(text)
    os.truncate(folder / "index" / "bucket.npy", 40)
    opening(r"bucket\.npy cannot be read")
    assert first.exists()


def test_a_tar_replaced_by_another_of_the_same_length_is_noticed(tmp_path: Path) -> None:
    image = make_image(1)
    path = write_tar(
        tmp_path / "0.tar", crawled("a", image, "jpg", "caption a") + crawled("b", image, "jpg", "caption b")
    )
    build_index(tmp_path)
    size = path.stat().st_size
    write_tar(path, crawled("b", image, "jpg", "caption b") + crawled("a", image, "jpg", "caption a"))
    assert path.stat().st_size == size
    index = ShardIndex.open(tmp_path)
    for row in range(2):
        with pytest.raises(ShardError, match=r"0\.tar: found [ab]\.jpg .* was indexed; index it again"):
            index.read_sample(index.entry(row))


def test_a_tar_that_shrinks_or_goes_while_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", crawled("a", make_image(1), "jpg", "caption a"))
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    other = pickle.loads(pickle.dumps(index))
    path.rename(tmp_path / "gone")
    with pytest.raises(ShardError, match=r"0\.tar cannot be read at sample a"):
        other.read_sample(other.entry(0))
    (tmp_path / "gone").rename(path)
    os.truncate(path, 1100)
    with pytest.raises(ShardError, match=r"0\.tar ends at byte 1100, but sample a goes to byte"):
        index.read_sample(index.entry(0))


def test_a_handle_that_went_stale_is_opened_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", crawled("a", make_image(1), "jpg", "caption a"))
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    expected = read_all(index)
    stale = os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY)  # every read of it fails
    os.dup2(stale, index._shard_file(str(path))._descriptor)
    os.close(stale)
    assert read_all(index) == expected


def test_an_index_that_can_no_longer_be_read_is_no_samples_failure(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", crawled("a", make_image(1), "jpg", "caption a"))
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    os.truncate(tmp_path / "index" / "samples.npy", 130)
    with pytest.raises(DataError, match=r"samples\.npy was cut short"):
        index.entry(0)
    unreadable = os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY)
    os.dup2(unreadable, index._samples._descriptor)
    os.close(unreadable)
    with pytest.raises(DataError, match=r"samples\.npy can no longer be read"):
        index.entry(0)


def test_an_index_made_anew_is_not_taken_for_the_one_in_use(tmp_path: Path) -> None:
    """A worker that is replaced would take other samples for those of the order, and their failures for theirs."""
    write_tar(tmp_path / "1.tar", crawled("old", make_image(1), "jpg", "caption a"))
    build_index(tmp_path)
    corpus = Corpus.open([tmp_path], 0.0, "train")
    pickled = pickle.dumps(corpus)
    build_index(tmp_path)  # of the same tars
    assert pickle.loads(pickled).entry("image", 0, 0) == corpus.entry("image", 0, 0)
    write_tar(tmp_path / "0.tar", crawled("new", make_image(2), "jpg", "caption b"))
    build_index(tmp_path)
    with pytest.raises(ShardError, match=f"{tmp_path} was indexed anew while it is in use"):
        pickle.loads(pickled)


def test_all_bad_tars_are_named_and_can_be_skipped(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", crawled(str(number), make_image(number), "jpg", "a"))
    os.truncate(tmp_path / "1.tar", 700)
    (tmp_path / "2.tar").unlink()
    (tmp_path / "2.tar").symlink_to("/proc/self/mem")  # opens, but reading it fails, whoever reads
    message = r"2 of 4 tars cannot be used:\n.*1\.tar is cut short.*\n.*2\.tar cannot be read: Input/output error\n"
    with pytest.raises(ShardError, match=message):
        build_index(tmp_path)
    assert not (tmp_path / "index").exists()
    report = build_index(tmp_path, skip_bad_shards=True)
    assert report.samples == 2
    index = ShardIndex.open(tmp_path)
    assert [sample.key for sample in read_all(index)] == ["0", "3"]
    assert [(tar["name"], tar["bytes"]) for tar in index.manifest["skipped"]] == [("1.tar", 700), ("2.tar", 0)]
    os.truncate(tmp_path / "1.tar", 600)
    with pytest.raises(ShardError, match=r"1\.tar and 0 more tars are not in the index"):
        ShardIndex.open(tmp_path)
    (tmp_path / "1.tar").unlink()
    assert len(ShardIndex.open(tmp_path)) == 2  # one that was skipped may go
    for name in ("0.tar", "3.tar"):
        os.truncate(tmp_path / name, 700)
    with pytest.raises(ShardError, match=r"not one usable sample in 3 tars; the first: .*0\.tar is cut short"):
        build_index(tmp_path, skip_bad_shards=True)


def test_a_broken_off_indexing_scans_only_what_is_left_or_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []

    def scan(path: Path) -> scanning.Scan:
        scanned.append(path.name)
        return scanning.scan_tar(path)

    monkeypatch.setattr(indexing, "scan_tar", scan)
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", crawled(str(number), make_image(number), "jpg", f"old {number}"))
    whole = (tmp_path / "2.tar").read_bytes()
    os.truncate(tmp_path / "2.tar", 700)
    with pytest.raises(ShardError, match="cut short"):
        build_index(tmp_path)
    assert scanned == ["0.tar", "1.tar", "2.tar", "3.tar"]
    (tmp_path / "2.tar").write_bytes(whole)
    status = (tmp_path / "1.tar").stat()
    write_tar(tmp_path / "1.tar", crawled("1", make_image(1), "jpg", "new 1"))  # of the same size
    os.utime(tmp_path / "1.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    scanned.clear()
    build_index(tmp_path)
    assert scanned == ["1.tar", "2.tar"]
    assert [sample.captions for sample in read_all(ShardIndex.open(tmp_path))] == [
        (caption,) for caption in ("old 0", "new 1", "old 2", "old 3")
    ]
    assert not (tmp_path / ".index.partial").exists()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_that_claims_10_gigabytes(tmp_path: Path, form: int) -> None:
    path = write_tar(tmp_path / "0.tar", crawled("a", make_image(1), "jpg", "first"), form)
    with path.open("r+b") as file, tarfile.open(path) as tar:
        end = max(member.offset_data for member in tar) + tarfile.BLOCKSIZE
        claim = tarfile.TarInfo("b.mp4")
        claim.size = 10**10
        header = claim.tobuf(form)
        file.seek(end)
        file.write(header)
        file.truncate(end + len(header) + 1000)  # the tar ends inside the member
    with pytest.raises(ShardError, match=r"0\.tar is cut short"):
        build_index(tmp_path)
    with path.open("r+b") as file:  # the bytes are there, as a hole
        file.truncate(end + len(header) + 10**10)
        file.seek(0, os.SEEK_END)
        for name, data in [("b.txt", b"second"), *crawled("c", make_image(3), "jpg", "third")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.write(member.tobuf(form) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        file.write(bytes(1024))
    assert build_index(tmp_path).rejects == {"too_large": 1}
    assert [sample.key for sample in read_all(ShardIndex.open(tmp_path))] == ["a", "c"]


def test_captions_that_are_too_long_and_media_without_bytes(tmp_path: Path) -> None:
    image, page = make_image(1), "word " * 200_000
    members = [
        *crawled("good", image, "jpg", "short"),
        *crawled("page", image, "jpg", page),
        *crawled("one", image, "jpg", page, captions=[page, "fits"]),
        *crawled("nothing", b"", "jpg", "nothing"),
        ("huge.jpg", image),
        ("huge.txt", b"x" * (MAX_TEXT_BYTES + 1)),
        *crawled("limit", image, "jpg", "x" * MAX_CAPTION_LENGTH),
    ]
    write_tar(tmp_path / "0.tar", members)
    assert build_index(tmp_path).rejects == {"caption_too_long": 1, "media_image": 1, "too_large": 1}
    captions = {sample.key: sample.captions for sample in read_all(ShardIndex.open(tmp_path))}
    assert captions == {"good": ("short",), "one": ("fits",), "limit": ("x" * MAX_CAPTION_LENGTH,)}


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


# --- index and corpus ---


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


@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.5, 1.0])
def test_splits_are_disjoint_and_complete_and_keep_media_together(tmp_path: Path, holdout: float) -> None:
    folder = captioned(tmp_path, shards=5, per_shard=40)
    index = ShardIndex.open(folder)
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for split in ("train", "test"):
        if holdout == (0.0 if split == "test" else 1.0):
            with pytest.raises(
                ShardError, match=rf"no {split} samples in .*: 200 samples with data\.holdout={holdout}"
            ):
                Corpus.open([folder], holdout, split)
            continue
        corpus = Corpus.open([folder], holdout, split)
        splits[split] = [
            corpus.read_sample(corpus.entry(medium, shard, number))
            for medium, sizes in corpus.sizes().items()
            for shard, size in enumerate(sizes)
            for number in range(size)
        ]
        assert len(corpus) == len(splits[split]) == sum(corpus.count(medium) for medium in MEDIA)
    keys = {split: {sample.key for sample in samples} for split, samples in splits.items()}
    ids = {split: {sample.media_id for sample in samples} for split, samples in splits.items()}
    assert sorted(keys["train"] | keys["test"]) == [sample.key for sample in read_all(index)]
    assert not keys["train"] & keys["test"] and not ids["train"] & ids["test"]
    expected = {name for name in ids["train"] | ids["test"] if stable_hash(name) < holdout * 2**63}
    assert ids["test"] == expected
    assert len(keys["test"]) == pytest.approx(holdout * 200, abs=25)


def test_a_corpus_numbers_the_shards_of_several_folders_through(tmp_path: Path) -> None:
    folders = [captioned(tmp_path / "a", 2, 3, tag="a"), captioned(tmp_path / "b", 3, 2, tag="b")]
    write_tar(
        tmp_path / "c" / "clips.tar",
        crawled("clip", make_clip(1), "mp4", "moves") + crawled("x", make_image(1), "jpg", "is"),
    )
    build_index(tmp_path / "c")
    corpus = Corpus.open([*folders, tmp_path / "c"], holdout=0.0, split="train")
    sizes = corpus.sizes()
    assert sizes["image"].tolist() == [3, 3, 2, 2, 2, 1]
    assert sizes["video"].tolist() == [0, 0, 0, 0, 0, 1]
    assert corpus.entry("video", 5, 0).key == "clip"
    assert corpus.entry("image", 5, 0).key == "x"
    assert corpus.entry("image", 3, 1).shard == str(tmp_path / "b" / "00001.tar")
    in_order = [
        corpus.entry("image", shard, number) for shard, size in enumerate(sizes["image"]) for number in range(size)
    ]
    assert [corpus.nth("image", number) for number in range(corpus.count("image"))] == in_order
    with pytest.raises(IndexError):
        corpus.nth("image", corpus.count("image"))
    copy = pickle.loads(pickle.dumps(corpus))
    assert [copy.nth("image", number) for number in range(copy.count("image"))] == in_order
    assert copy.read_sample(in_order[4]) == corpus.read_sample(in_order[4])


def test_bad_arguments_of_a_corpus_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no shard folders: set data\.train"):
        Corpus.open([], 0.0, "train")
    folder = captioned(tmp_path, 1, 1)
    with pytest.raises(ShardError, match=r"data\.holdout is 1\.5"):
        Corpus.open([folder], 1.5, "train")


# --- what tars of others may hold ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"rotation": -90}, {"rotation": 45}, {"width": -1}, {"width": 0}, {"frames": 5 * 10**9}, {"key_frames": -1},
        {"duration_s": float("nan")}, {"fps": float("inf")}, {"fps": 1e300}, {"declared_frames": 2**70},
    ],
)  # fmt: skip
def test_facts_that_no_probe_gives_are_not_believed(tmp_path: Path, wrong: dict) -> None:
    clip = make_clip(10)
    facts = probe(clip, "mp4")
    believed = vars(facts) | {"frames": 77, "declared_frames": 77}
    members = [
        *crawled("a", clip, "mp4", "a dog", media_facts=vars(facts) | wrong),
        *crawled("b", clip, "mp4", "a dog", media_facts=believed),
    ]
    write_tar(tmp_path / "0.tar", members)
    assert build_index(tmp_path).samples == 2
    index = ShardIndex.open(tmp_path)
    assert vars(index.entry(0).facts) == pytest.approx(vars(facts))
    assert index.entry(1).facts.frames == 77  # possible facts are taken as they stand


@pytest.mark.parametrize("names", [("a.jpg", "a.txt", "a.jpg"), ("a.jpg", "a.txt", "a.jpg", "a.txt")])
def test_a_key_twice_in_a_row_is_not_guessed_at(tmp_path: Path, names: tuple[str, ...]) -> None:
    data = {"jpg": make_image(10), "txt": b"a dog"}
    members = [(name, data[name[2:]]) for name in names]
    write_tar(tmp_path / "0.tar", [*members, *crawled("b", make_image(1), "jpg", "a cat")])
    report = build_index(tmp_path)
    assert (report.samples, report.rejects) == (1, {"duplicate_key": 1})
    assert [sample.captions for sample in read_all(ShardIndex.open(tmp_path))] == [("a cat",)]


def test_json_nested_without_end_is_one_bad_sample(tmp_path: Path) -> None:
    members = [("a.jpg", make_image(1)), ("a.txt", b"a dog"), ("a.json", b'{"x": ' + b"[" * 200_000)]
    write_tar(tmp_path / "0.tar", [*members, *crawled("b", make_image(1), "jpg", "a cat")])
    assert build_index(tmp_path).rejects == {"json_invalid": 1}


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "0.tar", crawled("a", make_image(1), "jpg", "a dog"))

    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)  # tests may run as root, who may write everywhere
        with pytest.raises(ShardError, match=rf"cannot write into {tmp_path}: Permission denied .*\.index\.partial"):
            build_index(tmp_path)
    (tmp_path / ".index.partial").write_bytes(b"")
    with pytest.raises(ShardError, match=f"cannot write into {tmp_path}: File exists"):
        build_index(tmp_path)
