"""Key maps from published weights to SMAUG's parts: plain dictionaries of tensors in, plain dictionaries out."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_CLIP_LAYER = {
    "layer_norm1": "attention_norm",
    "self_attn.out_proj": "attention.out",
    "layer_norm2": "mlp_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BERT_LAYER = {
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "mlp_norm",
}


def clip_vision(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ``transformers.CLIPVisionModel`` as those of a ``VisionEncoder``.

    Keys may carry the prefix ``vision_model.`` or not. Raises ValueError naming a key that is missing.
    """
    source = {key.removeprefix("vision_model."): value for key, value in source.items()}
    target = {
        "class_token": _take(source, "embeddings.class_embedding"),
        "position_embedding": _take(source, "embeddings.position_embedding.weight"),
        # the convolution's kernel (D, 3, P, P) as the rows of a linear layer over flattened patches
        "patch_embedding.weight": _take(source, "embeddings.patch_embedding.weight").flatten(1),
    }
    for ours, theirs in (("norm_before", "pre_layrnorm"), ("norm_after", "post_layernorm")):
        target |= _linear(source, theirs, ours)
    for layer in range(_layers(source, r"encoder\.layers\.(\d+)\.")):
        prefix = f"encoder.layers.{layer}"
        target |= _join(source, [f"{prefix}.self_attn.{x}_proj" for x in "qkv"], f"layers.{layer}.attention.qkv")
        for theirs, ours in _CLIP_LAYER.items():
            target |= _linear(source, f"{prefix}.{theirs}", f"layers.{layer}.{ours}")
    return target


def bert(source: Mapping[str, Tensor], text_layers: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of ``transformers.BertModel`` (with or without its ``bert.`` prefix), split at ``text_layers``.

    Returns the weights of a ``TextEncoder`` and those of a ``MultiModalEncoder``; the latter's cross-attention is not
    among them. Raises ValueError naming a key that is missing.
    """
    source = {key.removeprefix("bert."): value for key, value in source.items()}
    text = _linear(source, "embeddings.LayerNorm", "embedding.norm")
    for theirs, ours in (("word", "word"), ("position", "position"), ("token_type", "segment")):
        text[f"embedding.{ours}.weight"] = _take(source, f"embeddings.{theirs}_embeddings.weight")
    fusion: dict[str, Tensor] = {}
    for layer in range(_layers(source, r"encoder\.layer\.(\d+)\.")):
        part, number = (text, layer) if layer < text_layers else (fusion, layer - text_layers)
        prefix, own = f"encoder.layer.{layer}", f"layers.{number}"
        part |= _join(
            source, [f"{prefix}.attention.self.{x}" for x in ("query", "key", "value")], f"{own}.attention.qkv"
        )
        for theirs, ours in _BERT_LAYER.items():
            part |= _linear(source, f"{prefix}.{theirs}", f"{own}.{ours}")
    return text, fusion


def _layers(source: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for key in source if (match := re.match(pattern, key))), default=-1)


def _take(source: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in source:
        raise ValueError(f"the weights have no {key}: they hold {len(source)} keys such as {sorted(source)[:3]}")
    return source[key]


def _linear(source: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{part}": _take(source, f"{theirs}.{part}") for part in ("weight", "bias")}


def _join(source: Mapping[str, Tensor], theirs: list[str], ours: str) -> dict[str, Tensor]:
    return {
        f"{ours}.{part}": torch.cat([_take(source, f"{key}.{part}") for key in theirs]) for part in ("weight", "bias")
    }
