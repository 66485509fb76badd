"""Saving beside training: what is copied when, disks without room, what is kept; at several ranks together."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.engine import checkpoint, files
from smaug_ds.engine.deepspeed import build_engine
from smaug_ds.engine.files import Retention
from smaug_ds.engine.monitor import Monitor
from smaug_ds.engine.optim import OptimConfig
from smaug_ds.engine.reports import JsonLines
from smaug_ds.engine.saving import Saved, SaveError, Saver
from smaug_ds.engine.snapshot import HostCopy
from smaug_ds.engine.train import RunConfig
from tests.ranks import run_ranks
from tests.standin import CPU_JSON, Standin, batch_of
from tests.test_checkpoint import FakeEngine, load

RANK_STATE = {"meters": {"m": 1}}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(saver: Saver, step: int, report: dict[str, Any] | None = None) -> None:
    if report is not None:
        saver.judge(step, report)
    saver.begin(step, {}, RANK_STATE)
    saver.finish()


# ---- the copy


def test_a_checkpoint_holds_what_was_there_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gate, told = nn.Linear(2, 3), threading.Event(), []
    monkeypatch.setattr(files, "write_tensors", waits_for(gate, files.write_tensors))
    saver = Saver(FakeEngine("step_4"), model, tmp_path, {}, Retention(2), report=told.append)
    expected, sums = model.weight.detach().clone(), torch.ones(3)
    saver.begin(4, {}, {"meters": {"sums": sums}})
    with torch.no_grad():  # training goes on
        model.weight.add_(1), sums.add_(1)
    assert saver.writing and not told and saver.latest is None
    saver.advance(writing=True)  # another rank is not done
    assert names(tmp_path) == [".writing-step_4"]
    gate.set()
    saver.finish()
    assert torch.equal(checkpoint.load_weights(tmp_path / "step_4")["weight"], expected)
    assert load(tmp_path)[2]["meters"]["sums"].tolist() == [1, 1, 1]
    manifest = json.loads((tmp_path / "step_4" / "manifest.json").read_text())["files"]
    size = sum(path.stat().st_size for path in (tmp_path / "step_4").rglob("*") if path.is_file())
    assert told == [Saved(4, size, told[0].blocking_seconds, told[0].total_seconds)]
    assert 0 < told[0].blocking_seconds <= told[0].total_seconds
    assert manifest.keys() == {"config.json", "engine/weights.pt", "model.safetensors", "rank_00000.pt", "state.json"}


def waits_for(gate: threading.Event, work: Callable[..., Any]) -> Callable[..., Any]:
    def later(*arguments: Any) -> Any:
        assert gate.wait(60)
        return work(*arguments)

    return later


class Holder:
    """Hands states to its checkpoint engine as DeepSpeed does."""

    checkpoint_engine: Any = None

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.save(self.state, os.path.join(folder, tag, "states.pt"))


def test_the_copy_shares_nothing_and_takes_shared_weights_once(tmp_path: Path) -> None:
    flat, model = torch.arange(12.0), nn.Linear(2, 3)
    model.weight.data = flat[:6].view(3, 2)
    state = {
        "module": {"weight": flat[:6].view(3, 2), "bias": model.bias.data},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        "part": flat[2:5],
        "turned": flat.view(3, 4).t(),
        "step": torch.tensor(3.0),
        "none": None,
    }
    host, aside = HostCopy(copies=True), tmp_path / "aside"
    host.take(Holder(state), aside, "rank_0.pt", {"list": [flat[:2]]}, model)
    taken = host.files["engine/states.pt"]
    assert taken["module"]["weight"] is host.weights["weight"]
    assert host.bytes() == 4 * (6 + 3 + 3 + 12 + 1 + 2) + 4 * (6 + 3)  # the weights go into two files
    addresses = {taken["part"].data_ptr(), taken["turned"].data_ptr(), flat.data_ptr()}
    flat.zero_()
    state["groups"][0]["lr"] = 7
    assert taken["part"].tolist() == [2, 3, 4] and taken["groups"] == [{"lr": 0.1, "betas": (0.9, 0.99)}]
    assert torch.equal(taken["turned"], torch.arange(12.0).view(3, 4).t())
    assert host.files["rank_0.pt"]["list"][0].tolist() == [0, 1] and taken["none"] is None
    state["part"] = flat[2:5] + 9
    host.take(Holder(state), aside, "rank_0.pt", {}, None)
    again = host.files["engine/states.pt"]
    assert again["part"].tolist() == [9, 9, 9] and not host.weights
    assert {again["part"].data_ptr(), again["turned"].data_ptr()} < addresses, "the same buffers"


def test_without_a_copy_the_live_tensors_are_handed_on(tmp_path: Path) -> None:
    weight = torch.ones(2)
    host = HostCopy(copies=False)
    host.take(Holder({"w": weight}), tmp_path, "rank_0.pt", {}, None)
    assert host.files["engine/states.pt"]["w"] is weight


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_copied_into_pinned_memory(tmp_path: Path) -> None:
    weight, host = torch.arange(1e6, device="cuda"), HostCopy(copies=True)
    host.take(Holder({"w": weight, "part": weight[5:9].half()}), tmp_path, "rank_0.pt", {}, None)
    weight.zero_()
    taken = host.files["engine/states.pt"]
    assert taken["w"].is_pinned() and torch.equal(taken["w"], torch.arange(1e6))
    assert taken["part"].tolist() == [5, 6, 7, 8]


# ---- no room


@pytest.mark.parametrize("stage", ["mkdir", "open", "write", "fsync", "safetensors", "rename", "replace", "room"])
@pytest.mark.parametrize("go_on", [True, False])
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, go_on: bool
) -> None:
    told: list[str] = []
    saver = Saver(Holder({}), nn.Linear(2, 3), tmp_path, {}, Retention(2), go_on=go_on, tell=told.append)

    def latest() -> str:
        opened = checkpoint.open_latest(tmp_path, told.append)
        assert opened
        return opened[0].name

    save(saver, 4)
    with monkeypatch.context() as patch:
        if stage == "safetensors":
            error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            patch.setattr(files, "save_file", lambda *_, **__: (_ for _ in ()).throw(error))
        elif stage == "room":
            patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
        elif stage == "open":
            patch.setattr(files, "HashedFile", full)
        elif stage == "write":
            patch.setattr(files.HashedFile, "close", full)
        else:
            patch.setattr(os, stage, full)
        if go_on:
            save(saver, 8)
        else:
            with pytest.raises(SaveError, match=r"run\.on_full_disk=continue"):
                save(saver, 8)
    if go_on:
        reason = "there is no room" if stage == "room" else "No space left on device"
        assert len(told) == 1 and "the checkpoint of step 8 was not written: " + reason in told[0]
        assert told[0].endswith("the latest one is step_4. Training goes on, the next save tries again")
    assert not (tmp_path / "step_8").exists() and not list(tmp_path.glob(".writing-step*"))
    assert (latest(), saver.latest) == ("step_4", "step_4")
    save(saver, 12)
    assert (latest(), saver.latest) == ("step_12", "step_12")
    assert names(tmp_path) == ["latest", "step_12", "step_4"]


def fail_on_one_rank(folder: str) -> list[Any]:
    """Rank 1 of 2 has no room, in the second save."""
    told: list[str] = []
    engine = build_engine(Standin(), CPU_JSON, OptimConfig(), lambda step: 1.0, 2, 1)
    saver = Saver(engine, engine.module, Path(folder), {}, Retention(2), go_on=True, tell=told.append)
    save(saver, 1)
    whole = files.HashedFile.close
    if distributed.rank() == 1:
        files.HashedFile.close = full  # type: ignore[assignment]
    save(saver, 2)
    files.HashedFile.close = whole  # type: ignore[method-assign]
    distributed.barrier()
    after, listed = saver.latest, names(Path(folder))
    losses = engine(batch_of(0, "video", range(2)))
    engine.backward(losses["loss"])
    engine.step()
    save(saver, 3)
    return [after, listed, saver.latest, told]


def test_what_one_rank_cannot_write_is_given_up_by_all(tmp_path: Path) -> None:
    for after, listed, latest, told in run_ranks(fail_on_one_rank, 2, str(tmp_path)):
        assert (after, listed, latest) == ("step_1", ["latest", "step_1"], "step_3")
        assert len(told) == 1 and "No space left on device" in told[0]
    checkpoint.verify(tmp_path / "step_3")


def test_lines_that_do_not_fit_come_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the second one is on the disk when it is full."""

    class Disk:
        room, data = 20, b""

        def write(self, data: bytes) -> int:
            if self.room == 0:
                full()
            taken = data[: self.room]
            self.data, self.room = self.data + taken, self.room - len(taken)
            return len(taken)

    lines, disk = JsonLines(tmp_path / "lines.jsonl"), Disk()
    lines.close()
    lines._file = disk  # type: ignore[assignment]
    for step in range(3):
        lines.write({"step": step, "x": 1.5})
    assert capsys.readouterr().out.count("WARNING") == 1 and len(disk.data) == 20
    disk.room = 1000
    lines.write({"step": 3, "x": 1.5})
    assert [json.loads(line)["step"] for line in disk.data.splitlines()] == [0, 1, 2, 3]


