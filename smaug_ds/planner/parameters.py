"""Parameters of the model, part by part, from its config alone.

Letters: D width, F width of an MLP, N patches, P patch size.
"""

from __future__ import annotations

from smaug_ds.model.beit import relative_places
from smaug_ds.model.language import TextConfig
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.model.vision import VisionConfig

MLP_RATIO = 4  # of timm's Block, where a config does not name the MLP's width


def parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part; the word embedding, which the vocabulary logits share, is counted in the text encoder.

    Equal to the built model, trainable or not. ``model.text.vocab_size`` must be set.
    """
    vision, text, decoder = model.vision, model.text, model.decoder
    pixels = 3 * vision.patch_size**2
    counts = {
        "vision encoder": vision_encoder(vision),
        "pixel decoder": linear(vision.width, decoder.width)
        + decoder.width
        + vision.patches * decoder.width
        + decoder.depth * block(decoder.width, MLP_RATIO * decoder.width)
        + norm(decoder.width)
        + linear(decoder.width, pixels),
        "text encoder": (text.vocab_size + text.max_positions + 2) * text.width
        + norm(text.width)
        + text.text_layers * block(text.width, text.mlp_width),
        "multi-modal encoder": text.fusion_layers * crossing_block(text, vision.width),
        "vocabulary logits": linear(text.width, text.width) + norm(text.width) + text.vocab_size,
        "projections and match head": linear(vision.width, model.projection)
        + linear(text.width, model.projection)
        + linear(text.width, 2),
        "temperature": 2,  # and the bias of the sigmoid loss
    }
    if model.frames > 1:
        counts["temporal encoder"] = model.frames * vision.width + model.temporal.depth * block(
            vision.width, MLP_RATIO * vision.width
        )
    if model.frames > model.frames_kept:
        counts["frame selector"] = (
            linear(vision.width + text.width, vision.width)
            + model.selector.depth * block(vision.width, model.selector.mlp_width)
            + linear(vision.width, 1)
        )
    if model.answer_layers:
        counts["answer decoder"] = model.answer_layers * crossing_block(text, text.width)
    return counts


def vision_encoder(vision: VisionConfig) -> int:
    """CLIP's, or BEiT's: a bias of the patch embedding, no norm before the first layer, another one for the mean of the
    patches where that speaks for a frame, and in each layer a bias table and two scales."""
    tokens = 3 * vision.patch_size**2 * vision.width + vision.width + (vision.patches + 1) * vision.width
    layer = block(vision.width, vision.mlp_width)
    if vision.layout == "clip":
        return tokens + 2 * norm(vision.width) + vision.depth * layer
    layer += relative_places(vision.patches) * vision.heads + 2 * vision.width
    norms = 2 if vision.pooling == "mean" else 1
    return tokens + vision.width + norms * norm(vision.width) + vision.depth * layer


def linear(inputs: int, outputs: int) -> int:
    """A matrix and its bias."""
    return inputs * outputs + outputs


def norm(width: int) -> int:
    """Gain and bias of a layer norm."""
    return 2 * width


def block(width: int, mlp_width: int) -> int:
    """A transformer layer: queries, keys, values, output, MLP, two norms."""
    attention = linear(width, 3 * width) + linear(width, width)
    return attention + linear(width, mlp_width) + linear(mlp_width, width) + 2 * norm(width)


def crossing_block(text: TextConfig, seen_width: int) -> int:
    """A layer with a cross-attention to something ``seen_width`` wide, too."""
    crossing = 2 * linear(text.width, text.width) + linear(seen_width, 2 * text.width) + norm(text.width)
    return block(text.width, text.mlp_width) + crossing
