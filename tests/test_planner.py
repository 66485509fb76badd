"""The planner's arithmetic against the model as it is built, counted and run; its predictions and refusals."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from smaug_ds.config import ConfigError
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.model import recompute
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.planner.calibration import Measured, rows, speed
from smaug_ds.planner.cluster import ASSUMED_EFFICIENCY, DEVICES, ClusterConfig, Machine
from smaug_ds.planner.communication import exchanges, seconds
from smaug_ds.planner.flops import Captions, Step, step_flops
from smaug_ds.planner.media import MediaConfig, supplies
from smaug_ds.planner.memory import Precision, activations, checkpoint_bytes, states
from smaug_ds.planner.parameters import parameters
from smaug_ds.planner.prediction import Work, memory, predict, require_fit, scaling
from tests.models import VOCABULARY, random_batch, small_config, small_model
from tests.ranks import run_ranks
from tools.plan_run import main
from tools.planning.corpus import paper_recipe
from tools.profiling.model import ProfileConfig, count_flops

ROOT = Path(__file__).resolve().parent.parent
BF16 = Precision.of(json.loads((ROOT / "ds_configs/zero2_bf16.json").read_text()))
FP32 = Precision.of(json.loads((ROOT / "ds_configs/cpu.json").read_text()))
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


def sized(size: str, frames: int = 1, frames_kept: int = 1, **changes: Any) -> ModelConfig:
    """A preset with BERT's vocabulary; ``vision__mask_ratio=0.1`` changes a setting of a part."""
    config = dataclasses.replace(ModelConfig.of_size(size), frames=frames, frames_kept=frames_kept)
    for key, value in {"text__vocab_size": 30522, **changes}.items():
        part, _, name = key.rpartition("__")
        if part:
            value, name = dataclasses.replace(getattr(config, part), **{name: value}), part
        config = dataclasses.replace(config, **{name: value})
    return config


def work(model: ModelConfig | None = None, precision: Precision = BF16, **changes: Any) -> Work:
    mix = {"image": 0.5, "video": 0.5}
    plan = Work(model or sized("base"), LossConfig(), MediaConfig(), precision, mix, 1024, 128)  # type: ignore[arg-type]
    return dataclasses.replace(plan, **changes)


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

    modes: list[Any] = []  # whose caches hold what "cheap" keeps

    def contexts(*arguments: Any) -> Any:
        modes.append(create_selective_checkpoint_contexts(*arguments))
        return modes[-1]

    monkeypatch.setattr(recompute, "create_selective_checkpoint_contexts", contexts)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(batch)
    for caching, _ in modes:
        for result in tree_leaves([entry for entries in caching.storage.values() for entry in entries]):
            tensor = getattr(result, "val", result)
            if isinstance(tensor, Tensor):
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


def engine_step(path: str) -> tuple[float, int]:
    """On a rank: bytes that leave it in an optimizer step of two micro steps, and those of its checkpoint on disk."""
    import torch.distributed as dist

    from smaug_ds.engine import checkpoint
    from smaug_ds.engine.deepspeed import build_engine
    from smaug_ds.engine.optim import OptimConfig

    sent = [0.0]
    world = dist.get_world_size()
    others = (world - 1) / world

    def count(name: str, share: float, argument: str) -> None:
        real = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = inspect.signature(real).bind(*args, **kwargs).arguments[argument]
            sent[0] += share * tensor.numel() * tensor.element_size()
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
    sent[0] = 0.0
    for turn in range(2):
        batch = random_batch(config, 4, seed=2 * dist.get_rank() + turn, lengths=[12] * 4)
        engine.backward(engine(batch)["loss"])
        engine.step()
    leaving = sent[0]
    final = checkpoint.save(engine, Path(path), 1, {}, {}, model, {}, 1)
    size = sum(file.stat().st_size for file in final.rglob("*") if file.suffix in (".pt", ".safetensors"))
    return leaving, size


@pytest.mark.slow
def test_exchanged_bytes_and_checkpoint_are_those_of_a_real_engine(tmp_path: Path) -> None:
    config = small_config()
    count = sum(parameters(config).values())
    for leaving, size in run_ranks(engine_step, 2, str(tmp_path)):
        step = Step(1, 4, 2, Captions.full(12), 4)
        found = exchanges(config, LossConfig(), step, FP32, count, accumulation=2)
        assert sum(exchange.sent for exchange in found) == pytest.approx(leaving, rel=0.1)
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


def plan_run(*arguments: str) -> int:
    return main(["--config", str(ROOT / "jobs/experiments/pretrain_stage1.yaml"), *arguments])


def test_a_plan_is_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, script = tmp_path / "plan.json", tmp_path / "start.sh"
    arguments = ["--json", str(file), "--write", str(script), "cluster.nodes=2", "cluster.devices=4"]
    assert plan_run(*arguments, "run.folder=/runs/a b", "data.flip=0.0") == 0
    out = capsys.readouterr().out
    for expected in ("213,147,454", "ZeRO-3", "bottleneck: ", "17M", "assumed, not measured", "exchange of gradients"):
        assert expected in out
    assert f"WARNING: {script} cannot start yet: set data.tokenizer, and data.train or data.corpus" in out
    told = json.loads(file.read_text())
    assert told["parameters"]["vision encoder"] == 85_799_424
    assert len(told["scaling"]) == 11
    # what the script starts, told by a stand-in for sbatch
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$RUN" "$@"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{stand_in.parent}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", str(script), "--partition=P"], capture_output=True, text=True, env=environment, check=True
    )
    folder, nodes, gpus, time, *rest = done.stdout.splitlines()
    assert (folder, nodes, gpus) == ("/runs/a b", "--nodes=2", "--gpus-per-node=4")
    needed = told["runs"][0]["seconds"]
    hours, minutes, _ = map(int, time.removeprefix("--time=").split(":"))
    assert needed < (hours * 60 + minutes) * 60 < 2 * needed + 3600
    config = str(ROOT / "jobs/experiments/pretrain_stage1.yaml")
    assert rest == ["--partition=P", "jobs/pretrain.sbatch", "--config", config, "data.flip=0.0"]


@pytest.mark.parametrize(("nodes", "expected"), [(1, "jobs/launch_local.sh"), (4, "jobs/launch_multinode.sh")])
def test_scripts_for_hosts_are_whole(nodes: int, expected: str, tmp_path: Path) -> None:
    script = tmp_path / "start.sh"
    arguments = ["--launcher", "hosts", "--write", str(script), f"cluster.nodes={nodes}", "batch.global_size=4096"]
    assert plan_run(*arguments) == 0
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert expected in script.read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["batch.micro_size=8192", "batch.global_size=65536"], "error: batch.micro_size is 8192: a rank needs"),
        (["cluster.devices=3"], "error: batch.global_size is 1024"),
        (["cluster.device=h300"], "error: cluster.device is h300"),
        (["cluster.nodes=0"], "error: cluster.nodes is 0"),
        (["cluster.gpus=8"], "error: command line: unknown key cluster.gpus"),
        (["media.longest_caption=3"], "error: media.longest_caption is 3.0"),
        (["--profile", "nowhere.json"], "error: --profile nowhere.json"),
        (["--run", "nowhere"], "error: --run nowhere"),
        (["data.train=[nowhere]"], "error: data.train: "),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert err.count("\n") == 1
