"""The files of a checkpoint and how they get onto the disk: hashed while written, synced, renamed.

RUN/checkpoints/latest                     text: the name of the checkpoint to resume from
                best.json                  the one that ``run.keep_best`` keeps, and how good it is
RUN/checkpoints/step_120/manifest.json     size and SHA-256 of every other file
                         state.json        step, loader, quarantine, config, versions, world size
                         model.safetensors the model alone, for a next stage, evaluation and fine-tuning
                         config.json       its architecture
                         rank_00000.pt     random states, meters and failure budget of a rank
                         engine/           DeepSpeed's weights, optimizer and schedule
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

LATEST = "latest"
BEST = "best.json"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
ARCHITECTURE = "config.json"
STATE = "state.json"
ASIDE = ".writing-"  # begins the names of what is not finished
DAMAGED = "damaged_"  # begins the names of what was passed over


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay, beside the best one."""

    last: int  # so many of the newest
    every: int = 0  # steps: the multiples stay for good; 0: none


class HashedFile:
    """A new file for ``torch.save``: hashed on its way, on disk once it is closed.

    What goes wrong in writing is raised by ``close`` alone, since torch turns an error in between into one of its own.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of a buffer."""
        view = memoryview(data).cast("B")
        size = len(view)
        self._digest.update(view)
        self._bytes += size
        try:
            while view and not self._error:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._error = error
        return size

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> dict[str, Any]:
        """Syncs; returns size and hash. Raises OSError if anything could not be written."""
        with self._file:
            if self._error:
                raise self._error
            os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def write_tensors(path: Path, content: Any) -> dict[str, Any]:
    """``torch.save`` onto the disk; returns size and hash. Raises OSError if that fails."""
    file = HashedFile(path)
    torch.save(content, cast(IO[bytes], file))
    return file.close()


def write_weights(path: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Safetensors onto the disk; returns size and hash. Raises OSError if that fails."""
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    return sync_and_describe(path)


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Text onto the disk; returns size and hash."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def as_json(content: Mapping[str, Any]) -> str:
    """JSON as all files here have it."""
    return json.dumps(content, indent=1) + "\n"


def describe(path: Path) -> dict[str, Any]:
    """Size and hash of what lies there."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def sync_and_describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file that somebody else wrote, once it is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return describe(path)


def publish(aside: Path, final: Path, files: Mapping[str, Any], best: Mapping[str, Any] | None) -> int:
    """Lists ``files``, renames the folder, then moves the pointers; each is on disk before the next.

    files: size and hash by relative path; what the engine wrote itself is added.
    Returns the size of the checkpoint, bytes. Raises OSError when this host does not see one of ``files`` whole.
    """
    for name, facts in files.items():  # on a network's disk another host's file may not have arrived
        size = (aside / name).stat().st_size if (aside / name).is_file() else None
        if size != facts["bytes"]:
            seen = "is not seen" if size is None else f"has {size} bytes instead of {facts['bytes']}"
            raise OSError(errno.EIO, f"{name}, which a rank has written, {seen} on the main rank's host")
    found = sorted(path for path in aside.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = {path.relative_to(aside).as_posix(): path for path in found}
    added = {name: sync_and_describe(path) for name, path in names.items() if name not in files}
    listed = dict(sorted({**added, **files}.items()))
    manifest = write_text(aside / MANIFEST, as_json({"format": 1, "files": listed}))
    for inner in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
        sync_folder(inner)
    folder, texts = final.parent, {LATEST: final.name + "\n"}
    if best is not None:
        texts[BEST] = as_json(best)  # last: until `latest` has moved, the best one so far has to be known
    for name, text in texts.items():  # from here on nothing needs room
        write_text(folder / f"{ASIDE}{name}", text)
    os.rename(aside, final)
    sync_folder(folder)
    sync_folder(folder.parent)  # `checkpoints` itself may be new
    for name in texts:
        os.replace(folder / f"{ASIDE}{name}", folder / name)
        sync_folder(folder)
    return manifest["bytes"] + sum(facts["bytes"] for facts in listed.values())


def point_to(folder: Path, name: str) -> None:
    """Makes ``name`` the checkpoint to resume from."""
    replace_text(folder / LATEST, name + "\n")


def replace_text(path: Path, text: str) -> None:
    """The old text or the new one is there, whatever happens."""
    aside = path.with_name(f"{ASIDE}{path.name}")
    write_text(aside, text)
    os.replace(aside, path)
    sync_folder(path.parent)


def read_pointer(folder: Path) -> str | None:
    """Name of the checkpoint to resume from."""
    pointer = folder / LATEST
    return pointer.read_text(errors="replace").strip() if pointer.is_file() else None


def finish_best(folder: Path) -> None:
    """Moves ``best.json`` into place where a kill came between ``latest`` and it."""
    aside = folder / f"{ASIDE}{BEST}"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if json.loads(aside.read_text())["checkpoint"] == read_pointer(folder):
            os.replace(aside, folder / BEST)
            sync_folder(folder)


def set_aside(folder: Path, name: str) -> None:
    """Calls a damaged checkpoint ``damaged_NAME``, so that it neither counts as kept nor is gone on from."""
    aside, number = folder / f"{DAMAGED}{name}", 1
    while aside.exists():
        aside, number = folder / f"{DAMAGED}{name}_{number}", number + 1
    with contextlib.suppress(OSError):  # it stays under its name
        os.rename(folder / name, aside)
        sync_folder(folder)


def read_best(folder: Path) -> dict[str, Any] | None:
    """The best checkpoint so far (``checkpoint``, ``metric``, ``value``, ``step``), if it is still there."""
    try:
        best = json.loads((folder / BEST).read_text())
        return best if (folder / best["checkpoint"]).is_dir() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def retain(folder: Path, step: int, retention: Retention) -> None:
    """Removes the checkpoints up to ``step`` that need not stay; what a run went back behind is the user's."""
    numbers = [number for number in step_numbers(folder) if number <= step]
    best = read_best(folder)
    for number in numbers[: -retention.last]:
        name = f"step_{number}"
        for_good = retention.every and number % retention.every == 0
        if not for_good and not (best and best["checkpoint"] == name):
            shutil.rmtree(folder / name, ignore_errors=True)  # what stays is tried again after the next save


def clear(folder: Path) -> None:
    """Removes what is not finished."""
    for stale in folder.glob(f"{ASIDE}*"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                stale.unlink()


def step_numbers(folder: Path) -> list[int]:
    """Numbers of the checkpoints of ``folder``; what else lies there, such as a copy ``step_6_best``, is the user's."""
    return sorted(number for path in folder.glob("step_*") if (number := step_of(path.name)) >= 0)


def step_of(name: str | None) -> int:
    """The number in a checkpoint's name, -1 if it is none."""
    number = re.fullmatch(r"step_(0|[1-9]\d*)", name or "")
    return int(number[1]) if number else -1


def sync_folder(folder: Path) -> None:
    """Puts the names in ``folder`` on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
