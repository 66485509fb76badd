"""BEiT, the second encoder of the paper's table 7, and its kin ViT and DeiT -> as much as ours holds of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smaug_ds.convert.source import Source

_BEIT_LAYER = {
    "attention_norm": "layernorm_before",
    "attention.out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def beit_vision(source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """What a ``VisionEncoder`` can hold of Hugging Face's BEiT (``BeitModel``), ViT or DeiT: a start, not the model.

    Exact: class token, patches, attention, MLP and their norms. Layer scale goes into the layers' last matrices, the
    patches' bias and BEiT's want of absolute positions into the position table, the key's missing bias becomes 0. Not
    held, so listed as unused: BEiT's relative position bias and pooler. SMAUG's encoder normalises once more before
    the first layer and has QuickGELU for GELU.

    Returns weights and unused keys. Raises ValueError naming a key that is missing.
    """
    weights = Source(source).inside("beit.")
    return map_beit(weights), weights.unused()


def map_beit(weights: Source) -> dict[str, Tensor]:
    class_token = weights.take("embeddings.cls_token").flatten()
    patch_bias = weights.take("embeddings.patch_embeddings.projection.bias")
    positions = weights.get("embeddings.position_embeddings")
    if positions is None:  # the only trace of the grid's size: (2 side - 1)^2 + 3 relative places
        table = weights.peek("encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table")
        side = (round((len(table) - 3) ** 0.5) + 1) // 2
        positions = class_token.new_zeros(1, side * side + 1, len(class_token))
    positions = positions.flatten(0, 1)
    target = {
        "class_token": class_token,
        "position_embedding": torch.cat([positions[:1], positions[1:] + patch_bias]),
        "patch_embedding.weight": weights.take("embeddings.patch_embeddings.projection.weight").flatten(1),
    }
    if weights.has("layernorm.weight"):
        target |= weights.linear("layernorm", "norm_after")
    for number in range(weights.layers("encoder.layer.{}.")):
        theirs, ours = f"encoder.layer.{number}.", f"layers.{number}."
        queries = [f"{theirs}attention.attention.{name}." for name in ("query", "key", "value")]
        target |= weights.join(queries, f"{ours}attention.qkv", bias_optional=True)
        for part, name in _BEIT_LAYER.items():
            target |= weights.linear(theirs + name, ours + part)
        for scale, part in (("lambda_1", "attention.out"), ("lambda_2", "mlp.fc2")):
            if (factor := weights.get(theirs + scale)) is not None:
                target[f"{ours}{part}.weight"] = factor[:, None] * target[f"{ours}{part}.weight"]
                target[f"{ours}{part}.bias"] = factor * target[f"{ours}{part}.bias"]
    return target
