"""A model as a folder: ``model.safetensors`` and ``config.json``, read and written as Hugging Face's models are."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "model.safetensors"
ARCHITECTURE = "config.json"
HUB = "hf-hub:"  # before the name of a repository, as timm and open_clip have it
CARD = "README.md"
_TOKENIZERS = ("tokenizer.json", "vocab.txt")
_ABOUT_WEIGHTS = (CARD, "state.json")
_BARE_CARD = """---
library_name: smaug-ds
---

Weights of a SMAUG-DS model. State what they were trained on, and a licence, before they are handed on.

    from smaug_ds.model.smaug import {name}
    model = {name}.from_pretrained("FOLDER")
"""
_MODEL_TYPE = "smaug"
_NOT_ARCHITECTURE = ("model_type", "architectures")
M = TypeVar("M", bound="Pretrained")


class Pretrained(nn.Module):
    """Gives a module with a frozen dataclass ``config`` the one-line ways in and out."""

    config_class: ClassVar[type]
    config: Any
    came_from: str = ""  # folder or repository

    @classmethod
    def from_pretrained(cls: type[M], name: str | os.PathLike[str]) -> M:
        """The model of a folder, or of a repository on the Hugging Face hub if ``name`` is ``hf-hub:USER/NAME``.

        It is in fp32, on the CPU and in evaluation mode. Folders: what ``tools/convert_checkpoint.py export`` or
        ``save_pretrained`` wrote, or a checkpoint of a run. Raises ValueError naming the file and what is wrong with
        it: missing, damaged, or of another architecture.
        """
        config = read_architecture(cls.config_class, resolve(name, ARCHITECTURE))
        file = resolve(name, WEIGHTS)
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        model = cls(config)
        require_same(file, {key: tuple(value.shape) for key, value in weights.items()}, model)
        model.load_state_dict(weights)
        model.came_from = str(name)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes weights and architecture into ``folder``, each file complete before it gets its name."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in self.state_dict().items()}
        aside = folder / f".writing-{WEIGHTS}"
        save_file(weights, aside, metadata={"format": "pt"})
        os.replace(aside, folder / WEIGHTS)
        write_architecture(self.config, type(self).__name__, folder)

    def push_to_hub(self, repository: str, private: bool = True) -> None:
        """Uploads the model to ``USER/NAME`` on the hub; needs ``hf auth login`` before.

        The tokenizer of the folder that it came from goes with it, and so do model card and settings of its run if the
        weights are still those that they speak of; else it gets a card that says no more than how to use it.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            self._add_what_lay_beside(Path(folder))
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload model")

    def _add_what_lay_beside(self, folder: Path) -> None:
        found: dict[str, Path] = {}
        for name in (*_TOKENIZERS, *_ABOUT_WEIGHTS) if self.came_from else ():
            with contextlib.suppress(ValueError):
                found[name] = resolve(self.came_from, name)
        for name, path in found.items():
            if name in _TOKENIZERS or self._has_weights_of(resolve(self.came_from, WEIGHTS)):
                shutil.copyfile(path, folder / name)
        if not (folder / CARD).exists():
            (folder / CARD).write_text(_BARE_CARD.format(name=type(self).__name__), encoding="utf-8")

    def _has_weights_of(self, file: Path) -> bool:
        own = self.state_dict()
        with safe_open(file, framework="pt") as saved:
            return own.keys() == set(saved.keys()) and all(
                torch.equal(saved.get_tensor(name), value.cpu()) for name, value in own.items()
            )


def resolve(name: str | os.PathLike[str], file: str) -> Path:
    """The path of ``file`` in the folder ``name``, or in the repository ``hf-hub:USER/NAME`` after a download.

    Raises ValueError when there is no such file.
    """
    if str(name).startswith(HUB):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(str(name).removeprefix(HUB), file))
        except (OSError, ValueError) as error:  # no network, no such repository or file, a malformed name
            raise ValueError(f"{name}: {file} could not be had from the hub: {error}") from error
    path = Path(name) / file
    if not path.is_file():
        raise ValueError(f"{path} is missing: {name} is no folder of a model (a repository is named {HUB}USER/NAME)")
    return path


def read_architecture(cls: type, path: Path) -> Any:
    """The config of type ``cls`` in a ``config.json``. Raises ValueError when it is not one of this model."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or values.get("model_type", _MODEL_TYPE) != _MODEL_TYPE:
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} describes a model of type {kind!r}, not {_MODEL_TYPE!r}")
    try:
        return _build(cls, {key: value for key, value in values.items() if key not in _NOT_ARCHITECTURE}, "")
    except ValueError as error:
        raise ValueError(f"{path} does not describe a SMAUG model: {error}") from error


def write_architecture(config: Any, name: str, folder: Path) -> None:
    """``config`` as ``folder/config.json``, with what tells Hugging Face's tools the kind of model."""
    values = {"model_type": _MODEL_TYPE, "architectures": [name], **dataclasses.asdict(config)}
    aside = folder / f".writing-{ARCHITECTURE}"
    aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, folder / ARCHITECTURE)


def require_same(source: Path, shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    """Raises ValueError naming the first key that ``model`` lacks, does not get, or has in another shape."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, shape in own.items():
        if key not in shapes:
            raise ValueError(f"{source} has no {key}, which the architecture of its {ARCHITECTURE} needs")
        if shapes[key] != shape:
            raise ValueError(
                f"{source}: {key} has shape {list(shapes[key])}, but its {ARCHITECTURE} says {list(shape)}"
            )
    if unknown := sorted(shapes.keys() - own.keys()):
        raise ValueError(f"{source}: {unknown[0]} has no place in the architecture of its {ARCHITECTURE}")


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass from nested plain values; every field that shapes the model has to be there, and nothing else."""
    hints = get_type_hints(cls)
    optional = {item.name for item in dataclasses.fields(cls) if item.metadata.get("may_be_missing")}
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            raise ValueError(f"unknown key {prefix}{key}" + (f" ({prefix}{close[0]}?)" if close else ""))
    if missing := [key for key in hints if key not in values and key not in optional]:
        raise ValueError(f"{prefix}{missing[0]} is missing")
    arguments = {}
    for key, hint in hints.items():
        if key not in values:
            continue
        value = values[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{key} is {value!r}, not a section")
            arguments[key] = _build(hint, value, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            arguments[key] = _typed(hint, value, f"{prefix}{key}")
    return cls(**arguments)


def _typed(hint: Any, value: Any, key: str) -> Any:
    """``value`` as JSON gave it, checked against a field's type; lists become tuples."""
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{key} is {value!r}, which is no list")
        return tuple(_typed(get_args(hint)[0], item, key) for item in value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{key} is {value!r}, which is none of {', '.join(map(str, get_args(hint)))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is not hint:
        raise ValueError(f"{key} is {value!r}, which is no {hint.__name__}")
    return value
