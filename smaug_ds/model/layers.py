"""Attention and transformer blocks that timm and transformers do not offer in the form SMAUG needs.

Letters: B batch, L tokens of the query side, M tokens of the key side, S packed tokens of all captions, R of them that
are wanted, D width, H heads, E width of one head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from smaug_ds.model.packing import Packing

# Scores of one head above which the fused kernel wins on a CPU in bf16, too.
_MANY_SCORES = 1024 * 1024


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Attention of queries (B, H, L, E) to keys and values (B, H, M, E) -> (B, H, L, E).

    mask: broadcastable to (B, H, L, M), True on what may be seen. PyTorch's fused kernel, except in bf16 on a CPU:
    there plain matrix products take a third to a sixth of its time, forward and backward, while the scores are few.
    """
    few = q.shape[-2] * k.shape[-2] < _MANY_SCORES
    if not (few and q.dtype == torch.bfloat16 and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = q @ (k * k.shape[-1] ** -0.5).transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    attention = scores.softmax(dim=-1)
    return (drop_out(attention, dropout) if dropout else attention) @ v


def drop_out(x: Tensor, share: float) -> Tensor:
    """Zeroes a ``share`` of x at random, and scales the rest so that the mean stays.

    On a CPU random numbers are drawn one after the other, so four elements share one of 64 bits there; the share is met
    to within 1/65536.
    """
    if x.device.type != "cpu":
        return F.dropout(x, share)
    limit = round(share * 2**16)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= limit - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - limit))


class Dropout(nn.Module):
    """``drop_out`` while training."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return drop_out(x, self.share) if self.training and self.share else x


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * 1.702, inplace=True).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0], x * 1.702)


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x), CLIP's activation, as a scaled SiLU: it keeps its input alone for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return _QuickGelu.apply(x)


class ViTBlock(Block):
    """timm's pre-norm block with ``attend``, which need not compute what nobody wants."""

    attn: Attention
    mlp: Mlp

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True)

    def forward(self, x: Tensor, wanted: int | None = None) -> Tensor:  # type: ignore[override]
        """``x`` (B, L, D) -> (B, L, D), or only the first ``wanted`` tokens of it: they still attend to all."""
        heads = self.attn.num_heads
        q, k, v = rearrange(self.attn.qkv(self.norm1(x)), "b l (three h e) -> three b h l e", three=3, h=heads)
        attended = attend(q[:, :, :wanted], k, v)
        x = x[:, :wanted] + self.attn.proj(rearrange(attended, "b h l e -> b l (h e)"))
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b l (three h e) -> three b h l e", three=3, h=self.heads)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out(rearrange(attend(q, k, v), "b h l e -> b l (h e)"))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, L, D) -> (B, L, D)."""
        return self._attend(*self._project(x))

    def with_class_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``, and the class token's attention to all other tokens, averaged over heads: (B, L - 1).

        Only that one row of the attention matrix is computed beside the fused kernel; L x L is never materialised.
        """
        q, k, v = self._project(x)
        scores = q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, 1, L)
        class_attention = scores.float().softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)
        return self._attend(q, k, v), class_attention


class CaptionAttention(nn.Module):
    """Multi-head self-attention within each of the packed captions."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:
        """``x`` (S, D) -> (S, D); with ``rows`` (R,) only what these tokens find, (R, D)."""
        qkv = self.qkv(x)
        dropout = self.dropout if self.training else 0.0
        if rows is None:
            q, k, v = rearrange(packing.pad(qkv), "b l (three h e) -> three b h l e", three=3, h=self.heads)
            attended = attend(q, k, v, packing.mask, dropout)
            return self.out(packing.unpad(rearrange(attended, "b h l e -> b l (h e)")))
        width = x.shape[-1]
        captions = packing.captions_of(rows)
        q = rearrange(qkv[:, :width].index_select(0, rows), "r (h e) -> r h 1 e", h=self.heads)
        seen = packing.pad(qkv[:, width:]).index_select(0, captions)
        k, v = rearrange(seen, "r l (two h e) -> two r h l e", two=2, h=self.heads)
        mask = packing.mask.index_select(0, captions)
        attended = attend(q, k, v, mask, dropout)
        return self.out(rearrange(attended, "r h 1 e -> r (h e)"))


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of each packed caption to its visual tokens, whose width may differ."""

    def __init__(self, width: int, heads: int, visual_width: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(visual_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` (S, D), ``seen`` (B, M, 2 D) from ``key_value``, ``mask`` (B, 1, 1, M) True on what may be seen ->
        (S, D)."""
        q = rearrange(packing.pad(self.query(x)), "b l (h e) -> b h l e", h=self.heads)
        k, v = rearrange(seen, "b m (two h e) -> two b h m e", two=2, h=self.heads)
        return self.out(packing.unpad(rearrange(self._attend(q, k, v, mask), "b h l e -> b l (h e)")))

    def of_rows(self, x: Tensor, seen: Tensor) -> Tensor:
        """``x`` (R, D) tokens, each with what it sees, ``seen`` (R, M, 2 D) -> (R, D)."""
        q = rearrange(self.query(x), "r (h e) -> r h 1 e", h=self.heads)
        k, v = rearrange(seen, "r m (two h e) -> two r h m e", two=2, h=self.heads)
        return self.out(rearrange(self._attend(q, k, v, None), "r h 1 e -> r (h e)"))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, mask, dropout)


