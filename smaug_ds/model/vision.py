"""Masked vision transformer with token sparsification (SMAUG sections 3.2 and 3.3), in CLIP's layout.

Letters: B batch, T frames, N patches, V visible patches, K tokens at the end (class token included), P patch size,
D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from smaug_ds.model.checks import MAY_BE_MISSING, require_heads, require_positive
from smaug_ds.model.layers import ClipBlock, gather_tokens
from smaug_ds.model.positions import grid_waves
from smaug_ds.model.recompute import Recompute, recomputed, require_recompute
from smaug_ds.model.sparsify import keep_and_fuse, kept_count, random_mask, visible_count

# CLIP's pixel statistics, per channel of an image in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """Vision encoder; the defaults are ViT-B/16 as in the paper."""

    # whose transformer it is; beit holds ViT and DeiT, too
    layout: Literal["clip", "beit"] = field(default="clip", metadata=MAY_BE_MISSING)
    # what speaks for a frame: class token, or (beit) the others' mean
    pooling: Literal["class", "mean"] = field(default="class", metadata=MAY_BE_MISSING)
    image_size: int = 224  # height and width, pixels
    patch_size: int = 16  # pixels
    width: int = 768  # D
    depth: int = 12  # layers
    heads: int = 12
    mlp_width: int = 3072
    mask_ratio: float = 0.5  # share of the patches masked while training, the same ones in all frames of a clip
    keep_rate: float = 0.8  # share of the tokens that stay at each sparsification
    sparsify_layers: tuple[int, ...] = (4, 7, 10)  # layers, counted from 1, that drop tokens between attention and MLP
    sparsify_at_inference: bool = True  # drop tokens at inference, too
    checkpoint_every: int = 0  # recompute every n-th layer in the backward pass: 0 none, 1 all
    # of such a layer, everything, or only what is cheap: norms, activations, dropout; not matrix products
    checkpoint_what: Recompute = field(default="layer", metadata=MAY_BE_MISSING)

    def __post_init__(self) -> None:
        require_positive("model.vision", self, "image_size", "patch_size", "width", "depth", "mlp_width")
        require_heads("model.vision", self.heads, "model.vision.width", self.width)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.vision.image_size {self.image_size} is not a multiple of "
                f"model.vision.patch_size {self.patch_size}"
            )
        if self.pooling == "mean" and self.layout == "clip":
            raise ValueError(
                "model.vision.pooling is mean, but model.vision.layout clip has a class token: set it to class"
            )
        if not 0 <= self.mask_ratio <= 0.95:
            raise ValueError(f"model.vision.mask_ratio is {self.mask_ratio}: it must lie in [0, 0.95]")
        if not visible_count(self.patches, self.mask_ratio):
            raise ValueError(
                f"model.vision.mask_ratio is {self.mask_ratio}, which masks all of the {self.patches} patches: lower it"
            )
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"model.vision.keep_rate is {self.keep_rate}: it must lie in (0, 1]")
        for layer in self.sparsify_layers:
            if not 1 <= layer <= self.depth:
                raise ValueError(
                    f"model.vision.sparsify_layers names layer {layer}, but model.vision.depth is {self.depth}"
                )
        if len(set(self.sparsify_layers)) < len(self.sparsify_layers):
            raise ValueError(f"model.vision.sparsify_layers is {list(self.sparsify_layers)}: name each layer once")
        require_recompute("model.vision", self.checkpoint_every, self.checkpoint_what)

    @property
    def patches(self) -> int:
        """N, patches of one frame."""
        return (self.image_size // self.patch_size) ** 2

    def token_counts(self, training: bool = True) -> list[int]:
        """Tokens, class token included, that enter the first layer and that leave each sparsification."""
        tokens = visible_count(self.patches, self.mask_ratio) if training else self.patches
        counts = [tokens + 1]
        if training or self.sparsify_at_inference:
            for _ in self.sparsify_layers:
                kept = kept_count(tokens, self.keep_rate)
                tokens = kept + 1 if kept < tokens else tokens
                counts.append(tokens + 1)
        return counts


@dataclass
class EncodedFrames:
    """What the vision encoder returns; ids say where each token came from."""

    tokens: Tensor  # (B, T, K, D), class token first
    kept_ids: Tensor  # (B, T, K - 1) patch of each token after the class token; N for a fused token
    visible_ids: Tensor | None  # (B, V) patches that were seen; None without a mask
    masked_ids: Tensor | None  # (B, N - V) the others, in random order
    layer_ids: list[Tensor]  # kept_ids after each sparsification, (B, T, .), for pictures


def normalise_pixels(frames: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) -> float32 with CLIP's mean and deviation removed, without a copy from the host."""
    scaled = frames.float() / 255
    channels = [(scaled[..., c, :, :] - PIXEL_MEAN[c]) / PIXEL_STD[c] for c in range(3)]
    return torch.stack(channels, dim=-3)


