"""What the profiler cannot do is told in one line before anything is measured, and no process waits for a dead one."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest

from smaug_ds.config import ConfigError
from smaug_ds.data.config import DataConfig
from tools.planning import host
from tools.profiling import ablation, index, loader, model
from tools.profiling.command import run
from tools.profiling.processes import run_together


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[..., object], Sequence[str]], str]:
    """Runs a subcommand that has to end with code 2 and one line; returns that line."""

    def refuse(main: Callable[..., object], arguments: Sequence[str]) -> str:
        with pytest.raises(SystemExit, match=r"^2$"):
            main(arguments, "profile")
        out, err = capsys.readouterr()
        assert out == "", "something was measured before"
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip()

    return refuse


@pytest.mark.parametrize(
    ("main", "arguments", "expected"),
    [
        (model.main, ["--png", "chart"], "--png chart: a chart cannot be written as a file without suffix"),
        (model.main, ["--png", "chart.txt"], "--png chart.txt: a chart cannot be written as .txt"),
        (model.main, ["--png", "chart.xbm"], "--png chart.xbm: a chart cannot be written as .xbm"),  # knows no colours
        (model.main, ["--tensorboard", f"{__file__}/sub"], f"--tensorboard {__file__}/sub: "),
        (model.main, ["--tensorboard", __file__], f"--tensorboard {__file__} is a file"),
        (
            model.main,
            ["--tensorboard", "/proc/nothing/x"],
            "--tensorboard /proc/nothing/x: ",
        ),  # no folder is made there
        (model.main, ["--json", f"{__file__}/x.json"], f"--json {__file__}/x.json: there is no folder {__file__}"),
        (
            ablation.main,
            ["--tables", "frames", "model.size=tiny", "model.temporal.heads=3"],
            "model.vision.width is 128, not a multiple of model.temporal.heads, which is 3",
        ),
        (index.main, ["decoder=nvdec"], "data.decoder is nvdec, but no GPU"),
        (loader.main, ["clip_seconds=0.01"], "clip_seconds is 0.01, which holds no frame at 30 frames/s"),
    ],
)
def test_told_before_anything_is_measured(
    main: Callable[..., object],
    arguments: list[str],
    expected: str,
    refused: Callable[[Callable[..., object], Sequence[str]], str],
) -> None:
    assert refused(main, arguments).startswith(expected)


def test_without_decord_the_comparison_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[[Callable[..., object], Sequence[str]], str]
) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)  # as if it were not installed
    told = refused(loader.main, ["--against", "decord"])
    assert told.startswith("--against decord: ")
    assert "pip install" in told


def test_charts_and_boards_that_can_be_written_pass(tmp_path: Path) -> None:
    arguments = ["--png", str(tmp_path / "chart.JPG"), "--tensorboard", str(tmp_path / "new" / "board")]
    parser = argparse.ArgumentParser()
    parser.add_argument("--png", type=Path)
    parser.add_argument("--tensorboard", type=Path)
    run(parser, arguments, None, lambda args: None)
    assert (tmp_path / "new" / "board").is_dir()
    assert not (tmp_path / "chart.JPG").exists()


def test_any_value_error_is_one_line_and_other_errors_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise ValueError("model.x is 1:\n  raise it") if args.overrides else TypeError("a bug")

    with pytest.raises(SystemExit, match=r"^2$"):
        run(argparse.ArgumentParser(), ["model.x=1"], None, fail)
    assert capsys.readouterr().err == "error: model.x is 1: raise it\n"
    with pytest.raises(TypeError, match="a bug"):
        run(argparse.ArgumentParser(), [], None, fail)


def test_host_looks_where_it_writes_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "measure", lambda *_: pytest.fail("it measured"))
    assert host.main(["--json", "/nonexistent/x.json", "model.size=tiny"], "host") == 2
    assert capsys.readouterr() == ("", "error: --json /nonexistent/x.json: there is no folder /nonexistent\n")


def test_an_index_without_videos_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        index.main(["--samples", "1", "--shards", "1"], "index")
    told = capsys.readouterr().err
    assert told.startswith("error: --samples is 1: with holdout=0.0 that leaves 1 images and 0 videos to train on")
    assert told.count("\n") == 1


def test_a_process_that_fails_ends_those_that_wait_for_it() -> None:
    context = get_context("spawn")
    processes = [context.Process(target=time.sleep, args=(3600,)), context.Process(target=sys.exit, args=(3,))]
    with pytest.raises(ConfigError, match=r"codes \[-9, 3\]"):
        run_together(processes, grace=0.1)


def test_a_rank_that_fails_ends_the_measurement_of_an_index(tmp_path: Path) -> None:
    """The ranks meet at barriers, and the first one cannot open what it is given."""
    with pytest.raises(ConfigError, match=r"codes \[1\] of its ranks"):
        index._measure_ranks(DataConfig(corpus=str(tmp_path / "absent.yaml")), tmp_path, 1)


def test_an_exchange_is_timed_between_computations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that an exchange puts on by 3 and a computation by 5, each exchange is 3."""
    clock = [0.0]
    monkeypatch.setattr(host.time, "perf_counter", lambda: clock[0])

    def passes(seconds: float) -> Callable[[], None]:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    assert host._mean_between(passes(5.0), passes(3.0)) == 3.0
    assert clock[0] == host.TURNS * 8.0
