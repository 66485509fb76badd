"""BEiT, the second encoder of the paper's table 7, and its kin ViT and DeiT -> ``model/beit.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from smaug_ds.convert.source import Source
from smaug_ds.model.beit import relative_places
from smaug_ds.model.vision import PIXEL_MEAN, PIXEL_STD

Pooling = Literal["class", "mean"]
PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and deviation that BEiT and ViT remove from an image in [0, 1]
_LAYER = {
    "attention_norm": "layernorm_before",
    "attention.out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_TABLE = "relative_position_bias.relative_position_bias_table"


class Vision(NamedTuple):
    """Weights of a ``BeitEncoder``, its ``VisionConfig.pooling``, and the keys that were not used."""

    weights: dict[str, Tensor]
    pooling: Pooling
    unused: list[str]


def beit_vision(
    source: Mapping[str, Tensor], heads: int, pixels: tuple[Sequence[float], Sequence[float]] = PIXELS
) -> Vision:
    """The whole of Hugging Face's ``BeitModel``, ``ViTModel`` or a model around one: equal outputs on equal pictures.

    What one of them lacks is filled with what changes nothing: biases of places, positions and keys with 0, scales with
    1. SMAUG removes CLIP's mean and deviation from a picture; the difference to ``pixels`` goes into the patches'
    embedding. BEiT with mean pooling has a norm for the mean, but none for tokens: theirs begins as the mean's.

    Raises ValueError naming a key that is missing.
    """
    weights = Source(source).inside("beit.").inside("vit.")
    target, pooling = map_beit(weights, heads, pixels)
    return Vision(target, pooling, weights.unused())


def map_beit(
    weights: Source, heads: int, pixels: tuple[Sequence[float], Sequence[float]] = PIXELS
) -> tuple[dict[str, Tensor], Pooling]:
    """Weights of a ``BeitEncoder``, and its pooling."""
    class_token = weights.take("embeddings.cls_token").flatten()
    target = {"class_token": class_token, **_embedding(weights, pixels)}
    shared = weights.get(f"encoder.{_TABLE}")
    grid, depth = None, weights.layers("encoder.layer.{}.")
    for number in range(depth):
        theirs, ours = f"encoder.layer.{number}.", f"layers.{number}."
        queries = [f"{theirs}attention.attention.{name}." for name in ("query", "key", "value")]
        target |= weights.join(queries, f"{ours}attention.qkv", bias_optional=True)
        for part, name in _LAYER.items():
            target |= weights.linear(theirs + name, ours + part)
        for scale, part in (("lambda_1", "attention_scale"), ("lambda_2", "mlp_scale")):
            factor = weights.get(theirs + scale)
            target[ours + part] = torch.ones_like(class_token) if factor is None else factor
        table = weights.get(f"{theirs}attention.attention.{_TABLE}")
        table = shared if table is None else table
        if table is not None:
            grid = ((round((len(table) - 3) ** 0.5) + 1) // 2) ** 2
            target[f"{ours}attention.position_bias"] = table
    positions = weights.get("embeddings.position_embeddings")
    if positions is None:
        if grid is None:
            raise ValueError("the weights have neither positions nor relative places: they are not BEiT's nor ViT's")
        positions = class_token.new_zeros(grid + 1, len(class_token))
    target["position_embedding"] = positions.reshape(-1, len(class_token))
    if grid is None:
        places = class_token.new_zeros(relative_places(len(target["position_embedding"]) - 1), heads)
        target |= {f"layers.{number}.attention.position_bias": places.clone() for number in range(depth)}
    if weights.has("pooler.layernorm.weight"):
        pooled = weights.linear("pooler.layernorm", "norm_after.pooled")
        own = {key.replace(".pooled", ""): value.clone() for key, value in pooled.items()}
        return target | pooled | own, "mean"
    return target | weights.linear("layernorm", "norm_after"), "class"


def _embedding(weights: Source, pixels: tuple[Sequence[float], Sequence[float]]) -> dict[str, Tensor]:
    """The patches' embedding of pictures with CLIP's mean and deviation removed instead of ``pixels``."""
    kernel = weights.take("embeddings.patch_embeddings.projection.weight")  # (D, 3, P, P)
    bias = weights.take("embeddings.patch_embeddings.projection.bias")
    mean, std = (torch.tensor(values, dtype=torch.float64, device=kernel.device) for values in pixels)
    our_mean, our_std = (torch.tensor(v, dtype=torch.float64, device=kernel.device) for v in (PIXEL_MEAN, PIXEL_STD))
    # x = (image - mean) / std = ours * (our_std / std) + (our_mean - mean) / std, channel by channel
    scaled = kernel.double() * (our_std / std)[:, None, None]
    shift = torch.einsum("dcpq,c->d", kernel.double(), (our_mean - mean) / std)
    return {
        "patch_embedding.weight": scaled.flatten(1).to(kernel.dtype),
        "patch_embedding.bias": (bias.double() + shift).to(bias.dtype),
    }
