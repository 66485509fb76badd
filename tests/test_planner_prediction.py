"""What the planner predicts, from data sheets or from measured steps, and which of these it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from smaug_ds.config import ConfigError
from smaug_ds.planner.calibration import Measured, rows, speed
from smaug_ds.planner.cluster import ASSUMED_EFFICIENCY, ClusterConfig, Machine
from smaug_ds.planner.flops import step_flops
from smaug_ds.planner.media import MediaConfig, supplies
from smaug_ds.planner.prediction import predict, scaling
from tests.models import VOCABULARY
from tests.plans import BF16, FP32, sized, work
from tools.planning.corpus import paper_recipe


def test_recipes_of_the_paper_have_their_size() -> None:
    assert paper_recipe("5M", MediaConfig()).draws == {"image": 2_950_000, "video": 2_500_000}
    assert sum(paper_recipe("17M", MediaConfig()).draws.values()) == 18_420_000


def test_nvdec_is_named_when_it_is_slowest() -> None:
    plan, machine = work(sized("base", 4, 2)), Machine.of(ClusterConfig(storage_gb_s=1000))
    fast = speed([], machine, "base", 4, plan.parameters, BF16)
    step = predict(plan, machine, fast)
    assert step.bottleneck == "NVDEC"
    engines = 8 * 7 * plan.media.nvdec_pictures_s / plan.media.pictures(4)
    assert step.samples_per_second == pytest.approx(engines / 0.5)  # every second sample is a clip
    assert step.unhindered > step.samples_per_second
    plain = next(supply for supply in supplies(plan.mix, 4, plan.media, machine) if supply.name == "NVDEC")
    assert "data.decoder=pyav" in plain.needs  # 96 cores decode more than that


def test_without_a_profile_the_share_of_the_peak_is_told_as_assumed() -> None:
    machine = Machine.of(ClusterConfig())
    fast = speed([], machine, "base", 1, 1, BF16)
    assert fast.flops == pytest.approx(989e12 * ASSUMED_EFFICIENCY)
    assert any("assumed" in text for text in machine.assumptions)
    told = Machine.of(ClusterConfig(efficiency=0.45, peak_tflops=700))
    assert speed([], told, "base", 1, 1, BF16).flops == pytest.approx(700e12 * 0.45)
    with pytest.raises(ConfigError, match=r"cluster\.device is cpu.*--profile"):
        Machine.of(ClusterConfig(device="cpu"))


def measured_row(world_size: int = 1, **changes: Any) -> dict[str, Any]:
    row = {"what": "train", "size": "tiny", "frames": 1, "frames_kept": 1, "batch": 16, "dtype": "fp32"}
    row |= {"device": "cpu", "world_size": world_size, "caption_tokens_mean": 12.0}
    row |= {"seconds_per_step": {"median": 0.25, "low": 0.2, "high": 0.3}, "samples_per_second": 64.0}
    row |= {"flops_per_step": 1e10, "matrix_peak_flops": 1e11, "mfu": 0.4, "peak_memory_bytes": 1e9}
    return row | {"phases": {"data": 0.01, "forward": 0.08, "backward": 0.12, "step": 0.04}} | changes


def test_a_measured_step_is_predicted_as_it_was_measured() -> None:
    model = sized("tiny", text__vocab_size=VOCABULARY)
    plan = work(model, FP32, micro_batch=16, mix={"image": 1.0})
    _, step = next(plan.steps(1))
    flops = sum(part.total for part in step_flops(model, plan.loss, step).values())
    profile = {"conditions": {}, "measured": [measured_row(flops_per_step=flops), measured_row(world_size=2)]}
    found = rows(profile, "FILE")
    cluster = ClusterConfig(device="cpu", devices=1, cores=2)
    machine = Machine.of(cluster, calibrated=True)
    fast = speed(found, machine, "tiny", 1, plan.parameters, FP32)
    assert fast.flops == pytest.approx(flops / 0.2)
    assert predict(plan, machine, fast).seconds == pytest.approx(0.24, rel=0.001)  # without its wait for data


def test_a_model_that_waits_is_held_up_by_its_data() -> None:
    """However short the wait is beside the arithmetic: with less arithmetic the step would take as long."""
    plan, machine = work(sized("base"), mix={"image": 1.0}), Machine.of(ClusterConfig(storage_gb_s=1000))
    fast = speed([], machine, "base", 1, plan.parameters, BF16)
    alone = predict(plan, machine, fast)
    assert alone.bottleneck == "arithmetic" and "waiting for data" not in alone.parts
    short = alone.seconds * 1.05
    slow = Machine.of(ClusterConfig(storage_gb_s=8 * plan.micro_batch * plan.media.image_mb / 1e3 / short))
    held_up = predict(plan, slow, fast)
    assert held_up.seconds == pytest.approx(short)
    assert held_up.parts["waiting for data"] < held_up.parts["arithmetic"]
    assert held_up.bottleneck == "storage"

    shared = Machine.of(ClusterConfig(device="cpu", devices=4, cores=2, link_gb_s=1.0), calibrated=True)
    slowest = predict(work(sized("tiny"), FP32, micro_batch=16), shared, fast)
    assert slowest.bottleneck.startswith("cores, which model and data path share")
    assert slowest.data_rate is None  # none of its own
    thin = dataclasses.replace(shared.cluster, link_gb_s=0.001)
    exchanging = predict(work(sized("tiny"), FP32, micro_batch=16), Machine.of(thin, calibrated=True), fast)
    assert "waiting for data" in exchanging.parts
    assert exchanging.bottleneck == "exchange of gradients"  # whatever the cores do meanwhile


def test_ranks_share_the_cores_of_a_host() -> None:
    """Four ranks on two cores take twice as long as two, and what the data path takes of the cores comes on top."""
    plan = work(sized("tiny"), FP32, micro_batch=16, mix={"image": 1.0})
    fast = speed([Measured("train", "tiny", 1, 1, 16, "fp32", "cpu", 1, 0.2, 1e10)], FAKE, "tiny", 1, 1, FP32)

    def step(ranks: int, **media: float) -> float:
        cluster = ClusterConfig(device="cpu", devices=ranks, cores=2, link_gb_s=1e6, latency_us=0.001)
        changed = dataclasses.replace(plan, media=dataclasses.replace(plan.media, **media))
        return predict(changed, Machine.of(cluster, calibrated=True), fast).seconds

    # but for AdamW, whose work the ranks divide
    assert step(4, image_cpu_ms=0.001) / step(2, image_cpu_ms=0.001) == pytest.approx(2, rel=0.05)
    assert step(4, image_cpu_ms=5) - step(4, image_cpu_ms=0.001) == pytest.approx(4 * 16 * 5e-3 / 2, rel=0.02)
    assert step(1, image_cpu_ms=5) == pytest.approx(step(1, image_cpu_ms=0.001))  # there is a core to spare


FAKE = Machine.of(ClusterConfig(device="cpu"), calibrated=True)


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ([], 'FILE: has no list "measured"'),
        ({"measured": []}, "is empty"),
        ({"measured": [measured_row(), {"what": "train"}]}, "row 1"),
        ({"measured": [measured_row(seconds_per_step=None)]}, "row 0"),
    ],
)
def test_what_is_no_profile_is_refused(profile: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        rows(profile, "FILE")


def test_a_profile_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"measured size tiny.*model\.size base"):
        speed(rows({"measured": [measured_row()]}, "FILE"), FAKE, "base", 1, 1, FP32)


@pytest.mark.parametrize("measured", ["cpu", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-80GB"])
def test_a_profile_of_another_device_is_refused(measured: str) -> None:
    machine = Machine.of(ClusterConfig(device="h200"))
    found = rows({"measured": [measured_row(device=measured)]}, "FILE")
    with pytest.raises(ConfigError, match=rf"measured {measured}, the plan has cluster\.device h200"):
        speed(found, machine, "tiny", 1, 1, BF16)
    found += rows({"measured": [measured_row(device="NVIDIA H200", flops_per_step=3e10)]}, "FILE")
    assert speed(found, machine, "tiny", 1, 1, BF16).flops == pytest.approx(3e10 / 0.2)


def test_a_profile_of_the_same_width_goes_first() -> None:
    wide, narrow = measured_row(), measured_row(dtype="deepspeed", frames=4, world_size=2, flops_per_step=3e10)
    found = rows({"measured": [wide, narrow]}, "FILE")
    for precision, row in ((FP32, wide), (BF16, narrow)):
        assert speed(found, FAKE, "tiny", 1, 1, precision).flops == pytest.approx(row["flops_per_step"] / 0.2)
    assert "not measured" not in speed(found, FAKE, "tiny", 1, 1, BF16).source
    told = speed(found[:1], FAKE, "tiny", 1, 1, BF16).source
    assert "fp32" in told and "computes in 16 bit, which was not measured" in told


def test_scaling_goes_from_one_rank_to_1024() -> None:
    plan = work()
    machine = Machine.of(ClusterConfig())
    found = scaling(plan, ClusterConfig(), speed([], machine, "base", 1, plan.parameters, BF16), False)
    assert [row.weak.ranks for row in found] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    efficiency = [row.weak.unhindered / row.weak.ranks for row in found]
    assert efficiency == sorted(efficiency, reverse=True)
    assert all(row.strong is not None and row.strong.ranks * row.strong.micro_batch <= 1024 for row in found)
    parts = {row.weak.ranks: row.memory.parts for row in found}
    assert parts[1024]["optimizer"] == pytest.approx(parts[1]["optimizer"] / 1024)
