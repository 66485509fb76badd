"""What the index leaves out of tars, with a reason for each sample, and what it does not believe."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from smaug_ds.data.index import ShardIndex
from smaug_ds.data.indexing import build_index
from smaug_ds.data.shard import MAX_CAPTION_LENGTH, MAX_TEXT_BYTES, ShardError
from smaug_ds.data.video import probe
from tests.shards import crawled, make_clip, make_image, read_all, write_tar


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


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", make_image(1))])
    with pytest.raises(ShardError, match="not one usable sample in 1 tars; the first: a: no_caption"):
        build_index(tmp_path)
    assert not (tmp_path / "index").exists()


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
