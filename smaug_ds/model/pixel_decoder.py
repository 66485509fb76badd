"""Pixel decoder of masked visual modelling (SMAUG section 3.2; MAE section 3).

Letters: B rows (batch times frames), N patches, K kept tokens, M patches to predict, D encoder width, W decoder width,
P patch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smaug_ds.model.checks import require_heads, require_positive
from smaug_ds.model.layers import ViTBlock, gather_tokens
from smaug_ds.model.positions import grid_waves


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Pixel decoder of masked visual modelling."""

    width: int = 512  # W
    depth: int = 3  # blocks
    heads: int = 8
    predicted_share: float = 1.0  # share of the masked patches that is reconstructed; below 1 the rest is not decoded
    normalise_targets: bool = False  # targets with the mean and deviation of their patch removed (MAE table 1d)

    def __post_init__(self) -> None:
        require_positive("model.decoder", self, "width", "depth")
        require_heads("model.decoder", self.heads, "model.decoder.width", self.width)
        if not 0 < self.predicted_share <= 1:
            raise ValueError(f"model.decoder.predicted_share is {self.predicted_share}: it must lie in (0, 1]")


class PixelDecoder(nn.Module):
    def __init__(self, config: PixelDecoderConfig, encoder_width: int, patches: int, patch_size: int):
        super().__init__()
        self.config = config
        self.project_in = nn.Linear(encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.empty(config.width))
        self.position_embedding = nn.Parameter(torch.empty(patches, config.width))
        self.blocks = nn.ModuleList(ViTBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.project_out = nn.Linear(config.width, 3 * patch_size**2)

    def init_weights(self) -> None:
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            self.position_embedding.copy_(grid_waves(*self.position_embedding.shape))

    def forward(self, tokens: Tensor, kept_ids: Tensor, visible_ids: Tensor | None, predict_ids: Tensor) -> Tensor:
        """Pixels of the patches ``predict_ids``.

        tokens: (B, K, D) without class token. kept_ids: (B, K) their patches; the id N (a fused token, which has no
        place) is left out. predict_ids: (B, M). visible_ids: (B, V) patches that are decoded beside them, because the
        others can learn from them; None: there are none but the predicted ones. Returns (B, M, 3 P P).
        """
        grid = self._place(self.project_in(tokens), kept_ids) + self.position_embedding  # (B, N, W)
        decoded = predict_ids if visible_ids is None else torch.cat([predict_ids, visible_ids], dim=1)
        x = gather_tokens(grid, decoded)
        for block in self.blocks[:-1]:
            x = block(x)
        # what is to be predicted came first: the last block computes nothing else
        x = self.blocks[-1](x, predict_ids.shape[1])
        return self.project_out(self.norm(x))

    def _place(self, tokens: Tensor, kept_ids: Tensor) -> Tensor:
        """Kept tokens at their places, the mask token at all others. (B, K, W) -> (B, N, W)."""
        rows, patches = len(tokens), len(self.position_embedding)
        # one place more than there are patches takes the fused tokens and is cut off again
        grid = self.mask_token.to(tokens.dtype).expand(rows, patches + 1, -1)
        places = kept_ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        return grid.scatter(1, places, tokens)[:, :patches]


def pixel_targets(patches: Tensor, config: PixelDecoderConfig) -> Tensor:
    """What the decoder learns to predict: ``patches`` (..., 3 P P) as they are, or normalised each by itself."""
    if not config.normalise_targets:
        return patches
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6) ** 0.5
