"""The clips and texts of a split, encoded: each rank its share of the clips, texts dealt out in batches and gathered.

Letters: Q texts, C clips, B rows of one batch, T frames, K tokens of a frame, S tokens of all texts, D width,
P projection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from smaug_ds import distributed
from smaug_ds.data.sample import Batch, Medium
from smaug_ds.model.packing import Packing
from smaug_ds.model.smaug import SmaugModel, TextOutput, VisualOutput
from smaug_ds.text import Tokenizer


class Clips(NamedTuple):
    """One encoded batch of this rank, waiting in host memory for its texts."""

    keys: list[str]
    media_ids: NDArray[np.int64]  # (B,)
    captions: list[tuple[str, ...]]
    medium: Medium
    embedding: NDArray[np.float32]  # (B, P)
    visual: VisualOutput  # tokens only
    frame_embedding: NDArray[np.float32] | None = None  # (B, T, P) of each frame alone, unit length


class Gallery(NamedTuple):
    """What every rank knows of the clips of all ranks, in the order of their keys: it does not tell who read them."""

    keys: list[str]
    media_ids: NDArray[np.int64]  # (C,)
    captions: list[tuple[str, ...]]
    media: list[Medium]
    embedding: NDArray[np.float32]  # (C, P)
    frame_embedding: NDArray[np.float32] | None = None  # (C, T, P); of an image T times the same


def encode_clips(
    model: SmaugModel, loader: Iterable[Batch], per_frame: bool = False, with_tokens: bool = True
) -> list[Clips]:
    """All batches of this rank's ``loader``, encoded without a mask.

    Without ``with_tokens`` the visual tokens are not kept (K = 0): they are most of what evaluation holds in memory.
    """
    clips = []
    for batch in progress(loader, "encode"):
        visual = model.encode_frames(batch.frames.to(device_of(model)), None)
        tokens = visual.tokens if with_tokens else visual.tokens[:, :, :0]
        where = device_of(model).type
        if torch.is_autocast_enabled(where):  # the fusion's first layer rounds them all the same
            tokens = tokens.to(torch.get_autocast_dtype(where))
        clips.append(
            Clips(
                batch.keys,
                batch.media_ids.cpu().numpy(),
                batch.all_captions,
                batch.medium,
                visual.embedding.float().cpu().numpy(),
                only_tokens(visual, tokens.cpu()),
                _embed_frames(model, visual.tokens) if per_frame else None,
            )
        )
    return clips


def _embed_frames(model: SmaugModel, tokens: Tensor) -> NDArray[np.float32]:
    """``tokens`` (B, T, K, D) -> (B, T, P), as if each frame were a clip."""
    projected = model.vision_projection(tokens[:, :, 0])
    return F.normalize(projected.float(), dim=-1).cpu().numpy()


def gather_gallery(clips: list[Clips]) -> Gallery:
    """Everything but the tokens from all ranks. Each clip has to be on one rank only; there may be none at all."""
    own = [
        (
            batch.keys,
            batch.media_ids,
            batch.captions,
            [batch.medium] * len(batch.keys),
            batch.embedding,
            [None] * len(batch.keys) if batch.frame_embedding is None else batch.frame_embedding,
        )
        for batch in clips
    ]
    batches = [batch for share in distributed.gather_objects(own) for batch in share]
    rows = [row for batch in batches for row in zip(*batch, strict=True)]
    rows.sort(key=lambda row: row[0])
    if not rows:
        return Gallery([], np.zeros(0, np.int64), [], [], np.zeros((0, 0), np.float32))
    keys, media_ids, captions, media, embedding, frames = zip(*rows, strict=True)
    assert len(set(keys)) == len(keys), "the loader gave a clip to two ranks, or twice to one"
    frame_embedding = None
    if frames[0] is not None:
        most = max(map(len, frames))
        frame_embedding = np.stack([np.broadcast_to(own, (most, own.shape[1])) for own in frames])
    return Gallery(list(keys), np.array(media_ids), list(captions), list(media), np.stack(embedding), frame_embedding)


def only_tokens(visual: VisualOutput, tokens: Tensor) -> VisualOutput:
    """``visual`` with ``tokens`` (B, T, K, D), and without what only the pixel decoder and pictures need."""
    nothing = tokens[:, :0]
    return dataclasses.replace(
        visual,
        tokens=tokens,
        embedding=nothing,
        spatial_tokens=nothing,
        kept_ids=nothing,
        visible_ids=None,
        masked_ids=None,
        layer_ids=[],
    )


def encode_texts(
    model: SmaugModel, texts: list[str], tokenizer: Tokenizer, batch_size: int, with_states: bool = True
) -> TextOutput:
    """Packed states (S, D) and fp32 embedding (Q, P) of all texts, in host memory of every rank.

    The batches are fixed and dealt out to the ranks in turn. Without ``with_states`` the states are empty (D = 0),
    for those who need the embedding only.
    """
    device = device_of(model)
    own: dict[int, tuple[Tensor, list[int], Tensor]] = {}
    for start in range(distributed.rank() * batch_size, len(texts), distributed.world_size() * batch_size):
        ids = tokenizer.encode(texts[start : start + batch_size], model.config.text.max_length)
        text = model.encode_text(ids.input_ids.to(device), ids.lengths)
        states = text.states if with_states else text.states[:, :0]
        own[start] = (states.cpu(), ids.lengths, text.embedding.float().cpu())
    parts = {start: part for share in distributed.gather_objects(own) for start, part in share.items()}
    batches = [parts[start] for start in sorted(parts)]
    return TextOutput(
        states=torch.cat([states for states, _, _ in batches]),
        packing=Packing.of([length for _, lengths, _ in batches for length in lengths], "cpu"),
        embedding=torch.cat([embedding for _, _, embedding in batches]),
    )


def device_of(model: SmaugModel) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def progress(items: Iterable[Any], name: str) -> Iterator[Any]:
    """A bar on the main rank's terminal, nothing in log files."""
    return iter(tqdm(items, desc=name, leave=False, disable=None if distributed.is_main() else True))
