"""Benchmark files that cannot be used: the message names the file and the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.evaluation.benchmarks import BenchmarkError, read_benchmark, read_ids, read_predictions
from smaug_ds.evaluation.benchmarks.__main__ import main


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


QUESTION = {"video_name": "x", "question": "why", "question_id": "q0"}
ANSWER = {"question_id": "q0", "answer": "so", "type": 3}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", [], "holds no rows"),
        ("a.json", "[{", "row 0 is damaged"),
        ("a.json", "{", "not JSON"),
        ("a.json", [{"video": "x"}], "row 0: of no known layout"),
        ("a.json", [{"video": "x", "caption": "c"}, {"video": "x"}], 'row 1: wants "caption"'),
        ("a.json", [{"video": "x", "caption": "c"}, "x"], "row 1: wants an object"),
        ("a.json", [{"video": ["x", "y"], "caption": "c"}], 'row 0: wants "video"'),
        ("a.json", [{"video": "x", "caption": []}], "row 0: no caption"),
        ("a.json", [{"video": "x", "caption": [" "]}], "row 0: wants a text"),
        ("a.json", '[{"video": "x", "caption": "\\ud83d"}]', "row 0: .*is not UTF-8"),
        (
            "a.json",
            [{"video": "x", "caption": ["a", "b"], "answer": 2}],
            "row 0: answer is 2, but there are 2 captions",
        ),
        ("a.json", [{"video": "x", "question": "q", "answer": ["a", "b"]}], "row 0: wants one answer"),
        ("a.json", [{"video_id": 1, "question": "q", "answer": "a", "id": 5}] * 2, "row 1: id 5 stands there twice"),
        ("a.json", [{"video": "x.mov", "description": None}], 'row 0: wants "description"'),
        ("a.json", {"v_x": {"sentences": []}}, "video v_x: no sentences"),
        ("a.json", {"v_x": {"duration": 3}}, 'video v_x: wants "sentences"'),
        ("a.json", {"sentences": [{"video_id": "v"}], "videos": []}, 'sentence 0: wants "caption"'),
        ("a.json", [QUESTION], "give the file of their answers"),
        ("a.json", ["v_x", "v_y"], "holds ids, no benchmark"),
        ("a.json", [ANSWER], "holds answers, no benchmark"),
        ("a.csv", "video_id,sentence\nvideo1\n", "row 0: not as many columns"),
        ("a.csv", "videoid,name\n1,x\n", "neither JSON, nor a csv with video_id, sentence"),
    ],
)
def test_bad_files_are_named_with_their_row(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(BenchmarkError, match=message) as caught:
        read_benchmark(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ([QUESTION], [], "q.json, row 0: question_id q0 has no answer in .*a.json"),
        ([QUESTION], [ANSWER, {**ANSWER, "question_id": "q1"}], "a.json: 1 answers have no question in .*q.json: q1"),
        ([QUESTION, QUESTION], [ANSWER], "q.json, row 1: question_id q0 stands there twice"),
        ([QUESTION], [ANSWER, ANSWER], "a.json, row 1: question_id q0 stands there twice"),
        ([QUESTION], [{**ANSWER, "type": 9}], "a.json, row 0: type is 9"),
        ([QUESTION], [{**ANSWER, "type": "3"}], 'a.json, row 0: wants "type"'),
    ],
)
def test_wrong_joins(tmp_path: Path, questions: Any, answers: Any, message: str) -> None:
    _write(tmp_path / "my_q.json", questions)
    _write(tmp_path / "my_a.json", answers)
    with pytest.raises(BenchmarkError, match=message):
        read_benchmark(tmp_path / "my_q.json")


def test_other_misuse(tmp_path: Path) -> None:
    pairs = _write(tmp_path / "pairs.csv", "key,vid_key,video_id,sentence\nret0,msr1,video1,a cat\n")
    assert len(read_benchmark(pairs)) == 1
    with pytest.raises(BenchmarkError, match=r"nowhere.json cannot be read: No such file"):
        read_benchmark(tmp_path / "nowhere.json")
    with pytest.raises(BenchmarkError, match="its answers are not in a file of their own"):
        read_benchmark(pairs, answers=pairs)
    with pytest.raises(BenchmarkError, match="has no rows of the 1 videos"):
        read_benchmark(pairs, ids=_write(tmp_path / "ids.txt", "video0\n"))
    with pytest.raises(BenchmarkError, match="no list of video ids"):
        read_ids(pairs)
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(range(256)))
    with pytest.raises(BenchmarkError, match=r"other\.bin: neither JSON, nor a csv"):
        read_ids(other)
    for before in (0, 1000):
        other.write_bytes(b"video1\n" * before + "vidéo2\n".encode("latin-1"))
        with pytest.raises(BenchmarkError, match=rf"other\.bin is not UTF-8 at byte {7 * before + 3}"):
            read_ids(other)
    with pytest.raises(BenchmarkError, match="row 1: wants the name of a video"):
        read_ids(_write(tmp_path / "ids.json", ["x", 3]))
    with pytest.raises(BenchmarkError, match="row 1: question_id q0 stands there twice"):
        read_predictions(_write(tmp_path / "p.json", [{"question_id": "q0", "answer": "a"}] * 2))


def test_the_command_ends_with_2_and_a_line_for_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = _write(tmp_path / "pairs.json", [{"video": "a.mp4", "caption": "a cat"}])
    missing, none = tmp_path / "none.json", "No such file or directory"
    (tmp_path / "media").mkdir()
    for arguments, told in [
        ([missing], f"{missing} cannot be read: {none}"),
        ([tmp_path], f"{tmp_path} cannot be read: Is a directory"),
        ([pairs, "--ids", missing], f"{missing} cannot be read: {none}"),
        ([pairs, "--media", missing], f"{missing} is no folder: give the one that holds the videos of {pairs}"),
    ]:
        assert main([str(argument) for argument in arguments]) == 2
        assert capsys.readouterr().err == f"error: {told}\n"
    (tmp_path / "media" / "a.mp4").touch()
    out = tmp_path / "nowhere" / "out.json"
    assert main([str(pairs), "--media", str(tmp_path / "media"), "--list", str(out)]) == 2
    assert capsys.readouterr().err == f"error: --list {out} cannot be written: {none}\n"
