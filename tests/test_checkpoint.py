"""Checkpoints: whole or absent, verified before use, random states restored, weights handed on."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from smaug_ds.engine import checkpoint, files


class FakeEngine:
    """Writes and reads a file as DeepSpeed does; there is no rate to renew."""

    def __init__(self, content: str = "") -> None:
        self.content = content
        self.optimizer = SimpleNamespace(param_groups=[])
        self.lr_scheduler = SimpleNamespace(base_lrs=[], lr_lambdas=[], last_epoch=0)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "DeepSpeed's own pointer moves before all ranks are done"
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "weights.pt").write_text(self.content * 1000)

    def load_checkpoint(self, folder: str, tag: str) -> None:
        self.content = (Path(folder) / tag / "weights.pt").read_text()[: len("step_0")]


def save(folder: Path, step: int, keep: int = 2, model: nn.Module | None = None) -> Path:
    model = model or nn.Linear(2, 3)
    engine = FakeEngine(f"step_{step}")
    return checkpoint.save(engine, folder, step, {"n": step}, {"meters": {"m": step}}, model, {"frames": 4}, keep)


WARNINGS: list[str] = []


def load(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    opened = checkpoint.open_latest(folder, WARNINGS.append)
    assert opened is not None
    latest, state = opened
    engine = FakeEngine()
    return engine.content or latest.name, state, checkpoint.restore(engine, latest)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    assert checkpoint.open_latest(tmp_path, WARNINGS.append) is None
    save(tmp_path, 5)
    name, state, rank_state = load(tmp_path)
    assert name == "step_5"
    assert (state["step"], state["n"], state["world_size"]) == (5, 5, 1)
    assert {"version", "commit", "torch"} <= state.keys()
    assert rank_state == {"meters": {"m": 5}}


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_10", "step_9"]
    (tmp_path / "latest").write_text("step_9")  # gone back by hand, then another step
    save(tmp_path, 10, keep=1)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_10"]
    assert load(tmp_path)[0] == "step_10"


def test_what_is_not_called_like_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("step_1_best", "step_best", "step_007"):
        (tmp_path / name).mkdir()
    for step in (2, 6, 8):
        save(tmp_path, step, keep=1)
    names = sorted(path.name for path in tmp_path.glob("step_*"))
    assert names == ["step_007", "step_1_best", "step_8", "step_best"]


@pytest.mark.parametrize("pointer", [None, "", "\n"])
def test_without_a_pointer_the_newest_is_taken_loudly(tmp_path: Path, pointer: str | None) -> None:
    """As after a kill between the first checkpoint's rename and the pointer."""
    save(tmp_path, 4), save(tmp_path, 16)
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    WARNINGS.clear()
    assert load(tmp_path)[1]["step"] == 16
    assert len(WARNINGS) == 1 and "latest is missing or empty; going on from step_16" in WARNINGS[0]
    assert load(tmp_path)[1]["step"] == 16 and len(WARNINGS) == 1
    (tmp_path / "latest").write_text("step_4")
    assert load(tmp_path)[1]["step"] == 4


