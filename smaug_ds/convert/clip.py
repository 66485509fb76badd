"""CLIP's vision transformer in four published layouts -> ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from smaug_ds.convert.source import Source, some


class Layout(NamedTuple):
    """Where a layout of CLIP's vision transformer keeps what. ``{}`` stands for the layer's number."""

    name: str
    mark: str  # a key that this layout has and no other
    prefix: str  # of the vision model's keys inside a larger model
    class_token: str
    positions: str
    patches: str
    norm_before: str
    norm_after: str
    layer: str
    qkv: tuple[str, ...]  # followed by weight and bias
    rest: dict[str, str]  # ours -> theirs


_CLIP_LAYOUTS = (
    Layout(
        "Hugging Face's CLIPVisionModel",
        mark="embeddings.class_embedding",
        prefix="vision_model.",
        class_token="embeddings.class_embedding",
        positions="embeddings.position_embedding.weight",
        patches="embeddings.patch_embedding.weight",
        norm_before="pre_layrnorm",
        norm_after="post_layernorm",
        layer="encoder.layers.{}.",
        qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
        rest={
            "attention_norm": "layer_norm1",
            "attention.out": "self_attn.out_proj",
            "mlp_norm": "layer_norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
    ),
    Layout(
        "OpenAI's and open_clip's CLIP",
        mark="class_embedding",
        prefix="visual.",
        class_token="class_embedding",
        positions="positional_embedding",
        patches="conv1.weight",
        norm_before="ln_pre",
        norm_after="ln_post",
        layer="transformer.resblocks.{}.",
        qkv=("attn.in_proj_",),
        rest={
            "attention_norm": "ln_1",
            "attention.out": "attn.out_proj",
            "mlp_norm": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        },
    ),
    Layout(
        "timm's VisionTransformer",
        mark="cls_token",
        prefix="",
        class_token="cls_token",
        positions="pos_embed",
        patches="patch_embed.proj.weight",
        norm_before="norm_pre",
        norm_after="norm",
        layer="blocks.{}.",
        qkv=("attn.qkv.",),
        rest={
            "attention_norm": "norm1",
            "attention.out": "attn.proj",
            "mlp_norm": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
    ),
)


def clip_vision(source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of CLIP's ViT-B/16, in the layout of Hugging Face, OpenAI, open_clip or timm, as a ``VisionEncoder``'s.

    Returns them and the keys that were not used. Raises ValueError when the layout is none of these or a key is
    missing. The layouts do not tell the activation: ours is OpenAI's QuickGELU.
    """
    layout = clip_layout(source)
    weights = Source(source).inside(layout.prefix)
    width = weights.take(layout.class_token).shape[-1]
    target = {
        "class_token": weights.take(layout.class_token).reshape(width),
        "position_embedding": weights.take(layout.positions).reshape(-1, width),
        # the convolution's kernel (D, 3, P, P) as the rows of a linear layer over flattened patches
        "patch_embedding.weight": weights.take(layout.patches).flatten(1),
        **weights.linear(layout.norm_before, "norm_before"),
        **weights.linear(layout.norm_after, "norm_after"),
    }
    for number in range(weights.layers(layout.layer)):
        theirs, ours = layout.layer.format(number), f"layers.{number}."
        target |= weights.join([theirs + name for name in layout.qkv], f"{ours}attention.qkv")
        for part, name in layout.rest.items():
            target |= weights.linear(theirs + name, ours + part)
    return target, weights.unused()


def clip_layout(source: Mapping[str, Tensor]) -> Layout:
    """The layout of a CLIP vision transformer's weights. Raises ValueError for any other."""
    for layout in _CLIP_LAYOUTS:
        if layout.prefix + layout.mark in source or layout.mark in source:
            return layout
    names = ", ".join(layout.name for layout in _CLIP_LAYOUTS)
    raise ValueError(f"these are not weights of a CLIP vision transformer as {names} have them: {some(source)}")
