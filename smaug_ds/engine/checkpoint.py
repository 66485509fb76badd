"""Checkpoints that are whole or absent: written aside, synced, renamed; the pointer ``latest`` moves last.

RUN/checkpoints/latest                     text: the name of the checkpoint to resume from
RUN/checkpoints/step_120/manifest.json     size and SHA-256 of every other file
                         state.json        step, loader, quarantine, config, versions, world size
                         model.safetensors the model alone, for a next stage, evaluation and fine-tuning
                         config.json       its architecture
                         rank_00000.pt     random states and meters of a rank
                         engine/           DeepSpeed's weights, optimizer and schedule
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smaug_ds
from smaug_ds import distributed
from smaug_ds.engine import elastic

LATEST = "latest"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
ARCHITECTURE = "config.json"
STATE = "state.json"
_ASIDE = ".writing-"


def save(
    engine: Any,
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    model: nn.Module,
    architecture: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes the checkpoint of ``step`` finished steps into ``folder`` and makes it the latest. All ranks call it.

    Args:
        state: of the whole run, JSON-able.
        rank_state: of this rank beside its random states, loadable with ``weights_only=True``.
        model: whose weights are written once more as safetensors, with ``architecture``.
        keep: number of checkpoints to leave, this one included.

    Whatever breaks off in the middle leaves the previous checkpoint and the pointer to it untouched.
    """
    final, aside = folder / f"step_{step}", folder / f"{_ASIDE}step_{step}"
    if _read_pointer(folder) == final.name:  # stopped again before another step was done
        return final
    if distributed.is_main():
        for stale in [*folder.glob(f"{_ASIDE}*"), final]:
            shutil.rmtree(stale, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(aside), tag="engine", save_latest=False)
    torch.save({**rank_state, "random": random_state()}, aside / f"rank_{distributed.rank():05d}.pt")
    if distributed.is_main():
        weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        _write_json(aside / ARCHITECTURE, architecture)
        _write_json(aside / STATE, {**state, "step": step, "world_size": distributed.world_size(), **code_version()})
    distributed.barrier()
    files = _on_all_ranks(aside, _sync_and_describe)
    if distributed.is_main():
        _write_json(aside / MANIFEST, {"format": 1, "files": files})
        _publish(aside, final)
        _retain(folder, step, keep)
    distributed.barrier()
    return final


def open_latest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of ``folder`` to resume from and its state, see ``read_state``; None where there is none at all.

    That is the one that ``latest`` names. If it is damaged, or nothing is named, it is the newest older one that is
    whole; ``warn`` is told, and the pointer goes back to it. All ranks call it.

    Raises:
        ValueError: there are checkpoints, but not one is whole; the message says what is wrong with the newest.
    """
    candidates = distributed.gather_objects(_candidates(folder))[0]  # as the main rank sees them
    damage: list[str] = []
    for number, name in enumerate(candidates):
        try:
            state = read_state(folder / name)
        except ValueError as error:
            damage.append(str(error))
            continue
        if _read_pointer(folder) != name:
            reason = damage[0] if damage else f"{folder / LATEST} is missing or empty"
            warn(f"WARNING: {reason}; going on from {name}, {number} before it passed over")
            distributed.barrier()
            if distributed.is_main():
                _point_to(folder, name)
            distributed.barrier()
        return folder / name, state
    if damage:
        raise ValueError(
            f"none of {', '.join(candidates)} in {folder} is whole: {damage[0]}; remove them to start anew"
        )
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Verifies a checkpoint and returns the ``state`` that ``save`` was given, with ``step`` and ``world_size``.

    All ranks call it. Raises ValueError naming a file that is missing or damaged.
    """
    verify(checkpoint)
    return json.loads((checkpoint / STATE).read_text())


