"""The profiler of whole steps: its batches, what it counts, its turns, and the arithmetic of its reports."""

from __future__ import annotations

import dataclasses
import functools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smaug_ds import distributed
from smaug_ds.config import ConfigError, parse
from smaug_ds.engine.compiled import compile_static
from smaug_ds.engine.deepspeed import load_json
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.planner.calibration import rows, speed
from smaug_ds.planner.cluster import ClusterConfig, Machine
from smaug_ds.planner.memory import Precision
from smaug_ds.text import IGNORED, Tokenizer
from tests.models import VOCABULARY, small_config
from tools.profiling import ablation, compare, model, turns
from tools.profiling import step as profiling_step
from tools.profiling.ablation import ROWS, TABLES, Row, forward_flops
from tools.profiling.captions import MSRVTT, draw_lengths
from tools.profiling.machine import peak_memory
from tools.profiling.model import ProfileConfig, count_flops, largest
from tools.profiling.model import main as profile
from tools.profiling.report import Bar, Report, draw, table
from tools.profiling.step import Step, StepConfig, random_batch
from tools.profiling.turns import External, Facts, Spread, Timing, _load, _serve, executed_flops

CONTRACT = {  # what tools/plan_run.py reads
    *("what", "size", "frames", "frames_kept", "batch", "dtype", "device", "world_size", "caption_tokens_mean"),
    *("seconds_per_step", "samples_per_second", "flops_per_step", "matrix_peak_flops", "mfu", "peak_memory_bytes"),
    "phases",
}
TINY = ["model.size=tiny", "batch=2", "batches=1"]
PEER = """
import torch
HELD = torch.ones(100_000_000)  # 400 MB
def make_step(batch, frames, dtype):
    weight = torch.randn(256, 256, requires_grad=True)
    def step():
        (torch.ones(batch * frames, 256) @ weight).sum().backward()
    return step
"""


def small(**further: Any) -> StepConfig:
    return StepConfig(model=small_config(), batch=4, batches=2, **further)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- captions


def test_drawn_lengths_have_the_mean_of_msrvtt() -> None:
    mean = sum(length * count for length, count in MSRVTT.items()) / sum(MSRVTT.values())
    assert sum(MSRVTT.values()) == 1000
    assert mean == pytest.approx(11.75)
    for seed in range(5):
        drawn = draw_lengths("msrvtt", "", 32, 32, generator(seed))
        assert sum(drawn) / 32 == pytest.approx(mean, abs=0.5)
        assert min(drawn) <= 7
        assert max(drawn) >= 17
    assert max(draw_lengths("msrvtt", "", 12, 64, generator())) == 12
    assert draw_lengths("full", "", 32, 3, generator()) == [32, 32, 32]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".json"])
def test_lengths_of_a_file(tmp_path: Path, suffix: str) -> None:
    captions = ["a b c", "a b c d e", "a b c d e"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde"]) + "\n")
    path = tmp_path / f"captions{suffix}"
    path.write_text(
        {
            ".txt": "\n".join([captions[0], "", *captions[1:]]),
            ".csv": "key,sentence\n" + "".join(f"x,{caption}\n" for caption in captions),
            ".jsonl": "".join(json.dumps({"caption": caption}) + "\n" for caption in captions),
            ".json": json.dumps([{"video": f"{i}.mp4", "caption": c} for i, c in enumerate(captions)]),
        }[suffix]
    )
    expected = Tokenizer(vocabulary).encode(captions, 32).lengths
    assert sorted(draw_lengths(str(path), str(vocabulary), 32, 3, generator())) == sorted(expected) == [5, 7, 7]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("captions.txt", "\n \n", "holds no caption"),
        ("captions.csv", "a,b\n1,2\n", r"columns \['a', 'b'\]"),
        ("captions.jsonl", '{"text": "x"}\n', "line 1: no text under the key caption"),
        ("absent.txt", None, "is not a file: give full, msrvtt or a file"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, name: str, content: str | None, expected: str) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"captions: .*{expected}"):
        draw_lengths(str(tmp_path / name), str(vocabulary), 32, 4, generator())
    with pytest.raises(ConfigError, match="tokenizer is empty"):
        draw_lengths(str(tmp_path / name), "", 32, 4, generator())


