"""Open-ended question answering: the answer decoder chooses from a list, or writes the answer.

Ranking is Singularity's (arXiv 2206.03428, from ALBEF) but for one thing: the first token leaves
``questions.shortlist`` answers of the list, and the best of them by full likelihood is the answer. Its code adds the
first token's log-probability once more to that of all tokens; here each token, the end token included, counts once, so
a shortlist as long as the list is full enumeration.

A clip is read by one rank, which answers all questions on it. A question whose clip cannot be read counts as wrong.

Letters: Q questions, C answers of the list, S tokens of all questions together, D width.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smaug_ds.data.sample import Batch
from smaug_ds.evaluation.answers import (
    ACTIVITYNET_QA_TYPES,
    accuracy,
    activitynet_qa_accuracy,
    activitynet_qa_report,
    exact_match,
)
from smaug_ds.evaluation.asking import Asked, QuestionConfig, on_all_ranks, protocol
from smaug_ds.evaluation.benchmarks import coverage, require_answers, write_predictions
from smaug_ds.evaluation.encoding import device_of, only_tokens, progress
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.answers import next_words
from smaug_ds.model.packing import Packing, pick_captions
from smaug_ds.model.smaug import SmaugModel, VisualOutput
from smaug_ds.text import TextIds, Tokenizer, clean


@dataclass(frozen=True)
class AnswerResult:
    """Accuracy in percent with the conditions under which it holds, and every prediction."""

    accuracy: float
    accuracies: dict[str, float]  # of each type of ActivityNet-QA, "Free" and "All"; empty without types
    majority: float  # accuracy of the one answer that is right most often on these questions
    coverage: float  # share of the questions, in percent, whose answer is on the list
    n_questions: int
    unanswered: int  # their clips could not be read: wrong
    protocol: dict[str, Any]
    predictions: dict[str, str] = dataclasses.field(repr=False)  # by question_id

    def report(self) -> dict[str, Any]:
        """All but the predictions, ready for JSON."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "predictions"}

    def table(self) -> str:
        """A few lines for the terminal: ActivityNet-QA's as its own tool prints them."""
        how = "generated" if self.protocol["method"] == "generate" else f"top {self.protocol['shortlist']} ranked"
        line = (
            f"accuracy {self.accuracy:.2f} ({how}; always the same answer {self.majority:.2f}); "
            f"{self.n_questions} questions, {self.coverage:.2f} % of the answers on the list"
        )
        return f"{line}\n{activitynet_qa_report(self.accuracies)}" if self.accuracies else line

    def write_predictions(self, path: Path) -> None:
        """The file that ActivityNet-QA's evaluation tool reads."""
        write_predictions(path, self.predictions)


@torch.no_grad()
def evaluate(
    model: SmaugModel,
    loader: Iterable[Batch],
    asked: Asked,
    answers: Sequence[str],
    tokenizer: Tokenizer,
    config: QuestionConfig,
    evaluation: RetrievalConfig,
    checkpoint: str = "",
) -> AnswerResult:
    """Answers the questions on the clips of all ranks' loaders; the same result on every rank. Every rank calls it.

    Args:
        loader: this rank's share of the clips, each on one rank only.
        answers: the list to choose from.
        evaluation: sizes of batches, precision.
        checkpoint: what the weights are, for the protocol.

    Raises ValueError when the model has no answer decoder or the list is shorter than the shortlist, and DataError, on
    all ranks, when a loader's worker dies on one of them.
    """
    questions = asked.benchmark.questions
    if not model.config.answer_layers:
        raise ValueError(
            "model.answer_layers is 0: the checkpoint has no answer decoder; fine-tune it for answers first"
        )
    if config.method == "rank":
        require_answers(answers, config.shortlist)
    predicted = on_all_ranks(
        model, evaluation, lambda: _answer_own(model, loader, asked, answers, tokenizer, config, evaluation)
    )
    normalise = clean if config.method == "generate" else None
    truth = [question.answer for question in questions]
    correct = exact_match([predicted.get(row) for row in range(len(questions))], truth, normalise)
    types = [question.type for question in questions if question.type in ACTIVITYNET_QA_TYPES]
    return AnswerResult(
        accuracy=accuracy(correct),
        accuracies=activitynet_qa_accuracy(correct, types) if len(types) == len(questions) else {},
        majority=100.0 * Counter(truth).most_common(1)[0][1] / len(truth),
        coverage=coverage(answers, questions),
        n_questions=len(questions),
        unanswered=len(questions) - len(predicted),
        protocol=_protocol(model, asked, len(answers), config, evaluation, checkpoint),
        predictions={questions[row].question_id: predicted[row] for row in sorted(predicted)},
    )