def restore(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Puts a checkpoint that ``read_state`` has passed into ``engine`` and the random states of this rank.

    The learning rate goes on by the engine's own schedule, which may be longer than the one of the checkpoint. If the
    checkpoint is of another number of ranks, its parts are divided anew, see ``elastic``.
    Returns the ``rank_state`` that ``save`` was given.
    """
    from smaug_ds.engine.deepspeed import renew_rate, safe_load

    state = json.loads((checkpoint / STATE).read_text())
    if state["world_size"] == distributed.world_size():
        with safe_load():
            engine.load_checkpoint(str(checkpoint), tag="engine")
        rank_state = _read_rank(checkpoint, distributed.rank())
        set_random_state(rank_state.pop("random"))
    else:
        elastic.restore_engine(engine, checkpoint / "engine")
        rank_state = elastic.merge_rank_states([_read_rank(checkpoint, rank) for rank in range(state["world_size"])])
        elastic.seed_rank(state["step"])
    renew_rate(engine)
    return rank_state


def _read_rank(checkpoint: Path, rank: int) -> dict[str, Any]:
    return torch.load(checkpoint / f"rank_{rank:05d}.pt", map_location="cpu", weights_only=True)


def verify(checkpoint: Path) -> None:
    """Compares every file with the manifest; the ranks share the work. Raises ValueError naming what is damaged."""
    with distributed.agreeing(ValueError):
        try:
            expected = json.loads((checkpoint / MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{checkpoint / MANIFEST} cannot be read ({error})") from error
    found = _on_all_ranks(checkpoint, _describe)
    for name, facts in expected.items():
        if name not in found:
            raise ValueError(f"{checkpoint / name} is missing")
        for fact in ("bytes", "sha256"):
            if facts[fact] != found[name][fact]:
                wrong = f"{fact} is {found[name][fact]} instead of {facts[fact]}"
                raise ValueError(f"{checkpoint / name} is damaged, its {wrong}")


def find(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` means: a run folder (its latest checkpoint) or a checkpoint itself.

    Raises ValueError when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a run folder or a checkpoint")
    name = _read_pointer(path / "checkpoints")
    found = path / "checkpoints" / name if name else path
    if not (found / WEIGHTS).is_file():
        raise ValueError(f"{path} is neither a run folder with a checkpoint nor a checkpoint with {WEIGHTS}")
    return found


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Model weights of a run folder or checkpoint, on the CPU. Raises ValueError naming a missing or damaged file."""
    file = find(path) / WEIGHTS
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def initialise(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Copies the weights that ``model`` has a place for, cast to its types, and says in a line what was left over.

    Raises ValueError when a shape differs (naming the key and both shapes) or nothing fits.
    """
    own = model.state_dict()
    missing, unused = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if len(missing) == len(own):
        raise ValueError(f"none of the {len(weights)} weights has a place in the model: {unused[:3]} ...")
    for name, value in weights.items():
        if name in own and own[name].shape != value.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, but the model needs {list(own[name].shape)}")
    model.load_state_dict(dict(weights), strict=False)
    return f"{len(own) - len(missing)} weights taken, missing: {_brief(missing)}, unused: {_brief(unused)}"


def random_state() -> dict[str, Any]:
    """States of the global generators of Python, NumPy and torch, made of tensors and plain numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what ``random_state`` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def code_version() -> dict[str, Any]:
    """Versions of this package, its git commit where there is one, and torch."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # not a checkout, or no git
        commit = None
    return {"version": smaug_ds.__version__, "commit": commit, "torch": torch.__version__}


def _candidates(folder: Path) -> list[str]:
    """Names of the checkpoints that a run may go on from, the one that ``latest`` names first, then older ones."""
    named = _read_pointer(folder)
    numbers = sorted(_step_numbers(folder), reverse=True)
    if not named:
        return [f"step_{number}" for number in numbers]
    step = re.fullmatch(r"step_(\d+)", named)
    return [named, *(f"step_{number}" for number in numbers if step and number < int(step[1]))]


def _read_pointer(folder: Path) -> str | None:
    pointer = folder / LATEST
    return pointer.read_text().strip() if pointer.is_file() else None


def _publish(aside: Path, final: Path) -> None:
    """Renames the finished folder, then moves the pointer; each is on disk before the next."""
    folder = final.parent
    for inner in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
        _sync_folder(inner)
    os.rename(aside, final)
    _sync_folder(folder)
    _point_to(folder, final.name)


def _point_to(folder: Path, name: str) -> None:
    pointer = folder / f"{_ASIDE}{LATEST}"
    _write(pointer, name + "\n")
    os.replace(pointer, folder / LATEST)
    _sync_folder(folder)


def _retain(folder: Path, step: int, keep: int) -> None:
    """Removes all but the last ``keep`` checkpoints up to ``step``; what a run went back behind is the user's."""
    for number in [number for number in _step_numbers(folder) if number <= step][:-keep]:
        shutil.rmtree(folder / f"step_{number}")


def _step_numbers(folder: Path) -> list[int]:
    """Numbers of the checkpoints of ``folder``; what else lies there, such as a copy ``step_6_best``, is the user's."""
    names = (re.fullmatch(r"step_(0|[1-9]\d*)", path.name) for path in folder.glob("step_*"))
    return sorted(int(name[1]) for name in names if name)


def _on_all_ranks(folder: Path, describe: Callable[[Path], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``describe`` of every file but the manifest, by relative path; each rank takes its share."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    share = files[distributed.rank() :: distributed.world_size()]
    own = {path.relative_to(folder).as_posix(): describe(path) for path in share}
    return dict(sorted(item for part in distributed.gather_objects(own) for item in part.items()))


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync_and_describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _describe(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, json.dumps(content, indent=1) + "\n")


def _brief(names: list[str]) -> str:
    parts = sorted({name.partition(".")[0] for name in names})
    return f"{len(names)} ({', '.join(parts)})" if names else "none"
