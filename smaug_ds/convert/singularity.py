"""Published Singularity checkpoints -> ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from smaug_ds.convert.beit import Pooling, map_beit
from smaug_ds.convert.bert import map_language
from smaug_ds.convert.source import Source


def singularity(
    source: Mapping[str, Tensor], text_layers: int, frames: int, heads: int
) -> tuple[dict[str, Tensor], Pooling, list[str]]:
    """Weights of a published Singularity checkpoint (arXiv 2206.03428; its ``models/model_retrieval_base.py``).

    Its BEiT goes in as ``beit_vision`` says, with the norm of tokens that follows it. Unused: its temporal encoder,
    which works along time at each place and is post-norm, and, with one frame, its temporal embeddings.

    Returns weights of a ``SmaugModel``, the pooling of its vision encoder, and the unused keys. Raises ValueError
    naming a key that is missing.
    """
    weights = Source(source)
    vision, pooling = map_beit(weights.inside("vision_encoder."), heads)
    target = {f"vision.{key}": value for key, value in vision.items()}
    if weights.has("vision_layernorm.weight"):
        target |= weights.linear("vision_layernorm", "vision.norm_after")
    text = weights.inside("text_encoder.")
    target |= map_language(text.inside("bert."), text, text_layers)
    for theirs, ours in (("vision_proj", "vision_projection"), ("text_proj", "text_projection")):
        target |= weights.linear(theirs, ours)
    if weights.has("itm_head.weight"):  # index 1 is a match, as ours
        target |= weights.linear("itm_head", "match_head")
    if weights.has("temp"):  # similarities are divided by it; ours are multiplied by the exponential
        target["logit_scale"] = -weights.take("temp").reshape(1).log()
    if frames > 1 and weights.has("temporal_embeddings"):
        target["temporal.position_embedding"] = weights.take("temporal_embeddings").flatten(0, 2)
    return target, pooling, weights.unused()
