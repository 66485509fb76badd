"""Multiple choice as in MSRVTT-MC: of the texts given with a clip the one with the best match logit is chosen.

A retrieval model answers as it is: MSRVTT-MC has no training of its own (Singularity, arXiv 2206.03428, section 4.2).
Where there are choices to train on, ``engine/choosing.py`` does.
A clip is read by one rank, which scores all its choices. A question whose clip cannot be read counts as wrong.

Letters: Q questions, C choices of the one that has most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smaug_ds.data.sample import Batch
from smaug_ds.evaluation.answers import accuracy, chosen_right
from smaug_ds.evaluation.asking import Asked, on_all_ranks, protocol
from smaug_ds.evaluation.encoding import device_of, only_tokens, progress
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer


@dataclass(frozen=True)
class ChoiceResult:
    """Accuracy in percent with the conditions under which it holds."""

    accuracy: float
    chance: float  # accuracy of choosing at random
    n_questions: int
    unanswered: int  # their clips could not be read: wrong
    protocol: dict[str, Any]
    scores: NDArray[np.float32] = dataclasses.field(repr=False)  # (Q, C), -inf where there is no choice or no score

    def report(self) -> dict[str, Any]:
        """All but the scores, ready for JSON."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "scores"}

    def table(self) -> str:
        """A line for the terminal."""
        return f"accuracy {self.accuracy:.2f}, chance {self.chance:.2f}; {self.n_questions} questions"


@torch.no_grad()
def evaluate(
    model: SmaugModel,
    loader: Iterable[Batch],
    asked: Asked,
    tokenizer: Tokenizer,
    config: RetrievalConfig,
    checkpoint: str = "",
) -> ChoiceResult:
    """Answers the questions on the clips of all ranks' loaders; the same result on every rank. Every rank calls it.

    Args:
        loader: this rank's share of the clips, each on one rank only.
        config: sizes of batches, precision.
        checkpoint: what the weights are, for the protocol.

    Raises DataError, on all ranks, when a loader's worker dies on one of them.
    """
    questions = asked.benchmark.choices
    found = on_all_ranks(model, config, lambda: _score_own(model, loader, asked, tokenizer, config))
    scores = np.full((len(questions), max(len(question.choices) for question in questions)), -np.inf, np.float32)
    for row, values in found.items():
        scores[row, : len(values)] = values
    scored = np.isfinite(scores).any(axis=1)
    # ties are wrong, so a question without scores is
    correct = chosen_right(scores, [question.answer for question in questions])
    return ChoiceResult(
        accuracy=accuracy(correct),
        chance=100.0 * float(np.mean([1 / len(question.choices) for question in questions])),
        n_questions=len(questions),
        unanswered=int((~scored).sum()),
        protocol=protocol(model, asked, config, checkpoint) | {"score": "match logit", "ties": "pessimistic"},
        scores=scores,
    )


def _score_own(
    model: SmaugModel, loader: Iterable[Batch], asked: Asked, tokenizer: Tokenizer, config: RetrievalConfig
) -> dict[int, list[float]]:
    """Match logits of the choices of each question on this rank's clips, by the question's row."""
    questions, device = asked.benchmark.choices, device_of(model)
    scores: dict[int, list[float]] = {}
    for batch in progress(loader, "choose"):
        wanted = [(clip, row) for clip, key in enumerate(batch.keys) for row in asked.rows.get(key, ())]
        pairs = [(clip, row, text) for clip, row in wanted for text in questions[row].choices]
        visual = model.encode_frames(batch.frames.to(device), None)
        visual = only_tokens(visual, visual.tokens)
        for start in range(0, len(pairs), config.pair_batch_size):
            clips, rows, texts = zip(*pairs[start : start + config.pair_batch_size], strict=True)
            ids = tokenizer.encode(texts, model.config.text.max_length)
            encoded = model.encode_text(ids.input_ids.to(device), ids.lengths)
            logits = model.match(visual.index(torch.tensor(clips, device=device)), encoded)
            for row, logit in zip(rows, logits.float().tolist(), strict=True):
                scores.setdefault(row, []).append(logit)
    return scores