class BertBlock(nn.Module):
    """BERT's post-norm layer; with ``visual_width`` a cross-attention stands between self-attention and MLP.

    Place and normalisation of the cross-attention are those of ALBEF and Singularity, so that their weights fit.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, visual_width: int | None = None):
        super().__init__()
        self.attention = CaptionAttention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        if visual_width is not None:
            self.cross_attention = CrossAttention(width, heads, visual_width, dropout)
            self.cross_attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.mlp = Mlp(width, mlp_width, act_layer=nn.GELU)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)
        self.drop = Dropout(dropout)

    def forward(
        self, x: Tensor, packing: Packing, seen: Tensor | None = None, seen_mask: Tensor | None = None
    ) -> Tensor:
        """``x`` (S, D) packed captions, ``seen`` (B, M, 2 D) keys and values that the cross-attention made of visual
        tokens, or None, all of them seen without a ``seen_mask`` (B, 1, 1, M) -> (S, D)."""
        x = self.attention_norm(x + self.drop(self.attention(x, packing)))
        if seen is not None:
            x = self.cross_attention_norm(x + self.drop(self.cross_attention(x, packing, seen, seen_mask)))
        return self.mlp_norm(x + self.drop(self.mlp(x)))

    def of_rows(self, x: Tensor, packing: Packing, seen: Tensor | None, rows: Tensor) -> Tensor:
        """The same for the tokens ``rows`` (R,) alone, where nobody wants the others: (R, D)."""
        attended = self.attention(x, packing, rows)
        x = self.attention_norm(x.index_select(0, rows) + self.drop(attended))
        if seen is not None:
            attended = self.cross_attention.of_rows(x, seen.index_select(0, packing.captions_of(rows)))
            x = self.cross_attention_norm(x + self.drop(attended))
        return self.mlp_norm(x + self.drop(self.mlp(x)))


class ClipBlock(nn.Module):
    """CLIP's pre-norm layer with QuickGELU, open between attention and MLP so that tokens can leave there."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width, act_layer=QuickGelu)

    def attend(self, x: Tensor) -> Tensor:
        """The attention half. ``x`` (B, L, D) -> (B, L, D)."""
        return x + self.attention(self.attention_norm(x))

    def attend_and_rank(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The attention half, and the class token's attention to the other tokens (B, L - 1)."""
        attended, class_attention = self.attention.with_class_attention(self.attention_norm(x))
        return x + attended, class_attention

    def transform(self, x: Tensor) -> Tensor:
        """The MLP half. ``x`` (B, L, D) -> (B, L, D)."""
        return x + self.mlp(self.mlp_norm(x))


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` (B, K) of ``tokens`` (B, N, D) -> (B, K, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linears as in MAE, N(0, 0.02) embeddings as in BERT, unit norms; apply with ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def silence_residual(block: nn.Module) -> None:
    """Zeroes the last linear of both halves of a timm ``Block``: it starts as the identity and learns from there."""
    for name in ("attn.proj", "mlp.fc2"):
        for parameter in block.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
