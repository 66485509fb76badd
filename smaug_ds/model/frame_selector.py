"""Text-guided frame selection: which frames of a clip is the sentence about? (SMAUG section 3.4)

Letters: B batch, T frames, k chosen frames, D visual width, Dt text width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor, nn

from smaug_ds.model.checks import require_positive
from smaug_ds.model.layers import ViTBlock
from smaug_ds.model.sparsify import gumbel_top_k


@dataclass(frozen=True)
class SelectorConfig:
    """Frame selector of the multi-frame stage."""

    depth: int = 2  # transformer blocks
    heads: int = 2
    mlp_width: int = 2048
    temperature: float = 1.0  # of the Gumbel softmax

    def __post_init__(self) -> None:
        require_positive("model.selector", self, "depth", "heads", "mlp_width")
        if not self.temperature > 0:
            raise ValueError(f"model.selector.temperature is {self.temperature}: it must be above 0")


@dataclass
class FrameChoice:
    """Which frames a text chose, and how sure it was."""

    scores: Tensor  # (B, T)
    chosen: Tensor  # (B, k) frame ids in temporal order
    weights: Tensor  # (B, T) 1 on chosen frames, 0 on the others, with the gradient of the softmax

    def repeat_first(self, count: int) -> FrameChoice:
        """Followed by the ``count`` first ones once more."""
        return FrameChoice(*(torch.cat([x, x[:count]]) for x in (self.scores, self.chosen, self.weights)))


class FrameSelector(nn.Module):
    def __init__(self, config: SelectorConfig, visual_width: int, text_width: int):
        super().__init__()
        self.config = config
        self.project_in = nn.Linear(visual_width + text_width, visual_width)
        mlp_ratio = config.mlp_width / visual_width
        self.blocks = nn.ModuleList(ViTBlock(visual_width, config.heads, mlp_ratio) for _ in range(config.depth))
        self.project_out = nn.Linear(visual_width, 1)

    def forward(self, frames: Tensor, text: Tensor, k: int, noise: Tensor | None) -> FrameChoice:
        """``frames`` (B, T, D) one feature a frame, ``text`` (B, Dt), ``noise`` (B, T) uniform or None at inference."""
        text = repeat(text, "b d -> b t d", t=frames.shape[1])
        x = self.project_in(torch.cat([frames, text], dim=-1))
        for block in self.blocks:
            x = block(x)
        scores = self.project_out(x).squeeze(-1)
        chosen, weights = gumbel_top_k(scores, k, noise, self.config.temperature)
        return FrameChoice(scores, chosen, weights)
