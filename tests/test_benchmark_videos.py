"""The videos of a benchmark found in folders and shards by whatever name they have there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smaug_ds.data.index import ShardIndex
from smaug_ds.data.indexing import build_index
from smaug_ds.data.sharding import build
from smaug_ds.evaluation.benchmarks import (
    Benchmark,
    BenchmarkError,
    find_in_folder,
    find_in_shards,
    read_benchmark,
    write_list,
)
from smaug_ds.evaluation.benchmarks.__main__ import main
from smaug_ds.evaluation.benchmarks.videos import stem
from tests.shards import crawled, make_clip, write_tar


def _listed(folder: Path, *names: str) -> Benchmark:
    folder.mkdir(exist_ok=True)
    path = folder / "list.json"
    path.write_text(json.dumps([{"video": name, "caption": f"about {name}"} for name in names]))
    return read_benchmark(path)


def _touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_stem() -> None:
    expected = {"x.mov": "x", "x.mov.mp4": "x", "x.": "x", "x.MP4": "x", "x": "x", "x.y": "x.y", ".mp4": ".mp4"}
    assert {name: stem(name) for name in expected} == expected


def test_endings_prefixes_and_folders(tmp_path: Path) -> None:
    media = _touch(tmp_path / "media", "deep/a.mkv", "v_b.mp4", "c.3gp", "d", "e.mp4", "f.txt", "g.MP4", "h.mts.mp4")
    benchmark = _listed(tmp_path, "a.mov", "b", "v_c", "d.", "e.mp4", "f", "g.avi", "h.mts")
    found = find_in_folder(benchmark, media)
    expected = {
        "a.mov": "deep/a.mkv",
        "b": "v_b.mp4",
        "v_c": "c.3gp",
        "d.": "d",
        "e.mp4": "e.mp4",
        "g.avi": "g.MP4",
        "h.mts": "h.mts.mp4",
    }
    assert {video: path.relative_to(media).as_posix() for video, path in found.places.items()} == expected
    assert found.missing == {"f": 5}


def test_the_nearest_name_wins(tmp_path: Path) -> None:
    media = _touch(tmp_path / "media", "a.avi", "a.mp4", "v_b.mp4", "b.webm", "v_a.mp4")
    found = find_in_folder(_listed(tmp_path, "a.mp4", "b", "v_a"), media)
    assert [path.name for path in found.places.values()] == ["a.mp4", "b.webm", "v_a.mp4"]
    assert find_in_folder(_listed(tmp_path, "a.mov"), media).places["a.mov"].name == "a.avi"  # the same each time


def test_folders_of_a_name_must_agree(tmp_path: Path) -> None:
    """The built-in corpus calls clips by number in each split: another split's clip is no stand-in."""
    media = _touch(tmp_path / "media", "train/000/7.mp4", "test/000/7.mp4")
    wanted = _listed(tmp_path, "media/test/000/7.mp4")
    assert find_in_folder(wanted, media).places["media/test/000/7.mp4"] == media / "test/000/7.mp4"
    (media / "test/000/7.mp4").unlink()
    assert find_in_folder(wanted, media).missing == {"media/test/000/7.mp4": 0}
    _touch(media, "test/000/7.mp4")
    with pytest.raises(BenchmarkError, match="video 7 may be test/000/7 or train/000/7"):
        find_in_folder(_listed(tmp_path, "7"), media)


def test_missing_videos_are_reported_and_allowed(tmp_path: Path) -> None:
    media = _touch(tmp_path / "media", "3.mp4", "8.mp4")
    benchmark = _listed(tmp_path, *map(str, range(10)))
    found = find_in_folder(benchmark, media)
    report = (
        f"list.json: 8 of 10 videos are missing in {media}: 0 (row 0), 1 (row 1), 2 (row 2), 4 (row 4), 5 (row 5) ..."
    )
    assert str(found).endswith(report)
    found.require(8)
    with pytest.raises(BenchmarkError, match=r"8 of 10 videos are missing.*; 7 may be missing"):
        found.require(7)
    assert list(benchmark.without(found.missing).videos) == ["3", "8"]
    nothing = find_in_folder(benchmark, _touch(tmp_path / "empty", "x.mp4"))
    with pytest.raises(BenchmarkError, match="10 of 10"):
        nothing.require(10)
    whole = find_in_folder(_listed(tmp_path, "3", "8"), media)
    whole.require()
    assert str(whole).endswith(f"list.json: all 2 videos are in {media}")
    with pytest.raises(BenchmarkError, match="nowhere is no folder"):
        find_in_folder(benchmark, tmp_path / "nowhere")


