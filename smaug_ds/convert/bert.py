"""BERT -> our text encoder, multi-modal encoder and masked-word head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from smaug_ds.convert.source import Source

_BERT_LAYER = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def bert(source: Mapping[str, Tensor], text_layers: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Weights of ``transformers.BertModel`` or a model around it, split at layer ``text_layers``.

    Returns the weights of a ``TextEncoder``, those of a ``MultiModalEncoder`` (but for its cross-attention, which BERT
    lacks), and the keys that were not used. Raises ValueError naming a key that is missing.
    """
    weights = Source(source).inside("bert.")
    return *_map_bert(weights, text_layers), weights.unused()


def smaug_bert(source: Mapping[str, Tensor], text_layers: int) -> tuple[dict[str, Tensor], list[str]]:
    """``bert`` as weights of a whole ``SmaugModel``, with the masked-word head if there is one."""
    weights = Source(source)
    target = map_language(weights.inside("bert."), weights, text_layers)
    return target, weights.unused()


def map_language(bert_weights: Source, around: Source, text_layers: int) -> dict[str, Tensor]:
    text, fusion = _map_bert(bert_weights, text_layers)
    target = {f"text.{key}": value for key, value in text.items()} | {f"fusion.{key}": v for key, v in fusion.items()}
    head = around.inside("cls.predictions.")
    if head.has("transform.dense.weight"):
        target |= head.linear("transform.dense", "word_head.transform")
        target |= head.linear("transform.LayerNorm", "word_head.norm")
        target["word_head.bias"] = head.take("bias")
        head.drop_copy("decoder.weight", target["text.embedding.word.weight"])
        head.drop_copy("decoder.bias", target["word_head.bias"])
    return target


def _map_bert(weights: Source, text_layers: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    text = weights.linear("embeddings.LayerNorm", "embedding.norm")
    for theirs, ours in (("word", "word"), ("position", "position"), ("token_type", "segment")):
        text[f"embedding.{ours}.weight"] = weights.take(f"embeddings.{theirs}_embeddings.weight")
    fusion: dict[str, Tensor] = {}
    for layer in range(weights.layers("encoder.layer.{}.")):
        part, number = (text, layer) if layer < text_layers else (fusion, layer - text_layers)
        prefix, own = f"encoder.layer.{layer}", f"layers.{number}"
        queries = [f"{prefix}.attention.self.{name}." for name in ("query", "key", "value")]
        part |= weights.join(queries, f"{own}.attention.qkv")
        for ours, theirs in _BERT_LAYER.items():
            part |= weights.linear(f"{prefix}.{theirs}", f"{own}.{ours}")
        cross = f"{prefix}.crossattention"  # of ALBEF and Singularity
        if weights.has(f"{cross}.self.query.weight"):
            part |= weights.linear(f"{cross}.self.query", f"{own}.cross_attention.query")
            part |= weights.join([f"{cross}.self.key.", f"{cross}.self.value."], f"{own}.cross_attention.key_value")
            part |= weights.linear(f"{cross}.output.dense", f"{own}.cross_attention.out")
            part |= weights.linear(f"{cross}.output.LayerNorm", f"{own}.cross_attention_norm")
    return text, fusion