# ---- the step


def test_random_batch_is_one_that_training_could_see() -> None:
    config = small()
    lengths = [5, 12, 3, 7]
    batch = random_batch(config, lengths, generator())
    assert batch.frames.shape == (4, 1, 3, 32, 32)
    assert batch.frames.dtype == torch.uint8
    assert len(batch.input_ids) == sum(lengths)
    first = 0
    for length in lengths:
        labels = batch.mlm_labels[first : first + length]
        assert (labels != IGNORED).any()
        assert labels[0] == labels[-1] == IGNORED
        first += length
    hidden = batch.mlm_labels != IGNORED
    assert torch.equal(batch.mlm_labels[hidden], batch.input_ids[hidden])
    assert torch.equal(batch.mlm_positions, hidden.nonzero().squeeze(1))
    assert batch.input_ids.max() < VOCABULARY


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_learn_and_tell_their_phases(dtype: str) -> None:
    step = Step(small(dtype=dtype, captions="full"))
    assert step.caption_tokens == 12
    losses = [float(step()) for _ in range(16)]
    assert losses[-1] < losses[0]
    phases = step.clock.read()
    assert all(phases[name] > 0 for name in ("forward", "backward", "step"))
    assert phases["data"] == 0


def test_the_engine_takes_the_same_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 weights round, so the loss is near that of fp32, not equal to it."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        engine = Step(small(dtype="deepspeed"))
        assert float(engine()) == pytest.approx(float(Step(small(dtype="fp32"))()), rel=0.02)
    finally:
        distributed.shutdown()


def test_a_compiled_step_has_the_same_loss_and_its_arithmetic_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiling_step, "compile_static", functools.partial(compile_static, backend="aot_eager"))
    plain, compiled = Step(small(dtype="fp32")), Step(small(dtype="fp32", compile=True))
    for _ in range(2):
        assert float(compiled()) == pytest.approx(float(plain()), abs=1e-4)
    assert executed_flops(compiled) == executed_flops(plain)
    assert "graphs of vision and pixels, 0 graph breaks" in capsys.readouterr().out


def test_memory_that_counting_takes_is_not_the_step_s(monkeypatch: pytest.MonkeyPatch) -> None:
    highest = []

    def wasteful(function: Any) -> int:
        function()
        torch.ones(128 * 2**20)  # 512 MiB
        highest.append(peak_memory(torch.device("cpu")))
        return 1

    monkeypatch.setattr(turns, "executed_flops", wasteful)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    timed = turns._Timed(small(), 1)
    assert timed.facts(None).peak_bytes < highest[0] - 300 * 2**20


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"mask_ratio is 0.0, which masks none of the 16 patches.*set loss.mvm to 0"):
        StepConfig(model=small_config(mask_ratio=0.0))
    with pytest.raises(ConfigError, match="dtype is bf16: set dtype=deepspeed"):
        small(deepspeed="ds_configs/cpu.json")
    with pytest.raises(ConfigError, match="batch is 0"):
        dataclasses.replace(small(), batch=0)
    with pytest.raises(ConfigError, match=r"loss\.mvm are all 0: nothing to learn"):
        small(loss=LossConfig(vtc=0, vtm=0, mlm=0, mvm=0))


