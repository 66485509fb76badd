"""The profiler of savings: what a row takes back costs more and, unless it says so, computes the same."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models import small_config
from tools.profiling import savings
from tools.profiling.savings import SAVINGS, Saving, measure
from tools.profiling.step import Step, StepConfig
from tools.profiling.turns import External, _Timed, time_steps

MORE_ARITHMETIC = ("packed captions", "keys and values", "words predicted", "last fusion layer", "last decoder block")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def small(frames: int, dtype: Literal["fp32", "bf16"], batches: int = 1) -> StepConfig:
    return StepConfig(model=small_config(frames, min(frames, 2)), batch=4, batches=batches, dtype=dtype)


def losses_of(step: Step) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Losses, gradients, and operations of the forward pass."""
    torch.manual_seed(0)
    counter = FlopCounterMode(display=False)
    with counter, torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.config.dtype == "bf16"):
        losses = step.module(step.batches[0])
    step.module.zero_grad()
    losses["loss"].backward()
    gradients = {name: value.grad.clone() for name, value in step.module.named_parameters() if value.grad is not None}
    return losses, gradients, counter.get_total_flops()


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("saving", SAVINGS, ids=lambda saving: saving.name)
def test_without_a_saving_the_losses_are_the_same(saving: Saving, frames: int) -> None:
    step = Step(small(frames, "fp32"))
    losses, gradients, flops = losses_of(step)
    with saving.without(step):
        other, other_gradients, more = losses_of(step)
    assert losses_of(step)[2] == flops, "the saving is not back"
    if "attention" not in saving.name:  # torch does not count what its fused kernel for CPUs does
        assert (more > flops) == saving.name.startswith(MORE_ARITHMETIC)
    if "other losses" in saving.name:
        assert other["mlm"] != losses["mlm"]
        return
    for name in ("vtc", "vtm", "mlm", "mvm"):
        torch.testing.assert_close(other[name], losses[name], atol=1e-6, rtol=1e-6)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_the_attention_of_a_cpu_in_bf16_equals_the_fused_one() -> None:
    step = Step(small(4, "bf16"))
    (saving,) = [saving for saving in SAVINGS if "attention" in saving.name]
    losses, gradients, _ = losses_of(step)
    with saving.without(step):
        other, other_gradients, _ = losses_of(step)
    for name in ("vtc", "vtm", "mlm", "mvm"):
        torch.testing.assert_close(other[name], losses[name], atol=0.0, rtol=2e-2)
    flat, other_flat = (torch.cat([g.flatten() for g in some.values()]) for some in (gradients, other_gradients))
    assert torch.nn.functional.cosine_similarity(flat, other_flat, dim=0) > 0.99


def test_both_sides_of_a_turn_take_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    step, taken, timed = Step(small(1, "fp32", batches=3)), [], []
    monkeypatch.setattr(step, "_run", lambda batch: taken.append(id(batch)))
    monkeypatch.setattr(savings, "time_steps", lambda *args: (timed.append(len(taken)), time_steps(*args))[1])
    worth = measure(step, Saving("nothing", lambda step: nullcontext()), 2, 2, 1)
    turns = [taken[start : start + 2] for start in timed]
    first, second, third = map(id, step.batches)
    assert turns == [[first, second], [first, second], [third, first], [third, first]]
    assert len(taken) == 4 * (1 + 2)
    assert worth.ratio.low <= worth.ratio.median <= worth.ratio.high


def test_the_table_tells_every_saving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, chart = tmp_path / "savings.json", tmp_path / "savings.png"
    tiny = ["model.size=tiny", "batch=2", "batches=1", "model.text.vocab_size=60", "model.vision.depth=2"]
    files = ["--json", str(file), "--png", str(chart), "--tensorboard", str(tmp_path / "board")]
    savings.main(["--turns", "2", *files, *tiny, "model.vision.sparsify_layers=[1]"], "savings")
    told, out = json.loads(file.read_text()), capsys.readouterr().out
    assert [row["name"] for row in told["rows"]] == [saving.name for saving in SAVINGS]
    for row in told["rows"]:
        assert row["name"] in out
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["seconds_with"]["low"] > 0
    assert told["conditions"]["config"]["model"]["vision"]["depth"] == 2
    assert chart.stat().st_size > 1000
    assert list((tmp_path / "board").glob("events*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch=0"], "batch is 0: it must be at least 1"),
        (["--turns", "0"], "--turns is 0: it must be at least 1"),
        (["--steps", "0"], "--steps is 0: it must be at least 1"),
        (["model.frames=2", "model.frames_kept=3"], "model.frames_kept is 3"),
        (["model.nonsense=1"], "model.nonsense"),
        (["dtype=deepspeed"], "dtype is deepspeed: savings takes bf16 or fp32"),
        (["adamw=loop"], "adamw is loop: savings takes fused"),
        (["compile=true"], "compile is true: savings takes back parts of the model"),
        (["--json", "nowhere/figures.json"], "there is no folder nowhere"),
        (["--json", "docs"], "--json docs is a folder: name a file"),
        (["--tensorboard", "README.md"], "--tensorboard README.md is a file: name a folder"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        savings.main(arguments, "savings")
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_both_sides_of_a_comparison_keep_freed_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept: list[Any] = []
    for module in ("step", "turns"):
        monkeypatch.setattr(f"tools.profiling.{module}.keep_freed_memory", lambda: kept.append(True))
    _Timed(small(1, "fp32"), 0)
    assert len(kept) == 1
    peer = tmp_path / "peer_of_memory.py"
    peer.write_text("def make_step(batch, frames, dtype):\n    return lambda: None\n")
    _Timed(External(peer, 1, 1, "fp32"), 0)
    assert len(kept) == 2
