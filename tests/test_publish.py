"""Publishing a checkpoint: no file is lost on the way, the best one is known at every moment."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.quarantine import DataError, TooManyFailuresError
from smaug_ds.engine import checkpoint, files
from smaug_ds.engine.files import Retention
from smaug_ds.engine.finetuning import ChoiceTask, QuestionTask
from smaug_ds.engine.monitor import NonFiniteError
from smaug_ds.engine.reports import JsonLines
from smaug_ds.engine.run import exit_code, require_metric
from smaug_ds.engine.saving import SaveError, Saver
from smaug_ds.engine.tasks import RetrievalTask
from smaug_ds.engine.train import RunConfig, train
from smaug_ds.engine.watchdog import Watchdog
from tests.ranks import run_ranks
from tests.test_checkpoint import FakeEngine, Killed
from tests.test_saving import RANK_STATE, names, save


def make_saver(folder: Path, **options: Any) -> Saver:
    return Saver(FakeEngine("step_4"), nn.Linear(2, 3), folder, {}, Retention(1), **options)


@pytest.mark.parametrize(("how", "told"), [("missing", "is not seen"), ("short", r"has 1 bytes instead of \d+")])
def test_what_a_rank_has_written_is_not_left_out_of_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, told: str
) -> None:
    """As with a network's disk whose cache on the main rank's host does not know of the file yet."""
    saver = make_saver(tmp_path)
    save(saver, 4)
    whole = files.publish

    def publish(aside: Path, *arguments: Any) -> int:
        file = aside / "rank_00000.pt"
        file.unlink()
        if how == "short":
            file.write_bytes(b"x")
        return whole(aside, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", publish)
        with pytest.raises(SaveError, match=rf"rank_00000\.pt, which a rank has written, {told}"):
            save(saver, 8)
    assert names(tmp_path) == ["latest", "step_4"]


def test_a_file_that_the_listing_misses_is_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.rglob

    def rglob(self: Path, pattern: str) -> Any:
        return (path for path in whole(self, pattern) if path.name != "rank_00000.pt")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rglob", rglob)
        save(make_saver(tmp_path), 4)
    listed = json.loads((tmp_path / "step_4" / "manifest.json").read_text())["files"]
    assert "rank_00000.pt" in listed and listed == dict(sorted(listed.items()))
    checkpoint.verify(tmp_path / "step_4")


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_kill_while_pointers_move_forgets_no_best_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """moves: pointers that are in place when the kill comes."""
    saver = make_saver(tmp_path, keep_best="r1", background=False)
    save(saver, 2, {"r1": 5.0})
    save(saver, 4, {"r1": 1.0})
    whole, left = os.replace, [moves]

    def replace(*arguments: Any) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(files, "retain", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            save(saver, 6, {"r1": 9.0})
    saver = make_saver(tmp_path, keep_best="r1")  # the next start
    assert saver.latest == ("step_6" if moves else "step_4")
    best = files.read_best(tmp_path)
    assert best is not None and best["checkpoint"] == ("step_6" if moves else "step_2")
    assert saver.judge(8, {"r1": 7.0}) == (moves == 0)
    save(saver, 8)
    assert names(tmp_path) == ["best.json", "latest", *(["step_6"] if moves else []), "step_8"]


def test_a_metric_that_there_is_not_is_named_at_the_start() -> None:
    for task, known in ((RetrievalTask, "t2v_r1"), (ChoiceTask, "accuracy"), (QuestionTask, "accuracy")):
        require_metric(known, task.metrics)
        require_metric("", task.metrics)
        with pytest.raises(ConfigError, match=rf"run\.keep_best is t2v_R1: the evaluation yields .*{known}"):
            require_metric("t2v_R1", task.metrics)
    assert {"dual_encoder", "protocol", "details"}.isdisjoint(RetrievalTask.metrics)


def test_lines_are_tried_once_more_at_the_end(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines._pending = b'{"step": 1}\n'  # had no room
    lines.close()
    assert (tmp_path / "lines.jsonl").read_bytes() == b'{"step": 1}\n'


def test_the_run_folder_is_synced_when_the_folder_of_checkpoints_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    saver = make_saver(tmp_path / "checkpoints")
    saver.begin(4, {}, RANK_STATE)
    saver.finish()
    assert tmp_path in synced


def test_a_finished_run_that_is_asked_for_fewer_steps_stays_finished() -> None:
    engine: Any = SimpleNamespace(fp16_enabled=lambda: False)
    monitor: Any = SimpleNamespace(first_step=6)
    nothing: Any = None
    assert train(engine, [], nothing, RunConfig(), 4, 1, monitor, nothing, nothing) == 6


def test_an_error_that_cannot_be_printed_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stderr", Full())
    distributed.print_error(ValueError("told"))
    watchdog = Watchdog(Path("nowhere"), 0.0)
    with pytest.raises(RuntimeError, match=r"^first$"), watchdog:
        raise RuntimeError("first")


def read_with_a_bad_sector(folder: str) -> tuple[str, list[str]]:
    """Rank 1 of 2 cannot read a file of the newest checkpoint."""
    told: list[str] = []
    whole = checkpoint.describe

    def describe(path: Path) -> dict[str, Any]:
        if distributed.rank() == 1 and path.parent.name == "step_8":
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # without a name, as `read` raises it
        return whole(path)

    checkpoint.describe = describe
    try:
        opened = checkpoint.open_latest(Path(folder), told.append)
    finally:
        checkpoint.describe = whole
    assert opened is not None
    return opened[0].name, told


def test_a_file_that_one_rank_cannot_read_is_damage_for_all(tmp_path: Path) -> None:
    saver = Saver(FakeEngine("step_4"), nn.Linear(2, 3), tmp_path, {}, Retention(2))
    save(saver, 4), save(saver, 8)
    for name, told in run_ranks(read_with_a_bad_sector, 2, str(tmp_path)):
        assert name == "step_4" and len(told) == 1
        assert "rank 1: " in told[0] and "/step_8/" in told[0] and "cannot be read: Input/output error" in told[0]


def test_only_what_a_repetition_would_meet_again_keeps_the_scripts_from_repeating() -> None:
    told = (ConfigError, NonFiniteError, TooManyFailuresError, DataError)
    assert [exit_code(kind("told")) for kind in told] == [2, 87, 87, 1]
