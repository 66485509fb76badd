"""Memory of a rank: weights, gradients and optimizer under each ZeRO stage, activations of a micro step, bytes on disk.

What the model keeps for its backward pass is counted layer by layer, in elements per token; the coefficients are what
autograd saves in torch 2.12 (a test compares). Letters as in ``flops``; F width of an MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smaug_ds.losses import LossConfig
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.model.sparsify import kept_count, visible_count
from smaug_ds.model.vision import VisionConfig
from smaug_ds.planner.flops import KEYS, Keys, Step, projected_tokens
from smaug_ds.planner.parameters import MLP_RATIO

FLOAT = 4  # bytes of float32
MOMENTS = 2 * FLOAT  # AdamW's, a parameter
LANGUAGE_BLOCK = 12  # elements a token and unit of width that a post-norm layer saves beside its MLP
CROSSING = 6  # the same of its cross-attention, on the side of the caption
PRE_NORM_BLOCK = 8  # the same of a pre-norm layer, both halves
# Of a layer that recomputes what is cheap alone, its input and the results of matrix products and attention: queries,
# keys and values 3, attention and what its output matrix makes of it 2, the MLP's result 1; beside the MLP's width.
CHEAP_BLOCK, CHEAP_CROSSING = 7, 3

# What the matching loss brings from other ranks: the visual tokens of all their clips ("all"), or those of the drawn
# negatives ("drawn").
Negatives = Literal["all", "drawn"]
NEGATIVES: Negatives = "drawn"


@dataclass(frozen=True)
class Precision:
    """What DeepSpeed keeps and sends, as its JSON says."""

    stage: int  # ZeRO stage, 0 to 3
    mixed: bool  # 16-bit weights beside a float32 copy; else float32 throughout (autocast included)
    activation_bytes: int  # of an element: 2 with bf16, fp16 or autocast
    gradient_bytes: int  # of an accumulated one
    sent_bytes: int  # of a gradient on its way to other ranks
    bucket: int  # elements of a gradient bucket
    offload: bool  # optimizer and its copy of the weights in the memory of the host
    whole_reduction: bool  # DeepSpeed all-reduces a bucket and keeps its part (its default); else reduces to the owner

    @property
    def weight_bytes(self) -> int:
        """Of an element of the weights that the model computes with."""
        return 2 if self.mixed else FLOAT

    @classmethod
    def of(cls, deepspeed: dict) -> Precision:
        """From a DeepSpeed JSON that ``engine.deepspeed.load_json`` has passed."""
        zero = deepspeed.get("zero_optimization", {})
        mixed = any(deepspeed.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
        autocast = bool(deepspeed.get("torch_autocast", {}).get("enabled"))
        own = 2 if mixed else FLOAT
        accumulated = {"fp32": FLOAT, "bf16": 2, "fp16": 2, None: own}
        return cls(
            stage=zero.get("stage", 0),
            mixed=mixed,
            activation_bytes=2 if mixed or autocast else FLOAT,
            gradient_bytes=accumulated[deepspeed.get("data_types", {}).get("grad_accum_dtype")],
            sent_bytes=accumulated[deepspeed.get("communication_data_type")],
            bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            offload=zero.get("offload_optimizer", {}).get("device") == "cpu",
            whole_reduction=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
        )


@dataclass(frozen=True)
class States:
    """Bytes of one rank that do not depend on the batch."""

    weights: float
    gradients: float
    optimizer: float  # float32 copy of the weights and both moments
    buckets: float  # gradients on their way
    host: float  # of the optimizer, where it is offloaded

    @property
    def device(self) -> float:
        """All that lies in the memory of the device."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def states(parameters: int, precision: Precision, stage: int, world_size: int) -> States:
    """What ZeRO ``stage`` leaves on each rank (Rajbhandari et al. 2020, section 5), with DeepSpeed's own buffers.

    Stage 1 divides the optimizer, 2 the gradients, too, 3 the weights, too. DeepSpeed keeps a float32 copy of a rank's
    share of the weights even where the model is float32, from stage 1 on.
    """
    shares = [1 / world_size if stage >= least else 1.0 for least in (1, 2, 3)]
    copied = FLOAT if precision.mixed or stage >= 1 else 0
    optimizer = parameters * (copied + MOMENTS) * shares[0]
    # At the step, the rank's share of the gradients stands in one float32 piece beside what was accumulated.
    gradients = parameters * (precision.gradient_bytes * shares[1] + FLOAT * shares[0])
    if precision.offload:
        host, optimizer, gradients = optimizer + parameters * FLOAT * shares[0], 0.0, gradients * shares[1]
    else:
        host = 0.0
    bucket = min(precision.bucket, parameters) * (precision.weight_bytes + precision.sent_bytes)
    return States(
        parameters * precision.weight_bytes * shares[2], gradients, optimizer, bucket if stage >= 1 else 0.0, host
    )