@pytest.mark.parametrize(
    ("engine", "dtype", "product"),
    [
        ({}, "fp32", torch.float32),
        ({"bf16": {"enabled": False}}, "fp32", torch.float32),
        ({"bf16": {"enabled": True}}, "deepspeed", torch.bfloat16),
        ({"fp16": {"enabled": True}}, "fp16", torch.float16),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "bf16", torch.bfloat16),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "fp16", torch.float16),
        ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, "fp16", torch.float16),
        (None, "deepspeed", torch.bfloat16),  # the default, ds_configs/cpu_bf16.json
    ],
)
def test_a_step_of_an_engine_is_held_against_what_its_json_computes_in(
    engine: dict[str, Any] | None, dtype: str, product: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engine.json"
    if engine is not None:
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **engine}))
    config = small(dtype="deepspeed", deepspeed="" if engine is None else str(path))
    peak = Mock(return_value=4.0)
    monkeypatch.setattr(model, "matrix_peak", peak)
    assert model.peak_of(config) == 4.0
    assert peak.call_args.args[0] is product
    facts, timing = Facts("cpu", flops=2.0, peak_bytes=1, caption_tokens=12.0), Timing([[1.0]], [])
    measured = model.record(config, timing, facts, 4.0)
    assert measured["dtype"] == dtype
    precision = Precision.of(load_json(config.deepspeed or profiling_step.BF16_ENGINE))
    machine = Machine.of(ClusterConfig(device="cpu"), calibrated=True)
    assert "not measured" not in speed(rows({"measured": [measured]}, "FILE"), machine, "tiny", 1, 1, precision).source


def test_the_answer_decoder_has_a_row_of_its_own() -> None:
    counts = model.count_parameters(dataclasses.replace(small_config(), answer_layers=1))
    without = model.count_parameters(small_config())
    assert {**without, "answer decoder": counts["answer decoder"]} == counts
    assert counts["answer decoder"] > 0


# ---- what is counted


def test_flops_of_a_linear_layer_and_of_attention() -> None:
    layer, x = nn.Linear(32, 64), torch.randn(8, 32, requires_grad=True)
    assert executed_flops(lambda: layer(x)) == 2 * 8 * 32 * 64
    assert executed_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 8 * 32 * 64
    q, k, v = (torch.randn(2, 4, length, 16, requires_grad=True) for length in (10, 12, 12))
    product = 2 * 2 * 4 * 10 * 12 * 16
    assert executed_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert executed_flops(lambda: (q @ k.transpose(-1, -2)).softmax(-1) @ v) == 2 * product
    # the fused backward computes the scores again: five products instead of four
    assert executed_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 7 * product


@pytest.mark.parametrize(("frames", "frames_kept"), [(1, 1), (4, 2)])
def test_the_forward_pass_executes_what_the_table_says(frames: int, frames_kept: int) -> None:
    model = small_config(frames, frames_kept)
    config = dataclasses.replace(small(captions="full"), model=model)
    module = Pretraining(SmaugModel(model), config.loss).train()
    batch = random_batch(config, [12] * 4, generator())
    executed = executed_flops(lambda: module(batch)) / 4
    told = sum(count_flops(ProfileConfig(model, len(batch.mlm_positions) / len(batch.input_ids))).values())
    assert executed == pytest.approx(told, rel=0.02)


def test_ablation_rows_save_arithmetic() -> None:
    config = StepConfig(model=small_config(image_size=64), batch=4, batches=1, captions="full")  # 64 patches
    known: dict[StepConfig, float] = {}

    def flops(row: Row) -> float:  # of a sample
        step = row.of(config)
        if step not in known:
            known[step] = executed_flops(Step(step)) / step.batch
        return known[step]

    masking, keep, frames, parts = ([row for row in ROWS if row.table == name] for name in TABLES)
    values = [flops(row) for row in masking[1:]]
    assert values == sorted(values, reverse=True)
    assert flops(masking[0]) < flops(masking[0].dense)  # without a mask tokens are dropped all the same
    values = [flops(row) for row in keep]
    assert values == sorted(values)
    # every frame is projected once, whoever looks at it: choosing frames saves no product, and the selector costs 2 %
    of_four = {row.frames_kept: flops(row) for row in frames if row.frames == 4}
    assert list(of_four) == [1, 2, 3, 4]
    assert all(of_four[kept] == pytest.approx(of_four[4], rel=0.02) for kept in (1, 2, 3))
    assert all(flops(row.dense) > flops(row) for row in frames)
    masked, sparse, chosen = (flops(row) for row in parts)
    assert flops(parts[0].dense) > masked > sparse
    assert chosen == of_four[2]


