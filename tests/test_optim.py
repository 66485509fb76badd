"""Learning rate schedule and parameter groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from smaug_ds.config import ConfigError
from smaug_ds.engine.optim import OptimConfig, Schedule, parameter_groups
from tests.models import small_config, small_model

CONFIG = OptimConfig(lr=1e-3, min_lr=1e-5, epochs=2.5, warmup_epochs=0.5)


def test_the_rate_grows_from_the_first_step_and_ends_at_min_lr() -> None:
    schedule = Schedule.of(CONFIG, steps_per_epoch=8)
    assert (schedule.total_steps, schedule.warmup_steps) == (20, 4)
    rates = [CONFIG.lr * schedule(step) for step in range(20)]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4] == pytest.approx(1e-3)  # the cosine begins at its top
    assert rates[19] == pytest.approx(1e-5)
    for step in range(4, 20):
        expected = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * (step - 4) / 15)) / 2
        assert rates[step] == pytest.approx(expected)
    assert schedule(1000) == schedule(19)


def test_steps_overrule_epochs() -> None:
    schedule = Schedule.of(OptimConfig(warmup_steps=3, warmup_epochs=100), steps_per_epoch=8, max_steps=7)
    assert (schedule.total_steps, schedule.warmup_steps) == (7, 3)
    assert Schedule.of(OptimConfig(warmup_epochs=0), steps_per_epoch=4, max_steps=5)(0) == 1


def test_the_rate_goes_on_after_resume() -> None:
    schedule = Schedule.of(CONFIG, steps_per_epoch=8)

    def fresh() -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=CONFIG.lr)
        return optimizer, LambdaLR(optimizer, schedule)

    def run(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    whole = run(*fresh(), 20)
    optimizer, scheduler = fresh()
    first = run(optimizer, scheduler, 9)
    again, resumed = fresh()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert first + run(again, resumed, 11) == whole


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"lr": 0.0}, "optim.lr is 0.0"),
        ({"min_lr": 1.0}, "optim.min_lr is 1.0"),
        ({"betas": (0.9, 1.0)}, "optim.betas is"),
        ({"weight_decay": -1.0}, "optim.weight_decay is -1.0"),
        ({"warmup_steps": -1}, "optim.warmup_steps is -1"),
        ({"gradient_clip": -1.0}, "optim.gradient_clip is -1.0"),
        ({"eps": 0.0}, "optim.eps is 0.0"),
        ({"epochs": 0.0}, "optim.epochs is 0.0"),
    ],
)
def test_a_bad_setting_is_named(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        OptimConfig(**arguments)


def test_a_warm_up_longer_than_the_run_names_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs makes 8 warm-up steps, but the run has only 5"):
        Schedule.of(OptimConfig(), steps_per_epoch=8, max_steps=5)
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps makes 5 warm-up steps, but the run has only 5"):
        Schedule.of(OptimConfig(warmup_steps=5), steps_per_epoch=8, max_steps=5)


def test_only_matrices_decay() -> None:
    model = small_model(small_config(frames=4, frames_kept=2))
    model.match_head.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = parameter_groups(model, 0.02)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.02, 0.0)
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    kept_names = {names[id(parameter)] for parameter in kept["params"]}
    assert not decayed_names & kept_names
    assert decayed_names | kept_names == set(names.values()) - {"match_head.weight"}
    for name in ("vision.patch_embedding.weight", "vision_projection.weight", "fusion.layers.0.mlp.fc1.weight"):
        assert name in decayed_names
    expected = {name for name in names.values() if name.endswith(".bias") or "norm" in name or "embedding.word" in name}
    expected |= {"vision.class_token", "vision.position_embedding", "temporal.position_embedding", "logit_scale"}
    expected |= {"pixel_decoder.mask_token", "pixel_decoder.position_embedding", "text.embedding.position.weight"}
    assert expected <= kept_names
    assert all(name.endswith(".weight") for name in decayed_names)
