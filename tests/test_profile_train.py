"""The profiler of a real run: the arithmetic of its record, the timing of collectives, and two ranks of it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from smaug_ds.config import ConfigError, parse
from smaug_ds.engine.monitor import PHASES
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.planner.calibration import rows, speed
from smaug_ds.planner.cluster import ClusterConfig, Machine
from smaug_ds.planner.memory import Precision
from tests.test_profile_step import CONTRACT
from tools.profiling import train
from tools.profiling.ranks import watched_communication
from tools.profiling.step import Step, StepConfig
from tools.profiling.train import record
from tools.profiling.turns import executed_flops


def test_record_of_a_run_takes_the_ranks_agreement_out_of_the_wait_for_data() -> None:
    config = parse(PretrainConfig, None, ["batch.global_size=8", "batch.micro_size=2"])
    line = {"samples_per_second": 4.0, "peak_memory_bytes": 7.0, "loss/image": 1.0}
    for phase, seconds, communication in (("data", 0.3, 0.2), ("forward", 0.5, 0.1), ("backward", 0.9, 0.4)):
        line |= {f"seconds_per_step/{phase}": seconds, f"communication/{phase}": communication}
    line |= {"seconds_per_step/step": 0.2, "communication/step": 0.0}
    measured = record(config, [line] * 3, 2, "bf16", 12.0)
    assert set(measured) >= CONTRACT
    assert measured["seconds_per_step"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert measured["phases"] == pytest.approx(
        {"data": 0.1, "forward": 0.4, "backward": 0.5, "step": 0.2, "communication": 0.7}
    )
    assert measured["share_waiting_for_data"] == pytest.approx(0.05)
    assert "waits for data 5.0% of a step" in train.tell(measured)


@pytest.mark.parametrize("frames", [(1, 1), (4, 2)])
def test_record_of_a_run_calibrates_a_plan(tmp_path: Path, frames: tuple[int, int]) -> None:
    """Its operations are those that torch counts, of all micro steps of a rank."""
    engine = tmp_path / "engine.json"
    engine.write_text(Path("ds_configs/cpu.json").read_text(encoding="utf-8"), encoding="utf-8")
    shape = [f"model.frames={frames[0]}", f"model.frames_kept={frames[1]}", "model.size=tiny"]
    settings = [*shape, "batch.global_size=32", "batch.micro_size=8", f"run.deepspeed={engine}"]
    config = parse(PretrainConfig, None, settings)
    medium = "image" if frames[0] == 1 else "video"
    line = {f"{kind}/{phase}": 0.2 for kind in ("seconds_per_step", "communication") for phase in PHASES}
    line |= {f"seconds_per_step/{phase}": 1.2 for phase in PHASES}
    line |= {"samples_per_second": 6.0, "peak_memory_bytes": 7.0, f"loss/{medium}": 1.0}
    measured = record(config, [line] * 3, 1, "fp32", 24.0)
    text = dataclasses.replace(config.model.text, max_length=24)
    model = dataclasses.replace(config.model, text=text)
    step = StepConfig(model, batch=8, batches=1, captions="full")
    assert measured["flops_per_step"] == pytest.approx(4 * executed_flops(Step(step)), rel=0.03)
    found = rows(json.loads(json.dumps({"measured": [measured]})), "FILE")
    machine = Machine.of(ClusterConfig(device="cpu"), calibrated=True)
    fast = speed(found, machine, "tiny", frames[0], 1, Precision.of({}))
    assert fast.flops == pytest.approx(measured["flops_per_step"] / 2)  # forward and backward pass, a second each
    assert fast.optimizer == pytest.approx(1 / measured["parameters"])


def test_communication_is_timed_once_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any, **__: Any) -> None:
        time.sleep(0.02)

    def of_two() -> None:
        dist.broadcast(None)
        dist.broadcast(None)

    monkeypatch.setattr(dist, "broadcast", slow)
    monkeypatch.setattr(dist, "all_reduce", of_two)
    with watched_communication() as spent:
        dist.all_reduce()
        assert 0.04 <= spent() < 0.08
        before = spent()
        with pytest.raises(TypeError):
            dist.all_reduce(1)
        dist.broadcast(None)
        assert spent() - before >= 0.02
    assert dist.broadcast is slow
    assert dist.all_reduce is of_two


@pytest.mark.slow
def test_train_runs_two_ranks_from_rendered_shards(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--ranks", "2", "--steps", "2", "--warmup", "1", "--clips", "4", "--json", str(out)]
    train.main([*arguments, "model.size=tiny", "batch.micro_size=2", "data.workers=0"], "train")
    (measured,) = json.loads(out.read_text())["measured"]
    assert (measured["what"], measured["world_size"], measured["steps"]) == ("train", 2, 2)
    assert measured["phases"]["communication"] > 0
    assert 10 <= measured["caption_tokens_mean"] <= 18
    assert measured["flops_per_step"] > 0
    assert {"data", "forward", "backward", "step"} <= set(measured["phases"])
    assert "error" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["data.train=[]"], None),
        (["--data", "/a", "--data", "/b"], ("/a", "/b")),
        (["data.train=[/a, /b]"], ("/a", "/b")),
        (["data={train: [/a]}"], ("/a",)),
        (["data.corpus=/c.yaml"], "/c.yaml"),
    ],
)
def test_clips_are_rendered_only_where_no_data_are_named(
    arguments: list[str], expected: tuple[str, ...] | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[Path] = []
    started: list[PretrainConfig] = []

    def render(folder: Path, *_: object) -> None:
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]) + "\n")
        rendered.append(folder)

    def start(ranks: int, settings: list[str], steps: int) -> None:
        started.append(parse(PretrainConfig, None, settings))
        raise ConfigError("far enough")

    monkeypatch.setattr(train, "render_corpus", render)
    monkeypatch.setattr(train, "run_ranks", start)
    with pytest.raises(SystemExit, match=r"^2$"):
        train.main([*arguments, "model.size=tiny"], "train")
    data = started[0].data
    assert len(rendered) == (expected is None)
    if rendered:
        expected = (f"{rendered[0]}/video",)
        assert data.tokenizer == f"{rendered[0]}/vocab.txt"
    assert (data.train or data.corpus) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "0"], "--ranks is 0"),
        (["--data", "/a", "data.train=[/b]"], '--data /a and data.train=["/b"]: give one of them'),
        (["--data", "/a", "data.corpus=/c.yaml"], "--data /a and data.corpus=/c.yaml: give one of them"),
        (["run.max_steps=3"], "run.max_steps cannot be set here"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: there is no folder nowhere"),
        (["--ranks", "2", "batch.global_size=9"], "batch.global_size is 9, not a multiple of 16"),
    ],
)
def test_wrong_settings_of_a_run_are_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        train.main(arguments, "train")
    told = capsys.readouterr().err
    assert told.startswith(f"error: {expected}") and told.count("\n") == 1