def test_base_size_saves_at_least_what_the_paper_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    ablation.main(["--tables", "parts", "--steps", "0", "--json", str(out)], "ablation")
    two = json.loads(out.read_text())["counted"][-1]
    assert (two["frames"], two["frames_kept"]) == (4, 2)
    assert two["dense_forward_flops"] / two["forward_flops"] >= two["paper"]
    assert "+ token sparsification (VTS)" in capsys.readouterr().out
    (one,) = (row for row in ROWS if row.name == "1 frame")
    assert 57.07e9 / forward_flops(one.of(StepConfig())) >= one.paper  # 57.07: Singularity's forward pass of a sample


def test_dense_has_nothing_sparse() -> None:
    dense = ROWS[-1].dense.of(parse(StepConfig, None, ["batch=8"]))
    assert dense.model.vision.token_counts() == [197]
    assert (dense.model.frames, dense.model.frames_kept, dense.batch, dense.loss.mvm) == (4, 4, 4, 0)


# ---- turns


def test_spread_and_phases() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    timing = Timing([[1.0, 2.0], [6.0]], [{"forward": 1.0}, {"forward": 5.0}, {"forward": 2.0}])
    assert timing.seconds == Spread(2.0, 1.0, 6.0)
    assert timing.phase_medians == {"forward": 2.0}


@pytest.mark.parametrize("start", [1, 3, 8, 64, 1000])
@pytest.mark.parametrize("limit", [1, 2, 7, 8, 63, 100, 1500])
def test_largest_batch_is_found_from_either_side(start: int, limit: int) -> None:
    found = largest(lambda batch: batch <= limit, start)
    assert found <= limit < found + max(1, found // 16) + 1
    with pytest.raises(ConfigError, match="not even 1 fits"):
        largest(lambda batch: False, start)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("x = 1", "has no make_step"), ("def make_step(batch, frames, dtype): return 3", "make_step returned 3")],
)
def test_files_that_make_no_step(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "peer.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        _load(External(path, 1, 1, "fp32"))


@pytest.mark.parametrize(
    ("error", "fits"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", False),
        ("RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')", False),
        ("RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED')", False),
        ("RuntimeError('CUDA error: out of memory')", False),
        ("RuntimeError('CUDA error: CUBLAS_STATUS_EXECUTION_FAILED')", True),
        ("KeyError('out of memory')", True),
    ],
)
def test_what_says_that_a_batch_is_too_large(tmp_path: Path, error: str, fits: bool) -> None:
    path, pipe = tmp_path / "peer.py", Mock()
    path.write_text(f"import torch\ndef make_step(batch, frames, dtype):\n    raise {error}\n")
    with pytest.raises(SystemExit) if fits else nullcontext():
        _serve(pipe, External(path, 1, 1, "fp32"), 0)
    told = [call.args[0] for call in pipe.send.call_args_list]
    assert [kind for kind, _ in told] == ([] if fits else ["memory"])
    assert all(text.startswith("out of memory: lower batch (") for _, text in told)


def test_singularity_needs_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tools.peers.singularity import make_step

    monkeypatch.setenv("SINGULARITY", str(tmp_path))
    with pytest.raises(ValueError, match=r"SINGULARITY is '.*', where no models/model_pretrain.py is"):
        make_step(1, 1, "bf16")
    with pytest.raises(ValueError, match="dtype is deepspeed"):
        make_step(1, 1, "deepspeed")


@pytest.mark.slow
def test_compare_takes_turns_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer, out = tmp_path / "peer.py", tmp_path / "figures.json"
    peer.write_text(PEER)
    files = ["--json", str(out), "--png", str(tmp_path / "chart.png"), "--tensorboard", str(tmp_path / "board")]
    compare.main(["--peer", str(peer), "--turns", "2", "--steps", "1", *files, *TINY], "compare")
    told = json.loads(out.read_text())
    ours, theirs = told["measured"]
    assert set(ours) >= CONTRACT
    assert ours["what"] == "model"
    assert ours["steps"] == 2
    assert sum(ours["phases"].values()) <= ours["seconds_per_step"]["high"]
    assert 0 < ours["mfu"] < 1
    assert theirs["flops_per_step"] == 2 * 2 * 2 * 256 * 256  # forward, and backward for the weight alone
    ratios = [their / our for our, their in told["turns_seconds"]]
    assert told["speed_ratio"] == pytest.approx({"median": sum(ratios) / 2, "low": min(ratios), "high": max(ratios)})
    assert told["memory_ratio"] == ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    assert theirs["peak_memory_bytes"] > 600e6  # its 400 MB, which ours does not hold, and torch
    assert "samples/s, ours to peer's" in capsys.readouterr().out
    assert (tmp_path / "chart.png").stat().st_size > 1000
    assert list((tmp_path / "board").glob("events*"))


@pytest.mark.slow
def test_model_steps_and_what_goes_wrong_in_their_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    arguments = ["--size", "tiny", "--steps", "2", "--warmup", "0", *TINY[1:]]
    profile([*arguments, "--json", str(out), "--trace", str(trace)], "model")
    told = json.loads(out.read_text())
    (measured,) = told["measured"]
    assert set(measured) >= CONTRACT
    assert measured["samples_per_second"] == pytest.approx(2 / measured["seconds_per_step"]["median"])
    assert measured["flops_per_step"] > 3 * sum(told["forward_flops"].values())  # a batch of two, backward too
    assert any("addmm" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        profile([*arguments, "captions=nowhere.txt", "tokenizer=nowhere"], "model")
    assert capsys.readouterr().err.startswith("error: model: tokenizer: nowhere: no tokenizer there")


@pytest.mark.slow
def test_ablation_holds_rows_against_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "ROWS", [ROWS[3]])
    out = tmp_path / "figures.json"
    ablation.main(["--tables", "masking", "--turns", "1", "--warmup", "0", "--json", str(out), *TINY], "ablation")
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ratio"]["median"] > 0
    assert row["flops_ratio"] > 1.3
    assert row["paper"] == pytest.approx(1.65, abs=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "deepspeed"])
