"""What SMAUG leaves out: masked patches, unattended tokens, irrelevant frames. Pure functions.

Letters: B batch, T frames, N patches, V visible patches, n tokens at hand, K kept tokens, k kept frames, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smaug_ds.model.layers import gather_tokens


def visible_count(patches: int, mask_ratio: float) -> int:
    """V: how many of ``patches`` stay visible when ``mask_ratio`` of them is masked."""
    return patches - round(patches * mask_ratio)


def kept_count(tokens: int, keep_rate: float) -> int:
    """K = ceil(keep_rate * tokens), free of the rounding error of the product (0.8 * 65 is 52, not 53)."""
    return math.ceil(round(keep_rate * tokens, 6))


def random_mask(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Splits the patches of each row at random (SMAUG section 3.2; MAE section 3).

    Used with one row per clip it is a tube mask: all frames of the clip lose the same patches.

    noise: (B, N) uniform random numbers. Returns ``visible`` (B, V) and ``masked`` (B, N - V), ids in ascending order
    for the visible ones and in random order for the masked ones, so that a prefix of them is a random subset.
    """
    order = noise.argsort(dim=1)
    visible = visible_count(noise.shape[1], mask_ratio)
    return order[:, :visible].sort(dim=1).values, order[:, visible:]


def keep_and_fuse(
    tokens: Tensor, ids: Tensor, attention: Tensor, keep_rate: float, fused_id: int
) -> tuple[Tensor, Tensor]:
    """Keeps the most attended tokens and fuses the rest into one (SMAUG section 3.3; EViT equation 3).

    tokens: (B, n, D) without the class token. ids: (B, n) the patch each token stands for. attention: (B, n) the class
    token's attention to each. Returns (B, K + 1, D) and (B, K + 1), K = ceil(keep_rate * n): the kept tokens in
    their order and, last, the attention-weighted sum of the others under the id ``fused_id``. With nothing to drop,
    tokens and ids come back as they are.
    """
    keep = kept_count(tokens.shape[1], keep_rate)
    if keep == tokens.shape[1]:
        return tokens, ids
    ranked = attention.argsort(dim=1, descending=True, stable=True)
    kept, dropped = ranked[:, :keep].sort(dim=1).values, ranked[:, keep:]
    weights = attention.gather(1, dropped).to(tokens.dtype)
    fused = torch.einsum("bn,bnd->bd", weights, gather_tokens(tokens, dropped))
    return (
        torch.cat([gather_tokens(tokens, kept), fused.unsqueeze(1)], dim=1),
        torch.cat([ids.gather(1, kept), ids.new_full((len(ids), 1), fused_id)], dim=1),
    )


def gumbel_top_k(scores: Tensor, k: int, noise: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Chooses ``k`` of T frames by score, straight-through (SMAUG section 3.4; Jang et al. 2017, equation 1).

    scores: (B, T). noise: (B, T) uniform in (0, 1) while training, None at inference (plain top-k).
    Returns ``chosen`` (B, k) frame ids in temporal order, and ``weights`` (B, T): exactly 1 on chosen frames and 0 on
    the others, with the gradient of the softmax.
    """
    scores = scores.float()
    if noise is not None:
        scores = scores - torch.log(-torch.log(noise.float().clamp(1e-6, 1 - 1e-6)))
    chosen = scores.topk(k, dim=1).indices.sort(dim=1).values
    soft = torch.softmax(scores / temperature, dim=1)
    hard = torch.zeros_like(soft).scatter(1, chosen, 1.0)
    return chosen, hard + (soft - soft.detach())
