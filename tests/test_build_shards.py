"""The shard tools: media copied bit for bit, nothing lost without a line, the same bytes whatever the workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from smaug_ds.data.annotations import describe_source, read_lists
from smaug_ds.data.index import Corpus, ShardIndex
from smaug_ds.data.media import MediaError
from smaug_ds.data.sample import Sample
from smaug_ds.data.shard import ShardError
from smaug_ds.data.video import probe
from tests.conftest import ROOT
from tests.shards import crawled, make_clip, make_image, write_tar
from tools.build_shards import build


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Ten files, one of them with two captions, and their list; beside it five rows that cannot become samples."""
    root = tmp_path / "media"
    root.mkdir()
    rows: list[dict] = []
    for number in range(6):
        (root / f"clip.{number}.MP4").write_bytes(make_clip(10 * number))
        rows.append({"video": f"clip.{number}.MP4", "caption": f"clip {number}"})
    for number in range(4):
        (root / f"{number}.png").write_bytes(make_image(number, "png"))
        rows.append({"image": f"{number}.png", "caption": [f"image {number}", f"again {number}"]})
    (root / "list.json").write_text(json.dumps(rows))
    (root / "broken.mp4").write_bytes(b"no film")
    bad = [
        {"video": "gone.mp4", "caption": "missing"},
        {"video": "broken.mp4", "caption": "no film"},
        {"video": "0.png", "caption": "listed as a film"},
        {"video": "sound.mp3", "caption": "la la la"},
        {"image": "1.png", "caption": " "},
    ]
    bad[-1]["image"] = "./1.png"  # the same file by another name, without captions
    (root / "bad.json").write_text(json.dumps(bad))
    return root


def samples_of(folder: Path) -> list[Sample]:
    index = ShardIndex.open(folder)
    return [index.read_sample(index.entry(row)) for row in range(len(index))]