def test_real_lists_and_names(shared_data: Path, tmp_path: Path) -> None:
    project = shared_data / "annotations/project"
    for name in ("video_train", "video_test", "qa_train", "qa_test", "mc_test"):
        benchmark = read_benchmark(project / f"{name}.json")
        found = find_in_folder(benchmark, shared_data)
        found.require()
        assert found.places == {video: shared_data / video for video in benchmark.videos}
    paragraphs = read_benchmark(project / "paragraph_activitynet_format.json")
    find_in_folder(paragraphs, shared_data / "videos/open_long").require()
    questions = read_benchmark(shared_data / "annotations/activitynet_qa/test_q.json")
    media = _touch(tmp_path / "activitynet", *[f"v_{video}.mkv" for video in list(questions.videos)[1:]])
    found = find_in_folder(questions, media)
    assert found.missing == {questions.questions[0].video: 0} and len(found.places) == 799
    assert all(path.name == f"v_{video}.mkv" for video, path in found.places.items())


def test_built_in_corpus(toy_media: Path) -> None:
    counts = {"video_test": 32, "mc_test": 32}
    for name in ("video_test", "mc_test", "qa_train", "qa_test"):
        benchmark = read_benchmark(toy_media / f"{name}.json")
        find_in_folder(benchmark, toy_media).require()
        assert len(benchmark) == counts.get(name, len(benchmark))


def test_both_names_of_a_didemo_video_lead_to_it(shared_data: Path, tmp_path: Path) -> None:
    paragraphs = read_benchmark(shared_data / "annotations/didemo/test_data.json")
    for part in (0, -1):
        media = _touch(tmp_path / str(part), *[one.names[part] for one in paragraphs.texts])
        found = find_in_folder(paragraphs, media)
        assert [path.name for path in found.places.values()] == [one.names[part] for one in paragraphs.texts]


def test_shards_by_media_id_source_and_key(tmp_path: Path) -> None:
    clip = make_clip(90)
    write_tar(
        tmp_path / "shards/00000.tar",
        [
            member
            for key, fields in [
                ("000", {"media_id": "deep/a.mp4"}),
                ("001", {"media_id": "https://example.org/1", "source": "b.mp4"}),
                ("v_c", {}),
            ]
            for member in crawled(key, clip, "mp4", f"about {key}", **fields)
        ],
    )
    build_index(tmp_path / "shards")
    found = find_in_shards(_listed(tmp_path, "a.mov", "b", "c", "nobody"), [ShardIndex.open(tmp_path / "shards")])
    assert {video: entry.key for video, entry in found.places.items()} == {"a.mov": "000", "b": "001", "c": "v_c"}
    assert found.missing == {"nobody": 3}


def test_list_to_shards_and_back(tmp_path: Path) -> None:
    """From a benchmark file over the command's list to shards, in which the benchmark's videos are found again."""
    for name in ("v_a.mp4", "v_b.mp4"):
        path = _touch(tmp_path / "media", f"clips/{name}") / "clips" / name
        path.write_bytes(make_clip(ord(name[2])))
    captions = {f"v_{name}": {"duration": 1, "timestamps": [], "sentences": [" one ", f"two {name}"]} for name in "abc"}
    file, out = tmp_path / "val.json", tmp_path / "list.json"
    file.write_text(json.dumps(captions))
    assert main([str(file), "--media", str(tmp_path / "media"), "--list", str(out)]) == 0
    assert json.loads(out.read_text()) == [
        {"video": "clips/v_a.mp4", "caption": ["one two a"]},
        {"video": "clips/v_b.mp4", "caption": ["one two b"]},
    ]
    build([out], tmp_path / "media", tmp_path / "shards")
    index = ShardIndex.open(tmp_path / "shards")
    found = find_in_shards(read_benchmark(file), [index])
    assert found.missing == {"v_c": 2}
    samples = {video: index.read_sample(entry) for video, entry in found.places.items()}
    assert {video: sample.captions for video, sample in samples.items()} == {
        "v_a": ("one two a",),
        "v_b": ("one two b",),
    }


def test_list_of_questions_and_choices(shared_data: Path, tmp_path: Path) -> None:
    for name, text in (("qa_test", "question"), ("mc_test", "caption")):
        benchmark = read_benchmark(shared_data / f"annotations/project/{name}.json")
        write_list(tmp_path / "list.json", benchmark, find_in_folder(benchmark, shared_data))
        rows = json.loads((shared_data / f"annotations/project/{name}.json").read_text())
        texts = {row["video"]: row[text] if text == "question" else row[text][row["answer"]] for row in rows}
        listed = json.loads((tmp_path / "list.json").read_text())
        assert {row["video"]: row["caption"] for row in listed} == {video: [text] for video, text in texts.items()}
