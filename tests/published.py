"""Names and shapes of published weights that no installed library makes: OpenAI's CLIP and Singularity."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Make = Callable[[tuple[int, ...]], Tensor]


def openai_clip(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ``transformers.CLIPVisionModel`` under OpenAI's and open_clip's names, text tower added."""
    renamed = (
        ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.patch_embedding", "conv1"),
        ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"),
        ("encoder.layers", "transformer.resblocks"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("self_attn", "attn"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    )
    out = {"logit_scale": torch.ones(()), "token_embedding.weight": torch.ones(3, 2)}
    for key, value in clip.items():
        for theirs, name in renamed:
            key = key.replace(theirs, name)
        out[f"visual.{key}"] = value
    for key in [key for key in out if key.endswith(("q_proj.weight", "q_proj.bias"))]:
        head, _, part = key.rpartition("q_proj.")
        out[f"{head}in_proj_{part}"] = torch.cat([out.pop(f"{head}{name}_proj.{part}") for name in "qkv"])
    return {**out, "visual.proj": torch.ones(4, 2)}


def singularity(
    make: Make, width: int = 768, mlp: int = 3072, heads: int = 12, vision_layers: int = 12, text_layers: int = 9,
    fusion_layers: int = 3, words: int = 30522, positions: int = 512, side: int = 14, patch: int = 16, frames: int = 4,
    projection: int = 256, temporal_layers: int = 2,
) -> dict[str, Tensor]:  # fmt: skip
    """A pre-training checkpoint of Singularity (BEiT-base and BERT-base by default); ``make`` takes a shape."""
    out: dict[str, Tensor] = {}

    def new(*shape: int) -> Tensor:
        return make(shape)

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = new(rows, columns)
        if bias:
            out[f"{name}.bias"] = new(rows)

    def norm(name: str) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = new(width), new(width)

    def attention(name: str) -> None:
        for part in ("query", "key", "value"):
            linear(f"{name}.self.{part}", width, width)
        linear(f"{name}.output.dense", width, width)
        norm(f"{name}.output.LayerNorm")

    def bert_layer(name: str, cross: bool) -> None:
        attention(f"{name}.attention")
        if cross:
            attention(f"{name}.crossattention")
        linear(f"{name}.intermediate.dense", mlp, width)
        linear(f"{name}.output.dense", width, mlp)
        norm(f"{name}.output.LayerNorm")

    out["temp"], out["temporal_embeddings"] = new().abs() + 0.01, new(1, frames, 1, width)
    vision = "vision_encoder."
    out[f"{vision}embeddings.cls_token"] = new(1, 1, width)
    out[f"{vision}embeddings.patch_embeddings.projection.weight"] = new(width, 3, patch, patch)
    out[f"{vision}embeddings.patch_embeddings.projection.bias"] = new(width)
    for number in range(vision_layers):
        layer = f"{vision}encoder.layer.{number}."
        out[f"{layer}lambda_1"], out[f"{layer}lambda_2"] = new(width), new(width)
        for part in ("query", "key", "value"):
            linear(f"{layer}attention.attention.{part}", width, width, bias=part != "key")
        bias = f"{layer}attention.attention.relative_position_bias.relative_position_"
        out[f"{bias}bias_table"] = new((2 * side - 1) ** 2 + 3, heads)
        out[f"{bias}index"] = new(side**2 + 1, side**2 + 1)
        linear(f"{layer}attention.output.dense", width, width)
        linear(f"{layer}intermediate.dense", mlp, width)
        linear(f"{layer}output.dense", width, mlp)
        norm(f"{layer}layernorm_before"), norm(f"{layer}layernorm_after")
    norm(f"{vision}pooler.layernorm"), norm("vision_layernorm")
    text = "text_encoder.bert."
    out[f"{text}embeddings.position_ids"] = new(1, positions)
    for table, rows in (("word", words), ("position", positions), ("token_type", 2)):
        out[f"{text}embeddings.{table}_embeddings.weight"] = new(rows, width)
    norm(f"{text}embeddings.LayerNorm")
    for number in range(text_layers + fusion_layers):
        bert_layer(f"{text}encoder.layer.{number}", cross=number >= text_layers)
    head = "text_encoder.cls.predictions."
    out[f"{head}bias"] = new(words)
    linear(f"{head}transform.dense", width, width), norm(f"{head}transform.LayerNorm")
    out[f"{head}decoder.weight"] = out[f"{text}embeddings.word_embeddings.weight"]
    out[f"{head}decoder.bias"] = out[f"{head}bias"]
    linear("vision_proj", projection, width), linear("text_proj", projection, width), linear("itm_head", 2, width)
    for number in range(temporal_layers):
        bert_layer(f"temporal_vision_encoder.layer.{number}", cross=False)
    return out
