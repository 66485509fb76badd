"""BEiT's transformer (arXiv 2106.08254, section 2 and appendix D), the second encoder of SMAUG's table 7.

It differs from CLIP's in that the attention of each layer has a learnt bias for the relative place of two patches, each
half of a layer a learnt scale, the MLP GELU, the norms a smaller epsilon; and there is no norm before the first layer.
ViT and DeiT (arXiv 2012.12877) are the same without bias and scale, with absolute positions.

Letters: B batch of frames, L tokens with the class token, N patches, D width, H heads, R relative places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from smaug_ds.model.layers import SelfAttention
from smaug_ds.model.positions import WITHOUT_PLACE
from smaug_ds.model.vision import VisionConfig, VisionEncoder

_EPS = 1e-12  # of all norms


class BeitAttention(SelfAttention):
    """Multi-head self-attention with a bias for the relative place of query and key."""

    places: Tensor  # (N + 2, N + 2) entry of the bias table

    def __init__(self, width: int, heads: int, patches: int):
        super().__init__(width, heads)
        self.position_bias = nn.Parameter(torch.zeros(relative_places(patches), heads))
        self.register_buffer("places", relative_index(patches), persistent=False)

    def bias(self, ids: Tensor) -> Tensor:
        """``ids`` (B, L - 1) of the tokens after the class token, N for a fused one -> (B, H, L, L)."""
        ids = F.pad(ids, (1, 0), value=len(self.places) - 1)
        index = self.places[ids[:, :, None], ids[:, None]]  # (B, L, L)
        return rearrange(self.position_bias[index], "b l m h -> b h l m")

    def attend(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, L, D) -> (B, L, D), and the class token's attention to the others, a mean over heads (B, L - 1)."""
        q, k, v = self._project(x)
        bias = self.bias(ids).to(q.dtype)
        scores = q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias[:, :, :1]  # (B, H, 1, L)
        class_attention = scores.float().softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(rearrange(attended, "b h l e -> b l (h e)")), class_attention


class BeitBlock(nn.Module):
    """BEiT's pre-norm layer, open between attention and MLP so that tokens can leave there."""

    def __init__(self, width: int, heads: int, mlp_width: int, patches: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=_EPS)
        self.attention = BeitAttention(width, heads, patches)
        self.attention_scale = nn.Parameter(torch.ones(width))
        self.mlp_norm = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, mlp_width, act_layer=nn.GELU)
        self.mlp_scale = nn.Parameter(torch.ones(width))

    def attend_and_rank(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The attention half. ``x`` (B, L, D), ``ids`` (B, L - 1) -> (B, L, D), and the class token's attention to the
        other tokens (B, L - 1)."""
        attended, class_attention = self.attention.attend(self.attention_norm(x), ids)
        return x + self.attention_scale * attended, class_attention

    def transform(self, x: Tensor) -> Tensor:
        """The MLP half. ``x`` (B, L, D) -> (B, L, D)."""
        return x + self.mlp_scale * self.mlp(self.mlp_norm(x))


class PoolingNorm(nn.LayerNorm):
    """Norm of the tokens, whose first one becomes the normalised mean of the others: what BEiT fine-tuned on ImageNet
    says of a picture."""

    def __init__(self, width: int):
        super().__init__(width, eps=_EPS)
        self.pooled = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, L, D) -> (B, L, D)."""
        return torch.cat([self.pooled(x[:, 1:].mean(dim=1, keepdim=True)), super().forward(x[:, 1:])], dim=1)


class BeitEncoder(VisionEncoder):
    """``VisionEncoder`` with BEiT's layers.

    Tokens that a sparsification fuses have no place in the picture: like the class token they stand to all others in
    the one relation that it has to patches.
    """

    def __init__(self, config: VisionConfig):
        super().__init__(config)
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.width)
        self.norm_before = nn.Identity()  # type: ignore[assignment]
        self.layers = nn.ModuleList(
            BeitBlock(config.width, config.heads, config.mlp_width, config.patches) for _ in range(config.depth)
        )
        mean = config.pooling == "mean"
        self.norm_after = PoolingNorm(config.width) if mean else nn.LayerNorm(config.width, eps=_EPS)

    def _layer(self, layer: nn.Module, x: Tensor, ids: Tensor, drops: bool) -> tuple[Tensor, Tensor]:
        assert isinstance(layer, BeitBlock)
        x, class_attention = layer.attend_and_rank(x, ids)
        if drops:
            x, ids = self._drop(x, ids, class_attention)
        return layer.transform(x), ids


def relative_places(patches: int) -> int:
    """R: entries of a bias table for a square grid of ``patches``."""
    side = round(patches**0.5)
    return (2 * side - 1) ** 2 + WITHOUT_PLACE


def relative_index(patches: int) -> Tensor:
    """Entry of the bias table for each query and key, (N + 2, N + 2): N patches, a fused token, the class token.

    As BEiT has it: first the grid's relative places, row by row from the lower right, then class token to patch, patch
    to class token, class token to itself.
    """
    side = round(patches**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down, right = rows[:, None] - rows[None], columns[:, None] - columns[None]
    places = relative_places(patches)
    index = torch.full((patches + 2, patches + 2), places - 1)
    index[:patches, :patches] = (down + side - 1) * (2 * side - 1) + right + side - 1
    index[patches:, :patches] = places - 3
    index[:patches, patches:] = places - 2
    return index
