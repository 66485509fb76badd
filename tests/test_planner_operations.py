"""The planner's parameters and operations against the model as it is built and counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.planner.flops import Captions, Step, step_flops
from smaug_ds.planner.parameters import parameters
from tests.models import random_batch, small_config, small_model
from tests.plans import sized
from tools.profiling.model import ProfileConfig, count_flops

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


@pytest.mark.parametrize("size", ["base", "tiny"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"frames": 4, "frames_kept": 4},
        {"frames": 8, "frames_kept": 2, "vision__sparsify_layers": (2,), "vision__depth": 7},
        {"answer_layers": 2, "projection": 48, "decoder__depth": 1, "selector__mlp_width": 768},
        {"vision__layout": "beit"},
        {"vision__layout": "beit", "vision__pooling": "mean", "vision__depth": 11},
    ],
)
def test_parameters_equal_the_built_model(size: str, changes: dict[str, Any]) -> None:
    config = sized(size, **changes)
    with torch.device("meta"):
        model = SmaugModel(config)
    assert sum(parameters(config).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision__mask_ratio": 0.25, "vision__keep_rate": 0.6},
        {"vision__mask_ratio": 0.65, "vision__sparsify_layers": (2, 3)},
        {"vision__keep_rate": 1.0, "decoder__predicted_share": 0.5},
        {"frames": 4, "frames_kept": 2},
        {"frames": 4, "frames_kept": 1, "vision__mask_ratio": 0.1},
        {"frames": 8, "frames_kept": 4, "decoder__predicted_share": 0.25},
        {"frames": 4, "frames_kept": 4, "text__max_length": 20},
    ],
)
@pytest.mark.parametrize("size", ["base", "tiny"])
def test_forward_operations_equal_torchs_counter(size: str, changes: dict[str, Any]) -> None:
    config = sized(size, **changes)
    length, loss = config.text.max_length, LossConfig()
    counted = count_flops(ProfileConfig(config))
    step = Step(config.frames, 1, 1, Captions.full(length), round(loss.mlm_probability * length))
    planned = step_flops(config, loss, step)
    planned.pop("contrast")
    assert set(planned) == set(counted)
    for name, flops in planned.items():
        assert flops.forward == pytest.approx(counted[name], rel=0.01), name


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("frames", [(1, 1), (4, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize("lengths", [[12] * 8, [5, 12, 6, 7, 5, 12, 8, 9]])
def test_a_whole_step_equals_torchs_counter(every: int, frames: tuple[int, int], lengths: list[int]) -> None:
    """Forward and backward, recomputation included, over real losses."""
    config = small_config(*frames, checkpoint_every=every)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, checkpoint_every=every))
    module = Pretraining(small_model(config), LossConfig()).train()
    batch = random_batch(config, len(lengths), lengths=lengths)
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with counter:
        loss = module(batch)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    captions = Captions(sum(lengths) / len(lengths), max(lengths))
    step = Step(frames[0], len(lengths), 1, captions, len(batch.mlm_positions) / len(lengths))
    planned = step_flops(config, LossConfig(), step).values()
    # negatives have captions of other lengths
    assert sum(part.forward for part in planned) == pytest.approx(forward, rel=0.01 if len(set(lengths)) == 1 else 0.05)
    total = counter.get_total_flops()
    assert sum(part.total for part in planned) == pytest.approx(total, rel=0.01 if len(set(lengths)) == 1 else 0.05)


def test_losses_left_out_cost_nothing() -> None:
    step = Step(1, 8, 1, Captions.full(12), 2)
    names = set(step_flops(sized("base"), LossConfig(vtm=0, mlm=0, mvm=0), step))
    assert names == {"vision encoder", "text encoder", "projections and match head", "contrast"}


def test_shared_keys_save_what_they_should() -> None:
    """One frame: three of four projections. Of 4 frames all are projected once instead of 2 in each of 4 passes."""
    tokens, step = sized("base").vision.token_counts()[-1], Step(1, 2, 1, Captions.full(12), 2)
    projection = 3 * 2 * (2 * tokens * 768 * 2 * 768)  # three layers, of a forward pass, two samples

    def saved(model: ModelConfig, step: Step) -> float:
        each, once = (step_flops(model, LossConfig(), step, keys)["multi-modal encoder"] for keys in KEYS)
        return each.forward - once.forward

    assert saved(sized("base"), step) == pytest.approx(3 * projection)
    assert saved(sized("base", 4, 2), dataclasses.replace(step, frames=4)) == pytest.approx((8 - 4) * projection)
    # on several ranks the clips of drawn negatives come from others, of which only chosen frames are projected
    many = dataclasses.replace(step, world_size=4)
    assert saved(sized("base"), many) == pytest.approx((4 - 1.75) * projection)
    assert saved(sized("base", 4, 2), dataclasses.replace(many, frames=4)) == pytest.approx((8 - 5.5) * projection)
    # where fewer frames are looked at than there are, it is they alone
    assert saved(sized("base", 8, 1), dataclasses.replace(step, frames=8)) == pytest.approx(0)


KEYS: list[Any] = ["per pass", "shared"]
