"""Accuracy of answers against slow versions and against ActivityNet-QA's evaluation as its tool does it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from smaug_ds.evaluation.answers import (
    ACTIVITYNET_QA_TYPES,
    accuracy,
    accuracy_by_type,
    activitynet_qa_accuracy,
    activitynet_qa_report,
    chosen_right,
    exact_match,
)
from smaug_ds.text import clean


def test_exact_match_is_letter_by_letter() -> None:
    truth = ["yes", "t-shirt", "two", "red"]
    correct = exact_match(["yes", "t - shirt", "2", None], truth)
    assert correct.tolist() == [True, False, False, False]
    assert exact_match(["Yes", "t - shirt", "2", None], truth, clean).tolist() == [True, True, False, False]
    assert accuracy(correct) == 25.0
    with pytest.raises(ValueError, match="3 predictions for 4 questions"):
        exact_match(["a", "b", "c"], truth)
    with pytest.raises(ValueError, match="no questions"):
        accuracy(np.zeros(0, dtype=bool))


def test_chosen_right_equals_slow_sort() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, (300, 5)).astype(np.float32)  # many ties
    answers = generator.integers(0, 5, 300)
    slow = []
    for row, answer in zip(scores, answers, strict=True):
        order = sorted(range(5), key=lambda c, row=row, answer=answer: (-row[c], c == answer))  # ties go against it
        slow.append(order[0] == answer)
    fast = chosen_right(scores, answers)
    assert fast.tolist() == slow
    assert 0 < accuracy(fast) < 100
    assert not chosen_right(np.zeros((3, 5)), [0, 1, 2]).any()
    assert chosen_right(np.array([[1.0, 0.0, -np.inf]]), [0]).all()


def test_chosen_right_refuses_what_means_nothing() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        chosen_right(np.zeros((2, 3)), [0, 1, 2])
    with pytest.raises(ValueError, match="1 of 6 choice scores are NaN"):
        chosen_right(np.array([[0.0, np.nan, 1.0], [0.0, 1.0, 2.0]]), [0, 1])
    with pytest.raises(ValueError, match="answers go from 0 to 3, choices from 0 to 2"):
        chosen_right(np.zeros((2, 3)), [0, 3])


def test_accuracy_by_type_equals_counting() -> None:
    generator = np.random.default_rng(1)
    correct, types = generator.random(500) < 0.4, generator.integers(0, 9, 500)
    found = activitynet_qa_accuracy(correct, types)
    for kind, name in ACTIVITYNET_QA_TYPES.items():
        own = [bool(c) for c, t in zip(correct, types, strict=True) if t == kind]
        assert found[name] == pytest.approx(100 * sum(own) / len(own))
    free = [bool(c) for c, t in zip(correct, types, strict=True) if t in (3, 4, 5, 6, 7, 8)]
    assert found["Free"] == pytest.approx(100 * sum(free) / len(free))
    assert found["All"] == pytest.approx(100 * correct.sum() / 500)


def test_types_without_questions_and_without_a_name() -> None:
    correct = np.array([True, False])
    assert activitynet_qa_accuracy(correct, [0, 0]) == {"Motion": 50.0, "All": 50.0}
    assert accuracy_by_type(correct, [7, 9], {7: "seven", 8: "eight", 9: "nine"}) == {"seven": 100.0, "nine": 0.0}
    with pytest.raises(ValueError, match=r"types \[9\] are none of"):
        activitynet_qa_accuracy(correct, [0, 9])
    with pytest.raises(ValueError, match="types are"):
        activitynet_qa_accuracy(correct, [0])


def test_report_equals_the_official_tool_but_for_free(shared_data: Path) -> None:
    """The tool's arithmetic on the real test answers: what it prints, and why its "Free" is another."""
    rows = json.loads((shared_data / "annotations/activitynet_qa/test_a.json").read_text())
    generator = np.random.default_rng(2)
    predicted = [row["answer"] if generator.random() < 0.4 else "something else" for row in rows]
    right, count = dict.fromkeys(range(9), 0), {}
    for row, answer in zip(rows, predicted, strict=True):
        count[row["type"]] = count.get(row["type"], 0) + 1
        right[row["type"]] += answer == row["answer"]
    types = [row["type"] for row in rows]
    found = activitynet_qa_accuracy(exact_match(predicted, [row["answer"] for row in rows]), types)
    report = dict(line.strip().split(": ") for line in activitynet_qa_report(found).splitlines() if "\t" in line)
    for kind, name in ACTIVITYNET_QA_TYPES.items():
        assert report[name] == f"{right[kind] / count[kind]:.4f}"
    assert report["All"] == f"{sum(right.values()) / sum(count.values()):.4f}"
    tools_free = sum(list(right.values())[3:]) / sum(list(count.values())[3:])  # count is in order of appearance
    assert tools_free == pytest.approx(found["Free"] / 100 * 5600 / 4021)
    assert sum(count[kind] for kind in range(3, 9)) == 5600


def test_report_shows_absent_types() -> None:
    lines = activitynet_qa_report(activitynet_qa_accuracy(np.array([True]), [3])).splitlines()
    assert lines[0] == "Accuracy (per question type):"
    assert "\tMotion: -" in lines and "\tFree: 1.0000" in lines and "\tYes/No: 1.0000" in lines
    assert lines[6] == "Accuracy of the Free type questions(per answer type):"
