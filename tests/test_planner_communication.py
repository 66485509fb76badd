"""The planner's exchanged bytes and checkpoints against a real engine's, and the time that links take."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.planner.cluster import DEVICES, ClusterConfig, Machine
from smaug_ds.planner.communication import exchanges, seconds
from smaug_ds.planner.flops import Captions, Step
from smaug_ds.planner.memory import checkpoint_bytes
from smaug_ds.planner.parameters import parameters
from tests.models import random_batch, small_config, small_model
from tests.plans import BF16, FP32, ROOT, sized
from tests.ranks import run_ranks


def engine_step(path: str) -> tuple[float, int, int]:
    """On a rank: bytes that leave it in an optimizer step of two micro steps, in how many collectives, and the bytes of
    its checkpoint on disk."""
    import torch.distributed as dist

    from smaug_ds.engine import checkpoint
    from smaug_ds.engine.deepspeed import build_engine
    from smaug_ds.engine.optim import OptimConfig

    sent: list[float] = []  # by each collective
    world = dist.get_world_size()
    others = (world - 1) / world

    def count(name: str, share: float, argument: str) -> None:
        real = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = inspect.signature(real).bind(*args, **kwargs).arguments[argument]
            sent.append(share * tensor.numel() * tensor.element_size())
            return real(*args, **kwargs)

        setattr(dist, name, counted)

    # before the engine is made, which remembers the functions that it is going to call
    for name, share, argument in (
        ("all_reduce", 2 * others, "tensor"),
        ("all_gather", world - 1, "tensor"),
        ("all_gather_into_tensor", world - 1, "input_tensor"),
        ("all_to_all_single", others, "input"),
    ):
        count(name, share, argument)
    config = small_config()
    model = small_model(config)
    engine = build_engine(
        Pretraining(model, LossConfig()), str(ROOT / "ds_configs/cpu.json"), OptimConfig(), lambda step: 1.0, 4, 2
    )
    sent.clear()
    for turn in range(2):
        batch = random_batch(config, 4, seed=2 * dist.get_rank() + turn, lengths=[12] * 4)
        engine.backward(engine(batch)["loss"])
        engine.step()
    leaving, calls = sum(sent), len(sent)
    final = checkpoint.save(engine, Path(path), 1, {}, {}, model, {}, 1)
    size = sum(file.stat().st_size for file in final.rglob("*") if file.suffix in (".pt", ".safetensors"))
    return leaving, calls, size


@pytest.mark.slow
def test_exchanged_bytes_and_checkpoint_are_those_of_a_real_engine(tmp_path: Path) -> None:
    config = small_config()
    count = sum(parameters(config).values())
    for leaving, calls, size in run_ranks(engine_step, 2, str(tmp_path)):
        step = Step(1, 4, 2, Captions.full(12), 4)
        found = exchanges(config, LossConfig(), step, FP32, count, accumulation=2)
        assert sum(exchange.sent for exchange in found) == pytest.approx(leaving, rel=0.1)
        # what only the loop asks: whether the data came, twice, that all is finite, and that nobody was told to stop
        assert sum(exchange.calls for exchange in found) == calls + 4
        # of a model this small names and headers are a good part
        assert checkpoint_bytes(count, FP32) == pytest.approx(size, rel=0.25)


def test_gradients_travel_as_the_stage_says() -> None:
    step, count = Step(1, 128, 8, Captions.full(12), 2), 1_000_000

    def sent(stage: int, accumulation: int, **changes: Any) -> dict[str, float]:
        precision = dataclasses.replace(BF16, stage=stage, **changes)
        found = exchanges(sized("base"), LossConfig(), step, precision, count, accumulation)
        return {exchange.name: exchange.sent for exchange in found}

    assert sent(2, 1)["gradients"] == pytest.approx(2 * 7 / 8 * 4e6)
    assert sent(2, 4)["gradients"] == pytest.approx(4 * 2 * 7 / 8 * 4e6)
    assert sent(1, 4)["gradients"] == pytest.approx(2 * 7 / 8 * 4e6)
    assert sent(2, 1, whole_reduction=False)["gradients"] == pytest.approx(7 / 8 * 4e6)
    assert sent(2, 4)["weights"] == pytest.approx(7 / 8 * 2e6)
    assert "weights" not in sent(0, 1)
    alone = dataclasses.replace(step, world_size=1)
    assert exchanges(sized("base"), LossConfig(), alone, BF16, count, 1) == []


def test_a_ring_across_nodes_goes_by_its_slowest_link() -> None:
    step, count = Step(1, 128, 16, Captions.full(12), 2), 213_000_000
    (gradients, *_) = exchanges(sized("base"), LossConfig(), step, BF16, count, 1)
    fast, slow = (
        seconds(gradients, Machine.of(ClusterConfig(nodes=2, network_gb_s=network, latency_us=0.001)))
        for network in (1000.0, 10.0)
    )
    assert slow / fast == pytest.approx(DEVICES["h200"].link_gb_s / 10, rel=0.01)
