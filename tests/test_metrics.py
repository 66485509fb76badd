"""Retrieval metrics on matrices made by hand, and against slow sorting."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from smaug_ds.evaluation.metrics import (
    RetrievalMetrics,
    chance_recall,
    dual_softmax,
    pool_frames,
    ranks,
    recall_at,
    relevance,
    rerank,
    retrieval_metrics,
    top_k,
)

# Three videos; video 0 has two captions (texts 0 and 1).
TEXT_MEDIA, VIDEO_MEDIA = [10, 10, 20, 30], [10, 20, 30]
SCORES = np.array(
    [
        [0.9, 0.1, 0.2],  # text 0: its video first
        [0.3, 0.8, 0.5],  # text 1: its video third
        [0.7, 0.6, 0.1],  # text 2: its video second
        [0.0, 0.1, 0.4],  # text 3: its video first
    ]
)


def test_relevance() -> None:
    expected = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    assert np.array_equal(relevance(TEXT_MEDIA, VIDEO_MEDIA), expected)
    with pytest.raises(ValueError, match="1 videos have no text"):
        relevance([10], [10, 20])
    with pytest.raises(ValueError, match=r"2 texts have no video.*number 1"):
        relevance([10, 40, 50], [10])


def test_by_hand() -> None:
    relevant = relevance(TEXT_MEDIA, VIDEO_MEDIA)
    assert ranks(SCORES, relevant).tolist() == [1, 3, 2, 1]
    # video 0: text 0 first; video 1: text 1 before its text 2; video 2: text 1 before its text 3
    assert ranks(SCORES.T, relevant.T).tolist() == [1, 2, 2]
    metrics = retrieval_metrics(SCORES, SCORES, relevant)
    assert (metrics.t2v_r1, metrics.t2v_r5, metrics.t2v_r10) == (50.0, 100.0, 100.0)
    assert metrics.v2t_r1 == pytest.approx(100 / 3)
    assert (metrics.median_rank, metrics.mean_rank) == (1.5, 1.75)
    assert (metrics.v2t_median_rank, metrics.v2t_mean_rank) == (2.0, pytest.approx(5 / 3))
    assert chance_recall(relevant) == pytest.approx(100 / 3)
    assert chance_recall(relevant.T) == pytest.approx(100 * (2 / 4 + 1 / 4 + 1 / 4) / 3)


def test_ties_are_pessimistic() -> None:
    relevant = relevance(range(5), range(5))
    assert ranks(np.zeros((5, 5)), relevant).tolist() == [5] * 5
    assert retrieval_metrics(np.zeros((5, 5)), np.zeros((5, 5)), relevant).t2v_r1 == 0.0


def test_own_captions_do_not_compete() -> None:
    relevant = relevance([1, 1, 2], [1, 2])
    v2t = ranks(np.array([[0.5, 0.0], [0.5, 0.0], [0.1, 0.9]]).T, relevant.T)
    assert v2t.tolist() == [1, 1]


def test_the_same_video_twice_is_found_twice() -> None:
    relevant = relevance([1, 2], [1, 1, 2])
    assert ranks(np.array([[0.9, 0.9, 0.1], [0.0, 0.0, 0.1]]), relevant).tolist() == [1, 1]


def test_nan_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 4 retrieval scores are NaN"):
        ranks(np.array([[np.nan, 0.0], [0.0, 1.0]]), np.eye(2, dtype=bool))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        ranks(np.zeros((2, 3)), np.eye(2, dtype=bool))


def test_ranks_equal_slow_sort() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 12, (40, 15)).astype(np.float32)  # many ties
    relevant = relevance([*range(15), *generator.integers(0, 15, 25)], range(15))
    for matrix, mask in [(scores, relevant), (scores.T, relevant.T)]:
        slow = []
        for row, own in zip(matrix, mask, strict=True):
            order = sorted(range(len(row)), key=lambda c, row=row, own=own: (-row[c], bool(own[c])))
            slow.append(1 + next(place for place, c in enumerate(order) if own[c]))
        fast = ranks(matrix, mask)
        assert fast.tolist() == slow
        for k in (1, 5, 10):
            assert recall_at(fast, k) == pytest.approx(100 * sum(rank <= k for rank in slow) / len(slow))


def test_top_k() -> None:
    chosen = top_k(np.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert chosen.tolist() == [[False, True, False, True], [True, True, False, False]]
    assert top_k(np.zeros((2, 3)), 9).all()


def test_rerank_puts_chosen_first_and_keeps_the_order_of_the_rest() -> None:
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(6, 20)).astype(np.float32)
    second = 100 * generator.normal(size=(6, 20)).astype(np.float32)
    chosen = top_k(scores, 7)
    merged = rerank(scores, np.where(chosen, second, np.nan), chosen)
    for row in range(6):
        inside, outside = np.flatnonzero(chosen[row]), np.flatnonzero(~chosen[row])
        expected = [*inside[np.argsort(-second[row, inside])], *outside[np.argsort(-scores[row, outside])]]
        assert np.argsort(-merged[row]).tolist() == expected


def test_rerank_of_nothing_keeps_the_order() -> None:
    scores = np.array([[0.1, 0.3, 0.2]])
    merged = rerank(scores, np.full((1, 3), np.nan), np.zeros((1, 3), dtype=bool))
    assert np.argsort(-merged[0]).tolist() == [1, 2, 0]


def brute_force(scores: list[list[float]], text_media: list[int], video_media: list[int]) -> RetrievalMetrics:
    """All metrics by counting, pair by pair, with nothing of the module but the record that holds them."""

    def rank(row: list[float], own: list[bool]) -> int:
        places = []
        for candidate, is_own in enumerate(own):
            if is_own:
                others = (row[other] for other in range(len(row)) if not own[other])
                places.append(1 + sum(score >= row[candidate] for score in others))
        return min(places)

    texts, videos = range(len(text_media)), range(len(video_media))
    t2v = [rank(scores[q], [text_media[q] == video_media[c] for c in videos]) for q in texts]
    v2t = [rank([scores[q][c] for q in texts], [text_media[q] == video_media[c] for q in texts]) for c in videos]
    recalls = [100 * sum(place <= k for place in way) / len(way) for way in (t2v, v2t) for k in (1, 5, 10)]
    middles = [f(way) for way in (t2v, v2t) for f in (statistics.median, statistics.fmean)]
    return RetrievalMetrics(*recalls, *middles)


@pytest.mark.parametrize("levels", [3, 8, 10**6])  # of the scores: nearly all tied, some, none
def test_metrics_equal_brute_force(levels: int) -> None:
    """Texts with several videos, videos with several texts, and ties."""
    generator = np.random.default_rng(levels)
    for _ in range(20):
        media = generator.permutation(12).tolist()
        video_media = [*media, *generator.choice(media, 6).tolist()]
        text_media = [*media, *generator.choice(media, 23).tolist()]
        scores = generator.integers(0, levels, (len(text_media), len(video_media))).astype(np.float32)
        found = retrieval_metrics(scores, scores, relevance(text_media, video_media))
        expected = brute_force(scores.tolist(), text_media, video_media)
        for name, value in vars(expected).items():
            assert getattr(found, name) == pytest.approx(value), name


def test_pooled_frames() -> None:
    scores = np.random.default_rng(2).normal(size=(4, 3, 5))
    for q, c in np.ndindex(3, 5):
        frames = scores[:, q, c].tolist()
        assert pool_frames(scores, "mean")[q, c] == pytest.approx(sum(frames) / 4)
        assert pool_frames(scores, "max")[q, c] == max(frames)
        soft = 0.1 * math.log(sum(math.exp(score / 0.1) for score in frames) / 4)
        assert pool_frames(scores, "lse", temperature=0.1)[q, c] == pytest.approx(soft)
    same = np.repeat(scores[:1], 4, axis=0)
    for pooling in ("mean", "max", "lse"):
        assert np.allclose(pool_frames(same, pooling, 0.07), scores[0])
    assert np.isfinite(pool_frames(1e4 * scores, "lse", temperature=0.01)).all()


def test_dual_softmax() -> None:
    scores = np.random.default_rng(3).normal(size=(3, 4))
    matched = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]], dtype=bool)  # none for the last video
    for mask in (np.ones((3, 4), dtype=bool), matched):
        found = dual_softmax(scores, None if mask.all() else mask)
        for q, c in np.ndindex(3, 4):
            if not mask[q, c]:
                assert found[q, c] == -np.inf
                continue
            column = sum(math.exp(scores[i, c]) for i in range(3) if mask[i, c])
            row = sum(math.exp(scores[q, j]) for j in range(4) if mask[q, j])
            assert math.exp(found[q, c]) == pytest.approx(math.exp(scores[q, c]) ** 2 / column / row)
    assert np.isfinite(dual_softmax(1e4 * scores)).all()


def test_dual_softmax_takes_a_video_from_the_queries_that_it_fits_less() -> None:
    """A hub: video 0 is every text's best, but it is text 0's above all."""
    scores = np.array([[9.0, 1.0, 1.0], [5.0, 4.9, 1.0], [5.0, 1.0, 4.9]])
    assert scores.argmax(axis=1).tolist() == [0, 0, 0]
    assert dual_softmax(scores).argmax(axis=1).tolist() == [0, 1, 2]