def test_steps_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--size", "tiny", "--steps", "2", "--json", str(out), "--trace", str(tmp_path / "trace.json")]
    profile([*arguments, f"dtype={dtype}", "batch=4", "model.frames=4", "model.frames_kept=2"], "model")
    (measured,) = json.loads(out.read_text())["measured"]
    assert measured["device"] == torch.cuda.get_device_name()
    assert all(measured["phases"][name] > 0 for name in ("forward", "backward", "step"))
    assert 0 < measured["mfu"] < 1
    assert 0 < measured["peak_memory_bytes"] < 20e9
    names = [event.get("name", "") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert any("gemm" in name or "nvjet" in name or "cutlass" in name for name in names)


# ---- reports


def test_bars_are_as_long_as_their_values() -> None:
    told = {
        "hardware": {"cores": 2, "processor": "x", "gpus": [], "load": 0.1},
        "versions": {"python": "3", "torch": "2"},
    }
    report = Report(told, "chart", "s", "other", [Bar("a", 4.0, "4"), Bar("b", 1.0, "1", mark=2.0), Bar("c", 0.0, "0")])
    pixels = np.asarray(draw(report)).astype(int)
    green = (pixels == (26, 148, 72)).all(axis=-1).sum(axis=1)
    lengths = [length for length, above in zip(green, [0, *green], strict=False) if length and length != above]
    red = (pixels == (207, 34, 46)).all(axis=-1).nonzero()[1]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=0.02)
    left = (pixels == (26, 148, 72)).all(axis=-1).nonzero()[1].min()
    assert (red.mean() - left) == pytest.approx(lengths[0] / 2, abs=3)
    assert table([["", "a"], ["b", "100"]]) == "     a\nb  100"