def patchify(frames: Tensor, patch_size: int) -> Tensor:
    """(B, T, 3, H, W) -> (B, T, N, 3 * P * P), channels first within a patch, as a convolution's kernel has them."""
    return rearrange(frames, "b t c (h p) (w q) -> b t (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of ``patchify`` for square frames: (B, T, N, 3 * P * P) -> (B, T, 3, H, W)."""
    side = round(patches.shape[2] ** 0.5)
    return rearrange(patches, "b t (h w) (c p q) -> b t c (h p) (w q)", h=side, c=3, p=patch_size, q=patch_size)


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.width, bias=False)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.position_embedding = nn.Parameter(torch.empty(config.patches + 1, config.width))
        self.norm_before = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(
            ClipBlock(config.width, config.heads, config.mlp_width) for _ in range(config.depth)
        )
        self.norm_after = nn.LayerNorm(config.width)

    def init_weights(self) -> None:
        nn.init.normal_(self.class_token, std=0.02)
        with torch.no_grad():
            self.position_embedding[0].zero_()
            self.position_embedding[1:] = grid_waves(self.config.patches, self.config.width)

    def forward(self, patches: Tensor, patch_noise: Tensor | None) -> EncodedFrames:
        """``patches`` (B, T, N, 3 P P) normalised pixels, ``patch_noise`` (B, N) uniform or None for no mask."""
        batch, frames = patches.shape[:2]
        visible, masked = None, None
        if patch_noise is not None and self.config.mask_ratio > 0:
            visible, masked = random_mask(patch_noise, self.config.mask_ratio)
        x, ids = self._embed(patches, visible)
        x, ids, layer_ids = self._encode(x, ids)
        return EncodedFrames(
            tokens=rearrange(self.norm_after(x), "(b t) k d -> b t k d", b=batch),
            kept_ids=rearrange(ids, "(b t) k -> b t k", b=batch),
            visible_ids=visible,
            masked_ids=masked,
            layer_ids=[rearrange(kept, "(b t) k -> b t k", t=frames) for kept in layer_ids],
        )

    def _embed(self, patches: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """Visible patches only -> (B T, V + 1, D) with positions and class token, and their ids (B T, V)."""
        batch, frames, count, _ = patches.shape
        if visible is None:
            ids = torch.arange(count, device=patches.device).expand(batch * frames, count)
        else:
            ids = repeat(visible, "b v -> (b t) v", t=frames)
        seen = gather_tokens(rearrange(patches, "b t n p -> (b t) n p"), ids).to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(seen) + self.position_embedding[1:][ids]
        class_token = repeat(self.class_token + self.position_embedding[0], "d -> b 1 d", b=len(x))
        return self.norm_before(torch.cat([class_token, x], dim=1)), ids

    def _encode(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        sparse = self.training or self.config.sparsify_at_inference
        every = self.config.checkpoint_every
        layer_ids = []
        for number, layer in enumerate(self.layers, start=1):
            drops = sparse and number in self.config.sparsify_layers
            if every and number % every == 0 and torch.is_grad_enabled():
                x, ids = recomputed(self.config.checkpoint_what, self._layer, layer, x, ids, drops)
            else:
                x, ids = self._layer(layer, x, ids, drops)
            if drops:
                layer_ids.append(ids)
        return x, ids, layer_ids

    def _layer(self, layer: nn.Module, x: Tensor, ids: Tensor, drops: bool) -> tuple[Tensor, Tensor]:
        """One layer on (B T, K, D); where it ``drops``, tokens leave between attention and MLP."""
        assert isinstance(layer, ClipBlock)
        if not drops:
            return layer.transform(layer.attend(x)), ids
        x, class_attention = layer.attend_and_rank(x)
        x, ids = self._drop(x, ids, class_attention)
        return layer.transform(x), ids

    def _drop(self, x: Tensor, ids: Tensor, class_attention: Tensor) -> tuple[Tensor, Tensor]:
        kept, ids = keep_and_fuse(x[:, 1:], ids, class_attention, self.config.keep_rate, self.config.patches)
        return torch.cat([x[:, :1], kept], dim=1), ids