def checkpoint_bytes(parameters: int, precision: Precision) -> float:
    """Bytes of a checkpoint on disk: DeepSpeed's weights, its float32 copy and moments, and the model alone."""
    return parameters * (2 * precision.weight_bytes + FLOAT + MOMENTS)


def activations(
    model: ModelConfig,
    loss: LossConfig,
    step: Step,
    precision: Precision,
    keys: Keys = KEYS,
    negatives: Negatives = NEGATIVES,
) -> dict[str, float]:
    """Bytes that a micro step of one rank holds at the end of its forward pass, by part."""
    size, vision = precision.activation_bytes, model.vision
    clips = step.batch * step.frames
    tokens = vision.token_counts()[-1]
    passes = 1 + bool(loss.mlm)
    fused = 3 * bool(loss.vtm) + bool(loss.mlm)
    parts = {"vision encoder": clips * size * _vision(model, size)}
    if step.frames > 1:
        block = tokens * (PRE_NORM_BLOCK + 2 * MLP_RATIO) * vision.width
        parts["temporal encoder"] = clips * size * block * model.temporal.depth
    text = model.text
    words = step.batch * step.captions.mean * size
    layer = LANGUAGE_BLOCK * text.width + 2 * text.mlp_width
    every, cheap = text.checkpoint_every, text.checkpoint_what == "cheap"
    again = CHEAP_BLOCK * text.width + text.mlp_width if cheap else text.width
    parts["text encoder"] = words * passes * (3 * text.width + _kept(text.text_layers, every, layer, again))
    if fused:
        crossing = layer + CROSSING * text.width
        again += CHEAP_CROSSING * text.width * cheap
        captions = words * fused * _kept(text.fusion_layers, every, crossing, again)
        seen = step.batch * fused * min(step.frames, model.frames_kept) * tokens * vision.width
        projected = projected_tokens(model, step, fused, keys, tokens) * 2 * text.width
        # projected within the layer, they are recomputed with it; "cheap" keeps them as it does all products
        recomputed = text.fusion_layers // every if every and keys == "per pass" and not cheap else 0
        # the tokens that a pass sees are copied out of those of all clips, once for the pairs and once as chosen
        copies = 1 + (step.frames > model.frames_kept)
        visual = size * (copies * seen + projected * (text.fusion_layers - recomputed))
        parts["multi-modal encoder"] = captions + visual
    if loss.mvm:
        parts["pixel decoder"] = clips * _pixel_decoder(model, size)
    if loss.mlm:
        # logits as computed, in float32, and their softmax
        parts["vocabulary logits"] = step.batch * step.hidden * text.vocab_size * (size + 2 * FLOAT)
    everyone = step.batch * step.world_size
    # float32: targets, and logits and their softmax in both directions; float64: the draw of the negatives
    parts["contrast"] = step.batch * everyone * (5 * FLOAT * bool(loss.vtc) + 3 * 8 * bool(loss.vtm))
    parts["negatives"] = 2 * size * gathered_elements(model, loss, step, negatives)
    return {name: value for name, value in parts.items() if value}


