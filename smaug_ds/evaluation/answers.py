"""Accuracy of answers: open-ended questions by exact match, multiple choice by the best score; numpy only.

The tools that published figures come from compare answers letter by letter (``evaluation/eval.py`` of
MILVLG/activitynet-qa, ``eval_simple_qa_acc`` of Singularity for MSRVTT-QA and ActivityNet-QA): nothing is normalised,
and a question without a prediction counts as wrong.

Letters: Q questions, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bools = NDArray[np.bool_]

# Types of ActivityNet-QA, by the names that its evaluation tool prints (arXiv 1906.02467, section 3): 3 to 8 are the
# answer types of its "Free" questions.
ACTIVITYNET_QA_TYPES: dict[int, str] = {
    0: "Motion",
    1: "Spatial Relation",
    2: "Temporal Relation",
    3: "Yes/No",
    4: "Color",
    5: "Object",
    6: "Location",
    7: "Number",
    8: "Other",
}
_FIRST_FREE = 3


def exact_match(
    predicted: Sequence[str | None], truth: Sequence[str], normalise: Callable[[str], str] | None = None
) -> Bools:
    """Which predictions are equal to the true answers, (Q,).

    Args:
        predicted: Q answers; None, for no prediction, is wrong.
        truth: Q answers.
        normalise: applied to both before they are compared. None compares letter by letter, as the official tools do;
            ``text.clean`` is fair to answers that were generated from cleaned text.

    Raises ValueError on lengths that disagree.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predictions for {len(truth)} questions")
    same = normalise or str
    pairs = zip(predicted, truth, strict=True)
    return np.array([one is not None and same(one) == same(other) for one, other in pairs], dtype=bool)


def chosen_right(scores: NDArray[np.floating], answers: ArrayLike) -> Bools:
    """Which questions have their true choice scored above all the others, (Q,).

    Ties are pessimistic: a true choice that shares the best score is wrong, so a model that scores everything alike
    gets nothing right.

    Args:
        scores: (Q, C), greater is better; -inf where a question has fewer choices.
        answers: (Q,) position of the true choice.

    Raises ValueError on shapes that disagree, positions that are no choice and NaN.
    """
    right = np.asarray(answers)
    if scores.ndim != 2 or right.shape != scores.shape[:1]:
        raise ValueError(f"scores are {scores.shape}, answers are {right.shape}: wants (Q, C) and (Q,)")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} choice scores are NaN")
    if ((right < 0) | (right >= scores.shape[1])).any():
        raise ValueError(f"answers go from {right.min()} to {right.max()}, choices from 0 to {scores.shape[1] - 1}")
    true = np.take_along_axis(scores, right[:, None], axis=1)  # (Q, 1)
    return (scores >= true).sum(axis=1) == 1


def accuracy(correct: Bools) -> float:
    """Share of the questions answered correctly, in percent. Raises ValueError if there are none."""
    if not len(correct):
        raise ValueError("no questions: there is no accuracy of nothing")
    return 100.0 * float(correct.mean())


def accuracy_by_type(correct: Bools, types: ArrayLike, names: Mapping[int, str]) -> dict[str, float]:
    """Accuracy in percent of the questions (Q,) of each type, by the type's name; types without questions are left out.

    Raises ValueError on lengths that disagree and on types without a name.
    """
    kinds = np.asarray(types)
    if kinds.shape != correct.shape:
        raise ValueError(f"{len(correct)} answers, but types are {kinds.shape}")
    if unknown := set(kinds.tolist()) - set(names):
        raise ValueError(f"types {sorted(unknown, key=str)} are none of {sorted(names)}")
    return {name: accuracy(correct[kinds == kind]) for kind, name in names.items() if (kinds == kind).any()}


def activitynet_qa_accuracy(correct: Bools, types: ArrayLike) -> dict[str, float]:
    """Accuracy in percent by the names of ActivityNet-QA's tool: each type, "Free" (types 3 to 8 together) and "All".

    "Free" is the share of all free questions. The official tool divides by a sum over types in the order in which they
    appear in the answer file, so the "Free" that it prints for the test split is too high by 5600 / 4021.
    """
    by_type = accuracy_by_type(correct, types, ACTIVITYNET_QA_TYPES)
    free = np.asarray(types) >= _FIRST_FREE
    return by_type | ({"Free": accuracy(correct[free])} if free.any() else {}) | {"All": accuracy(correct)}


def activitynet_qa_report(accuracies: Mapping[str, float]) -> str:
    """``activitynet_qa_accuracy`` in the lines of the official tool: fractions, "-" for a type without questions."""
    blocks = (
        ("Accuracy (per question type):", ("Motion", "Spatial Relation", "Temporal Relation", "Free", "All")),
        (
            "Accuracy of the Free type questions(per answer type):",
            ("Yes/No", "Color", "Object", "Location", "Number", "Other"),
        ),
    )
    lines = []
    for title, names in blocks:
        lines.append(title)
        lines += [f"\t{name}: " + (f"{accuracies[name] / 100:.4f}" if name in accuracies else "-") for name in names]
    return "\n".join(lines)