def test_a_damaged_checkpoint_is_passed_over_loudly_and_written_again(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_12" / "engine" / "weights.pt").write_text("step_1" * 999)
    (tmp_path / "step_8" / "config.json").unlink()
    WARNINGS.clear()
    name, state, _ = load(tmp_path)
    assert (name, state["step"]) == ("step_4", 4)
    assert len(WARNINGS) == 1 and "step_12/engine/weights.pt is damaged, its bytes is 5994 instead of" in WARNINGS[0]
    assert "going on from step_4, 2 before it passed over and now called damaged_step_N" in WARNINGS[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged_step_12", "damaged_step_8", "latest", "step_4"]
    save(tmp_path, 8, keep=3)  # the run that went on comes by the same steps
    save(tmp_path, 12, keep=3)
    assert load(tmp_path)[0] == "step_12" and len(WARNINGS) == 1
    for step in (4, 8, 12):
        (tmp_path / f"step_{step}" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"none of step_12, step_8, step_4 in .* is whole: .*step_12/manifest\.json"):
        checkpoint.open_latest(tmp_path, WARNINGS.append)


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 4)
    for damaged in ("damaged_step_8", "damaged_step_8_1"):
        save(tmp_path, 8)
        (tmp_path / "step_8" / "manifest.json").unlink()
        assert load(tmp_path)[0] == "step_4"
        assert (tmp_path / damaged).is_dir()
    save(tmp_path, 12)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_12", "step_4"]


@pytest.mark.parametrize("pointer", [b"\0" * 7, b"step_", b"\xff\xfe", b"step_x"])
def test_a_pointer_that_names_nothing_is_passed_over_loudly(tmp_path: Path, pointer: bytes) -> None:
    save(tmp_path, 4), save(tmp_path, 16)
    (tmp_path / "latest").write_bytes(pointer)
    WARNINGS.clear()
    assert load(tmp_path)[1]["step"] == 16
    assert len(WARNINGS) == 1 and "latest names no checkpoint; going on from step_16" in WARNINGS[0]
    assert files.read_pointer(tmp_path) == "step_16"


@pytest.mark.parametrize("manifest", ["[]", '{"files": [1]}', '{"files": {"a": 1}}', "null"])
def test_a_manifest_of_another_form_is_damage(tmp_path: Path, manifest: str) -> None:
    save(tmp_path, 4), save(tmp_path, 8)
    (tmp_path / "step_8" / "manifest.json").write_text(manifest)
    WARNINGS.clear()
    assert load(tmp_path)[1]["step"] == 4
    assert "step_8/manifest.json cannot be read" in WARNINGS[0]


def test_saving_the_latest_step_again_does_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert save(tmp_path, 3) == path
    assert (path / "manifest.json").stat().st_mtime_ns == before


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it and clean up."""


STAGES: dict[str, tuple[Any, str]] = {
    "engine": (FakeEngine, "save_checkpoint"),
    "random states": (torch, "save"),
    "weights": (files, "save_file"),
    "texts": (files, "write_text"),
    "sync": (os, "fsync"),
    "rename": (os, "rename"),
    "pointer": (os, "replace"),
    "retention": (files, "retain"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_stage_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, after: bool
) -> None:
    save(tmp_path, 4)
    owner, name = STAGES[stage]
    original: Callable[..., Any] = getattr(owner, name)

    def killed(*arguments: Any, **options: Any) -> None:
        if after:
            original(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            save(tmp_path, 8)
    published = stage == "retention" or (stage == "pointer" and after)
    assert load(tmp_path)[1]["step"] == (8 if published else 4)

    save(tmp_path, 8)  # the next run gets there again
    assert load(tmp_path)[1]["step"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_4", "step_8"]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["engine/weights.pt", "model.safetensors", "rank_00000.pt", "state.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, how: str) -> None:
    file = save(tmp_path, 4) / name
    if how == "flipped":
        damage(file)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=f"{name} is {'missing' if how == 'missing' else 'damaged'}.*remove them"):
        load(tmp_path)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    (save(tmp_path, 4) / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        load(tmp_path)


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()
    save(tmp_path, 1)
    expected = draw()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    load(tmp_path)
    assert draw() == expected


def test_weights_are_found_by_run_and_by_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    path = save(tmp_path / "checkpoints", 4, model=model)
    for place in (tmp_path, path):
        weights = checkpoint.load_weights(place)
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert json.loads((path / "config.json").read_text()) == {"frames": 4}
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        checkpoint.load_weights(tmp_path / "nowhere")
    (path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        checkpoint.load_weights(path)


def test_weights_that_share_storage_are_saved_each(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    flat = torch.arange(9.0)  # as ZeRO lays parameters out
    model.weight.data, model.bias.data = flat[:6].view(3, 2), flat[6:]
    path = save(tmp_path, 1, model=model)
    assert safetensors.torch.load_file(path / "model.safetensors")["bias"].tolist() == [6, 7, 8]


def test_initialising_from_another_model_tells_what_was_left_over() -> None:
    source = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)})
    target = nn.ModuleDict({"a": nn.Linear(2, 3), "c": nn.Linear(3, 1)})
    before: dict[str, Tensor] = {name: value.clone() for name, value in target.state_dict().items()}
    told = checkpoint.initialise(target, source.state_dict())
    assert told == "2 weights taken, missing: 2 (c), unused: 2 (b)"
    assert torch.equal(target["a"].weight, source["a"].weight)
    assert torch.equal(target["c"].weight, before["c.weight"])


def test_initialising_with_a_wrong_shape_names_key_and_shapes() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[3, 2\], but the model needs \[4, 2\]"):
        checkpoint.initialise(nn.Linear(2, 4), nn.Linear(2, 3).state_dict())
    with pytest.raises(ValueError, match="none of the 2 weights has a place in the model"):
        checkpoint.initialise(nn.ModuleDict({"a": nn.Linear(2, 3)}), nn.Linear(2, 3).state_dict())


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def test_deepspeed_unpickles_no_code(tmp_path: Path) -> None:
    from smaug_ds.engine.deepspeed import safe_load

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with safe_load(), pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "evil.pt", weights_only=False)  # as DeepSpeed does
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
