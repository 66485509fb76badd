"""Weights in and out.

    python tools/convert_checkpoint.py import [--clip CLIP] [--bert BERT] [--beit BEIT] [--singularity PTH]
                                              --out FOLDER [model.frames=1 ...]
    python tools/convert_checkpoint.py export RUN --out FOLDER [--tokenizer FILE] [--verify]

``import`` makes published weights a start: a run with ``run.init_from=FOLDER``. Each source is a file, a folder of
Hugging Face's layout, or ``hf-hub:USER/NAME``. What the sources do not bring starts at random in the run; it is
listed, and so is every weight that is not used. ``export`` takes the fp32 master weights out of a run's ZeRO files into
a folder for ``SmaugModel.from_pretrained(FOLDER)``; ``--verify`` runs both models on one batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smaug_ds import convert
from smaug_ds.config import parse
from smaug_ds.exchange.export import compare, export
from smaug_ds.exchange.unpickle import read_pickle
from smaug_ds.model.positions import resize_space, resize_time
from smaug_ds.model.pretrained import HUB, WEIGHTS, resolve, write_architecture
from smaug_ds.model.smaug import ModelConfig, SmaugModel

SOURCES = ("clip", "beit", "bert", "singularity")
# What a Singularity checkpoint holds beside its weights: settings in classes of omegaconf, which are not needed.
_SETTINGS = (
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str")),
    "collections.defaultdict",
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Boolean", "Float", "Integer", "String", "InterpolationResult")),
    "typing.Any",
)


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """The model that the weights are for."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    importing = actions.add_parser("import", help="published weights -> a start for a run")
    for name in SOURCES:
        importing.add_argument(f"--{name}", help=f"file, folder or {HUB}USER/NAME of {name} weights")
    importing.add_argument("--out", type=Path, required=True)
    importing.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the model")
    exporting = actions.add_parser("export", help="a run's checkpoint -> a folder for from_pretrained")
    exporting.add_argument("run", type=Path, help="run folder (its latest checkpoint) or checkpoint folder")
    exporting.add_argument("--out", type=Path, required=True, help="new folder")
    exporting.add_argument("--tokenizer", type=Path, help="the run's tokenizer, if it no longer lies where it was")
    exporting.add_argument("--verify", action="store_true", help="run both models on one batch")
    options = parser.parse_args(arguments)
    try:
        _import(options) if options.action == "import" else _export(options)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def _export(options: argparse.Namespace) -> None:
    checkpoint = export(options.run, options.out, options.tokenizer)
    print(f"{checkpoint} -> {options.out}: every tensor agrees with the checkpoint's model")
    if options.verify:
        largest = ", ".join(f"{name} {value:.3g}" for name, value in compare(checkpoint, options.out).items())
        print(f"largest differences between the two models' outputs on one batch: {largest}")


def _import(options: argparse.Namespace) -> None:
    sources = {name: getattr(options, name) for name in SOURCES if getattr(options, name)}
    weights, config = import_weights(sources, parse(ImportConfig, None, options.overrides).model)
    write_start(options.out, weights, config)
    print(f"{len(weights)} weights in {options.out}: start a run with run.init_from={options.out}")


def import_weights(sources: Mapping[str, str | Path], config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """Weights of a ``SmaugModel`` of ``config`` out of ``sources`` (by their names in ``SOURCES``), and the config
    with the vocabulary size of the text encoder among them. Prints what is not used, resized, or not to be had.

    Raises ValueError for a file that cannot be read or wants to run code, a missing key, or a shape that does not fit
    (both shapes named).
    """
    if not sources:
        raise ValueError(f"nothing to import: give {', '.join(f'--{name}' for name in SOURCES)}")
    weights: dict[str, Tensor] = {}
    for name, source in sources.items():
        taken, unused = _mapped(name, read_weights(source), config)
        print(f"{source}: not used: {', '.join(unused) or 'none'}")
        if twice := sorted(weights.keys() & taken.keys()):
            raise ValueError(f"--{name} brings {twice[0]}, which another source has brought already: leave one out")
        weights |= taken
    if "text.embedding.word.weight" in weights:
        text = dataclasses.replace(config.text, vocab_size=len(weights["text.embedding.word.weight"]))
        config = dataclasses.replace(config, text=text)
    own = _shapes(config)
    weights = {key: _resized(key, value, own) for key, value in weights.items()}
    for key, value in weights.items():
        if key not in own:
            raise ValueError(f"the model has no place for {key}: its layers are fewer than those of the weights")
        if own[key] != value.shape:
            raise ValueError(f"{key} has shape {list(value.shape)}, but the model needs {list(own[key])}")
    print(f"starts at random: {', '.join(key for key in own if key not in weights) or 'nothing'}")
    return {key: value.float().contiguous() for key, value in weights.items()}, config


def write_start(out: Path, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Writes the new folder ``out`` aside and renames it. Raises ValueError when it exists."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: name a new folder")
    aside = out.parent / f".writing-{out.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(dict(weights), aside / WEIGHTS, metadata={"format": "pt"})
    write_architecture(config, SmaugModel.__name__, aside)
    os.replace(aside, out)


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """A safetensors or PyTorch file, that of a Hugging Face folder or of ``hf-hub:USER/NAME``, as a flat state dict.

    Raises ValueError when there is none, it is damaged, or it wants to run code.
    """
    file = _file_of(source)
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    content = read_pickle(file, _SETTINGS)
    for key in ("state_dict", "model"):  # training checkpoints: open_clip's, Singularity's
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file} holds no state dict: neither at its top nor under state_dict or model")
    wrapped = all(key.startswith("module.") for key in content)  # by DistributedDataParallel
    return {key.removeprefix("module.") if wrapped else key: value for key, value in content.items()}


def _file_of(source: str | Path) -> Path:
    if Path(source).is_file():
        return Path(source)
    names = (WEIGHTS, "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    for name in names:
        try:
            return resolve(source, name)
        except ValueError as error:
            reason = error
    raise ValueError(f"{source} is no file and holds none of {', '.join(names)}: {reason}")


def _mapped(name: str, source: dict[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a ``SmaugModel`` and the unused keys of one source."""
    if name == "bert":
        return convert.smaug_bert(source, config.text.text_layers)
    if name == "singularity":
        return convert.singularity(source, config.text.text_layers, config.frames)
    if name == "clip":
        print(
            f"layout of {convert.clip_layout(source).name}; the layers compute QuickGELU, as OpenAI's own weights want"
        )
        vision, unused = convert.clip_vision(source)
    else:
        print("BEiT is a start only: its relative position bias and its GELU have no place in SMAUG's encoder")
        vision, unused = convert.beit_vision(source)
    return {f"vision.{key}": value for key, value in vision.items()}, unused


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    sized = dataclasses.replace(config.text, vocab_size=config.text.vocab_size or 1)
    with torch.device("meta"):
        model = SmaugModel(dataclasses.replace(config, text=sized))
    return {key: value.shape for key, value in model.state_dict().items()}


def _resized(key: str, value: Tensor, own: Mapping[str, Any]) -> Tensor:
    """Position tables of another picture size or number of frames, interpolated; all else as it is."""
    if key not in own or value.shape == own[key] or value.shape[1:] != own[key][1:]:
        return value
    wanted = own[key][0]
    if key == "vision.position_embedding":
        print(f"{key}: {len(value) - 1} patches interpolated to {wanted - 1}")
        return resize_space(value, wanted - 1)
    if key == "temporal.position_embedding":
        print(f"{key}: {len(value)} frames interpolated to {wanted}")
        return resize_time(value, wanted)
    return value


if __name__ == "__main__":
    main()
