"""The profiler of savings: what a row takes back costs more and, unless it says so, computes the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from smaug_ds.model.smaug import ModelConfig
from tests.models import small_config
from tools import profile_savings
from tools.profile_savings import SAVINGS, Saving, SavingsConfig, Step, make_step

MORE_ARITHMETIC = ("packed captions", "keys and values", "words predicted", "last fusion layer", "last decoder block")


def losses_of(step: Step) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Losses, gradients, and operations of the forward pass."""
    torch.manual_seed(0)
    counter = FlopCounterMode(display=False)
    with counter, torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.dtype == torch.bfloat16):
        losses = step.module(step.batch)
    step.module.zero_grad()
    losses["loss"].backward()
    gradients = {name: value.grad.clone() for name, value in step.module.named_parameters() if value.grad is not None}
    return losses, gradients, counter.get_total_flops()


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("saving", SAVINGS, ids=lambda saving: saving.name)
def test_without_a_saving_the_losses_are_the_same(saving: Saving, frames: int) -> None:
    step = make_step(SavingsConfig(model=small_config(frames, min(frames, 2))), 4, False, torch.float32, CPU)
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
    step = make_step(SavingsConfig(model=small_config(4, 2)), 4, False, torch.bfloat16, CPU)
    (saving,) = [saving for saving in SAVINGS if "attention" in saving.name]
    losses, gradients, _ = losses_of(step)
    with saving.without(step):
        other, other_gradients, _ = losses_of(step)
    for name in ("vtc", "vtm", "mlm", "mvm"):
        torch.testing.assert_close(other[name], losses[name], atol=0.0, rtol=2e-2)
    flat, other_flat = (torch.cat([g.flatten() for g in some.values()]) for some in (gradients, other_gradients))
    assert torch.nn.functional.cosine_similarity(flat, other_flat, dim=0) > 0.99


def test_the_table_tells_every_saving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "savings.json"
    tiny = ["--size", "tiny", "--batch", "2", "--rounds", "1", "--json", str(file), "model.text.vocab_size=60"]
    profile_savings.main([*tiny, "model.vision.depth=2", "model.vision.sparsify_layers=[1]"], "savings")
    told, out = json.loads(file.read_text()), capsys.readouterr().out
    assert [row["name"] for row in told["rows"]] == [saving.name for saving in SAVINGS]
    for row in told["rows"]:
        assert row["name"] in out
        assert row["ratio_low"] <= row["ratio_high"] and row["seconds_with"] > 0
    assert told["conditions"]["config"]["model"]["vision"]["depth"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch is 0: it must be at least 1"),
        (["--frames", "2", "--kept", "3"], "model.frames_kept is 3"),
        (["model.nonsense=1"], "model.nonsense"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        profile_savings.main(arguments, "savings")
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_full_captions_have_as_many_tokens_as_the_model_takes() -> None:
    config = SavingsConfig(model=dataclasses.replace(ModelConfig.of_size("tiny"), text=small_config().text))
    assert make_step(config, 3, True, torch.float32, CPU).batch.lengths == [12, 12, 12]
    assert max(make_step(config, 8, False, torch.float32, CPU).batch.lengths) == 12


CPU = torch.device("cpu")
