"""A checkpoint of a run -> one folder that needs neither the run nor DeepSpeed.

    OUT/model.safetensors   the fp32 master weights, out of the ZeRO files, checked against the weights of the run
        config.json         the architecture
        vocab.txt           the tokenizer (or tokenizer.json)
        state.json          settings of the run, steps, versions
        README.md           the model card

One tensor at a time is in memory, at most twice: as it is written, and rounded to 16 bits for the comparison.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smaug_ds.engine import checkpoint
from smaug_ds.exchange.card import model_card
from smaug_ds.exchange.zero import MasterWeights
from smaug_ds.model.pretrained import ARCHITECTURE, WEIGHTS, read_architecture, require_same, write_architecture
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.text import Tokenizer

ENGINE = "engine"
CARD = "README.md"
_PREFIXES = ("model.", "")  # of the model's parameters in the engine's module
_KEPT_STATE = ("step", "config", "fingerprints", "answers", "wall_seconds", "version", "commit", "torch", "world_size")


def export(source: Path, out: Path, tokenizer: Path | None = None) -> Path:
    """Exports a run folder (its latest checkpoint) or a checkpoint to the new folder ``out``; returns the checkpoint.

    Args:
        tokenizer: of the run, in case it no longer lies where the run found it.

    Raises ValueError naming the file and what to do: a file is missing, damaged or holds code, weights and
    architecture do not fit, the master weights are not those of the checkpoint's model, another tokenizer, or ``out``
    exists. Nothing is left of ``out`` then.
    """
    folder = checkpoint.find(source)
    if not (folder / ENGINE).is_dir():
        raise ValueError(f"{folder} has no folder {ENGINE}: it is no checkpoint of a run, or exported already")
    checkpoint.verify(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: name a new folder")
    state = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))
    vocabulary = _tokenizer_file(state, tokenizer)
    config = read_architecture(ModelConfig, folder / ARCHITECTURE)
    masters, names = _model_names(folder / ENGINE, config)

    aside = out.parent / f".writing-{out.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_weights(aside / WEIGHTS, masters, names, folder / checkpoint.WEIGHTS)
        write_architecture(config, SmaugModel.__name__, aside)
        shutil.copyfile(vocabulary, aside / ("tokenizer.json" if vocabulary.suffix == ".json" else "vocab.txt"))
        kept = {key: state[key] for key in _KEPT_STATE if key in state}
        (aside / checkpoint.STATE).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        weights = sum(torch.Size(masters.shape(name)).numel() for name in names.values())
        (aside / CARD).write_text(model_card(state, config, weights, folder), encoding="utf-8")
        _sync(aside)
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


@torch.no_grad()
def compare(folder: Path, out: Path) -> dict[str, float]:
    """Largest differences on one random batch, in fp32, between a checkpoint's own weights and the exported ones.

    They are 0 where the run's weights were fp32; else they show what rounding to 16 bits costs.
    """
    exported = SmaugModel.from_pretrained(out)
    config = exported.config
    rounded = SmaugModel(config).eval()
    rounded.load_state_dict(checkpoint.load_weights(folder))
    generator = torch.Generator().manual_seed(0)
    side, lengths = config.vision.image_size, [config.text.max_length, 3]
    frames = torch.randint(0, 256, (2, config.frames, 3, side, side), generator=generator).to(torch.uint8)
    words = torch.randint(0, config.text.vocab_size, (sum(lengths),), generator=generator)

    def outputs(model: SmaugModel) -> dict[str, Tensor]:
        visual, text = model.encode_frames(frames), model.encode_text(words, lengths)
        return {"video": visual.embedding, "text": text.embedding, "match": model.match(visual, text)}

    ours, theirs = outputs(exported), outputs(rounded)
    return {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}


def _tokenizer_file(state: Mapping[str, Any], given: Path | None) -> Path:
    path = Path(given or state["config"]["data"]["tokenizer"])
    if not path.exists():
        raise ValueError(f"{path} is missing: name the run's tokenizer with --tokenizer")
    file = Tokenizer(path).path
    if hashlib.sha256(file.read_bytes()).hexdigest() != state["fingerprints"]["data.tokenizer"]:
        raise ValueError(f"{file} is not the tokenizer that the run was made with: name that with --tokenizer")
    return file


def _model_names(engine: Path, config: ModelConfig) -> tuple[MasterWeights, dict[str, str]]:
    """The master weights, and what each key of the model is called among them."""
    masters = MasterWeights(engine)
    with torch.device("meta"):
        model = SmaugModel(config)
    own = list(model.state_dict())
    prefix = next((prefix for prefix in _PREFIXES if prefix + own[0] in masters), _PREFIXES[0])
    names = {key: prefix + key for key in own if prefix + key in masters}
    names |= {name.removeprefix(prefix): name for name in masters if name.startswith(prefix)}
    require_same(engine, {key: masters.shape(name) for key, name in names.items()}, model)
    return masters, names


def _write_weights(path: Path, masters: MasterWeights, names: Mapping[str, str], reference: Path) -> None:
    try:
        with safe_open(reference, framework="pt") as rounded:
            if missing := names.keys() ^ set(rounded.keys()):
                raise ValueError(f"{reference} and the ZeRO files differ in {sorted(missing)[0]}")

            def read(key: str) -> Tensor:
                value, expected = masters[names[key]], rounded.get_tensor(key)
                if not torch.equal(value.to(expected.dtype), expected):
                    raise ValueError(f"{key} of the ZeRO files is not {key} of {reference}, rounded to its type")
                return value

            write_safetensors(path, {key: masters.shape(name) for key, name in names.items()}, read)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{reference} cannot be read: {error}") from error


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
    """A safetensors file of fp32 tensors, asked for one by one: the library wants all of them in memory.

    Format: 8 bytes of header length, little-endian; the header as JSON, with blanks up to a multiple of 8; the numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            value = read(key)
            assert value.dtype == torch.float32 and tuple(value.shape) == shape, key
            value.contiguous().numpy().tofile(file)
            del value  # before the next one is read


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
