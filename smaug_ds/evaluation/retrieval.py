"""Text-video retrieval: cosine scores of the two encoders for all pairs, match logits for the best of them.

The protocol is Singularity's (arXiv 2206.03428, section 4): the top ``rerank_depth`` candidates of each query are
ordered by the match logit alone, the rest follows by cosine. Clips are encoded and matched on the rank that read
them, so visual tokens never travel; texts are shared out in batches and gathered. What is scored together does not
depend on the number of ranks.

Letters: Q texts, C clips, B clips of one batch, L text tokens, D width, P projection size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.quarantine import DataError
from smaug_ds.data.sample import Batch
from smaug_ds.evaluation.encoding import (
    Clips,
    Gallery,
    device_of,
    encode_clips,
    encode_texts,
    gather_gallery,
    only_tokens,
    progress,
    texts_at,
)
from smaug_ds.evaluation.metrics import (
    Bools,
    RetrievalMetrics,
    Scores,
    chance_recall,
    relevance,
    rerank,
    retrieval_metrics,
    top_k,
)
from smaug_ds.model.smaug import SmaugModel, TextOutput
from smaug_ds.text import Tokenizer


@dataclass(frozen=True)
class RetrievalConfig:
    """How retrieval is evaluated."""

    split: Literal["test", "train"] = "test"  # side of the hold-out that is searched
    rerank_depth: int = 128  # candidates of each query that the match logit orders; 0: cosine only
    join_captions: bool = False  # one text of all captions of a clip (paragraph retrieval); else each is a query
    batch_size: int = 32  # clips encoded at once on a rank
    pair_batch_size: int = 128  # texts encoded, and text-clip pairs matched, at once on a rank
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward pass (autocast); scores are kept in fp32

    def __post_init__(self) -> None:
        if self.rerank_depth < 0:
            raise ConfigError(f"evaluation.rerank_depth is {self.rerank_depth}: it must be 0 or more")
        for name in ("batch_size", "pair_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name} is {getattr(self, name)}: it must be at least 1")


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
        for name, metrics in [("cosine", self.dual_encoder), (final, self)][: 2 if final else 1]:
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
        with _precision(model, config):
            return _evaluate(model, loader, tokenizer, config, checkpoint)
    finally:
        model.train(was_training)


def _evaluate(
    model: SmaugModel, loader: Iterable[Batch], tokenizer: Tokenizer, config: RetrievalConfig, checkpoint: str
) -> RetrievalResult:
    with distributed.agreeing(DataError):
        clips = encode_clips(model, loader)
    gallery = gather_gallery(clips)
    if not gallery.keys:
        raise ValueError(f"the {config.split} split has no clips: name data.test, or raise data.holdout")
    owners, texts = _queries(gallery, config)
    encoded = encode_texts(model, texts, tokenizer, config.pair_batch_size, config.rerank_depth > 0)
    cosine = encoded.embedding.numpy() @ gallery.embedding.T  # (Q, C)
    relevant = relevance(gallery.media_ids[owners], gallery.media_ids)
    t2v_scores, v2t_scores = cosine, cosine
    if config.rerank_depth:
        pairs = _match_pairs(model, clips, encoded, _Candidates.best(cosine, config.rerank_depth), gallery, config)
        t2v_scores, v2t_scores = _reranked(cosine, distributed.gather_objects(pairs))
    return RetrievalResult(
        **dataclasses.asdict(retrieval_metrics(t2v_scores, v2t_scores, relevant)),
        n_texts=len(texts),
        n_videos=len(gallery.keys),
        chance_r1=chance_recall(relevant),
        dual_encoder=retrieval_metrics(cosine, cosine, relevant),
        protocol=_protocol(model, config, gallery, checkpoint),
        details=RetrievalDetails(texts, gallery.keys, relevant, t2v_scores, v2t_scores),
    )


def _queries(gallery: Gallery, config: RetrievalConfig) -> tuple[NDArray[np.int64], list[str]]:
    """The clip (Q,) that each query belongs to, and the queries."""
    captions = [(" ".join(several),) if config.join_captions else several for several in gallery.captions]
    owners = np.repeat(np.arange(len(captions)), [len(several) for several in captions])
    return owners, [text for several in captions for text in several]


class _Candidates(NamedTuple):
    """Pairs to be matched, as masks (Q, C)."""

    t2v: Bools  # the best clips of each text
    v2t: Bools  # the best texts of each clip

    @staticmethod
    def best(cosine: Scores, depth: int) -> _Candidates:
        return _Candidates(top_k(cosine, depth), top_k(cosine.T, depth).T)


class _Pairs(NamedTuple):
    """Matched pairs of one rank, each array (pairs,)."""

    text: NDArray[np.int64]
    clip: NDArray[np.int64]
    logit: NDArray[np.float32]
    t2v: Bools  # whether the pair was chosen for its text
    v2t: Bools  # whether it was chosen for its clip


def _match_pairs(
    model: SmaugModel,
    clips: list[Clips],
    texts: TextOutput,
    candidates: _Candidates,
    gallery: Gallery,
    config: RetrievalConfig,
) -> _Pairs:
    """Match logits of the candidate pairs whose clip this rank has read."""
    column = {key: i for i, key in enumerate(gallery.keys)}
    wanted = candidates.t2v | candidates.v2t
    device = device_of(model)
    text_ids, clip_ids, logits = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for batch in progress(clips, "match"):
        columns = np.array([column[key] for key in batch.keys])
        rows, queries = np.nonzero(wanted[:, columns].T)  # by clip, then by text
        visual = only_tokens(batch.visual, batch.visual.tokens.to(device))
        for start in range(0, len(rows), config.pair_batch_size):
            piece = slice(start, start + config.pair_batch_size)
            some_clips = visual.index(torch.from_numpy(rows[piece]).to(device))
            some_texts = texts_at(texts, torch.from_numpy(queries[piece]), device)
            logits.append(model.match(some_clips, some_texts).float().cpu().numpy())
        text_ids.append(queries)
        clip_ids.append(columns[rows])
    pairs = np.concatenate(text_ids), np.concatenate(clip_ids)
    return _Pairs(*pairs, np.concatenate(logits), candidates.t2v[pairs], candidates.v2t[pairs])


def _reranked(cosine: Scores, shares: list[_Pairs]) -> tuple[Scores, Scores]:
    """Scores (Q, C) for text-to-video and for video-to-text from all ranks' pairs."""
    text, clip, logit, t2v, v2t = (np.concatenate(parts) for parts in zip(*shares, strict=True))
    match = np.zeros_like(cosine)
    match[text, clip] = logit
    # Masks come from the ranks that matched the pairs: an ulp of difference between hosts must not lose a pair.
    chosen_t2v, chosen_v2t = np.zeros(cosine.shape, bool), np.zeros(cosine.shape, bool)
    chosen_t2v[text, clip], chosen_v2t[text, clip] = t2v, v2t
    return rerank(cosine, match, chosen_t2v), rerank(cosine.T, match.T, chosen_v2t.T).T


def _protocol(model: SmaugModel, config: RetrievalConfig, gallery: Gallery, checkpoint: str) -> dict[str, Any]:
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    rank_by = "match logit among the reranked, cosine below them" if config.rerank_depth else "cosine"
    return {
        "split": config.split,
        "media": dict(Counter(gallery.media)),
        "frames": model.config.frames,
        "frames_kept": model.config.frames_kept,
        "image_size": model.config.vision.image_size,
        "sparsified": model.config.vision.sparsify_at_inference and model.config.vision.keep_rate < 1,
        "captions": "joined" if config.join_captions else "each a query",
        "cleaning": "Singularity's pre_text",
        "max_text_tokens": model.config.text.max_length,
        "rerank_depth": config.rerank_depth,
        "score": rank_by,
        "dual_softmax": False,
        "ties": "pessimistic",
        "precision": f"{weights} weights, {config.precision} forward pass, fp32 scores",
        "checkpoint": checkpoint,
    }


def _precision(model: SmaugModel, config: RetrievalConfig) -> contextlib.AbstractContextManager:
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device_of(model).type, dtype=torch.bfloat16)