def test_media_are_copied_bit_for_bit_with_all_captions_and_facts(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "shards"
    report = build([media / "list.json"], media, out, samples_per_shard=4)
    assert (report.shards, report.index.samples, report.index.captions, report.rejects) == (3, 10, 14, {})
    annotations = read_lists([media / "list.json"])
    samples = samples_of(out)
    for sample, annotation in zip(samples, annotations, strict=True):
        assert sample.media == (media / annotation.path).read_bytes()
        assert (sample.media_id, sample.medium, sample.captions) == (
            annotation.media_id,
            annotation.medium,
            annotation.captions,
        )
    index = ShardIndex.open(out)
    facts = [index.entry(row).facts for row in range(10)]
    for found, annotation in zip(facts, annotations, strict=True):
        data = (media / annotation.path).read_bytes()
        assert vars(found) == pytest.approx(vars(probe(data, annotation.path.rpartition(".")[2].lower())))
    assert (out / "rejects.jsonl").read_text() == ""
    assert not (tmp_path / "new" / "shards.partial").exists()


def test_webdataset_reads_what_was_built(media: Path, tmp_path: Path) -> None:
    build([media / "list.json"], media, tmp_path / "out", samples_per_shard=100)
    read = list(webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{number:09d}" for number in range(10)]
    for sample, annotation in zip(read, read_lists([media / "list.json"]), strict=True):
        data = (media / annotation.path).read_bytes()
        assert sample["mp4" if annotation.medium == "video" else "png"] == data
        assert sample["txt"].decode() == annotation.captions[0]
        assert json.loads(sample["json"])["captions"] == list(annotation.captions)


def test_files_that_cannot_be_used_are_left_out_with_a_reason(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = build([media / "bad.json", media / "list.json"], media, out, samples_per_shard=5)
    assert report.shards == 2  # the first shard had nothing to hold
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {line["path"]: line["reason"] for line in lines} == {
        "gone.mp4": "missing",
        "broken.mp4": "media_open",
        "0.png": "medium",
        "sound.mp3": "suffix",
        "./1.png": "no_caption",
    }
    assert all(line["detail"] for line in lines) and sum(report.rejects.values()) == 5
    assert "5 rows and media files left out" in str(report)
    assert [sample.captions for sample in samples_of(out)] == [
        annotation.captions for annotation in read_lists([media / "list.json"])
    ]
    with pytest.raises(ShardError, match=r"all 5 media files were left out \(.*missing 1.*rejects\.jsonl"):
        build([media / "bad.json"], media, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_workers_and_an_earlier_killed_build_change_nothing(media: Path, tmp_path: Path) -> None:
    lists = [media / "list.json", media / "bad.json"]
    build(lists, media, tmp_path / "one", samples_per_shard=3, workers=1)
    (tmp_path / "two.partial").mkdir()
    (tmp_path / "two.partial" / "00009.tar").write_bytes(b"half a shard")
    build(lists, media, tmp_path / "two", samples_per_shard=3, workers=2)
    one, two = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and "00003.tar" in one


def test_what_build_refuses(media: Path, tmp_path: Path) -> None:
    lists = [media / "list.json"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ShardError, match=r"full exists and is not empty"):
        build(lists, media, tmp_path / "full")
    with pytest.raises(ShardError, match=r"media root .*nowhere is no folder"):
        build(lists, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ShardError, match=r"--samples-per-shard is 0"):
        build(lists, media, tmp_path / "out", samples_per_shard=0)
    (media / "empty.json").write_text("[]")
    with pytest.raises(ShardError, match=r"no rows in .*empty\.json"):
        build([media / "empty.json"], media, tmp_path / "out")


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_tools_on_the_command_line(media: Path, tmp_path: Path) -> None:
    options = ("--list", media / "list.json", "--media-root", media, "--workers", 1, "--out")
    built = run_tool("tools/build_shards.py", *options, tmp_path / "out")
    assert built.returncode == 0, built.stderr
    assert "1 shards" in built.stdout and "10 samples (6 videos" in built.stdout
    again = run_tool("tools/build_shards.py", *options, tmp_path / "out")
    assert again.returncode == 0 and "all made before" in again.stdout
    refused = run_tool("tools/build_shards.py", *options, tmp_path / "out", "--samples-per-shard", 9)
    assert refused.returncode == 2 and "samples_per_shard = 256, this command has 9" in refused.stderr
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1

    for tool, folder in (("build", ("--list", media / "list.json", "--out", tmp_path / "no")), ("index", (tmp_path,))):
        wrong = run_tool(f"tools/{tool}_shards.py", *folder, "--workers", -3)
        assert wrong.returncode == 2 and "'-3' is no whole number of at least 1" in wrong.stderr
    assert not (tmp_path / "no").exists()

    write_tar(tmp_path / "ready" / "00000.tar", crawled("a", make_image(1), "jpg", "a picture"))
    indexed = run_tool("tools/index_shards.py", tmp_path / "ready", tmp_path / "nowhere", "--workers", 1)
    assert indexed.returncode == 2
    assert "1 samples (0 videos" in indexed.stdout and "nowhere does not exist" in indexed.stderr
    assert samples_of(tmp_path / "ready")[0].captions == ("a picture",)


def test_real_media(shared_data: Path, tmp_path: Path) -> None:
    source = describe_source(shared_data)
    report = build(source.train, source.media_root, tmp_path / "train", samples_per_shard=32)
    accounted = report.index.samples + sum(report.rejects.values())
    assert accounted == len(read_lists(source.train)) == 147
    corpus = Corpus.open([tmp_path / "train"], holdout=0.0, split="train")
    for medium in ("image", "video"):
        for number in range(corpus.count(medium)):
            sample = corpus.read_sample(corpus.nth(medium, number))
            assert sample.media == (shared_data / sample.media_id).read_bytes()
    assert report.rejects == {}


def test_hostile_media_are_taken_or_left_as_the_probe_says(shared_data: Path, tmp_path: Path) -> None:
    names = sorted(
        str(file.relative_to(shared_data))
        for file in (shared_data / "hostile").rglob("*")
        if file.suffix.lower() in (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
    )
    (tmp_path / "list.json").write_text(json.dumps([{"video": name, "caption": name} for name in names]))
    report = build([tmp_path / "list.json"], shared_data, tmp_path / "out", samples_per_shard=16)
    rejected = {json.loads(line)["path"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()}
    kept = {sample.media_id: sample for sample in samples_of(tmp_path / "out")}
    assert rejected and kept and rejected.isdisjoint(kept) and rejected | set(kept) == set(names)
    assert report.index.samples == len(kept)
    for name in names:
        try:
            probe((shared_data / name).read_bytes(), name.rpartition(".")[2].lower())
        except MediaError:
            assert name in rejected
        else:
            assert kept[name].captions == (name,)


def test_captions_without_a_word_are_left_out_of_a_build(media: Path, tmp_path: Path) -> None:
    rows = [{"image": "0.png", "caption": ["...", "a dog"]}, {"image": "1.png", "caption": "?!"}]
    (media / "dots.json").write_text(json.dumps(rows))
    report = build([media / "dots.json"], media, tmp_path / "out")
    assert (report.index.samples, report.rejects) == (1, {"no_caption": 1})
    assert samples_of(tmp_path / "out")[0].captions == ("a dog",)


def test_a_storage_that_comes_back_is_looked_at_again(media: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    with pytest.raises(ShardError, match=r"all 10 media files were left out \(missing 10\)"):
        build([media / "list.json"], tmp_path / "away", tmp_path / "out", samples_per_shard=4)
    for file in media.iterdir():
        (tmp_path / "away" / file.name).write_bytes(file.read_bytes())
    report = build([media / "list.json"], tmp_path / "away", tmp_path / "out", samples_per_shard=4)
    assert (report.index.samples, report.rejects) == (10, {})


def test_a_command_that_finished_nothing_does_not_stand_in_the_way(media: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"video": "nowhere.mp4", "caption": 7}]))
    with pytest.raises(ValueError, match="row 0"):  # a wrong list
        build([tmp_path / "list.json"], media, tmp_path / "out")
    assert build([media / "list.json"], media, tmp_path / "out").index.samples == 10


def test_a_folder_leaves_nothing_out_in_silence(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "b.webm", "c.mp4"):
        (tmp_path / name).write_bytes(make_clip(40))
    (tmp_path / "a.jpg").write_bytes(make_image(3))  # a thumbnail
    for name in ("d.mp3", "e"):
        (tmp_path / name).write_bytes(b"sound")
    for key in "abcde":
        (tmp_path / f"{key}.txt").write_text(f"this is {key}")
    report = build([tmp_path], tmp_path, tmp_path.parent / f"{tmp_path.name}_out")
    assert report.index.samples == 3
    assert report.rejects == {"suffix": 2, "same_key": 1}
