"""Retrieval metrics on score matrices; numpy only.

Letters: Q queries, C candidates, T frames. A candidate is relevant to a query when both belong to the same media; a
video with several captions has several relevant texts, and the best ranked of them counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scores = NDArray[np.floating]
Bools = NDArray[np.bool_]
Ranks = NDArray[np.int64]
Pooling = Literal["mean", "max", "lse"]


@dataclass(frozen=True)
class RetrievalMetrics:
    """Both directions of text-video retrieval. Recalls are percentages of the queries, ranks count from 1."""

    t2v_r1: float
    t2v_r5: float
    t2v_r10: float
    v2t_r1: float
    v2t_r5: float
    v2t_r10: float
    median_rank: float  # of text-to-video
    mean_rank: float  # of text-to-video
    v2t_median_rank: float
    v2t_mean_rank: float


def relevance(text_media: ArrayLike, video_media: ArrayLike) -> Bools:
    """Which pairs belong together, (texts, videos): those of the same media id.

    Raises ValueError when a text has no video or a video no text: its rank would mean nothing.
    """
    relevant = np.asarray(text_media)[:, None] == np.asarray(video_media)[None, :]
    for axis, (one, other) in enumerate([("video", "text"), ("text", "video")]):
        lonely = np.flatnonzero(~relevant.any(axis=axis))
        if len(lonely):
            raise ValueError(f"{len(lonely)} {one}s have no {other} in the split, the first of them number {lonely[0]}")
    return relevant


def ranks(scores: Scores, relevant: Bools) -> Ranks:
    """Rank of each query's best relevant candidate, (Q,), counted from 1.

    Ties are pessimistic: an irrelevant candidate with the same score stands before the relevant one, so a model that
    scores everything alike finds nothing. Other relevant candidates never stand in the way.

    Args:
        scores: (Q, C), greater is better.
        relevant: (Q, C), at least one in each row.

    Raises ValueError on shapes that disagree and on NaN, which would compare as "not better" and win.
    """
    if scores.shape != relevant.shape:
        raise ValueError(f"scores are {scores.shape}, relevance is {relevant.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} retrieval scores are NaN")
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores >= best) & ~relevant).sum(axis=1)


def recall_at(rank: Ranks, k: int) -> float:
    """Share of the queries whose rank is at most ``k``, in percent."""
    return 100.0 * float((rank <= k).mean())


def chance_recall(relevant: Bools) -> float:
    """R@1 of a random order in percent: the mean share of relevant candidates over the queries (rows)."""
    return 100.0 * float(relevant.mean(axis=1).mean())


def retrieval_metrics(t2v_scores: Scores, v2t_scores: Scores, relevant: Bools) -> RetrievalMetrics:
    """Metrics of both directions. All three matrices are (texts, videos); the two score matrices differ when each
    direction reranked candidates of its own."""
    t2v = ranks(t2v_scores, relevant)
    v2t = ranks(v2t_scores.T, relevant.T)
    return RetrievalMetrics(
        t2v_r1=recall_at(t2v, 1),
        t2v_r5=recall_at(t2v, 5),
        t2v_r10=recall_at(t2v, 10),
        v2t_r1=recall_at(v2t, 1),
        v2t_r5=recall_at(v2t, 5),
        v2t_r10=recall_at(v2t, 10),
        median_rank=float(np.median(t2v)),
        mean_rank=float(t2v.mean()),
        v2t_median_rank=float(np.median(v2t)),
        v2t_mean_rank=float(v2t.mean()),
    )


def top_k(scores: Scores, k: int) -> Bools:
    """The ``k`` best candidates of each query as a mask (Q, C); of equal ones the first."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


def rerank(scores: Scores, second: Scores, chosen: Bools) -> NDArray[np.float64]:
    """Scores (Q, C) under which the ``chosen`` candidates stand first, ordered by ``second`` alone, and the others
    follow in the order of ``scores`` (Singularity reranks the top 128 like this, by the match logit).

    ``second`` is read only where ``chosen`` is set.
    """
    # In float64 the shift below keeps float32 scores apart.
    scores, second = scores.astype(np.float64), second.astype(np.float64)
    lowest = np.where(chosen, second, np.inf).min(axis=1, keepdims=True)
    lowest = np.where(np.isfinite(lowest), lowest, 0.0)
    below = lowest - 1.0 + scores - scores.max(axis=1, keepdims=True)
    return np.where(chosen, second, below)


def pool_frames(scores: Scores, pooling: Pooling, temperature: float = 1.0) -> Scores:
    """Scores (T, ...) of the frames of a clip, each alone -> one score (...) of the clip.

    ``lse`` is a soft maximum: ``temperature * log(mean(exp(scores / temperature)))``. It differs from the sum of
    Singularity's ``--eval_frame_ensemble lse`` by a constant, and a clip of equal frames scores like one of them.
    """
    if pooling == "mean":
        return scores.mean(axis=0)
    greatest = scores.max(axis=0)
    if pooling == "max":
        return greatest
    return greatest + temperature * np.log(np.exp((scores - greatest) / temperature).mean(axis=0))


def dual_softmax(scores: Scores, matched: Bools | None = None) -> NDArray[np.float64]:
    """Log of the softmax over texts times the softmax over videos, (Q, C): what a pair is worth beside all others of
    both directions (CAMoE, arXiv 2109.04290, in the symmetric form that is in use).

    It looks at all queries of the test at once, which a search engine does not have. Where ``matched`` is given, only
    these pairs have a score; the others are left out of the sums and come back as -inf.
    """
    exact = scores.astype(np.float64)
    if matched is not None:
        exact = np.where(matched, exact, -np.inf)
    return _log_softmax(exact, 0) + _log_softmax(exact, 1)


def _log_softmax(scores: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    greatest = scores.max(axis=axis, keepdims=True)
    greatest = np.where(np.isfinite(greatest), greatest, 0.0)  # a row without any matched pair
    total = np.exp(scores - greatest).sum(axis=axis, keepdims=True)
    return scores - greatest - np.log(np.where(total > 0, total, 1.0))
