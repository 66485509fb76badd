"""The planner's arithmetic for BEiT's layers against the model as it is counted and run."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.model.beit import BeitAttention
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.planner.flops import Captions, Step, step_flops, vision_flops
from smaug_ds.planner.memory import FLOAT, Precision, activations, transient
from tests.models import VOCABULARY, random_batch, small_config, small_model
from tests.plans import keep_caches
from tools.profiling.model import ProfileConfig, count_flops

FP32 = Precision.of({})
aten = torch.ops.aten
# torch's counter leaves out the fused attention of CPUs
COUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_shape=None, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


def beit(size: str, frames: int = 1, frames_kept: int = 1, **vision: Any) -> ModelConfig:
    """A preset with BEiT's layers."""
    config = dataclasses.replace(ModelConfig.of_size(size), frames=frames, frames_kept=frames_kept)
    vision = {"layout": "beit", **vision}
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **vision),
        text=dataclasses.replace(config.text, vocab_size=VOCABULARY),
    )


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"pooling": "mean", "mask_ratio": 0.25},
        {"mask_ratio": 0.65, "sparsify_layers": (2, 3), "keep_rate": 0.6},
        {"keep_rate": 1.0},
        {"sparsify_layers": ()},
    ],
)
@pytest.mark.parametrize("size", ["base", "tiny"])
def test_forward_operations_equal_torchs_counter(size: str, vision: dict[str, Any]) -> None:
    config = beit(size, 4, 2, **vision)
    length, loss = config.text.max_length, LossConfig()
    counted = count_flops(ProfileConfig(config))
    step = Step(4, 1, 1, Captions.full(length), round(loss.mlm_probability * length))
    planned = step_flops(config, loss, step)
    planned.pop("contrast")
    assert set(planned) == set(counted)
    for name, flops in planned.items():
        assert flops.forward == pytest.approx(counted[name], rel=0.01), name
    # of the encoder not a multiply-add is missing
    assert planned["vision encoder"].forward == pytest.approx(counted["vision encoder"], rel=1e-6)


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("vision", [{}, {"pooling": "mean", "keep_rate": 1.0}, {"sparsify_layers": (1,)}])
def test_the_encoders_step_equals_torchs_counter(
    every: int, vision: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, recomputation included.

    Without a gradient of its bias attention is fused on a CPU, too. With one, GPUs have a fused kernel, which makes as
    many products: that gradient is the scores'.
    """
    bias = BeitAttention.bias
    monkeypatch.setattr(BeitAttention, "bias", lambda self, ids: bias(self, ids).detach())
    config = small_config(2, 2, layout="beit", depth=5, checkpoint_every=every, **vision)
    model = small_model(config).train()
    batch = random_batch(config, 4, lengths=[12] * 4)
    patches = model.patchify(batch.frames)
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with counter:
        tokens = model.vision(patches, batch.patch_noise).tokens
        forward = counter.get_total_flops()
        tokens.sum().backward()
    planned = vision_flops(config) * (4 * 2)
    # but for sums of a single token, which torch makes without a product; CLIP's layers differ by more
    assert planned.forward == pytest.approx(forward, rel=3e-4)
    assert planned.total == pytest.approx(counter.get_total_flops(), rel=3e-4)


@pytest.mark.gpu
def test_a_whole_step_on_a_gpu_equals_torchs_counter() -> None:
    """With the gradient of the bias."""
    config = beit("tiny")
    module = Pretraining(small_model(config), LossConfig()).train().cuda()
    batch = random_batch(config, 8, lengths=[12] * 8).to("cuda")
    counter = FlopCounterMode(display=False)
    with counter, torch.autocast("cuda", torch.bfloat16):
        module(batch)["loss"].backward()
    step = Step(1, 8, 1, Captions.full(12), len(batch.mlm_positions) / 8)
    planned = sum(part.total for part in step_flops(config, LossConfig(), step).values())
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)


class Kept:
    """A saved tensor; it is gone with the node of the graph that saved it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # which knows no node: no ring that nothing takes apart


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"pooling": "mean"},
        {"keep_rate": 1.0},
        {"mask_ratio": 0.0},
        {"checkpoint_every": 2},
        {"checkpoint_every": 1},
        {"checkpoint_every": 1, "checkpoint_what": "cheap"},
        {"checkpoint_every": 2, "checkpoint_what": "cheap"},
        {"sparsify_layers": ()},
    ],
)
def test_what_the_encoder_saves(vision: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = beit("tiny", **vision)
    model = small_model(config).train()
    batch = random_batch(config, 8, lengths=[12] * 8)
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    cached = keep_caches(monkeypatch)
    patches = model.patchify(batch.frames)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        tokens = model.vision(patches, batch.patch_noise).tokens
        held = tokens.square()  # whoever reads them keeps them
    tensors = [*(kept.tensor for kept in alive), *cached()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    saved = sum(size for pointer, size in storages.items() if pointer not in own)
    assert held.requires_grad
    step = Step(1, 8, 1, Captions.full(12), 2)
    planned = activations(config, LossConfig(), step, FP32)["vision encoder"]
    assert planned == pytest.approx(saved, rel=0.05)


def test_a_bias_in_16_bit_has_numbers_of_64() -> None:
    """Of a layer of base size, per frame: scaled results, biases and their numbers come on top of CLIP's."""
    step, config = Step(1, 1, 1, Captions.full(12), 2), beit("base", depth=1, sparsify_layers=(), pooling="class")
    clip = dataclasses.replace(config, vision=dataclasses.replace(config.vision, layout="clip"))
    bf16 = Precision.of({"bf16": {"enabled": True}})
    for precision, size in ((FP32, FLOAT), (bf16, 2)):
        more, less = (activations(model, LossConfig(), step, precision)["vision encoder"] for model in (config, clip))
        norm_before = 98 * 768 * size
        assert more - less == 2 * 99 * 768 * size + 99 * 99 * (12 * size + 8) - norm_before
    again = dataclasses.replace(config, vision=dataclasses.replace(config.vision, checkpoint_every=1))
    plain = dataclasses.replace(clip, vision=dataclasses.replace(clip.vision, checkpoint_every=1))
    assert transient(again, step, bf16) - transient(plain, step, bf16) == 2 * 99 * 768 * 2 + 99 * 99 * (12 * 2 + 8)
