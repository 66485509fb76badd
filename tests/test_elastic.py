"""A run goes on at other numbers of ranks: the same losses, rates and weights as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.engine.elastic import merge_rank_states
from smaug_ds.engine.monitor import Meters
from smaug_ds.engine.resume import require_pool
from tests.ranks import run_ranks
from tests.standin import Standin, write_json
from tests.test_train import TOTAL, figures, run

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
