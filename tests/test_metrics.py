"""Retrieval metrics on matrices made by hand, and against slow sorting."""

from __future__ import annotations

import numpy as np
import pytest

from smaug_ds.evaluation.metrics import chance_recall, ranks, recall_at, relevance, rerank, retrieval_metrics, top_k

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
