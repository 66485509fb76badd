"""Published weights as a checkpoint to start from.

    python tools/convert_checkpoint.py import [--clip CLIP] [--bert BERT] --out FOLDER [model.frames=1 ...]

CLIP and BERT are folders (or weight files) of Hugging Face's ``CLIPVisionModel`` or ``CLIPModel`` (B/16) and
``BertModel`` (base, uncased), on disk. What they do not bring (cross-attention, decoder, heads) is left out of FOLDER,
and starts at random in a run with ``run.init_from=FOLDER``. Every weight that is not used is listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smaug_ds import convert
from smaug_ds.config import parse, to_dict
from smaug_ds.engine.checkpoint import ARCHITECTURE, WEIGHTS
from smaug_ds.model.smaug import ModelConfig, SmaugModel


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """The model that the weights are for."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["import"])
    parser.add_argument("--clip", type=Path, help="folder or file of CLIP-B/16 weights")
    parser.add_argument("--bert", type=Path, help="folder or file of BERT-base weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    try:
        if not args.clip and not args.bert:
            raise ValueError("nothing to import: give --clip or --bert")
        weights, config = import_weights(args.clip, args.bert, parse(ImportConfig, None, args.overrides).model)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / WEIGHTS, metadata={"format": "pt"})
    (args.out / ARCHITECTURE).write_text(json.dumps(to_dict(config), indent=1) + "\n")
    print(f"{len(weights)} weights in {args.out}: start a run with run.init_from={args.out}")


def import_weights(clip: Path | None, bert: Path | None, config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """Weights of a ``SmaugModel`` of ``config`` out of either or both, and the config with BERT's vocabulary size.

    Raises ValueError for a file that cannot be read, a missing key, or a shape that does not fit (both shapes named).
    """
    weights: dict[str, Tensor] = {}
    if clip:
        vision, unused = convert.clip_vision(read_weights(clip))
        report(clip, unused)
        weights |= {f"vision.{key}": value for key, value in vision.items()}
    if bert:
        text, fusion, unused = convert.bert(read_weights(bert), config.text.text_layers)
        report(bert, unused)
        weights |= {f"text.{key}": value for key, value in text.items()}
        weights |= {f"fusion.{key}": value for key, value in fusion.items()}
        vocabulary = len(text["embedding.word.weight"])
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocabulary))
    with torch.device("meta"):
        sized = dataclasses.replace(config.text, vocab_size=config.text.vocab_size or 1)
        own = SmaugModel(dataclasses.replace(config, text=sized)).state_dict()
    for key, value in weights.items():
        if key not in own:
            raise ValueError(f"the model has no place for {key}: its layers are fewer than those of the weights")
        if own[key].shape != value.shape:
            raise ValueError(f"{key} has shape {list(value.shape)}, but the model needs {list(own[key].shape)}")
    return {key: value.contiguous() for key, value in weights.items()}, config


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors or PyTorch file, or the one in a Hugging Face folder. Raises ValueError when there is none."""
    names = ("model.safetensors", "pytorch_model.bin")
    files = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
    if not files:
        raise ValueError(f"{path} is no file and holds neither {' nor '.join(names)}")
    file = files[0]
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def report(path: Path, unused: list[str]) -> None:
    """Says which weights have no place in SMAUG."""
    print(f"{path}: not used: {', '.join(unused) or 'none'}")


if __name__ == "__main__":
    main()
