"""Hard negatives of video-text matching: drawn from the pairs of all ranks, and only the drawn ones travel.

Letters: B pairs of this rank, G pairs of all ranks, W world size, S text tokens of all captions of this rank, D width,
F videos drawn from other ranks, T frames, K tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smaug_ds import distributed, losses
from smaug_ds.data.sample import Batch
from smaug_ds.model.packing import pick_captions, to_device
from smaug_ds.model.smaug import TextOutput, VisualOutput


@dataclass
class Draw:
    """Which negatives were drawn; the numbers are on their way to the host."""

    columns: Callable[[], list[list[int]]]  # waits, then tells of the G pairs of all ranks [text, video], as columns
    valid_texts: Tensor  # (B,) bool, False where a video has no negative text
    valid_videos: Tensor  # (B,)


@dataclass
class NegativeTexts:
    """A text that does not fit for each of this rank's videos."""

    states: Tensor  # packed, one caption for each video
    lengths: list[int]
    videos: list[int]  # (B,) the row of the video that each caption is a negative of


@dataclass
class NegativeVideos:
    """A video that does not fit for each of this rank's texts: first those of this rank, then those of others."""

    texts: list[int]  # (B,) the row of the text that each video is a negative of
    own: list[int]  # (B - F,) rows of this rank's videos
    foreign: Tensor  # (F, T, K, D) tokens of the others


@torch.no_grad()
def draw(visual: VisualOutput, text: TextOutput, batch: Batch, scale: Tensor, rows_at_once: int = 0) -> Draw:
    """A negative text for each video and a negative video for each text, by similarity of the embeddings.

    scale: (1,) inverse temperature. rows_at_once: of the (B, G) similarities; 0: all. Nothing waits for the device. All
    ranks call it.
    """
    ids, noise = batch.media_ids, batch.negative_noise
    all_ids, size = distributed.all_gather(ids), rows_at_once or len(ids)
    all_text, all_video = distributed.all_gather(text.embedding), distributed.all_gather(visual.embedding)

    def drawn(anchors: Tensor, others: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        pieces = [
            losses.draw_hard_negatives(losses.similarities(scale * some, others), some_ids, all_ids, some_noise)
            for some, some_ids, some_noise in zip(anchors.split(size), ids.split(size), noise.split(size), strict=True)
        ]
        columns, valid = zip(*pieces, strict=True)
        return torch.cat(columns), torch.cat(valid)

    texts, valid_texts = drawn(visual.embedding, all_text, noise[:, 0])
    videos, valid_videos = drawn(text.embedding, all_video, noise[:, 1])
    columns = distributed.all_gather(torch.stack([texts, videos], dim=1))
    return Draw(_send_to_host(columns), valid_texts, valid_videos)


def fetch(drawn: Draw, visual: VisualOutput, text: TextOutput) -> tuple[NegativeTexts, NegativeVideos]:
    """The drawn texts and videos, with gradient: what other ranks' losses ask of a text or video comes back to it.

    All ranks call it. Of what is drawn more than once, every copy travels.
    """
    # CPU tensors: ranks tell each other without waiting for the device
    all_lengths = distributed.all_gather(torch.tensor(text.packing.lengths)).tolist()
    drawn_texts, drawn_videos = (list(column) for column in zip(*drawn.columns(), strict=True))
    return _fetch_texts(drawn_texts, text, all_lengths), _fetch_videos(drawn_videos, visual)


def _fetch_texts(columns: list[int], text: TextOutput, all_lengths: list[int]) -> NegativeTexts:
    size = len(text.packing.lengths)
    sent, order = _requests(columns, size)
    states, _ = pick_captions(text.states, text.packing.lengths, [row for rows in sent for row in rows])
    came = [_columns_of(columns, size, distributed.rank())[row] for row in order]
    states = distributed.exchange_rows(
        states,
        [sum(text.packing.lengths[row] for row in rows) for rows in sent],
        [sum(all_lengths[column] for column in came if column // size == rank) for rank in _ranks()],
    )
    return NegativeTexts(states, [all_lengths[column] for column in came], order)


def _fetch_videos(columns: list[int], visual: VisualOutput) -> NegativeVideos:
    size, rank = len(visual.tokens), distributed.rank()
    sent, order = _requests(columns, size)
    wanted = _columns_of(columns, size, rank)
    own = [row for row in order if wanted[row] // size == rank]
    others = [row for row in order if wanted[row] // size != rank]
    sent[rank] = []  # what this rank has already stays where it is
    rows = torch.tensor([row for rows in sent for row in rows], dtype=torch.int64)
    foreign = distributed.exchange_rows(
        visual.tokens.index_select(0, to_device(rows, visual.tokens.device)),
        [len(rows) for rows in sent],
        [sum(wanted[row] // size == other for row in others) for other in _ranks()],
    )
    return NegativeVideos([*own, *others], [wanted[row] - rank * size for row in own], foreign)


def _requests(columns: list[int], size: int) -> tuple[list[list[int]], list[int]]:
    """The rows of this rank that each rank has drawn, and in which order what this rank has drawn arrives.

    columns: (G,) drawn by the pairs of all ranks, ``size`` of each.
    """
    rank = distributed.rank()
    sent = [[c - rank * size for c in _columns_of(columns, size, other) if c // size == rank] for other in _ranks()]
    wanted = _columns_of(columns, size, rank)
    return sent, sorted(range(size), key=lambda row: wanted[row] // size)


def _columns_of(columns: Sequence[int], size: int, rank: int) -> Sequence[int]:
    return columns[rank * size : (rank + 1) * size]


def _ranks() -> range:
    return range(distributed.world_size())


def _send_to_host(x: Tensor) -> Callable[[], list]:
    """Starts the copy of ``x``; what it returns waits for that copy alone, not for what is queued after it."""
    if x.device.type != "cuda":
        return x.tolist
    landed = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    landed.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list:
        arrived.synchronize()
        return landed.tolist()

    return wait
