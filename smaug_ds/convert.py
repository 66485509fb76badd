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


def clip_vision(source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of ``transformers.CLIPVisionModel`` or ``CLIPModel`` as those of a ``VisionEncoder``.

    Returns them and the keys that were not used. Raises ValueError naming a key that is missing.
    """
    weights = _Source(source, prefix="vision_model.")
    target = {
        "class_token": weights.take("embeddings.class_embedding"),
        "position_embedding": weights.take("embeddings.position_embedding.weight"),
        # the convolution's kernel (D, 3, P, P) as the rows of a linear layer over flattened patches
        "patch_embedding.weight": weights.take("embeddings.patch_embedding.weight").flatten(1),
    }
    for ours, theirs in (("norm_before", "pre_layrnorm"), ("norm_after", "post_layernorm")):
        target |= weights.linear(theirs, ours)
    for layer in range(weights.layers(r"encoder\.layers\.(\d+)\.")):
        prefix = f"encoder.layers.{layer}"
        target |= weights.join([f"{prefix}.self_attn.{x}_proj" for x in "qkv"], f"layers.{layer}.attention.qkv")
        for theirs, ours in _CLIP_LAYER.items():
            target |= weights.linear(f"{prefix}.{theirs}", f"layers.{layer}.{ours}")
    return target, weights.unused()


def bert(source: Mapping[str, Tensor], text_layers: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Weights of ``transformers.BertModel`` or a model around it, split at layer ``text_layers``.

    Returns the weights of a ``TextEncoder``, those of a ``MultiModalEncoder`` but for its cross-attention, and the keys
    that were not used. Raises ValueError naming a key that is missing.
    """
    weights = _Source(source, prefix="bert.")
    text = weights.linear("embeddings.LayerNorm", "embedding.norm")
    for theirs, ours in (("word", "word"), ("position", "position"), ("token_type", "segment")):
        text[f"embedding.{ours}.weight"] = weights.take(f"embeddings.{theirs}_embeddings.weight")
    fusion: dict[str, Tensor] = {}
    for layer in range(weights.layers(r"encoder\.layer\.(\d+)\.")):
        part, number = (text, layer) if layer < text_layers else (fusion, layer - text_layers)
        prefix, own = f"encoder.layer.{layer}", f"layers.{number}"
        queries = [f"{prefix}.attention.self.{name}" for name in ("query", "key", "value")]
        part |= weights.join(queries, f"{own}.attention.qkv")
        for theirs, ours in _BERT_LAYER.items():
            part |= weights.linear(f"{prefix}.{theirs}", f"{own}.{ours}")
    return text, fusion, weights.unused()


class _Source:
    """A state dict that remembers what was taken from it."""

    def __init__(self, source: Mapping[str, Tensor], prefix: str) -> None:
        # with the prefix the part stands inside a larger model, whose other weights are not ours
        inside = any(key.startswith(prefix) for key in source)
        self._foreign = [key for key in source if inside and not key.startswith(prefix)]
        # the oldest BERT weights call a norm's weight gamma and its bias beta
        self._weights = {
            re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", key.removeprefix(prefix))): value
            for key, value in source.items()
            if key not in self._foreign
        }
        self._taken: set[str] = set()

    def take(self, key: str) -> Tensor:
        if key not in self._weights:
            known = ", ".join(sorted(self._weights)[:3])
            raise ValueError(f"the weights have no {key}: they hold {len(self._weights)} keys such as {known}")
        self._taken.add(key)
        return self._weights[key]

    def linear(self, theirs: str, ours: str) -> dict[str, Tensor]:
        return {f"{ours}.{part}": self.take(f"{theirs}.{part}") for part in ("weight", "bias")}

    def join(self, theirs: list[str], ours: str) -> dict[str, Tensor]:
        parts = ("weight", "bias")
        return {f"{ours}.{part}": torch.cat([self.take(f"{key}.{part}") for key in theirs]) for part in parts}

    def layers(self, pattern: str) -> int:
        return 1 + max((int(match[1]) for key in self._weights if (match := re.match(pattern, key))), default=-1)

    def unused(self) -> list[str]:
        return sorted([*self._foreign, *(self._weights.keys() - self._taken)])
