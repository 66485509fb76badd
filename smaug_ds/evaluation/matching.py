"""Match logits of chosen text-clip pairs, each on the rank that has read the clip: visual tokens never travel.

Letters: Q texts, C clips, T frames.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smaug_ds import distributed
from smaug_ds.evaluation.encoding import Clips, device_of, only_tokens, progress
from smaug_ds.evaluation.metrics import Bools, Pooling, Scores, dual_softmax, pool_frames, rerank, top_k
from smaug_ds.model.smaug import SmaugModel, TextOutput, VisualOutput


class Candidates(NamedTuple):
    """Pairs to be matched, as masks (Q, C)."""

    t2v: Bools  # the best clips of each text
    v2t: Bools  # the best texts of each clip

    @staticmethod
    def best(scores: Scores, depth: int) -> Candidates:
        """The ``depth`` best of each row and of each column of ``scores`` (Q, C)."""
        return Candidates(top_k(scores, depth), top_k(scores.T, depth).T)


class Pairs(NamedTuple):
    """Matched pairs of one rank, each array (pairs,)."""

    text: NDArray[np.int64]
    clip: NDArray[np.int64]
    logit: NDArray[np.float32]
    t2v: Bools  # whether the pair was chosen for its text
    v2t: Bools  # whether it was chosen for its clip


def match_pairs(
    model: SmaugModel,
    clips: list[Clips],
    texts: TextOutput,
    candidates: Candidates,
    keys: list[str],
    batch_size: int,
    pooling: Pooling | None,
) -> Pairs:
    """Match logits of the candidate pairs whose clip this rank has read.

    Args:
        clips: of this rank. texts: all Q.
        keys: of all C clips, in the order of the candidates' columns.
        batch_size: pairs at once.
        pooling: of frames that are matched one by one; None: all frames, or those that the model chooses, together.
    """
    column = {key: i for i, key in enumerate(keys)}
    wanted = candidates.t2v | candidates.v2t
    device = device_of(model)
    text_ids, clip_ids, logits = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for batch in progress(clips, "match"):
        columns = np.array([column[key] for key in batch.keys])
        rows, queries = np.nonzero(wanted[:, columns].T)  # by clip, then by text
        visual = only_tokens(batch.visual, batch.visual.tokens.to(device))
        for start in range(0, len(rows), batch_size):
            piece = slice(start, start + batch_size)
            some_clips = visual.index(torch.from_numpy(rows[piece]).to(device))
            some_texts = texts.index(queries[piece].tolist()).to(device)
            logits.append(_match(model, some_clips, some_texts, pooling))
        text_ids.append(queries)
        clip_ids.append(columns[rows])
    pairs = np.concatenate(text_ids), np.concatenate(clip_ids)
    return Pairs(*pairs, np.concatenate(logits), candidates.t2v[pairs], candidates.v2t[pairs])


def _match(model: SmaugModel, clips: VisualOutput, texts: TextOutput, pooling: Pooling | None) -> NDArray[np.float32]:
    """(pairs,)."""
    if pooling is None:
        return model.match(clips, texts).float().cpu().numpy()
    frames = [only_tokens(clips, clips.tokens[:, t : t + 1]) for t in range(clips.tokens.shape[1])]
    alone = [model.match(frame, texts).float().cpu().numpy() for frame in frames]
    return pool_frames(np.stack(alone), pooling)


def rerank_pairs(scores: Scores, own: Pairs, dual: bool) -> tuple[Scores, Scores]:
    """Scores (Q, C) for text-to-video and for video-to-text: the chosen pairs of all ranks by match logit, the others
    below them by ``scores`` (Q, C). With ``dual``, dual softmax over the match logits. All ranks call it."""
    text, clip, logit, t2v, v2t = (
        np.concatenate(parts) for parts in zip(*distributed.gather_objects(own), strict=True)
    )
    match, matched = np.zeros(scores.shape, np.float64), np.zeros(scores.shape, bool)
    match[text, clip], matched[text, clip] = logit, True
    # Masks come from the ranks that matched the pairs: an ulp of difference between hosts must not lose a pair.
    chosen_t2v, chosen_v2t = np.zeros(scores.shape, bool), np.zeros(scores.shape, bool)
    chosen_t2v[text, clip], chosen_v2t[text, clip] = t2v, v2t
    if dual:
        match = dual_softmax(match, matched)
    return rerank(scores, match, chosen_t2v), rerank(scores.T, match.T, chosen_v2t.T).T
