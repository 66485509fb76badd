"""Benchmark files: the real ones with their quirks against slow joins, made-up ones of layouts not at hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.evaluation.benchmarks import (
    Benchmark,
    BenchmarkError,
    answer_list,
    coverage,
    predictions_in_order,
    read_answer_list,
    read_benchmark,
    read_ids,
    read_predictions,
    require_answers,
    write_predictions,
)
from smaug_ds.evaluation.benchmarks.__main__ import main


@pytest.fixture
def annotations(shared_data: Path) -> Path:
    return shared_data / "annotations"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_msrvtt_csv_and_singularity_list_are_the_same_pairs(annotations: Path) -> None:
    pairs = read_benchmark(annotations / "msrvtt/MSRVTT_JSFUSION_test.csv")
    listed = read_benchmark(annotations / "msrvtt/msrvtt_ret_test1k.json")
    assert pairs.name == listed.name == "MSR-VTT 1k-A test"
    assert pairs.task == "retrieval" and not pairs.notes and not listed.notes
    assert pairs.counts == listed.counts == {"videos": 1000, "sentences": 1000, "queries": 1000}
    with (annotations / "msrvtt/MSRVTT_JSFUSION_test.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [(one.video, *one.texts, one.row) for one in pairs.texts] == [
        (row[2], row[3], number) for number, row in enumerate(rows)
    ]
    assert [(f"{one.video}.mp4", one.texts) for one in pairs.texts] == [(o.video, o.texts) for o in listed.texts]


def test_msrvtt_training_ids(annotations: Path) -> None:
    ids = read_ids(annotations / "msrvtt/MSRVTT_train.9k.csv")
    assert len(ids) == 9000 and ids[0] == "video0"
    test = read_benchmark(annotations / "msrvtt/MSRVTT_JSFUSION_test.csv")
    assert not set(ids) & set(test.videos)


def test_msrvtt_data_by_its_published_layout(tmp_path: Path) -> None:
    sentences = [{"sen_id": i, "video_id": f"video{i % 3}", "caption": f" a  cat {i}\n"} for i in range(7)]
    videos = [{"id": i, "video_id": f"video{i}", "split": "train"} for i in range(3)]
    path = _write(tmp_path / "MSRVTT_data.json", {"info": {}, "videos": videos, "sentences": sentences})
    everything = read_benchmark(path)
    assert everything.counts == {"videos": 3, "sentences": 7, "queries": 7}
    assert everything.texts[1].texts == ("a cat 1", "a cat 4") and everything.texts[1].row == 1
    assert everything.notes == ("MSR-VTT: 3 videos, published 10000", "MSR-VTT: 7 sentences, published 200000")
    kept = read_benchmark(path, ids=_write(tmp_path / "train.csv", "video_id\nvideo2\nvideo9\nvideo0\n"))
    assert list(kept.videos) == ["video0", "video2"]
    assert len(kept.notes) == 1 and "1 of 3 videos" in kept.notes[0] and "video9" in kept.notes[0]


@pytest.mark.parametrize(("split", "names", "videos", "rows"), [("test", 1037, 1004, 4021), ("val", 1094, 1065, 4180)])
def test_didemo_paragraphs(annotations: Path, split: str, names: int, videos: int, rows: int) -> None:
    path = annotations / f"didemo/{split}_data.json"
    paragraphs = read_benchmark(path)
    assert paragraphs.counts == {"videos": videos, "sentences": rows, "queries": videos} and not paragraphs.notes
    assert paragraphs.task == "paragraph retrieval"
    assert sum(len(one.names) for one in paragraphs.texts) == names
    table = _json(path)
    assert {len(row["times"]) for row in table} <= {4, 5, 7}
    by_link: dict[str, list[str]] = {}  # one download link is one video, whatever its names
    for row in table:
        by_link.setdefault(row["dl_link"], []).extend(row["description"].split())
    assert [one.texts[0].split() for one in paragraphs.texts] == list(by_link.values())
    assert all(one.texts[0] == " ".join(one.texts[0].split()) for one in paragraphs.texts)
    assert {one.video.rpartition(".")[2] for one in paragraphs.texts} >= {"mov", "avi", "mp4", "3gp", "wmv", "mts", ""}


def test_didemo_with_a_list_of_names_joins_only_their_rows(annotations: Path, tmp_path: Path) -> None:
    """As in CLIP4Clip, whose list has one of the two names of a video."""
    path = annotations / "didemo/test_data.json"
    both = next(one for one in read_benchmark(path).texts if len(one.names) == 2)
    kept = read_benchmark(path, ids=_write(tmp_path / "test_list.txt", f"{both.names[1]}\n"))
    own = [row["description"] for row in _json(path) if row["video"] == both.names[1]]
    assert [one.texts for one in kept.texts] == [(" ".join(" ".join(own).split()),)]
    assert 0 < len(kept.texts[0].sentences) < len(both.sentences)


def test_activitynet_captions(annotations: Path, tmp_path: Path) -> None:
    path = annotations / "activitynet_captions/val_1.json"
    paragraphs = read_benchmark(path)
    assert paragraphs.counts == {"videos": 4917, "sentences": 17505, "queries": 4917} and not paragraphs.notes
    table = _json(path)
    assert list(paragraphs.videos) == list(table)
    raw = [sentence for video in table.values() for sentence in video["sentences"]]
    assert sum(sentence != sentence.strip() for sentence in raw) == 11639
    assert [s for one in paragraphs.texts for s in one.sentences] == [" ".join(s.split()) for s in raw]
    late = [time for video in table.values() for time in video["timestamps"] if time[1] > video["duration"]]
    assert len(late) == 134  # and nothing depends on them
    first = paragraphs.texts[0]
    assert first.texts == (" ".join(first.sentences),) and "  " not in first.texts[0]
    ids = annotations / "activitynet_captions/val_ids.json"
    assert len(read_ids(ids)) == 4926
    listed = read_benchmark(path, ids=ids)
    assert listed.records == paragraphs.records
    assert len(listed.notes) == 1 and "9 of 4926 videos" in listed.notes[0]
    part = read_benchmark(annotations / "activitynet_captions/val_2_head300.json")
    assert part.name == "activitynet_captions" and len(part) == 300 and not part.notes
    cut = _write(tmp_path / "val_1.json", dict(list(table.items())[:10]))
    assert read_benchmark(cut).notes[0] == "ActivityNet Captions val_1: 10 videos, published 4917"


def test_activitynet_qa_is_joined_by_question_id(annotations: Path, tmp_path: Path) -> None:
    folder = annotations / "activitynet_qa"
    test = read_benchmark(folder / "test_q.json")
    assert test.name == "ActivityNet-QA test" and not test.notes
    assert test.files == (str(folder / "test_q.json"), str(folder / "test_a.json"))
    assert test.counts == {"videos": 800, "questions": 8000}
    answers = {row["question_id"]: row for row in _json(folder / "test_a.json")}
    for row, question in zip(_json(folder / "test_q.json"), test.questions, strict=True):
        answer = answers[row["question_id"]]
        assert (question.question_id, question.video) == (row["question_id"], row["video_name"])
        assert (question.question, question.answer, question.type) == (
            " ".join(row["question"].split()),
            answer["answer"],
            answer["type"],
        )
    assert {question.type for question in test.questions} == set(range(9))
    assert all(question.question_id.startswith(f"v_{question.video}_") for question in test.questions)
    turned = _write(tmp_path / "turned.json", _json(folder / "test_a.json")[::-1])
    assert read_benchmark(folder / "test_q.json", answers=turned).records == test.records
    for split in ("train", "val"):
        assert len(read_benchmark(folder / f"{split}_q_head4000.json")) == 4000


def test_official_predictions(annotations: Path, tmp_path: Path) -> None:
    folder = annotations / "activitynet_qa"
    validation = read_benchmark(folder / "val_q_head4000.json")
    predictions = read_predictions(folder / "pred_val_example_head500.json")
    assert len(predictions) == 500
    ordered = predictions_in_order(predictions, validation.questions)
    assert len(ordered) == 4000 and sum(answer is not None for answer in ordered) == 500
    write_predictions(tmp_path / "pred.json", predictions)
    assert _json(tmp_path / "pred.json") == _json(folder / "pred_val_example_head500.json")
    assert [file.name for file in tmp_path.iterdir()] == ["pred.json"]
    with pytest.raises(BenchmarkError, match="1 of 501 predictions answer no question, as nobody"):
        predictions_in_order({**predictions, "nobody": "yes"}, validation.questions)


def test_msrvtt_qa_by_its_published_layout(tmp_path: Path) -> None:
    table = [
        {"answer": "couch", "category_id": 14, "id": 158581, "question": "what are three people sitting on?"},
        {"answer": "talk", "category_id": 14, "id": 158582, "question": "what are people doing?"},
    ]
    path = _write(tmp_path / "val_qa.json", [{**table[0], "video_id": 6513}, {**table[1], "video_id": "video6514"}])
    one, other = read_benchmark(path).questions
    assert (one.question_id, one.video, one.answer) == ("158581", "video6513", "couch")
    assert (other.video, other.row, other.type) == ("video6514", 1, None)
    assert read_benchmark(path).notes == (
        "MSRVTT-QA val: 2 videos, published 497",
        "MSRVTT-QA val: 2 questions, published 12278",
    )


def test_project_lists(annotations: Path) -> None:
    folder = annotations / "project"
    expected = {"video_train": 86, "video_test": 38, "qa_train": 81, "qa_test": 43, "mc_test": 38}
    read = {name: read_benchmark(folder / f"{name}.json") for name in expected}
    assert {name: len(benchmark) for name, benchmark in read.items()} == expected
    row = _json(folder / "mc_test.json")[5]
    choice = read["mc_test"].choices[5]
    assert (choice.video, choice.answer, len(choice.choices)) == (row["video"], row["answer"], 5)
    assert read["qa_test"].questions[0].question_id == "intel_asl_again.mkv_0"
    paragraphs = read_benchmark(folder / "paragraph_activitynet_format.json")
    assert paragraphs.counts == {"videos": 3, "sentences": 45, "queries": 3}
    with pytest.raises(BenchmarkError, match=r"qa_test.json is a question answering file"):
        _ = read["qa_test"].texts


def test_singularity_captions_are_queries_or_a_paragraph(tmp_path: Path) -> None:
    table = [
        {"video": "a.mp4", "caption": ["one ", "two"]},
        {"video": "b", "caption": "x"},
        {"video": "a.mp4", "caption": "three"},
    ]
    path = _write(tmp_path / "list.json", table)
    assert [one.texts for one in read_benchmark(path).texts] == [("one", "two", "three"), ("x",)]
    joined = read_benchmark(path, paragraph=True)
    assert [one.texts for one in joined.texts] == [("one two three",), ("x",)]
    assert joined.task == "paragraph retrieval" and joined.counts["queries"] == 2


def test_answer_lists(annotations: Path, tmp_path: Path) -> None:
    training = read_benchmark(annotations / "activitynet_qa/train_q_head4000.json").questions
    counts: dict[str, int] = {}
    for question in training:
        counts[question.answer] = counts.get(question.answer, 0) + 1
    slow = sorted(counts, key=lambda answer: -counts[answer])  # stable: the first of equals stays first
    assert answer_list(training, 20) == slow[:20]
    held_out = read_benchmark(annotations / "activitynet_qa/test_q.json").questions
    best = 100 * sum(question.answer in slow[:20] for question in held_out) / 8000
    assert coverage(slow[:20], held_out) == pytest.approx(best) and 0 < best < 100
    path = _write(tmp_path / "answer_list.json", ["yes", "no", "yes"])
    assert read_answer_list(path) == ["yes", "no"]
    require_answers(["yes", "no"], 2)
    with pytest.raises(ValueError, match="2 different answers, 3 are wanted"):
        require_answers(["yes", "no", "yes"], 3)
    with pytest.raises(ValueError, match=r"2 different answers, 128 are wanted: choose among at most 2"):
        require_answers(read_answer_list(path), 128)
    with pytest.raises(ValueError, match=f"{len(counts)} different answers, 9999 are wanted"):
        answer_list(training, 9999)
    with pytest.raises(ValueError, match="at least 1"):
        require_answers(["yes"], 0)
    with pytest.raises(BenchmarkError, match=r"row 1: wants an answer, found \{"):
        read_answer_list(_write(path, ["yes", {}]))


def test_command_prints_kind_counts_and_cost(annotations: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = [annotations / "didemo/test_data.json", annotations / "activitynet_qa/test_q.json"]
    ids = annotations / "activitynet_captions/val_ids.json"
    assert main([str(file) for file in [*files, ids]]) == 0
    printed = capsys.readouterr().out
    assert "test_data.json: DiDeMo test (didemo), 1004 videos, 4021 sentences, 1004 queries, " in printed
    assert "test_q.json: ActivityNet-QA test (activitynet_qa), 800 videos, 8000 questions, " in printed
    assert "answers from test_a.json" in printed and "val_ids.json: list of 4926 videos, " in printed
    assert main([str(_write(tmp_path / "a.json", [])), str(files[0])]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {tmp_path}/a.json holds no rows\n" and "DiDeMo test" in printed.out
    assert main([str(ids), "--media", str(tmp_path), "--list", str(tmp_path / "out.json")]) == 2
    assert "val_ids.json holds ids, no benchmark" in capsys.readouterr().err


def test_without_leaves_out_and_says_so(annotations: Path) -> None:
    listed: Benchmark = read_benchmark(annotations / "project/qa_test.json")
    video = listed.questions[0].video
    left = listed.without([video])
    assert len(left) == 42 and left.notes == ("1 of 43 records left out for 1 missing videos",)
    assert listed.without([]) is listed
    with pytest.raises(BenchmarkError, match="none of its 43 videos is left"):
        listed.without(listed.videos)
