"""Floating-point operations of a training step, part by part: 2 per multiply-add, matrix products and attention only.

Masking, sparsification, frame selection, real caption lengths and recomputation are in the figures: this is what a step
really executes. A linear layer costs twice its forward pass in the backward pass (gradients of input and of weight);
fused attention two and a half times, since it computes its scores once more.

Letters: B samples of a micro step on one rank, G those of all ranks, T frames, N patches, K tokens of a frame with the
class token, L tokens of a caption, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smaug_ds.losses import LossConfig
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.model.sparsify import kept_count, visible_count
from smaug_ds.planner.parameters import MLP_RATIO

ATTENTION_BACKWARD = 2.5  # of its forward pass: five products for two
FUSION_PASSES = 4  # matching: the pair, a wrong text, a wrong video; and the hidden words
TEXT_PASSES = 2  # clean and masked caption

# How the multi-modal encoder gets keys and values of the visual tokens: projected for each of its passes ("per pass"),
# or once per image and layer for all of them ("shared"), those of the drawn negatives included.
Keys = Literal["per pass", "shared"]
KEYS: Keys = "shared"


@dataclass(frozen=True)
class Captions:
    """How long captions are, tokens with [CLS] and [SEP]."""

    mean: float
    longest: float  # of a micro batch; attention alone pads to it

    @classmethod
    def full(cls, length: int) -> Captions:
        """All captions fill ``length`` tokens."""
        return cls(length, length)


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times)

    @property
    def total(self) -> float:
        return self.forward + self.backward


_NOTHING = Flops()


@dataclass(frozen=True)
class Step:
    """A micro step of one rank."""

    frames: int  # T: of the model for clips, 1 for images
    batch: int  # B
    world_size: int
    captions: Captions
    hidden: float  # words of a caption that are predicted


def step_flops(model: ModelConfig, loss: LossConfig, step: Step, keys: Keys = KEYS) -> dict[str, Flops]:
    """Operations of a micro step on one rank, by part. A loss of weight 0 leaves its part out."""
    vision, text, batch = model.vision, model.text, step.batch
    tokens = vision.token_counts()[-1]  # K
    clips = batch * step.frames
    parts = {"vision encoder": vision_flops(model) * clips}
    if step.frames > 1:
        parts["temporal encoder"] = (
            block(step.frames * tokens, vision.width, MLP_RATIO * vision.width) * model.temporal.depth * batch
        )
    passes = 1 + bool(loss.mlm)
    captions = step.captions
    parts["text encoder"] = (
        _every(
            text.text_layers, text.checkpoint_every * (text.checkpoint_what == "layer"), _caption_layer(model, captions)
        )
        * passes
        * batch
    )
    fused = 3 * bool(loss.vtm) + bool(loss.mlm)
    if step.frames > model.frames_kept:
        parts["frame selector"] = _selector(model, step.frames) * (3 if loss.vtm else 1) * batch
    parts["multi-modal encoder"] = _fusion(model, step, fused, keys, tokens)
    if loss.mvm:
        parts["pixel decoder"] = _pixel_decoder(model, tokens) * clips
    if loss.mlm:
        heads = linear(step.hidden, text.width, text.width) + linear(step.hidden, text.width, text.vocab_size)
        parts["vocabulary logits"] = heads * batch
    projections = linear(1, vision.width, model.projection) + linear(1, text.width, model.projection)
    matching = linear(1, text.width, 2) * (3 * bool(loss.vtm))
    parts["projections and match head"] = (projections + matching) * batch
    parts["contrast"] = _contrast(model, loss, step)
    return {name: flops for name, flops in parts.items() if flops.total}


def sample_flops(model: ModelConfig, loss: LossConfig, step: Step, keys: Keys = KEYS) -> float:
    """Forward and backward operations of one sample."""
    return sum(part.total for part in step_flops(model, loss, step, keys).values()) / step.batch


def linear(rows: float, inputs: int, outputs: int, first: bool = False) -> Flops:
    """A linear layer on so many rows; the ``first`` of a network needs no gradient of its input."""
    product = 2.0 * rows * inputs * outputs
    return Flops(product, product if first else 2 * product)


def attention(queries: float, keys: float, width: int) -> Flops:
    """Fused attention, all heads together."""
    product = 4.0 * queries * keys * width
    return Flops(product, ATTENTION_BACKWARD * product)


def block(tokens: float, width: int, mlp_width: int) -> Flops:
    """A transformer layer on a sequence of ``tokens``."""
    return _attention_half(tokens, width) + _mlp(tokens, width, mlp_width)


def vision_flops(model: ModelConfig) -> Flops:
    """The vision encoder on one frame while training.

    BEiT's layers rank the tokens even where none leaves. Its bias is added within the fused attention, and its gradient
    is that of the scores, so neither is a product more.
    """
    vision = model.vision
    beit = vision.layout == "beit"
    tokens = visible_count(vision.patches, vision.mask_ratio)
    total = linear(tokens, 3 * vision.patch_size**2, vision.width, first=True)
    for number in range(1, vision.depth + 1):
        layer = _attention_half(tokens + 1, vision.width)
        if number in vision.sparsify_layers:
            layer += _rank_and_fuse(tokens, kept_count(tokens, vision.keep_rate), vision.width)
            tokens = min(tokens, kept_count(tokens, vision.keep_rate) + 1)
        elif beit:
            layer += _rank_and_fuse(tokens, tokens, vision.width)
        last = linear(tokens + 1, vision.mlp_width, vision.width)
        layer += linear(tokens + 1, vision.width, vision.mlp_width) + last
        every = vision.checkpoint_every if vision.checkpoint_what == "layer" else 0
        if every and number % every == 0:
            # the backward pass needs the result of the last product for the gradient of BEiT's scale alone
            layer = _recomputed(layer, _NOTHING if beit else last)
        total += layer
    return total


def _rank_and_fuse(tokens: int, kept: int, width: int) -> Flops:
    """The class token's row of the attention matrix, and the sum of the tokens that leave.

    The row only ranks and weighs; its gradient flows through the weights of the sum.
    """
    row = Flops(2.0 * (tokens + 1) * width, 4.0 * (tokens + 1) * width)
    if kept == tokens:
        return Flops(row.forward)
    fused = Flops(2.0 * (tokens - kept) * width, 4.0 * (tokens - kept) * width)
    return row + fused


def _attention_half(tokens: float, width: int) -> Flops:
    return linear(tokens, width, 3 * width) + attention(tokens, tokens, width) + linear(tokens, width, width)


def _mlp(tokens: float, width: int, mlp_width: int) -> Flops:
    return linear(tokens, width, mlp_width) + linear(tokens, mlp_width, width)


def _caption_layer(model: ModelConfig, captions: Captions) -> Flops:
    """A layer of BERT on a packed caption; its attention alone is padded to the longest."""
    text = model.text
    return (
        linear(captions.mean, text.width, 3 * text.width)
        + attention(captions.longest, captions.longest, text.width)
        + linear(captions.mean, text.width, text.width)
        + _mlp(captions.mean, text.width, text.mlp_width)
    )


def _every(layers: int, every: int, layer: Flops) -> Flops:
    """``layers`` of them, of which every n-th is computed once more in the backward pass."""
    again = layers // every if every else 0
    return layer * (layers - again) + _recomputed(layer) * again


def _recomputed(layer: Flops, skipped: Flops = _NOTHING) -> Flops:
    return Flops(layer.forward, layer.backward + layer.forward - skipped.forward)


def _selector(model: ModelConfig, frames: int) -> Flops:
    width = model.vision.width
    return (
        linear(frames, width + model.text.width, width)
        + block(frames, width, model.selector.mlp_width) * model.selector.depth
        + linear(frames, width, 1)
    )


def _fusion(model: ModelConfig, step: Step, passes: int, keys: Keys, tokens: int) -> Flops:
    """All passes of the multi-modal encoder: ``passes`` captions look at the chosen frames of one clip each."""
    text, captions, batch = model.text, step.captions, step.batch
    if not passes:
        return Flops()
    seen = min(step.frames, model.frames_kept) * tokens
    crossing = linear(captions.mean, text.width, text.width) * 2 + attention(captions.longest, seen, text.width)
    layer = (_caption_layer(model, captions) + crossing) * passes
    wanted = (passes // 3) * 3 + (step.hidden if passes != 3 else 0.0)
    # the last layer computes class tokens and hidden words alone, which attend to all
    last = (
        linear(passes * captions.mean, text.width, 3 * text.width)
        + attention(wanted, captions.longest + seen, text.width)
        + linear(wanted, text.width, text.width) * 3
        + _mlp(wanted, text.width, text.mlp_width)
    )
    every = text.checkpoint_every if text.checkpoint_what == "layer" else 0
    projected = linear(projected_tokens(model, step, passes, keys, tokens), model.vision.width, 2 * text.width)
    total = _every(text.fusion_layers - 1, every, layer) * batch
    total += (_recomputed(last) if every and text.fusion_layers % every == 0 else last) * batch
    return total + projected * text.fusion_layers


def projected_tokens(model: ModelConfig, step: Step, passes: int, keys: Keys, tokens: int) -> float:
    """Visual tokens whose keys and values each fusion layer computes in a micro step.

    Shared, all frames of a clip are projected once and the chosen ones taken from there, unless fewer are looked at
    than there are. Of clips of other ranks that were drawn as negatives only the chosen frames come on top.
    """
    chosen = min(step.frames, model.frames_kept)
    if keys == "per pass":
        return step.batch * passes * chosen * tokens
    foreign = (1 - 1 / step.world_size) if passes > 1 else 0.0  # clips from other ranks, for each of a rank's own
    own = min((passes - foreign) * chosen, step.frames)
    return step.batch * (own + foreign * chosen) * tokens


def _pixel_decoder(model: ModelConfig, tokens: int) -> Flops:
    """The pixel decoder on one frame, see ``PixelDecoder.forward``."""
    vision, decoder = model.vision, model.decoder
    visible = visible_count(vision.patches, vision.mask_ratio)
    masked = vision.patches - visible
    predicted = max(1, round(decoder.predicted_share * masked))
    decoded = vision.patches if decoder.predicted_share == 1 else visible + predicted
    return (
        linear(tokens - 1, vision.width, decoder.width)
        + block(decoded, decoder.width, MLP_RATIO * decoder.width) * (decoder.depth - 1)
        + _last_block(decoded, predicted, decoder.width)
        + linear(predicted, decoder.width, 3 * vision.patch_size**2)
    )


def _last_block(tokens: int, wanted: int, width: int) -> Flops:
    """A block that computes only the ``wanted`` ones of its tokens, which attend to all."""
    attended = linear(tokens, width, 3 * width) + attention(wanted, tokens, width) + linear(wanted, width, width)
    return attended + _mlp(wanted, width, MLP_RATIO * width)


def _contrast(model: ModelConfig, loss: LossConfig, step: Step) -> Flops:
    """Similarities of the pairs of all ranks: for the loss, for the draw of negatives, and for the accuracy shown."""
    own, everyone = step.batch, step.batch * step.world_size
    pairs = 2.0 * own * everyone * model.projection
    total = Flops()
    if loss.vtc:
        directions = 1 if loss.contrastive == "sigmoid" else 2
        total += Flops(directions * pairs, 2 * directions * pairs) + Flops(2.0 * own * own * model.projection)
    if loss.vtm:
        total += Flops(2 * pairs)
    return total
