"""Simulated failures against their closed form, and every sample of a broken run against an uninterrupted one's."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from jobs import simulate_scale
from jobs.simulate_scale import main
from smaug_ds.data.order import Order, SetShards
from smaug_ds.planner.failures import (
    Attempt,
    Outcome,
    Trouble,
    best_interval,
    check_samples,
    committed,
    daly,
    expected_seconds,
    simulate,
    young,
)

ROOT = Path(__file__).resolve().parent.parent
GLOBAL = 24


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


def small_order() -> Order:
    sizes = {"image": [10, 9, 0, 0, 6], "video": [0, 0, 20, 13, 0]}
    return Order(sizes, GLOBAL, seed=3, group=2, sets=[SetShards(0, 2), SetShards(2, 4), SetShards(4, 5, 2.5)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("every", "trouble", "nodes"),
    [
        (10, Trouble(node_mtbf=4000, restart=20, save=3), 8),
        (37, Trouble(node_mtbf=4000, restart=20, save=3), 8),  # the last piece is shorter
        (10, Trouble(node_mtbf=300, restart=30, save=5), 4),  # restarts and saves fail, too
        (200, Trouble(node_mtbf=2000, restart=0, save=0), 2),
        (15, Trouble(node_mtbf=900, restart=10, save=2, repair=50), 4),
    ],
)
def test_simulated_time_is_that_of_the_closed_form(every: int, trouble: Trouble, nodes: int) -> None:
    draws = generator(1)
    times = [simulate(200, every, lambda _: 1.5, trouble, nodes, draws).seconds for _ in range(3000)]
    error = np.std(times) / math.sqrt(len(times))
    assert abs(np.mean(times) - expected_seconds(200, 1.5, every, trouble, nodes)) < 4.5 * error


def test_a_run_without_failures_takes_its_steps_and_saves() -> None:
    trouble = Trouble(math.inf, 100, 7)
    outcome = simulate(25, 10, lambda _: 2.0, trouble, 64, generator(0))
    assert outcome == Outcome(25 * 2.0 + 3 * 7, 0, (Attempt(0, 25, 25, 64),))
    assert expected_seconds(25, 2.0, 10, trouble, 64) == outcome.seconds


@pytest.mark.parametrize(("mtbf", "save"), [(86400 * 150, 2.0), (86400, 30.0), (3600, 60.0)])
@pytest.mark.parametrize("nodes", [1, 8, 64])
def test_the_best_interval_is_dalys(mtbf: float, save: float, nodes: int) -> None:
    """Found by search, it costs no more than Daly's and hardly less; Young's is near where saving is short."""
    trouble = Trouble(mtbf, 300, save)
    steps, seconds = 2_000_000, 0.5

    def cost(between: float) -> float:
        return expected_seconds(steps, seconds, max(1, round(between / seconds)), trouble, nodes)

    best = cost(best_interval(steps, seconds, trouble, nodes) * seconds)
    assert 0.99 * cost(daly(save, mtbf / nodes)) < best < 1.002 * cost(daly(save, mtbf / nodes))
    if save < mtbf / nodes / 100:
        assert young(save, mtbf / nodes) == pytest.approx(daly(save, mtbf / nodes), rel=0.1)


def test_where_nothing_fails_a_run_saves_once() -> None:
    assert best_interval(1000, 0.1, Trouble(math.inf, 0, 5), 8) == 1000


def test_the_same_seed_breaks_a_run_alike() -> None:
    trouble = Trouble(100, 5, 1, repair=20)
    runs = [simulate(200, 9, lambda n: 4 / n, trouble, 4, generator(seed), (1, 2, 3)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0].failures > 3


@pytest.mark.parametrize("seed", range(5))
def test_no_sample_is_lost_or_doubled_whatever_dies(seed: int) -> None:
    """Over several epochs, on 2, 4, 6 and 8 ranks in turn, with steps that were done and then lost."""
    order = small_order()
    steps = 20 * order.steps_per_epoch
    trouble = Trouble(node_mtbf=40, restart=1, save=0.2, repair=8)
    outcome = simulate(steps, 3, lambda nodes: 4 / nodes, trouble, 4, generator(seed), (1, 2, 3))
    assert sum(attempt.reached - attempt.saved for attempt in outcome.attempts)
    assert {attempt.nodes for attempt in outcome.attempts} >= {3, 4}
    kept = committed(outcome.attempts, steps)
    counts = check_samples(order, kept, 2, 4, steps)
    assert sum(counts.values()) == steps * GLOBAL


def test_lost_and_doubled_steps_are_found() -> None:
    whole = [Attempt(0, 12, 10, 2), Attempt(10, 20, 20, 1)]
    assert committed(whole, 20) == [(range(10), 2), (range(10, 20), 1)]
    with pytest.raises(ValueError, match="steps 10 to 11 are lost"):
        committed([whole[0], dataclasses.replace(whole[1], first=12)], 20)
    with pytest.raises(ValueError, match="steps 8 to 9 are done twice"):
        committed([whole[0], dataclasses.replace(whole[1], first=8)], 20)
    with pytest.raises(ValueError, match="steps 20 to 21 are lost"):
        committed(whole, 22)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([(range(0, 3), 2), (range(4, 6), 2)], "step 4 was done in the place of step 3"),
        ([(range(0, 3), 2), (range(2, 5), 2)], "step 2 was done in the place of step 3"),
        ([(range(0, 5), 2)], "5 steps of 6"),
        ([(range(0, 6), 5)], "slots are lost on 5 ranks"),  # which do not divide the global batch
    ],
)
def test_samples_out_of_place_are_found(kept: list[tuple[range, int]], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_samples(small_order(), kept, 1, 4, 6)


@pytest.mark.parametrize("name", ["node_mtbf", "restart", "save", "repair"])
def test_impossible_trouble_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="it must be"):
        dataclasses.replace(Trouble(1, 1, 1, 1), **{name: -1.0})


def run(*arguments: str) -> int:
    return main(["--config", str(ROOT / "jobs/experiments/pretrain_stage1.yaml"), *arguments])


def test_the_command_tells_all_sizes_and_follows_the_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate_scale, "CHECKED_STEPS", 60)
    file = tmp_path / "figures.json"
    arguments = ["--gpus", "8,512", "--mtbf-days", "5", "--runs", "50", "--json", str(file), "batch.global_size=2048"]
    assert run(*arguments) == 0
    assert "none lost, none twice" in capsys.readouterr().out
    few, many = json.loads(file.read_text())["rows"]
    assert (few["gpus"], few["nodes"], many["nodes"]) == (8, 1, 64)
    for row in (few, many):
        assert 0 < row["useful"] <= 1
        assert row["useful_by_default"] <= row["useful_expected"]
        # nothing is reported but what the simulation confirms; a run sees few failures, so its mean moves
        assert row["useful"] == pytest.approx(row["useful_expected"], abs=0.02)
    assert many["useful_expected"] < few["useful_expected"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "8,x"], "--gpus is '8,x': give numbers such as 8,64,512"),
        (["--gpus", "12"], "12 ranks do not fill nodes of cluster.devices = 8: take a multiple of it"),
        (["--runs", "0"], "--runs is 0: it must be at least 1"),
        (["--mtbf-days", "-1"], "the mean time between failures is -86400.0 s: it must be above 0"),
        (["--gpus", "2048"], "batch.global_size is 1024, which 2048 ranks do not divide: change --gpus or it"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"
