"""The profiler: its subcommands at tiny size, and the arithmetic of its advice on made-up figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.profiling.loader import Demand, advise, demand_of_run, share_waiting, workers_for
from tools.profiling.machine import family, use
from tools.profiling.stages import NvdecRate, Stage

ROOT = Path(__file__).resolve().parent.parent
TINY = ["clips=8", "clip_seconds=1", "batch=4", "image_size=32", "repeats=1", "seconds=0.2", "data.workers=1"]
STAGES = [
    Stage("read", "worker", 1.0),
    Stage("read, file not cached", "worker", 50.0, counted=False),
    Stage("demux, frame choice", "worker", 1.0),
    Stage("decode", "worker", 7.0),
    Stage("trim", "worker", 1.0, counted=False),
    Stage("pack, send", "worker", 1.0),
    Stage("graph", "rank", 4.0),
]


def run(*arguments: str, fails: bool = False) -> str:
    """What the profiler prints; its error where it should fail."""
    command = [sys.executable, "tools/profile_throughput.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


def test_loader_tells_stages_advice_and_conditions(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    out = run("loader", *TINY, "frames=[2]", "--rate", "1e6", "--nvdec-rate", "500", "--json", str(file))
    told = json.loads(file.read_text())
    assert {"hardware", "versions", "config", "command", "figures"} <= set(told)
    assert told["config"]["data"]["workers"] == 1
    assert "loader" in told["command"]
    images, clips = told["figures"]
    assert (images["case"], clips["case"]) == ("images", "clips, 2 frames")
    names = [stage["name"] for stage in clips["stages"]]
    for name in ("read", "demux, frame choice", "decode", "trim", "pack, send", "graph"):
        assert name in names
        assert name in out
    assert all(stage["milliseconds"] > 0 for figure in (images, clips) for stage in figure["stages"])
    assert clips["whole"]["samples_per_second"] > 0
    assert clips["advice"]["bottleneck"] in clips["advice"]["limits"]
    assert clips["advice"]["engines"] == 2000
    assert "bottleneck: " in out
    assert "assumed" in out


def test_soak_tells_memory_and_files_of_workers() -> None:
    out = run("loader", *TINY, "frames=[1]", "--soak", "40")
    lines = [line.split() for line in out.splitlines() if line.startswith("  ") and line.split()[0].isdigit()]
    assert [int(line[0]) for line in lines] == 2 * list(range(4, 41, 4))  # images, then clips
    assert all(sum(word.endswith(":") for word in line) >= 2 for line in lines)  # the rank and its worker


def test_index_tells_each_rank_and_the_shuffle(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    out = run("index", "--samples", "60000", "--shards", "120", "--json", str(file), "workers=0")
    assert "rank 1: opening" in out
    figures = json.loads(file.read_text())["figures"]
    assert [set(rank["lookup_microseconds"]) for rank in figures["ranks"]] == 2 * [{"image", "video"}]
    assert figures["shuffle"]["image"]["sets_per_batch"] == 5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frames=[0]"], "frames is [0]"),
        (["batch=0"], "batch is 0"),
        (["--rate", "0"], "--rate is 0.0"),
        (["--run", "nowhere"], "--run nowhere"),
        (["--data", "nowhere"], "data.tokenizer is empty"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], expected: str) -> None:
    assert run("loader", *arguments, fails=True).startswith(f"error: {expected}")


def test_the_slowest_part_is_the_bottleneck() -> None:
    few = advise(STAGES, 190, cpu_ms=14, workers=2, cores=16, demand=None, nvdec=None)
    assert few.limits == pytest.approx({"workers": 200, "rank": 250, "cores": 16e3 / 14})
    assert few.bottleneck == "workers"
    assert "decode takes 70%" in few.lines[1]
    assert advise(STAGES, 240, cpu_ms=14, workers=8, cores=16, demand=None, nvdec=None).bottleneck == "rank"
    assert advise(STAGES, 130, cpu_ms=14, workers=8, cores=2, demand=None, nvdec=None).bottleneck == "cores"
    alone = advise(STAGES, 70, cpu_ms=14, workers=0, cores=16, demand=None, nvdec=None)
    assert alone.limits["rank"] == pytest.approx(1e3 / 14)
    assert alone.bottleneck == "rank"


def test_advice_counts_workers_and_engines() -> None:
    advice = advise(STAGES, 200, 14, 2, 16, Demand(1000, 0.032), NvdecRate(300, 900))
    assert advice.workers == 10
    assert advice.engines == 4
    assert advice.waiting == pytest.approx(0.8)
    assert "3 workers" in advice.lines[-1]  # read, demux and trim: 3 ms
    assert "measured" in advice.lines[-1]
    assert "not measured" in advise(STAGES, 200, 14, 2, 16, Demand(1000, 0.032), None).lines[-1]


@pytest.mark.parametrize(("rate", "ms", "workers"), [(100, 10, 1), (101, 10, 2), (1000, 6.2, 7), (0.1, 1, 1)])
def test_workers_for(rate: float, ms: float, workers: int) -> None:
    assert workers_for(rate, ms) == workers


def test_share_waiting() -> None:
    assert share_waiting(100, 25) == pytest.approx(0.75)
    assert share_waiting(100, 100) == share_waiting(100, 500) == 0


def test_demand_of_a_run_leaves_its_wait_out(tmp_path: Path) -> None:
    steps = {"seconds_per_step/data": 0.3, "seconds_per_step/forward": 0.04, "seconds_per_step/backward": 0.06}
    lines = [{"step": 1, "samples_per_second": 1.0, **steps}, {"step": 2, "samples_per_second": 80.0, **steps}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert demand_of_run(tmp_path) == Demand(pytest.approx(320), pytest.approx(0.1))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no logged step"):
        demand_of_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '{"step": 1, "samples_per_second": 2.0}\n',
            "phases of the last logged step take 0 s without seconds_per_step/data",
        ),
        ('{"samples_per_second": 2.0, "seconds_per_step/data": 0.3}\n', "phases of the last logged step take 0 s"),
        ('{"step": 1}\n7\n', "line 2: expected a JSON object, found 7"),
    ],
)
def test_metrics_that_tell_no_demand(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=expected):
        demand_of_run(tmp_path)


def test_the_family_of_a_process_is_found() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        found = family()[child.pid]
        assert found.name == "sleep"
        assert found.descriptors >= 3
    finally:
        child.kill()
        child.wait()
    assert child.pid not in family()
    assert use("self") is not None