def gathered_elements(model: ModelConfig, loss: LossConfig, step: Step, negatives: Negatives) -> float:
    """Elements of visual tokens and text states that a rank receives from others for the matching loss."""
    if not loss.vtm or step.world_size == 1:
        return 0.0
    clip = step.frames * model.vision.token_counts()[-1] * model.vision.width
    caption = step.captions.mean * model.text.width
    others = step.batch * (step.world_size - 1 if negatives == "all" else 1 - 1 / step.world_size)
    return others * (clip + caption)


def transient(model: ModelConfig, step: Step, precision: Precision) -> float:
    """Bytes that come and go within a micro step: the recomputation of one layer, pixels in float32."""
    vision, text, size = model.vision, model.text, precision.activation_bytes
    tokens = visible_count(vision.patches, vision.mask_ratio) + 1
    layer = step.batch * step.frames * _vision_layer(vision, tokens, tokens, size)
    pixels = step.batch * step.frames * 3 * vision.image_size**2 * FLOAT
    caption = 3 * step.batch * step.captions.mean * (LANGUAGE_BLOCK * text.width + 2 * text.mlp_width)
    recomputed = max(layer * bool(vision.checkpoint_every), caption * bool(text.checkpoint_every))
    return size * recomputed + 3 * pixels


def _vision(model: ModelConfig, size: int) -> float:
    """Elements of ``size`` bytes that the vision encoder saves for one frame."""
    vision = model.vision
    tokens = visible_count(vision.patches, vision.mask_ratio)
    total = float(tokens * 3 * vision.patch_size**2)
    if vision.layout == "clip":  # which has a norm before its first layer
        total += tokens * vision.width
    for number in range(1, vision.depth + 1):
        entering = tokens + 1
        if number in vision.sparsify_layers:
            tokens = min(tokens, kept_count(tokens, vision.keep_rate) + 1)
        every = vision.checkpoint_every
        if every and number % every == 0:
            total += entering * vision.width
            if vision.checkpoint_what == "cheap":
                total += entering * (CHEAP_BLOCK - 2) * vision.width + (tokens + 1) * (vision.width + vision.mlp_width)
                # On a CPU a bias that learns takes attention apart, and its logits are a product; GPUs have a kernel.
                if vision.layout == "beit":
                    total += entering**2 * vision.heads
            continue
        total += _vision_layer(vision, entering, tokens + 1, size)
        if number in vision.sparsify_layers:  # the kept tokens, gathered and put together
            total += entering * vision.width
    return total + 2 * (tokens + 1) * vision.width


def _vision_layer(vision: VisionConfig, entering: int, leaving: int, size: int) -> float:
    """Elements of ``size`` bytes that a layer saves for one frame, of which ``leaving`` tokens go on to its MLP."""
    # the activation saves its input, the matrix behind it what it makes of that
    total = entering * (PRE_NORM_BLOCK - 2) * vision.width + leaving * 2 * (vision.width + vision.mlp_width)
    if vision.layout == "clip":
        return total
    # BEiT's scales save what they scale; the attention its bias, whose entries are found by int64 numbers
    return total + (entering + leaving) * vision.width + entering**2 * (vision.heads + 8 / size)


def _pixel_decoder(model: ModelConfig, size: int) -> float:
    """Bytes that the pixel decoder saves for one frame."""
    vision, decoder = model.vision, model.decoder
    visible = visible_count(vision.patches, vision.mask_ratio)
    predicted = max(1, round(decoder.predicted_share * (vision.patches - visible)))
    decoded = vision.patches if decoder.predicted_share == 1 else visible + predicted
    kept = vision.token_counts()[-1]
    blocks = decoded * decoder.depth * (PRE_NORM_BLOCK + 2 * MLP_RATIO) * decoder.width
    around = kept * vision.width + 2 * decoded * decoder.width + predicted * decoder.width
    # the error of every predicted pixel is float32
    return size * (blocks + around) + predicted * 3 * vision.patch_size**2 * FLOAT


def _kept(layers: int, every: int, layer: float, again: float) -> float:
    """Elements a token of ``layers`` that keep ``layer``, of which every n-th is recomputed and keeps ``again``."""
    recomputed = layers // every if every else 0
    return (layers - recomputed) * layer + recomputed * again
