"""What a small run needs, out of any source: a shard folder for each list, and mistakes that can be mended in place."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.data.index import ShardIndex
from smaug_ds.data.shard import ShardError
from tests.toys import read_list
from tools import prepare_corpus


def settings(out: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (out / "corpus.args").read_text().splitlines())


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        prepare_corpus.main([str(argument) for argument in arguments])
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return told


@pytest.fixture
def lists(toy_media: Path, tmp_path: Path) -> Path:
    """A folder with lists of some clips and images, whose media lie elsewhere."""
    folder = tmp_path / "lists"
    folder.mkdir()
    for name, count in (("video_train", 6), ("image_train", 4), ("video_test", 3)):
        (folder / f"{name}.json").write_text(json.dumps(read_list(toy_media, f"{name}.json")[:count]))
    shutil.copy(toy_media / "vocab.txt", folder)
    return folder


def test_each_list_has_a_shard_folder_and_an_empty_one_none(lists: Path, toy_media: Path, tmp_path: Path) -> None:
    whole = ["--data", str(lists), "--media-root", str(toy_media), "--workers", "1"]
    prepare_corpus.main([*whole, "--out", str(tmp_path / "out")])
    found = settings(tmp_path / "out")
    counts = {Path(folder).name: len(ShardIndex.open(folder)) for folder in json.loads(found["data.train"])}
    assert counts == {"video_train": 6, "image_train": 4}
    assert [Path(folder).name for folder in json.loads(found["data.test"])] == ["video_test"]
    assert (found["batch.global_size"], found["batch.micro_size"]) == ("4", "2")  # as many as there are images

    (lists / "image_train.json").write_text("[]")
    prepare_corpus.main([*whole, "--out", str(tmp_path / "fewer")])
    assert [Path(folder).name for folder in json.loads(settings(tmp_path / "fewer")["data.train"])] == ["video_train"]


def test_a_mistake_in_the_source_can_be_mended_with_the_same_out(
    lists: Path, toy_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "out", "--workers", "1"]
    assert "does not exist" in refused(capsys, "--data", tmp_path / "nowhere", *out)
    assert "toy.clips is 0" in refused(capsys, "--clips", "0", *out)
    told = refused(capsys, "--data", lists, *out)
    assert "media files were left out (missing " in told
    assert f"paths start at {lists}, unless --media-root" in told
    mended = ("--data", lists, "--media-root", toy_media, *out)
    begun = tmp_path / "out" / "shards" / "video_train.partial"
    assert f"or remove {begun}" in refused(capsys, *mended)  # nothing is removed unasked
    shutil.rmtree(begun)
    prepare_corpus.main([str(argument) for argument in mended])
    told = refused(capsys, "--clips", "64", *out)
    where = f"{lists} with media in {toy_media}"
    assert f"was prepared from {where}, not from the built-in corpus of 64 clips: name another --out" in told


def test_want_of_room_names_the_folder(
    lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    file.write_text("")
    assert f"{file}: File exists; --out needs" in refused(capsys, "--data", lists, "--out", file)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_corpus, "build", full)
    told = refused(capsys, "--data", lists, "--out", out)
    assert told == f"error: {out}: No space left on device; --out needs room and a right to write"


def test_a_list_that_cannot_be_built_is_not_left_out(
    lists: Path, toy_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_corpus.build

    def no_room(one: list[Path], *arguments: Any, **named: Any) -> Any:
        if one[0].stem == "video_train":
            raise ShardError("no room")
        return whole(one, *arguments, **named)

    monkeypatch.setattr(prepare_corpus, "build", no_room)
    own = ("--data", lists, "--media-root", toy_media, "--out", tmp_path / "out", "--workers", "1")
    assert refused(capsys, *own) == "error: no room"
    assert not (tmp_path / "out" / "corpus.args").exists()


def test_what_lies_in_out_is_neither_removed_nor_taken_for_another_source(
    lists: Path, toy_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--data", lists, "--media-root", toy_media, "--workers", "1")
    prepare_corpus.main([str(argument) for argument in (*own, "--out", tmp_path / "made")])
    shards = shutil.copytree(tmp_path / "made" / "shards" / "video_train", tmp_path / "mine" / "shards" / "own")
    shutil.rmtree(shards / "index")
    before = sorted(shards.iterdir())
    mine = ("--out", tmp_path / "mine", "--workers", "1")
    assert "does not exist" in refused(capsys, "--data", tmp_path / "nowhere", *mine)
    prepare_corpus.main([str(argument) for argument in ("--data", shards, *mine)])
    assert set(before) < set(shards.iterdir())

    # its vocabulary, trained on these captions, does not serve the next source
    other = shutil.copytree(shards, tmp_path / "other")
    assert "name another --out" in refused(capsys, "--data", other, *mine)
    (tmp_path / "mine" / "corpus.args").unlink()
    assert "name another --out" in refused(capsys, "--data", other, *mine)
    for damaged in ("{", "[]", ""):
        (tmp_path / "mine" / "source.json").write_text(damaged)
        assert "source.json does not tell from what" in refused(capsys, "--data", other, *mine)
    assert "give --data" in refused(capsys, "--media-root", toy_media, *mine)


def test_a_list_that_begins_with_nothing_is_not_an_empty_one(
    lists: Path, toy_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((lists / "video_train.json").read_text())
    (lists / "video_train.json").write_text(json.dumps([None, *rows]))
    told = refused(capsys, "--data", lists, "--media-root", toy_media, "--workers", "1", "--out", tmp_path / "out")
    assert "video_train.json" in told


def test_too_few_samples_to_test_on_are_told_at_once(
    lists: Path, toy_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_corpus, "HOLDOUT", 1e-6)
    own = ("--data", lists / "video_train.json", "--media-root", toy_media, "--workers", "1")
    told = refused(capsys, *own, "--out", tmp_path / "out")
    assert "6 samples with data.holdout=1e-06: give more samples, or some to test on" in told


def test_an_interruption_is_one_line(
    lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_corpus, "build", interrupted)
    with pytest.raises(SystemExit, match=r"^130$"):
        prepare_corpus.main(["--data", str(lists), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == "stopped: the same command goes on from here\n"


def test_a_list_that_has_grown_is_not_left_at_what_it_was(
    lists: Path, toy_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--data", lists, "--media-root", toy_media, "--out", tmp_path / "out", "--workers", "1")
    prepare_corpus.main([str(argument) for argument in own])
    before = settings(tmp_path / "out")
    prepare_corpus.main([str(argument) for argument in own])
    assert settings(tmp_path / "out") == before
    (lists / "video_train.json").write_text(json.dumps(read_list(toy_media, "video_train.json")[:8]))
    assert f"{tmp_path}/out/shards/video_train holds a build with lists" in refused(capsys, *own)


def test_a_source_is_the_same_from_wherever_it_is_named(
    lists: Path, toy_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(lists, tmp_path / "other" / "lists")
    own = ("--data", "lists", "--media-root", str(toy_media), "--out", str(tmp_path / "out"), "--workers", "1")
    monkeypatch.chdir(tmp_path)
    prepare_corpus.main(own)
    monkeypatch.chdir(tmp_path / "other")
    assert "name another --out" in refused(capsys, *own)
