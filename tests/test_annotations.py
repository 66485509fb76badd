"""Lists of media and captions, and what a folder given as --data is taken for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.data import annotations
from smaug_ds.data.annotations import (
    Annotation,
    Source,
    SourceError,
    describe_source,
    find_lists,
    read_list,
    read_lists,
)


def write_list(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_rows_of_one_file_become_one_sample_with_several_captions(tmp_path: Path) -> None:
    rows = [
        {"video": "a/1.mp4", "caption": " runs ", "duration": 2.5},
        {"image": "b.jpg", "caption": ["red", "round", "red", ""]},
        {"video": "a/1.mp4", "caption": ["jumps", "runs"]},
        {"video": "c.mp4", "caption": " "},
    ]
    path = write_list(tmp_path / "list.json", rows)
    assert list(read_list(path)) == [
        Annotation("video", "a/1.mp4", ("runs", "jumps"), "a/1.mp4"),
        Annotation("image", "b.jpg", ("red", "round"), "b.jpg"),
        Annotation("video", "c.mp4", (), "c.mp4"),
    ]


def test_lists_are_merged(tmp_path: Path) -> None:
    first = write_list(tmp_path / "1.json", [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": "y"}])
    second = write_list(tmp_path / "2.json", [{"image": "b.jpg", "caption": "z"}, {"video": "a.jpg", "caption": "v"}])
    assert [(a.medium, a.path, a.captions) for a in read_lists([first, second])] == [
        ("image", "a.jpg", ("x",)),
        ("image", "b.jpg", ("y", "z")),
        ("video", "a.jpg", ("v",)),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"video": "a.mp4"}, "holds a JSON dict, not a list"),
        ([{"caption": "x"}], 'row 0: wants "video" or "image"'),
        ([{"video": "a.mp4", "image": "a.jpg", "caption": "x"}], 'row 0: wants "video" or "image"'),
        ([{"video": "a.mp4", "caption": "x"}, {"video": 3, "caption": "x"}], "row 1: wants"),
        ([["a.mp4", "x"]], "row 0: wants"),
        ([{"video": "a.mp4", "question": "who?"}], 'row 0: wants "caption"'),
        ([{"video": "a.mp4", "caption": [1]}], 'row 0: wants "caption"'),
    ],
)
def test_rows_of_another_format_are_named(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(SourceError, match=rf"list\.json.*{message}"):
        list(read_list(write_list(tmp_path / "list.json", rows)))


def test_files_that_are_no_list(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"list .*gone\.json does not exist"):
        read_lists([tmp_path / "gone.json"])
    for content, message in [
        (b'[{"video": "a.mp4", "caption": "x"}, {"video": "b', r"row 1 is damaged"),
        (b'[{"video": "a.mp4", "caption": "x"} {"video"', r"no comma or end after row 0"),
        (b'[{"video": "a.mp4", "caption": "x"}', r"no comma or end after row 0"),
        (b"", r"not a list of rows"),
    ]:
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(SourceError, match=rf"bad\.json .*{message}"):
            read_lists([tmp_path / "bad.json"])


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
def test_arrays_are_read_piece_by_piece(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "_CHUNK", chunk)
    rows = [{"a": ["] ,[{", '\\"'], "b": None}, {}, {"c": {"d": [1.5, "ü"]}}] * 3
    for indent in (None, 3):
        (tmp_path / "rows.json").write_text("\ufeff " + json.dumps(rows, indent=indent) + "\n ", encoding="utf-8")
        assert list(annotations.json_rows(tmp_path / "rows.json")) == rows
    (tmp_path / "rows.json").write_text(" [ ] ")
    assert list(annotations.json_rows(tmp_path / "rows.json")) == []


def test_lists_are_found_three_levels_down_but_not_deeper(tmp_path: Path) -> None:
    near = write_list(tmp_path / "video_train.json", [])
    far = write_list(tmp_path / "x" / "y" / "z" / "image_test.json", [])
    write_list(tmp_path / "x" / "y" / "z" / "w" / "image_train.json", [])
    write_list(tmp_path / "qa_train.json", [])
    assert find_lists(tmp_path) == {"video_train.json": near, "image_test.json": far}
    write_list(tmp_path / "x" / "video_train.json", [])
    with pytest.raises(SourceError, match=r"two lists video_train\.json"):
        find_lists(tmp_path)


def test_describe_source_tells_shards_from_lists(tmp_path: Path) -> None:
    def shard(*parts: str) -> Path:
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path.parent

    flat = shard("flat", "00000.tar")
    assert describe_source(flat) == Source("shards", flat, (flat,), ())
    train, test = shard("split", "train", "0.tar"), shard("split", "test", "0.tar")
    assert describe_source(train.parent) == Source("shards", train.parent, (train,), (test,))

    lists = tmp_path / "lists"
    image, video = (write_list(lists / "deep" / f"{medium}_train.json", []) for medium in ("image", "video"))
    held_out = write_list(lists / "video_test.json", [])
    assert describe_source(lists) == Source("lists", lists, (video, image), (held_out,))
    assert describe_source(str(lists), media_root=tmp_path).media_root == tmp_path
    assert describe_source(image) == Source("lists", image.parent, (image,), ())
    assert describe_source(image, tmp_path) == Source("lists", tmp_path, (image,), ())

    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty holds no training data: looked for \*\.tar .* video_train\.json"):
        describe_source(tmp_path / "empty")
    with pytest.raises(SourceError, match=r"gone does not exist"):
        describe_source(tmp_path / "gone")


def test_lists_over_real_media(shared_data: Path) -> None:
    source = describe_source(shared_data)
    assert source.kind == "lists" and source.media_root == shared_data
    train, test = read_lists(source.train), read_lists(source.test)
    assert (len(train), len(test)) == (86 + 61, 38)
    assert not {annotation.media_id for annotation in train} & {annotation.media_id for annotation in test}
    assert all((shared_data / annotation.path).is_file() and annotation.captions for annotation in train + test)


def test_benchmark_files_in_the_same_layout(shared_data: Path) -> None:
    listed = read_lists([shared_data / "annotations" / "msrvtt" / "msrvtt_ret_test1k.json"])
    assert len(listed) == 1000 and all(len(annotation.captions) == 1 for annotation in listed)
