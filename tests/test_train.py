"""The loop at two ranks: resume, stopping together, refusing what is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smaug_ds import distributed
from smaug_ds.engine.optim import Schedule
from tests.launching import figures
from tests.loop import GLOBAL, OPTIM, TOTAL, run
from tests.ranks import run_ranks
from tests.standin import Standin, order_of


def all_runs(folder: str) -> dict[str, Any]:
    """Every run of the tests below, since starting ranks is what takes the time."""
    base = Path(folder)
    results: dict[str, Any] = {"whole": run(base / "whole", Standin(dropout=0.2))}
    # stopped after 6 of 9 steps, in the middle of a window of 4 logged steps, and resumed in a fresh module
    results["whole_by_4"] = run(base / "whole_by_4", Standin(dropout=0.2), log_every=4)
    results["stopped"] = run(base / "resumed", Standin(dropout=0.2), stop_at=6, log_every=4)
    results["resumed"] = run(base / "resumed", Standin(dropout=0.2), log_every=4)
    # killed after its checkpoint of step 4: what it logged since is not there twice
    results["killed"] = run(base / "killed", Standin(dropout=0.2), stop_at=6)
    if distributed.is_main():
        (base / "killed" / "latest").write_text("step_4")
    distributed.barrier()
    results["from_4"] = run(base / "killed", Standin(dropout=0.2))
    for name in ("break_loss_at", "break_gradient_at"):
        module = Standin()
        setattr(module, name, 2)
        results[name] = run(base / name, module)
    results["lost"] = run(base / "lost", Standin(), lose_at=6)
    run(base / "extended", Standin(), total=5)  # to its end, and then further
    results["extended"] = run(base / "extended", Standin())
    results["before_break"] = run(base / "before_break", Standin(), stop_at=2)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(all_runs, 2, str(folder))


def assert_same_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_everything_happens_when_it_is_due(ranks: list[dict[str, Any]], folder: Path) -> None:
    for rank, results in enumerate(ranks):
        whole = results["whole"]
        assert (whole["done"], whole["error"]) == (TOTAL, None)
        assert whole["finished"] == list(range(1, TOTAL + 1))
        assert whole["save"] == [4, 8, 9]
        assert whole["evaluate"] == [3, 6]  # the last step's is the caller's
        assert whole["draw"] == ([5] if rank == 0 else [])
    lines = figures(folder / "whole")
    order = order_of(GLOBAL)
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
    for line in lines:
        medium = order.medium(line["step"] - 1)
        names = {f"{name}/{medium}" for name in ("loss", "mlm", "vtc", "temperature")}
        assert line.keys() == {"step", "lr", "gradient_norm"} | names
    assert {order.medium(step) for step in range(TOTAL)} == {"image", "video"}
    schedule = Schedule.of(OPTIM, 1, TOTAL)
    assert [line["lr"] for line in lines] == pytest.approx([0.01 * schedule(step) for step in range(TOTAL)])
    assert list((folder / "whole" / "tensorboard").iterdir())


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(ranks: list[dict[str, Any]], folder: Path) -> None:
    for results in ranks:
        assert (results["stopped"]["done"], results["resumed"]["done"]) == (6, TOTAL)
        assert_same_weights(results["resumed"]["weights"], results["whole_by_4"]["weights"])
        assert_same_weights(results["resumed"]["weights"], results["whole"]["weights"])
    assert figures(folder / "resumed") == figures(folder / "whole_by_4")
    assert [line["step"] for line in figures(folder / "resumed")] == [4, 8, 9]


def test_what_was_logged_after_the_checkpoint_is_not_there_twice(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert ranks[0]["from_4"]["done"] == TOTAL
    assert figures(folder / "killed") == figures(folder / "whole")


def test_a_signal_on_one_rank_stops_all_after_the_same_step(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["stopped"]["done"] == 6
        assert results["stopped"]["save"] == [4, 6]


@pytest.mark.parametrize(("name", "blamed"), [("break_loss_at", "loss, vtc"), ("break_gradient_at", "gradient")])
def test_what_is_not_finite_on_one_rank_stops_all_before_the_step(
    ranks: list[dict[str, Any]], name: str, blamed: str
) -> None:
    for results in ranks:
        assert results[name]["error"].startswith(f"step 3: not finite: {blamed}.")
        assert results[name]["save"] == []
        assert_same_weights(results[name]["weights"], results["before_break"]["weights"])


def test_data_that_fail_on_one_rank_stop_all_and_name_it(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["lost"]["error"] == "rank 1: too many samples fail"
        assert results["lost"]["save"] == [4]


def test_an_extended_run_takes_the_rate_of_its_own_schedule(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert ranks[0]["extended"]["done"] == TOTAL
    before, after = Schedule.of(OPTIM, 1, 5), Schedule.of(OPTIM, 1, TOTAL)
    expected = [0.01 * (before if step < 5 else after)(step) for step in range(TOTAL)]
    assert [line["lr"] for line in figures(folder / "extended")] == pytest.approx(expected)
