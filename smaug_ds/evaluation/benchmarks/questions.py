"""Answer lists, and predictions in the format of ActivityNet-QA's evaluation tool."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from smaug_ds.data.annotations import SourceError, json_rows
from smaug_ds.evaluation.benchmarks.formats import rows
from smaug_ds.evaluation.benchmarks.records import BenchmarkError, Question


def answer_list(training: Iterable[Question], k: int) -> list[str]:
    """The ``k`` most frequent answers of the training questions, the most frequent first; of equally frequent ones
    the one that came first. Raises ValueError if there are fewer than ``k`` different answers."""
    answers = [answer for answer, _ in Counter(question.answer for question in training).most_common()]
    require_answers(answers, k)
    return answers[:k]


def read_answer_list(path: str | Path) -> list[str]:
    """The answers to choose from: a JSON list of texts, as Singularity's answer_list.json; repeated ones count once.

    Raises BenchmarkError for anything else; names the file and the row.
    """
    answers: dict[str, None] = {}
    try:
        for row, answer in enumerate(json_rows(Path(path))):
            if not isinstance(answer, str) or not answer.strip():
                raise BenchmarkError(f"{path}, row {row}: wants an answer, found {answer!r:.80}")
            answers[answer] = None
    except SourceError as error:
        raise BenchmarkError(str(error)) from error
    return list(answers)


def require_answers(answers: Sequence[str], k: int) -> None:
    """Raises ValueError where ``answers`` are not at least ``k`` (1 or more) different ones."""
    if k < 1:
        raise ValueError(f"{k} answers to choose from: wants at least 1")
    if len(set(answers)) < k:
        raise ValueError(
            f"the answer list has {len(set(answers))} different answers, {k} are wanted: "
            f"choose among at most {len(set(answers))}, or give a longer list"
        )


def coverage(answers: Iterable[str], questions: Sequence[Question]) -> float:
    """Share of ``questions`` in percent whose answer is among ``answers``: no ranker of that list does better."""
    known = set(answers)
    return 100.0 * sum(question.answer in known for question in questions) / len(questions)


def write_predictions(path: str | Path, predictions: Mapping[str, str]) -> None:
    """Predicted answers by question_id, as ActivityNet-QA's evaluation tool reads them: a JSON list of
    ``{"question_id": ..., "answer": ...}``. The file is whole or absent."""
    table = [{"question_id": question_id, "answer": answer} for question_id, answer in predictions.items()]
    aside = Path(f"{path}.{os.getpid()}.part")
    aside.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    aside.replace(path)


def read_predictions(path: str | Path) -> dict[str, str]:
    """Predicted answers by question_id. Raises BenchmarkError where a row lacks one, or an id stands there twice."""
    predictions: dict[str, str] = {}
    for row, fields in rows(Path(path)):
        key, answer = fields.get("question_id"), fields.get("answer")
        if not isinstance(key, str | int) or not isinstance(answer, str):
            raise BenchmarkError(f'{path}, row {row}: wants "question_id" and "answer", found {fields!r:.80}')
        if str(key) in predictions:
            raise BenchmarkError(f"{path}, row {row}: question_id {key} stands there twice")
        predictions[str(key)] = answer
    return predictions


def predictions_in_order(predictions: Mapping[str, str], questions: Sequence[Question]) -> list[str | None]:
    """The predicted answer of each question; None where there is none, which counts as wrong.

    Raises BenchmarkError where a prediction answers no question.
    """
    unknown = set(predictions) - {question.question_id for question in questions}
    if unknown:
        raise BenchmarkError(f"{len(unknown)} of {len(predictions)} predictions answer no question, as {min(unknown)}")
    return [predictions.get(question.question_id) for question in questions]