def test_figures_without_room_are_lost_and_later_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = Monitor(tmp_path, torch.device("cpu"), total_steps=2, global_batch=1)
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
        monitor.scalars(1, {"a": 1.0}), monitor.scalars(1, {"a": 1.0})
    assert capsys.readouterr().out.count("figures are missing there") == 1
    monitor.scalars(2, {"a": 1.0})
    monitor.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


# ---- what stays


def test_every_k_th_checkpoint_stays(tmp_path: Path) -> None:
    saver = Saver(FakeEngine("step_4"), nn.Linear(2, 3), tmp_path, {}, Retention(last=1, every=6))
    for step in range(2, 17, 2):
        save(saver, step)
    assert names(tmp_path) == ["latest", "step_12", "step_16", "step_6"]


@pytest.mark.parametrize(("metric", "sign"), [("t2v_r1", 1), ("median_rank", -1)])
def test_the_best_checkpoint_stays_until_a_better_one_comes(tmp_path: Path, metric: str, sign: int) -> None:
    def start() -> Saver:
        return Saver(FakeEngine("step_4"), nn.Linear(2, 3), tmp_path, {}, Retention(1), metric)

    saver = start()
    for step, value in ((2, 10.0), (4, 30.0), (6, 20.0), (8, None)):
        assert value is None or saver.judge(step, {metric: sign * value, "split": "test"}) == (value > step * 4)
        save(saver, step)
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"checkpoint": "step_4", "metric": metric, "value": sign * 30.0, "step": 4}
    assert names(tmp_path) == ["best.json", "latest", "step_4", "step_8"]
    saver = start()  # a run that was started again
    assert not saver.judge(10, {metric: sign * 30.0})
    save(saver, 10)
    assert saver.judge(10, {metric: sign * 40.0})  # the last one is measured after it is saved
    assert names(tmp_path) == ["best.json", "latest", "step_10"]
    with pytest.raises(ConfigError, match=r"run\.keep_best is .*: the evaluation yields v2t_r1$"):
        saver.judge(12, {"v2t_r1": 1.0, "split": "test"})


