"""A run's checkpoints, read: which one to go on from, whether it is whole, and its weights for another run.

``saving`` writes them, ``files`` says what they hold.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from smaug_ds import distributed
from smaug_ds.engine import elastic
from smaug_ds.engine.files import (
    ARCHITECTURE,
    DAMAGED,
    LATEST,
    MANIFEST,
    STATE,
    WEIGHTS,
    describe,
    point_to,
    read_pointer,
    set_aside,
    step_numbers,
    step_of,
)
from smaug_ds.engine.saving import code_version, random_state, save

__all__ = [
    "ARCHITECTURE",
    "LATEST",
    "MANIFEST",
    "STATE",
    "WEIGHTS",
    "code_version",
    "compare",
    "describe_all",
    "find",
    "initialise",
    "load_headers",
    "load_weights",
    "open_latest",
    "random_state",
    "read_state",
    "restore",
    "resumable",
    "save",
    "set_random_state",
    "verify",
]


def open_latest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of ``folder`` to resume from and its state, see ``read_state``; None where there is none at all.

    That is the one that ``latest`` names. If it is damaged, or nothing is named, it is the newest older one that is
    whole; ``warn`` is told, the pointer goes back to it, and the damaged ones are called ``damaged_step_N``. All ranks
    call it.

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
        if read_pointer(folder) != name:
            empty = "names no checkpoint" if read_pointer(folder) else "is missing or empty"
            reason = damage[0] if damage else f"{folder / LATEST} {empty}"
            called = f" and now called {DAMAGED}step_N" if number else ""
            warn(f"WARNING: {reason}; going on from {name}, {number} before it passed over{called}")
            distributed.barrier()
            if distributed.is_main():
                point_to(folder, name)
                for passed in candidates[:number]:
                    if step_of(passed) >= 0 and (folder / passed).is_dir():
                        set_aside(folder, passed)
            distributed.barrier()
        return folder / name, state
    if damage:
        raise ValueError(
            f"none of {', '.join(candidates)} in {folder} is whole: {damage[0]}; remove them to start anew"
        )
    return None


def resumable(folder: Path) -> bool:
    """Whether there is a checkpoint in ``folder`` to resume from, whole or not."""
    return bool(_candidates(folder))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Verifies a checkpoint and returns the ``state`` that ``save`` was given, with ``step`` and ``world_size``.

    All ranks call it. Raises ValueError naming a file that is missing or damaged.
    """
    verify(checkpoint)
    with distributed.agreeing(ValueError):
        try:
            return json.loads((checkpoint / STATE).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{checkpoint / STATE} cannot be read ({error})") from error


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
            listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
            expected = {name: {fact: facts[fact] for fact in ("bytes", "sha256")} for name, facts in listed.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{checkpoint / MANIFEST} cannot be read ({error})") from error
    found = describe_all(checkpoint)
    for name, facts in expected.items():
        if name not in found:
            raise ValueError(f"{checkpoint / name} is missing")
        for fact, value in facts.items():
            if value != found[name][fact]:
                wrong = f"{fact} is {found[name][fact]} instead of {value}"
                raise ValueError(f"{checkpoint / name} is damaged, its {wrong}")


def find(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` means: a run folder (its latest checkpoint) or a checkpoint itself.

    Raises ValueError when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a run folder or a checkpoint")
    name = read_pointer(path / "checkpoints")
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


def load_headers(path: str | Path) -> dict[str, Tensor]:
    """The same without values, on the device "meta": only the header of the file is read."""
    file = find(path) / WEIGHTS
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in list(opened.keys())}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def initialise(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Copies the weights that ``model`` has a place for, cast to its types, and says in a line what was left over.

    Raises ValueError as ``compare``.
    """
    told = compare(model, weights)
    model.load_state_dict(dict(weights), strict=False)
    return told


def compare(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Says in a line which of the weights ``model`` has a place for, by their names and shapes alone.

    Raises ValueError when a shape differs (naming the key and both shapes) or nothing fits.
    """
    own = model.state_dict()
    missing, unused = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if len(missing) == len(own):
        raise ValueError(f"none of the {len(weights)} weights has a place in the model: {unused[:3]} ...")
    for name, value in weights.items():
        if name in own and own[name].shape != value.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, but the model needs {list(own[name].shape)}")
    return f"{len(own) - len(missing)} weights taken, missing: {_brief(missing)}, unused: {_brief(unused)}"


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what ``random_state`` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _candidates(folder: Path) -> list[str]:
    """Names of the checkpoints that a run may go on from, the one that ``latest`` names first, then older ones."""
    named = read_pointer(folder)
    numbers = sorted(step_numbers(folder), reverse=True)
    if named and step_of(named) >= 0:
        return [named, *(f"step_{number}" for number in numbers if number < step_of(named))]
    copy = [named] if named and (folder / named).is_dir() else []  # of the user's; else a pointer that was damaged
    return [*copy, *(f"step_{number}" for number in numbers)]


def describe_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file but the manifest, by relative path; each rank takes its share.

    Raises ValueError on all ranks, naming the file, when one of them cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    share = files[distributed.rank() :: distributed.world_size()]
    own = {}
    with distributed.agreeing(ValueError):
        for path in share:
            try:
                own[path.relative_to(folder).as_posix()] = describe(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return dict(sorted(item for part in distributed.gather_objects(own) for item in part.items()))


def _brief(names: list[str]) -> str:
    parts = sorted({name.partition(".")[0] for name in names})
    return f"{len(names)} ({', '.join(parts)})" if names else "none"
