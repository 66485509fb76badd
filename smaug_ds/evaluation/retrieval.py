"""Text-video retrieval: cosine scores of the two encoders for all pairs, match logits for the best of them.

The protocol is Singularity's (arXiv 2206.03428, section 4): the top ``rerank_depth`` candidates of each query are
ordered by the match logit alone, the rest follows by cosine. Clips are encoded and matched on the rank that read
them; texts are shared out in batches and gathered. What is scored together does not depend on the number of ranks.

Letters: Q texts, C clips, T frames, P projection size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.quarantine import DataError
from smaug_ds.data.sample import Batch
from smaug_ds.evaluation.encoding import Gallery, device_of, encode_clips, encode_texts, gather_gallery
from smaug_ds.evaluation.matching import Candidates, match_pairs, rerank_pairs
from smaug_ds.evaluation.metrics import (
    Bools,
    Pooling,
    RetrievalMetrics,
    Scores,
    chance_recall,
    dual_softmax,
    pool_frames,
    relevance,
    retrieval_metrics,
)
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer

_TEXTS_AT_ONCE = 64  # whose cosines with all frames of all clips are in memory


@dataclass(frozen=True)
class RetrievalConfig:
    """How retrieval is evaluated."""

    split: Literal["test", "train"] = "test"  # side of the hold-out that is searched
    rerank_depth: int = 128  # candidates of each query that the match logit orders; 0: cosine only
    join_captions: bool = False  # one text of all captions of a clip (paragraph retrieval); else each is a query
    frame_scores: Literal["joined", "mean", "max", "lse"] = "joined"  # frames together, or each alone and then pooled
    dual_softmax: bool = False  # softmax over texts times softmax over clips: needs all queries at once
    batch_size: int = 32  # clips encoded at once on a rank
    pair_batch_size: int = 128  # texts encoded, and text-clip pairs matched, at once on a rank
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward pass (autocast); scores are kept in fp32

    def __post_init__(self) -> None:
        if self.rerank_depth < 0:
            raise ConfigError(f"evaluation.rerank_depth is {self.rerank_depth}: it must be 0 or more")
        for name in ("batch_size", "pair_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def pooling(self) -> Pooling | None:
        """How the scores of single frames become one; None where frames are joined."""
        return None if self.frame_scores == "joined" else self.frame_scores


@dataclass(frozen=True)
class RetrievalDetails:
    """Scores behind the metrics; rows and columns are in the order of ``texts`` and ``keys``."""

    texts: list[str]  # Q queries
    keys: list[str]  # C clips, shard/key
    relevant: Bools  # (Q, C)
    t2v_scores: Scores  # (Q, C), reranked for each text
    v2t_scores: Scores  # (Q, C), reranked for each clip


@dataclass(frozen=True)
class RetrievalResult(RetrievalMetrics):
    """Metrics in percent and ranks from 1, with the conditions under which they hold."""

    n_texts: int
    n_videos: int
    chance_r1: float  # text-to-video R@1 of a random order, percent
    dual_encoder: RetrievalMetrics  # the same by cosine alone
    protocol: dict[str, Any]
    details: RetrievalDetails = dataclasses.field(repr=False)

    def report(self) -> dict[str, Any]:
        """All but the score matrices, ready for JSON."""
        shown = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "details"}
        dual_encoder = dataclasses.asdict(self.dual_encoder)
        return {"split": self.protocol["split"], "n": self.n_videos} | shown | {"dual_encoder": dual_encoder}

    def table(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{'':22}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median rank':>14}"]
        final = f"top {self.protocol['rerank_depth']} reranked" if self.protocol["rerank_depth"] else ""
        first = "dual softmax" if self.protocol["dual_softmax"] else "cosine"
        for name, metrics in [(first, self.dual_encoder), (final, self)][: 2 if final else 1]:
            for way, median in [("t2v", metrics.median_rank), ("v2t", metrics.v2t_median_rank)]:
                recalls = "".join(f"{getattr(metrics, f'{way}_r{k}'):7.2f}" for k in (1, 5, 10))
                lines.append(f"{way} {name:18}{recalls}{median:14.1f}")
        lines.append(f"{self.n_texts} texts, {self.n_videos} clips; chance t2v R@1 {self.chance_r1:.2f}")
        return "\n".join(lines)


@torch.no_grad()
def evaluate(
    model: SmaugModel, loader: Iterable[Batch], tokenizer: Tokenizer, config: RetrievalConfig, checkpoint: str = ""
) -> RetrievalResult:
    """Retrieval over the clips of all ranks' loaders; the same result on every rank. Every rank has to call it.

    Args:
        loader: this rank's share of the split, each clip on one rank only.
        checkpoint: what the weights are, for the protocol.

    Raises ValueError when the split is empty or a score is not a number, and DataError, on all ranks, when a loader's
    worker dies on one of them.
    """
    was_training = model.training
    model.eval()
    try:
        with in_precision(model, config):
            return _evaluate(model, loader, tokenizer, config, checkpoint)
    finally:
        model.train(was_training)


def _evaluate(
    model: SmaugModel, loader: Iterable[Batch], tokenizer: Tokenizer, config: RetrievalConfig, checkpoint: str
) -> RetrievalResult:
    with distributed.agreeing(DataError):
        clips = encode_clips(model, loader, per_frame=config.pooling is not None, with_tokens=config.rerank_depth > 0)
    gallery = gather_gallery(clips)
    if not gallery.keys:
        raise ValueError(f"the {config.split} split has no clips: name data.test, or raise data.holdout")
    owners, texts = _queries(gallery, config)
    encoded = encode_texts(model, texts, tokenizer, config.pair_batch_size, config.rerank_depth > 0)
    temperature = float((-model.logit_scale).exp())
    scores: Scores = _cosine(encoded.embedding.numpy(), gallery, config.pooling, temperature)
    if config.dual_softmax:
        scores = dual_softmax(scores / temperature)
    relevant = relevance(gallery.media_ids[owners], gallery.media_ids)
    t2v_scores, v2t_scores = scores, scores
    if config.rerank_depth:
        candidates = Candidates.best(scores, config.rerank_depth)
        pairs = match_pairs(model, clips, encoded, candidates, gallery.keys, config.pair_batch_size, config.pooling)
        t2v_scores, v2t_scores = rerank_pairs(scores, pairs, config.dual_softmax)
    return RetrievalResult(
        **dataclasses.asdict(retrieval_metrics(t2v_scores, v2t_scores, relevant)),
        n_texts=len(texts),
        n_videos=len(gallery.keys),
        chance_r1=chance_recall(relevant),
        dual_encoder=retrieval_metrics(scores, scores, relevant),
        protocol=_protocol(model, config, gallery, checkpoint),
        details=RetrievalDetails(texts, gallery.keys, relevant, t2v_scores, v2t_scores),
    )


def _cosine(texts: NDArray[np.float32], gallery: Gallery, pooling: Pooling | None, temperature: float) -> Scores:
    """``texts`` (Q, P) with all clips, (Q, C); the cosines of single frames pooled where there are any."""
    if gallery.frame_embedding is None or pooling is None:
        return texts @ gallery.embedding.T
    scores = np.empty((len(texts), len(gallery.keys)), np.float32)
    frames = gallery.frame_embedding.transpose(1, 2, 0)  # (T, P, C)
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        piece = slice(start, start + _TEXTS_AT_ONCE)
        scores[piece] = pool_frames(texts[piece] @ frames, pooling, temperature)
    return scores


def _queries(gallery: Gallery, config: RetrievalConfig) -> tuple[NDArray[np.int64], list[str]]:
    """The clip (Q,) that each query belongs to, and the queries."""
    captions = [(" ".join(several),) if config.join_captions else several for several in gallery.captions]
    owners = np.repeat(np.arange(len(captions)), [len(several) for several in captions])
    return owners, [text for several in captions for text in several]


def _protocol(model: SmaugModel, config: RetrievalConfig, gallery: Gallery, checkpoint: str) -> dict[str, Any]:
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    rank_by = "match logit among the reranked, cosine below them" if config.rerank_depth else "cosine"
    return {
        "split": config.split,
        "media": dict(Counter(gallery.media)),
        "frames": model.config.frames,
        "frames_kept": model.config.frames_kept if config.pooling is None else model.config.frames,
        "frame_scores": config.frame_scores,
        "image_size": model.config.vision.image_size,
        "sparsified": model.config.vision.sparsify_at_inference and model.config.vision.keep_rate < 1,
        "captions": "joined" if config.join_captions else "each a query",
        "cleaning": "Singularity's pre_text",
        "max_text_tokens": model.config.text.max_length,
        "rerank_depth": config.rerank_depth,
        "score": rank_by,
        "dual_softmax": config.dual_softmax,
        "ties": "pessimistic",
        "precision": f"{weights} weights, {config.precision} forward pass, fp32 scores",
        "checkpoint": checkpoint,
    }


def in_precision(model: SmaugModel, config: RetrievalConfig) -> contextlib.AbstractContextManager:
    """Around forward passes: the precision of ``config``."""
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device_of(model).type, dtype=torch.bfloat16)
