"""A run goes on at other numbers of ranks: the same losses, rates and weights as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.order import slots
from smaug_ds.engine import checkpoint, elastic
from smaug_ds.engine.deepspeed import build_engine
from smaug_ds.engine.elastic import merge_rank_states
from smaug_ds.engine.monitor import Meters
from smaug_ds.engine.optim import OptimConfig
from smaug_ds.engine.preempt import EXIT_CODE
from smaug_ds.engine.resume import require_pool
from tests.forked import Forks
from tests.launching import figures, settings
from tests.loop import TOTAL, run
from tests.ranks import run_ranks
from tests.standin import CPU_JSON, Standin, batch_of, write_json

# Steps are logged in threes, so that 2 -> 1 and 4 -> 2 happen while the meters of a window are half full.
LOG_EVERY, PARTS = 3, ((2, 2), (1, 4), (4, 6), (2, TOTAL))  # (ranks, last step)
STAGES: dict[str, dict[str, Any]] = {
    "zero2_fp32": {},
    "zero1_bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
}


def part(folder: str, json: str, stop_at: int) -> dict[str, Any]:
    return run(Path(folder), Standin(), stop_at, LOG_EVERY, json=Path(json))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_other_numbers_of_ranks_change_nothing(stage: str, tmp_path: Path) -> None:
    """2 -> 1 -> 4 -> 2 ranks, with optimizer state, schedule and position."""
    json = str(write_json(tmp_path / "ds.json", **STAGES[stage]))
    (tmp_path / "whole").mkdir()
    whole = run_ranks(part, 2, str(tmp_path / "whole"), json, -1)[0]
    for ranks, stop_at in PARTS:
        parts = run_ranks(part, ranks, str(tmp_path / "parts"), json, stop_at)
        assert {result["done"] for result in parts} == {stop_at}
    # Sums over 1, 2 and 4 ranks round differently; in bf16 a weight may then fall on the other side of a step.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if "bf16" in stage else {"rtol": 1e-5, "atol": 1e-6}
    lines, expected = figures(tmp_path / "parts"), figures(tmp_path / "whole")
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 6, 9]
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys() and line["lr"] == other["lr"]
        np.testing.assert_allclose(list(line.values()), list(other.values()), **tolerance)
    for result in parts:
        for name, value in whole["weights"].items():
            np.testing.assert_allclose(value, result["weights"][name], err_msg=name, **tolerance)


def keys_by_step(path: Path, ranks: int) -> dict[int, list[str]]:
    """The sample keys of each global batch, in its order."""
    parts: dict[int, list[list[str]]] = {}
    for lines in zip(*(Path(f"{path}.{rank}").read_text().splitlines() for rank in range(ranks)), strict=True):
        told = [json.loads(line) for line in lines]
        assert len({(step, medium) for step, medium, _ in told}) == 1
        parts.setdefault(told[0][0], []).append([key for _, _, keys in told for key in keys])
    return {step: [key for micro in micros for key in micro] for step, micros in parts.items()}


@pytest.mark.slow
def test_a_real_run_goes_on_at_other_numbers_of_ranks(toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 4 -> 2 ranks in the middle of epochs of six steps: the same samples in the same order, the same rates.

    Without dropout the losses differ by rounding alone; the samples' own draws (masks, crops, negatives) stay.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def arguments(folder: Path, ranks: int) -> list[str]:
        own = [f"batch.micro_size={8 // ranks}", "run.max_steps=16", "run.save_every=0", "run.picture_every=0"]
        return [*settings(toy_shards, toy_media, folder), *own, "model.text.dropout=0", "data.test=[]"]

    with Forks() as forks:

        def part(folder: Path, ranks: int, last: int, code: int) -> dict[int, list[str]]:
            log, keys = tmp_path / "log", tmp_path / f"{folder.name}_{last}"
            pids = forks.start(ranks, arguments(folder, ranks), log, keys=str(keys), stop=[last, str(folder / "stop")])
            forks.end(pids, log, code)
            return keys_by_step(keys, ranks)

        expected = part(whole, 2, -1, 0)
        seen: dict[int, list[str]] = {}
        for ranks, last in ((2, 4), (1, 8), (4, 11), (2, 16)):
            steps = part(parts, ranks, last, EXIT_CODE if last < 16 else 0)
            assert list(steps) == list(range(len(seen), last))
            seen |= steps
    assert seen == expected and len({key for keys in seen.values() for key in keys}) == 96
    lines, others = figures(parts), figures(whole)
    assert [line["lr"] for line in lines] == [line["lr"] for line in others] and len(lines) == 16
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if "accuracy" not in name:  # which is shown among each rank's own pairs
                np.testing.assert_allclose(value, other[name], rtol=1e-5, err_msg=f"{name} in step {line['step']}")


def before_the_first_step(folder: str, ranks: int) -> dict[str, np.ndarray]:
    """A checkpoint of 2 ranks whose optimizer has not stepped, and one step from it."""
    module = Standin()
    engine = build_engine(module, CPU_JSON, OptimConfig(lr=0.01), lambda step: 1.0, 4 // ranks, 1)
    if ranks == 2:
        checkpoint.save(engine, Path(folder), 1, {}, {"meters": Meters().state_dict(), "budget": []}, module, {}, 1)
    else:
        for value in module.parameters():
            value.data.add_(1.0)
        assert checkpoint.restore(engine, Path(folder) / "step_1")["budget"] == []
    own = slots(0, distributed.rank(), ranks, 4 // ranks)
    engine.backward(engine(batch_of(0, "video", own))["loss"])
    engine.step()
    return {name: value.detach().float().numpy() for name, value in module.state_dict().items()}


def test_an_optimizer_that_never_stepped_has_no_moments_to_divide(tmp_path: Path) -> None:
    """As when fp16's loss scaler has skipped every step so far."""
    expected = run_ranks(before_the_first_step, 2, str(tmp_path), 2)[0]
    found = run_ranks(before_the_first_step, 1, str(tmp_path), 1)[0]
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_loss_scale_of_fp16_goes_on(tmp_path: Path) -> None:
    scaler = DynamicLossScaler(2.0**16, 2, 1.0, delayed_shift=2, consecutive_hysteresis=False)
    for _ in range(3):
        scaler.update_scale(overflow=False)
    states = {"optimizer_state_dict": {"loss_scaler": scaler}}
    for rank in range(2):
        torch.save(states, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    found = elastic._read_loss_scaler(tmp_path)
    assert vars(found) == vars(scaler) and found.cur_scale == 2.0**17


@pytest.mark.parametrize(("fused", "kind"), [(True, torch.Tensor), (False, torch.Tensor), (None, int)])
def test_the_number_of_steps_is_kept_as_each_adamw_keeps_it(fused: bool | None, kind: type) -> None:
    """DeepSpeed's own AdamW has a plain number."""
    part = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([part]) if fused is None else torch.optim.AdamW([part], fused=fused)
    steps = torch.tensor(3.0)
    kept = elastic._as_kept(steps, optimizer, part)
    assert type(kept) is kind and kept == 3 and kept is not steps


def test_meters_of_other_ranks_give_the_same_means() -> None:
    states = []
    for rank in range(3):
        meters = Meters()
        for step in range(2):
            meters.add("video", {"loss": torch.tensor(float(10 * rank + step))})
        states.append({"meters": meters.state_dict(), "budget": [[4, rank], [4, 0]]})
    merged = merge_rank_states(states)
    meters = Meters()
    meters.load_state_dict(merged["meters"], torch.device("cpu"))
    assert meters.read() == {"loss/video": pytest.approx((0 + 1 + 10 + 11 + 20 + 21) / 6)}
    assert merged["budget"] == [[4, 0], [4, 1], [4, 2], [4, 0], [4, 0], [4, 0]]


def test_the_pool_of_negatives_has_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    before = {"batch.micro_size": 4}
    require_pool(before, {"batch.micro_size": 8}, ranks=4, checkpoint=Path("step_1"))
    told = r"batch\.micro_size is 4 on 2 ranks, so that 8 pairs .* with 4 on 4 = 16: set batch\.micro_size to 8"
    with pytest.raises(ConfigError, match=told):
        require_pool(before, {"batch.micro_size": 4}, ranks=4, checkpoint=Path("step_1"))
    with pytest.raises(ConfigError, match=r"= 12: set batch\.micro_size to 6"):
        require_pool(before, {"batch.micro_size": 4}, ranks=3, checkpoint=Path("step_1"))
    with pytest.raises(ConfigError, match=r"= 5: use another number of ranks"):
        require_pool({"batch.micro_size": 5}, {"batch.micro_size": 4}, ranks=1, checkpoint=Path("step_1"))
