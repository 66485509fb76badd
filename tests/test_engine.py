"""The DeepSpeed engine: one owner per setting, and ZeRO at two ranks against plain AdamW in one process."""

from __future__ import annotations

import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from smaug_ds import distributed
from smaug_ds.config import ConfigError, to_dict
from smaug_ds.engine.deepspeed import (
    OPTIMIZER_OWNED_BY_RUN_CONFIG,
    OWNED_BY_RUN_CONFIG,
    ZeroStageEnum,
    build_engine,
    load_json,
    resolve,
    zero_stage,
)
from smaug_ds.engine.optim import OptimConfig, Schedule, parameter_groups
from smaug_ds.engine.resume import flat
from smaug_ds.engine.train import PretrainConfig
from tests.ranks import run_ranks
from tests.standin import CPU_JSON, ROOT, Batches, Standin, batch_of, order_of, write_json

STEPS, GLOBAL = 6, 8
CONFIG = OptimConfig(lr=0.02, min_lr=1e-3, weight_decay=0.5, gradient_clip=0.3, warmup_steps=2)
SCHEDULE = Schedule.of(CONFIG, steps_per_epoch=1, max_steps=STEPS)


def plain_adamw() -> tuple[dict[str, torch.Tensor], list[float], list[float], list[float]]:
    """The obvious loop over the global batch: weights, and per step loss, gradient norm before clipping and rate."""
    module, order = Standin(), order_of(GLOBAL)
    groups = parameter_groups(module, CONFIG.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.lr, betas=CONFIG.betas, eps=CONFIG.eps)
    scheduler = LambdaLR(optimizer, SCHEDULE)
    losses, norms, rates = [], [], []
    for step in range(STEPS):
        loss = module(batch_of(step, order.medium(step), range(GLOBAL)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        for parameter in module.parameters():  # ZeRO counts an unused parameter's gradient as 0
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), CONFIG.gradient_clip)))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return module.state_dict(), losses, norms, rates


def engine_run(path: str, micro_size: int) -> dict[str, Any]:
    """The same steps by the engine on this rank."""
    order = order_of(GLOBAL)
    accumulation = GLOBAL // (micro_size * distributed.world_size())
    engine = build_engine(Standin(), path, CONFIG, SCHEDULE, micro_size, accumulation)
    batches = iter(Batches(order, micro_size, accumulation))
    losses, norms, rates = [], [], []
    for _ in range(STEPS):
        rates.append(engine.get_lr()[0])
        total = torch.zeros(())
        for _ in range(accumulation):
            loss = engine(next(batches))["loss"]
            engine.backward(loss)
            engine.step()
            total += distributed.all_reduce_sum(loss) / accumulation / distributed.world_size()
        losses.append(float(total))
        norms.append(float(engine.get_global_grad_norm()))
    return {
        "weights": {name: value.numpy() for name, value in engine.module.state_dict().items()},
        "losses": losses,
        "norms": norms,
        "rates": rates,
        "config": engine.config,
        "stage": zero_stage(engine),
    }


