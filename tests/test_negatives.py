"""Negatives that travel alone against an all-gather of everything: values and gradients, at one, two and four ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smaug_ds import distributed
from smaug_ds.engine import negatives
from smaug_ds.engine.negatives import Draw
from smaug_ds.model.packing import Packing, pick_captions
from smaug_ds.model.smaug import TextOutput, VisualOutput
from tests.ranks import run_ranks

SIZE, WIDTH = 3, 5
LENGTHS = [4, 2, 7, 3, 3, 5, 6, 2, 2, 8, 4, 3]  # of the captions of four ranks
# For the pairs of four ranks, a text and a video: rank 0 draws only videos of its own, and still takes part in the
# backward pass of the others; some are drawn twice.
DRAWN = [(1, 2), (9, 0), (4, 1), (0, 0), (8, 10), (5, 7), (11, 3), (1, 1), (1, 2), (2, 4), (10, 9), (7, 0)]


def pairs(rank: int, dtype: torch.dtype) -> tuple[VisualOutput, TextOutput]:
    """Leaves of this rank, the same whatever the number of ranks."""
    generator = torch.Generator().manual_seed(rank)
    lengths = LENGTHS[rank * SIZE : (rank + 1) * SIZE]
    tokens = torch.randn(SIZE, 2, 3, WIDTH, generator=generator).to(dtype).requires_grad_()
    states = torch.randn(sum(lengths), WIDTH, generator=generator).to(dtype).requires_grad_()
    empty = torch.empty(SIZE, 0)
    visual = VisualOutput(tokens, empty, tokens, empty, None, None, [])
    return visual, TextOutput(states, Packing.of(lengths, "cpu"), empty)


def weights(shape: torch.Size, pair: int) -> torch.Tensor:
    """What the loss multiplies the negative of a ``pair`` with."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + pair))


def by_exchange(dtype: torch.dtype) -> list[Any]:
    """Loss and gradients of this rank as the objectives have them."""
    rank, world = distributed.rank(), distributed.world_size()
    visual, text = pairs(rank, dtype)
    columns = [[value % (world * SIZE) for value in pair] for pair in DRAWN[: world * SIZE]]
    nothing = torch.empty(0)
    texts, videos = negatives.fetch(Draw(lambda: columns, nothing, nothing), visual, text)
    loss = torch.zeros(())
    for states, video in zip(texts.states.split(texts.lengths), texts.videos, strict=True):
        loss = loss + (states * weights(states.shape, rank * SIZE + video)).sum()
    seen = torch.cat([visual.tokens[videos.own], videos.foreign])
    for tokens, caption in zip(seen, videos.texts, strict=True):
        loss = loss + (tokens * weights(tokens.shape, 50 + rank * SIZE + caption)).sum()
    loss.backward()
    return told(loss, visual, text)


def by_gathering(dtype: torch.dtype) -> list[Any]:
    """The same in one process per rank that has everything."""
    rank, world = distributed.rank(), distributed.world_size()
    visual, text = pairs(rank, dtype)
    columns = [[value % (world * SIZE) for value in pair] for pair in DRAWN[: world * SIZE]]
    all_tokens = distributed.all_gather_with_grad(visual.tokens)
    longest = max(LENGTHS)
    padded = text.packing.pad(text.states)
    padded = torch.cat([padded, padded.new_zeros(SIZE, longest - padded.shape[1], WIDTH)], dim=1)
    all_states = distributed.all_gather_with_grad(padded)
    loss = torch.zeros(())
    for pair in range(SIZE):
        negative_text, negative_video = columns[rank * SIZE + pair]
        states = all_states[negative_text, : LENGTHS[negative_text]]
        loss = loss + (states * weights(states.shape, rank * SIZE + pair)).sum()
        tokens = all_tokens[negative_video]
        loss = loss + (tokens * weights(tokens.shape, 50 + rank * SIZE + pair)).sum()
    loss.backward()
    return told(loss, visual, text)


def told(loss: torch.Tensor, visual: VisualOutput, text: TextOutput) -> list[Any]:
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (visual.tokens, text.states)]
    return [loss.item(), *(gradient.float().numpy() for gradient in gradients)]


def both() -> list[Any]:
    """Both ways in double precision and, as a model of DeepSpeed's has it, in bf16."""
    return [[by_exchange(dtype), by_gathering(dtype)] for dtype in (torch.float64, torch.bfloat16)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_travels_alone_equals_what_is_gathered(world_size: int) -> None:
    for double, half in [both()] if world_size == 1 else run_ranks(both, world_size):
        for (ours, theirs), tolerance in ((double, 1e-6), (half, 2e-2)):
            assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
            for one, other in zip(ours[1:], theirs[1:], strict=True):
                assert abs(one - other).max() <= tolerance * max(1.0, abs(other).max())
        assert all(abs(gradient).max() > 0 for gradient in double[0][1:])


def test_pairs_without_ranks_stay_where_they_are() -> None:
    visual, text = pairs(0, torch.float32)
    columns = [[2, 1], [0, 2], [1, 0]]
    texts, videos = negatives.fetch(Draw(lambda: columns, torch.empty(0), torch.empty(0)), visual, text)
    assert videos.own == [1, 2, 0] and videos.texts == [0, 1, 2] and len(videos.foreign) == 0
    expected, lengths = pick_captions(text.states, text.packing.lengths, [2, 0, 1])
    assert torch.equal(texts.states, expected) and texts.lengths == lengths and texts.videos == [0, 1, 2]
