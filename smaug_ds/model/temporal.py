"""Temporal encoder: self-attention over the tokens of all frames of a clip together (SMAUG section 3.1).

Letters: B batch, T frames, K tokens of a frame, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from smaug_ds.model.checks import require_positive
from smaug_ds.model.layers import ViTBlock, silence_residual
from smaug_ds.model.positions import waves


@dataclass(frozen=True)
class TemporalConfig:
    """Temporal encoder of the multi-frame stage."""

    depth: int = 2  # blocks
    heads: int = 12

    def __post_init__(self) -> None:
        require_positive("model.temporal", self, "depth", "heads")


class TemporalEncoder(nn.Module):
    def __init__(self, config: TemporalConfig, width: int, frames: int):
        super().__init__()
        self.position_embedding = nn.Parameter(torch.empty(frames, width))
        self.blocks = nn.ModuleList(ViTBlock(width, config.heads) for _ in range(config.depth))

    def init_weights(self) -> None:
        """Positions a fifth of what a token holds (root mean square), so that order shows; blocks silent: but for
        that, the multi-frame stage starts with what the single-frame stage has learnt."""
        with torch.no_grad():
            self.position_embedding.copy_(0.3 * waves(*self.position_embedding.shape))
        for block in self.blocks:
            silence_residual(block)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, K, D) -> (B, T, K, D).

        Raises ValueError when T is not the number of frames that the positions were made for.
        """
        frames = tokens.shape[1]
        if frames != len(self.position_embedding):
            raise ValueError(f"a clip has {frames} frames, but model.frames is {len(self.position_embedding)}")
        x = rearrange(tokens + self.position_embedding[:, None], "b t k d -> b (t k) d")
        for block in self.blocks:
            x = block(x)
        return rearrange(x, "b (t k) d -> b t k d", t=frames)