def test_a_best_one_that_could_not_be_written_is_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(FakeEngine("step_4"), nn.Linear(2, 3), tmp_path, {}, Retention(1), "r1", go_on=True)
    save(saver, 2, {"r1": 5.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        save(saver, 4, {"r1": 50.0})
    save(saver, 6, {"r1": 1.0})
    assert names(tmp_path) == ["best.json", "latest", "step_2", "step_6"]
    save(saver, 8, {"r1": 6.0})
    assert names(tmp_path) == ["best.json", "latest", "step_8"]


def test_a_run_that_went_back_finds_its_best_anew(tmp_path: Path) -> None:
    saver = Saver(FakeEngine("step_4"), nn.Linear(2, 3), tmp_path, {}, Retention(2), "r1")
    save(saver, 2), save(saver, 4, {"r1": 50.0})
    (tmp_path / "latest").write_text("step_2")
    saver = Saver(FakeEngine("step_4"), nn.Linear(2, 3), tmp_path, {}, Retention(2), "r1")
    assert saver.judge(4, {"r1": 50.0})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep_every": 1500}, r"run\.keep_every is 1500, not a multiple of run\.save_every, which is 1000"),
        ({"keep_every": 2, "save_every": 0}, r"run\.keep_every is 2, not a multiple"),
        ({"keep_best": "t2v_r1"}, r"run\.keep_best is t2v_r1, but run\.evaluate_every is 0"),
    ],
)
def test_what_could_not_be_kept_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RunConfig(**settings)