def _answer_own(
    model: SmaugModel,
    loader: Iterable[Batch],
    asked: Asked,
    answers: Sequence[str],
    tokenizer: Tokenizer,
    config: QuestionConfig,
    evaluation: RetrievalConfig,
) -> dict[int, str]:
    """The answer to each question on this rank's clips, by the question's row."""
    questions, device, longest = asked.benchmark.questions, device_of(model), model.config.text.max_length
    answer_ids = tokenizer.encode(answers, longest)
    found: dict[int, str] = {}
    for batch in progress(loader, "answer"):
        pairs = [(clip, row) for clip, key in enumerate(batch.keys) for row in asked.rows.get(key, ())]
        if not pairs:
            continue
        visual = model.encode_frames(batch.frames.to(device), None)
        visual = only_tokens(visual, visual.tokens)
        for start in range(0, len(pairs), evaluation.batch_size):
            clips, rows = zip(*pairs[start : start + evaluation.batch_size], strict=True)
            ids = tokenizer.encode([questions[row].question for row in rows], longest)
            states, packing = fuse_questions(model, visual.index(torch.tensor(clips, device=device)), ids)
            if config.method == "rank":
                scores = rank(model, states, packing, answer_ids, config.shortlist, evaluation.pair_batch_size)
                texts = [answers[best] for best in scores.argmax(axis=1)]
            else:
                texts = [
                    tokenizer.decode(words)
                    for words in generate(model, states, packing, tokenizer.cls_id, tokenizer.sep_id, config.max_tokens)
                ]
            found.update(zip(rows, texts, strict=True))
    return found


def fuse_questions(model: SmaugModel, clips: VisualOutput, questions: TextIds) -> tuple[Tensor, Packing]:
    """States (S, D) of questions that have seen their clips, one clip for each question."""
    text = model.encode_text(questions.input_ids.to(clips.tokens.device), questions.lengths)
    return model.fuse(text.states, text.packing, model.look_at(clips.tokens, text.sentence)), text.packing


def rank(
    model: SmaugModel, questions: Tensor, packing: Packing, answers: TextIds, shortlist: int, batch_size: int
) -> NDArray[np.float32]:
    """Log-likelihoods (Q, C) of the ``shortlist`` answers whose first token is likeliest, -inf for the others.

    questions: (S, D) fused states of Q questions with their ``packing``. answers: C answers. batch_size: pairs of a
    question and an answer at once. Of answers with equal first tokens the first ones of the list are taken.
    """
    first = torch.tensor([part[1] for part in answers.input_ids.split(answers.lengths)], device=questions.device)
    starts = answers.input_ids[0].to(questions.device).repeat(len(packing.lengths))  # [CLS], as in every answer
    states = model.answer(starts, [1] * len(packing.lengths), questions, packing)
    likely = model.word_logits(states).log_softmax(dim=1)[:, first]  # (Q, C)
    chosen = likely.sort(dim=1, descending=True, stable=True).indices[:, :shortlist].cpu()
    scores = np.full(tuple(likely.shape), -np.inf, dtype=np.float32)
    question_rows = torch.arange(len(chosen)).repeat_interleave(chosen.shape[1]).tolist()
    answer_rows = chosen.flatten().tolist()
    for start in range(0, len(answer_rows), batch_size):
        some_questions, some_answers = (
            question_rows[start : start + batch_size],
            answer_rows[start : start + batch_size],
        )
        states, lengths = pick_captions(questions, packing.lengths, some_questions)
        picked = TextIds(*pick_captions(answers.input_ids, answers.lengths, some_answers))
        values = log_likelihood(model, states, Packing.of(lengths, states.device), picked)
        scores[some_questions, some_answers] = values.cpu().numpy()
    return scores


def log_likelihood(model: SmaugModel, questions: Tensor, packing: Packing, answers: TextIds) -> Tensor:
    """Of one answer to each of the questions: the sum over its tokens but ``[CLS]``, the end token included, (Q,)."""
    ids = answers.input_ids.to(questions.device)
    rows, next_rows = next_words(answers.lengths, questions.device)
    states = model.answer(ids, answers.lengths, questions, packing)
    likely = model.word_logits(states[rows]).log_softmax(dim=1).gather(1, ids[next_rows][:, None]).squeeze(1)
    return torch.stack([part.sum() for part in likely.split([length - 1 for length in answers.lengths])])


def generate(
    model: SmaugModel, questions: Tensor, packing: Packing, first: int, end: int, max_tokens: int
) -> list[list[int]]:
    """The likeliest next token after the other, at most ``max_tokens`` of them, for each of the questions.

    first, end: ids of ``[CLS]`` and ``[SEP]``, which are not among the tokens returned.
    """
    count = len(packing.lengths)
    ids = torch.full((count, 1), first, device=questions.device)
    ended = torch.zeros(count, dtype=torch.bool, device=questions.device)
    for _ in range(min(max_tokens, model.config.text.max_positions - 1)):
        length = ids.shape[1]
        states = model.answer(ids.flatten(), [length] * count, questions, packing)
        words = model.word_logits(states.unflatten(0, (count, length))[:, -1]).argmax(dim=1)
        ids = torch.cat([ids, words[:, None]], dim=1)
        ended |= words == end
        if ended.all():
            break
    return [row[: row.index(end)] if end in row else row for row in ids[:, 1:].tolist()]


def _protocol(
    model: SmaugModel, asked: Asked, answers: int, config: QuestionConfig, evaluation: RetrievalConfig, checkpoint: str
) -> dict[str, Any]:
    ranked = config.method == "rank"
    return protocol(model, asked, evaluation, checkpoint) | {
        "method": config.method,
        "answers": answers if ranked else None,
        "shortlist": config.shortlist if ranked else None,
        "likelihood": "each token once, end token included" if ranked else "greedy",
        "match": "letter by letter" if ranked else "letter by letter after cleaning",
    }
