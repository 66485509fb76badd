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
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smaug_ds import convert
from smaug_ds.config import parse
from smaug_ds.exchange.export import compare, export
from smaug_ds.exchange.unpickle import read_pickle
from smaug_ds.model.positions import fit_positions
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
    except OSError as error:
        parser.exit(
            2, f"error: {error.filename or options.out}: {error.strerror}; --out needs room and a right to write\n"
        )


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
    with what they decide: the text encoder's vocabulary, layout and pooling of the vision encoder. Prints what is not
    used, resized, or not to be had.

    Raises ValueError for a file that cannot be read or wants to run code, a missing key, or a shape that does not fit
    (both shapes named).
    """
    if not sources:
        raise ValueError(f"nothing to import: give {', '.join(f'--{name}' for name in SOURCES)}")
    weights: dict[str, Tensor] = {}
    for name, source in sources.items():
        taken, config, unused = _mapped(name, source, config)
        print(f"{source}: not used: {', '.join(unused) or 'none'}")
        if twice := sorted(weights.keys() & taken.keys()):
            raise ValueError(f"--{name} brings {twice[0]}, which another source has brought already: leave one out")
        weights |= taken
    if "text.embedding.word.weight" in weights:
        text = dataclasses.replace(config.text, vocab_size=len(weights["text.embedding.word.weight"]))
        config = dataclasses.replace(config, text=text)
    own = _shapes(config)
    fitted = fit_positions(weights, config.vision.patches, config.frames)
    for key, value in fitted.items():
        if value.shape != weights[key].shape:
            print(f"{key}: {len(weights[key])} places interpolated to {len(value)}")
    weights = fitted
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


def _mapped(name: str, source: str | Path, config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig, list[str]]:
    """Weights of a ``SmaugModel``, the config with what they decide, and the unused keys of one source."""
    weights, layers, heads = read_weights(source), config.text.text_layers, config.vision.heads
    if name == "bert":
        taken, unused = convert.smaug_bert(weights, layers)
        return taken, config, unused
    if name == "singularity":
        taken, pooling, unused = convert.singularity(weights, layers, config.frames, heads)
        return taken, _with_beit(config, pooling), unused
    if name == "clip":
        layout = convert.clip_layout(weights).name
        print(f"layout of {layout}; the layers compute QuickGELU, as OpenAI's own weights want")
        vision, unused = convert.clip_vision(weights)
    else:
        pixels = _pixels(source)
        vision, pooling, unused = convert.beit_vision(weights, heads, pixels)
        config = _with_beit(config, pooling)
        print(f"pictures as the weights saw them: mean {list(pixels[0])}, deviation {list(pixels[1])}")
    return {f"vision.{key}": value for key, value in vision.items()}, config, unused


def _with_beit(config: ModelConfig, pooling: Literal["class", "mean"]) -> ModelConfig:
    print(f"model.vision.layout is beit, model.vision.pooling is {pooling}")
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, layout="beit", pooling=pooling))


def _pixels(source: str | Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of pixels out of the folder's ``preprocessor_config.json``; BEiT's where there is none."""
    file = Path(source) / "preprocessor_config.json"
    if not file.is_file():
        return convert.PIXELS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        mean, std = ([float(value) for value in content[f"image_{name}"]] for name in ("mean", "std"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} does not tell image_mean and image_std: {error!r}") from error
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise ValueError(f"{file}: image_mean is {mean}, image_std is {std}; three numbers each, std above 0")
    return mean, std


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    sized = dataclasses.replace(config.text, vocab_size=config.text.vocab_size or 1)
    with torch.device("meta"):
        model = SmaugModel(dataclasses.replace(config, text=sized))
    return {key: value.shape for key, value in model.state_dict().items()}


if __name__ == "__main__":
    main()
