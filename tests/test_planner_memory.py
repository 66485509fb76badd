"""The planner's memory against what autograd saves and ZeRO divides; what cannot fit is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from smaug_ds.config import ConfigError
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.planner.cluster import ClusterConfig, Machine
from smaug_ds.planner.flops import Captions, Step
from smaug_ds.planner.memory import Precision, activations, states
from smaug_ds.planner.prediction import memory, require_fit
from tests.models import VOCABULARY, random_batch, small_model
from tests.plans import BF16, FP32, ROOT, keep_caches, sized, work


@pytest.mark.parametrize("frames", [(1, 1), (4, 2)])
@pytest.mark.parametrize("changes", [{}, {"decoder__predicted_share": 0.5}, {"vision__mask_ratio": 0.25}])
@pytest.mark.parametrize(("every", "what"), [(0, "layer"), (2, "layer"), (1, "layer"), (2, "cheap"), (1, "cheap")])
def test_activations_are_what_autograd_saves(
    frames: tuple[int, int], changes: dict[str, Any], every: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"text__vocab_size": VOCABULARY, "vision__checkpoint_what": what, "text__checkpoint_what": what} | changes
    config = sized("tiny", *frames, vision__checkpoint_every=every, text__checkpoint_every=every, **changes)
    module = Pretraining(small_model(config), LossConfig()).train()
    batch = random_batch(config, 8, lengths=[12] * 8)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in own:
            kept[storage] = tensor  # holding on to it, so that no other comes to lie there
        return tensor

    cached = keep_caches(monkeypatch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(batch)
    for tensor in cached():
        keep(tensor)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    step = Step(frames[0], 8, 1, Captions.full(12), len(batch.mlm_positions) / 8)
    assert sum(activations(config, LossConfig(), step, FP32).values()) == pytest.approx(saved, rel=0.15)


@pytest.mark.parametrize("vision", [{}, {"vision__keep_rate": 1.0}, {"vision__mask_ratio": 0.0}])
def test_what_the_vision_encoder_saves(vision: dict[str, Any]) -> None:
    """Closely: activations keep their input alone."""
    config = sized("tiny", text__vocab_size=VOCABULARY, **vision)
    model = small_model(config).train()
    batch = random_batch(config, 8, lengths=[12] * 8)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    patches = model.patchify(batch.frames)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoded = model.vision(patches, batch.patch_noise)
    saved = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    assert encoded.tokens.requires_grad
    planned = activations(config, LossConfig(), Step(1, 8, 1, Captions.full(12), 2), FP32)["vision encoder"]
    assert planned == pytest.approx(saved, rel=0.06)


@pytest.mark.parametrize(("stage", "bytes_a_parameter"), [(0, 22), (1, 6 + 16 / 8), (2, 2 + 20 / 8), (3, 22 / 8)])
def test_zero_divides_what_its_stage_says(stage: int, bytes_a_parameter: float) -> None:
    """bf16 weights 2, float32 copy and moments 12, accumulated gradients 4, and 4 of them in one piece for AdamW."""
    held = states(1_000_000, dataclasses.replace(BF16, bucket=0), stage, 8)
    assert held.device == pytest.approx(1e6 * bytes_a_parameter)


def test_offload_moves_the_optimizer_to_the_host() -> None:
    offload = Precision.of(json.loads((ROOT / "ds_configs/zero2_offload.json").read_text()))
    held = states(1_000_000, offload, 2, 8)
    assert held.optimizer == 0
    assert held.host == pytest.approx(1e6 * 16 / 8)


@pytest.mark.parametrize("device", ["a100", "h200"])
def test_what_cannot_fit_is_refused_with_a_change_that_fits(device: str) -> None:
    machine = Machine.of(ClusterConfig(device=device))
    plan = work(sized("base", 4, 2), micro_batch=1400)
    with pytest.raises(
        ConfigError, match=r"batch\.micro_size is 1400: a rank needs .* GB .* lower batch\.micro_size"
    ) as e:
        require_fit(plan, machine)
    smaller = int(str(e.value).partition("batch.micro_size to ")[2].split()[0])
    assert memory(dataclasses.replace(plan, micro_batch=smaller), machine).fits
    assert not memory(dataclasses.replace(plan, micro_batch=smaller + 16), machine).fits


def test_checkpointing_is_offered_where_it_helps() -> None:
    plan, machine = work(sized("base", 4, 2), micro_batch=500), Machine.of(ClusterConfig(device="a100"))
    with pytest.raises(ConfigError, match=r"or set model\.vision\.checkpoint_every=1"):
        require_fit(plan, machine)