def engine_runs(path: str) -> list[dict[str, Any]]:
    """One micro step per step and two: in one go, since starting ranks is what takes the time."""
    return [engine_run(path, GLOBAL // distributed.world_size() // accumulation) for accumulation in (1, 2)]


@pytest.fixture(scope="module")
def two_ranks() -> list[list[dict[str, Any]]]:
    return run_ranks(engine_runs, 2, str(CPU_JSON))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_zero_2_at_two_ranks_equals_plain_adamw(
    two_ranks: list[list[dict[str, Any]]], accumulation: int, rank: int
) -> None:
    result = two_ranks[rank][accumulation - 1]
    weights, losses, norms, rates = plain_adamw()
    assert result["rates"] == pytest.approx(rates)
    assert result["losses"] == pytest.approx(losses, abs=2e-6)
    assert result["norms"] == pytest.approx(norms, abs=2e-6)
    assert max(norms) > CONFIG.gradient_clip > 0, "clipping has to matter here"
    for name, value in weights.items():
        torch.testing.assert_close(torch.from_numpy(result["weights"][name]), value, atol=2e-6, rtol=1e-5)


def test_the_engine_is_told_what_the_run_config_owns(two_ranks: list[list[dict[str, Any]]]) -> None:
    result = two_ranks[0][1]
    assert result["stage"] == 2
    assert result["config"]["train_micro_batch_size_per_gpu"] == 2
    assert result["config"]["gradient_accumulation_steps"] == 2
    assert result["config"]["gradient_clipping"] == 0.3
    parameters = result["config"]["optimizer"]["params"]
    assert parameters == {
        "torch_adam": True, "fused": True, "lr": 0.02, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_json_we_ship_is_accepted(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = resolve(load_json(path), CONFIG, micro_size=2, accumulation=3)
    resolved = DeepSpeedConfig(config)
    assert resolved.gradient_accumulation_steps == 3
    zero = resolved.zero_config
    assert not zero.overlap_comm and not zero.round_robin_gradients
    assert int(zero.stage) == (1 if path.stem == "zero1" else 2)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train_batch_size": 8}, ["train_batch_size", "set batch.global_size"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["set batch.micro_size"]),
        ({"gradient_accumulation_steps": 2}, ["set batch.global_size and batch.micro_size"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "set optim.gradient_clip"]),
        ({"scheduler": {}}, ["scheduler", "set optim.warmup_epochs"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, ["optimizer.params.lr", "set optim.lr"]),
        ({"zero_optimisation": {}}, ["unknown key zero_optimisation", "did you mean zero_optimization?"]),
        ({"colour": 1}, ["unknown key colour", "known keys: aio"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage is 3", "1 or 2"]),
        ({"zero_optimization": {}}, ["zero_optimization.stage is 0"]),
        (
            {"zero_optimization": {"stage": "2"}},
            ['zero_optimization.stage: expected a whole number, found a text: "2"'],
        ),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage: expected a whole number", "true or false"]),
        ({"zero_optimization": True}, ["zero_optimization: expected an object, found true or false: true"]),
        ({"bf16": True}, ["bf16: expected an object"]),
        ({"fp16": None}, ["fp16: expected an object, found null"]),
        ({"communication_data_type": 16}, ["communication_data_type: expected a text, found a whole number: 16"]),
        ({"steps_per_print": "10"}, ["steps_per_print: expected a whole number"]),
        ({"optimizer": []}, ["optimizer: expected an object, found a list: []"]),
        ({"optimizer": {"params": [1]}}, ["optimizer.params: expected an object"]),
        ({"optimizer": {"type": "Lamb"}}, ['optimizer.type is "Lamb": it must be AdamW']),
        ({"optimizer": {"type": 3}}, ["optimizer.type is 3"]),
        ({"optimizer": {"name": "AdamW"}}, ["unknown key optimizer.name; known here: type, params"]),
        ({"optimizer": {"params": {"amsgrad": True}}}, ["unknown key optimizer.params.amsgrad", "bias_correction"]),
        ({"optimizer": {"params": {"fused": True}}}, ["unknown key optimizer.params.fused; known without torch_adam"]),
        ({"optimizer": {"params": {"torch_adam": 1}}}, ["optimizer.params.torch_adam: expected true or false"]),
    ],
)
def test_a_bad_json_is_told_in_one_line(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    path = write_json(tmp_path / "ds.json", **changes)
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    for part in ["run.deepspeed", str(path), *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"bf16": {}, "bf16": {}}'])
def test_what_is_no_json_object_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.deepspeed=.*ds\.json: (not valid|expected)") as caught:
        load_json(tmp_path / "ds.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        load_json(tmp_path / "nowhere.json")


def refusals(paths: list[str]) -> list[str]:
    messages = []
    for path in paths:
        with pytest.raises(ConfigError) as caught:
            build_engine(Standin(), path, CONFIG, SCHEDULE, 1, 1)
        messages.append(str(caught.value))
    return messages


def test_the_zero_stage_of_a_checkpoint_is_pickled_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the version of Python: what some write instead, a safe load refuses."""
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda stage, _: (getattr, (type(stage), stage.name)))
    content = pickle.dumps(ZeroStageEnum.gradients, protocol=2)
    called = [name for code, name, _ in pickletools.genops(content) if code.name == "GLOBAL"]
    assert called == ["deepspeed.runtime.zero.config ZeroStageEnum"]
    assert pickle.loads(content) is ZeroStageEnum.gradients


def test_who_owns_a_key_is_a_setting_that_exists() -> None:
    keys = flat(to_dict(PretrainConfig()))
    for owners in [*OWNED_BY_RUN_CONFIG.values(), *OPTIMIZER_OWNED_BY_RUN_CONFIG.values()]:
        for owner in re.split(", | and ", owners):
            assert owner in keys


def test_what_deepspeed_refuses_is_told_in_one_line(tmp_path: Path) -> None:
    unknown = write_json(tmp_path / "unknown.json", zero_optimization={"stage": 2, "overlap_com": False})
    both = write_json(tmp_path / "both.json", bf16={"enabled": True}, fp16={"enabled": True})
    kind = write_json(tmp_path / "kind.json", communication_data_type="fp17")
    (messages,) = run_ranks(refusals, 1, [str(unknown), str(both), str(kind)])
    told = ("overlap_com", "fp16", "communication_data_type")
    for path, message, part in zip((unknown, both, kind), messages, told, strict=True):
        assert message.startswith(f"run.deepspeed={path}: ") and part in message and "\n" not in message
