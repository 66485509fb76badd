"""A trained checkpoint, opened to be used: its settings, its model and tokenizer, and what it is called on record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

from smaug_ds import distributed
from smaug_ds.config import ConfigError, naming, parse, to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.engine import checkpoint
from smaug_ds.engine.resume import flat
from smaug_ds.evaluation.asking import QuestionConfig
from smaug_ds.evaluation.frames import fit_frames
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.model.vision import VisionConfig
from smaug_ds.text import Tokenizer

FREE = (  # of the model; the rest is in the weights, or was when they were trained
    "frames",
    "frames_kept",
    "vision.sparsify_at_inference",
    "vision.keep_rate",
    "text.max_length",
)


@dataclass(frozen=True)
class EvaluateConfig:
    """The part of a run's settings that its evaluation needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: RetrievalConfig = field(default_factory=RetrievalConfig)


@dataclass(frozen=True)
class AskedConfig(EvaluateConfig):
    """The same for questions and multiple choices."""

    questions: QuestionConfig = field(default_factory=QuestionConfig)


E = TypeVar("E", bound=EvaluateConfig)


@overload
def read_config(path: str, data: str | None, overrides: Sequence[str] = ()) -> tuple[Path, EvaluateConfig]: ...


@overload
def read_config(path: str, data: str | None, overrides: Sequence[str], kind: type[E]) -> tuple[Path, E]: ...


def read_config(
    path: str, data: str | None, overrides: Sequence[str] = (), kind: type[Any] = EvaluateConfig
) -> tuple[Path, Any]:
    """The checkpoint folder that ``path`` means, and the settings of the run that wrote it, changed by ``overrides``
    (``key=value``) and ``data`` (a folder of shards that becomes the test split).

    Of an exported folder the tokenizer is its own. Where the run did not choose among frames, other ``model.frames``
    are all kept.

    Raises ConfigError when there is no checkpoint, its settings cannot be read, or an override is wrong or changes
    what training fixed.
    """
    try:
        folder = checkpoint.find(path)
        settings = _state(folder)["config"]
        sections = [item.name for item in dataclasses.fields(kind)]
        known = [key for key in sections if key in settings or key != "questions"]  # pre-training asks none
        saved = [f"{key}={json.dumps(settings[key])}" for key in known]
        tokenizers = [file for name in ("tokenizer.json", "vocab.txt") if (file := folder / name).is_file()]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"checkpoint {path}: {error}") from error
    saved += [f"data.tokenizer={file}" for file in tokenizers[:1]]
    trained = parse(kind, None, saved).model
    given = dict(override.partition("=")[::2] for override in overrides)
    if trained.frames == trained.frames_kept and "model.frames" in given and "model.frames_kept" not in given:
        saved.append(f"model.frames_kept={given['model.frames']}")
        saved.append(f"model.frames={given['model.frames']}")
    searched = [f"data.test={json.dumps([data])}", "evaluation.split=test"] if data else []
    config = parse(kind, None, [*saved, *searched, *overrides])
    before, now = flat(to_dict(trained)), flat(to_dict(config.model))
    for key, value in now.items():
        if before[key] != value and key not in FREE:
            raise ConfigError(
                f"checkpoint {folder} was trained with model.{key} = {before[key]}, which cannot be {value} in its "
                f"evaluation; what can be changed of the model: {', '.join(FREE)}"
            )
    return folder, config


def load_model(folder: Path, config: EvaluateConfig) -> tuple[SmaugModel, Tokenizer]:
    """The checkpoint's model on this rank's device, and its tokenizer.

    Raises ConfigError when weights, architecture and vocabulary do not fit together.
    """
    with naming("data.tokenizer"):
        tokenizer = Tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size != config.model.text.vocab_size:
        raise ConfigError(
            f"data.tokenizer: {tokenizer.path} has {tokenizer.vocab_size} entries, but the checkpoint's "
            f"model.text.vocab_size is {config.model.text.vocab_size}"
        )
    state = _state(folder)
    known = state.get("fingerprints", {}).get("data.tokenizer")
    if known and known != hashlib.sha256(tokenizer.path.read_bytes()).hexdigest():
        raise ConfigError(f"data.tokenizer: {tokenizer.path} holds another vocabulary than {folder} was trained with")
    model = SmaugModel(config.model)
    trained = parse(
        ModelConfig, None, [f"{key}={json.dumps(value)}" for key, value in state["config"]["model"].items()]
    )
    try:
        model.load_state_dict(fit_frames(model, checkpoint.load_weights(folder), trained))
    except ConfigError:
        raise
    except (ValueError, RuntimeError) as error:  # load_state_dict raises RuntimeError with all keys and shapes
        raise ConfigError(f"checkpoint {folder}: {error}") from error
    return model.to(distributed.device()).eval(), tokenizer


def require_vision(source: str | Path, config: ModelConfig) -> None:
    """Refuses to start a model of ``config`` from a run folder or checkpoint ``source`` of another vision encoder.

    Much of it would fit by name and shape, but mean something else. Bare weights tell nothing, so they pass. Raises
    ValueError naming both.
    """
    folder = checkpoint.find(source)
    file = next(
        (file for name in (checkpoint.ARCHITECTURE, checkpoint.STATE) if (file := folder / name).is_file()), None
    )
    if file is None:
        return
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        vision = (known if file.name == checkpoint.ARCHITECTURE else known["config"]["model"])["vision"]
        source_has = {name: vision.get(name, getattr(VisionConfig(), name)) for name in ("layout", "pooling")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not describe a SMAUG model: {error!r}") from error
    for name, value in source_has.items():
        if value != (wanted := getattr(config.vision, name)):
            raise ValueError(
                f"{file} is of a model with model.vision.{name} = {value}, but this one has {wanted}: "
                f"set model.vision.{name}={value} or start from another checkpoint"
            )


def identify(folder: Path) -> dict[str, Any]:
    """What a checkpoint is, wherever it lies: its run, its step, the SHA-256 of its weights, the code that reads it.

    All ranks call it. Raises ConfigError when the weights are not those of the checkpoint's manifest.
    """
    digest = None
    with distributed.agreeing(ConfigError):
        if distributed.is_main():
            digest = _sha256(folder / checkpoint.WEIGHTS)
            manifest = folder / checkpoint.MANIFEST
            files = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.is_file() else {}
            if checkpoint.WEIGHTS in files and files[checkpoint.WEIGHTS]["sha256"] != digest:
                raise ConfigError(f"checkpoint {folder / checkpoint.WEIGHTS} is damaged: it is not what was written")
    return {
        "run": run_folder(folder).name,
        "folder": str(folder),
        "step": _state(folder)["step"],
        "weights_sha256": distributed.gather_objects(digest)[0],
        "code": checkpoint.code_version(),
    }


def trained_with(folder: Path) -> dict[str, Any]:
    """What the evaluation may do otherwise than training did, as training did it; for the protocol."""
    model = flat(_state(folder)["config"]["model"])
    return {"training": {key: model[key] for key in FREE if key in model}}


def run_folder(folder: Path) -> Path:
    """The folder of the run whose checkpoint ``folder`` is; an exported folder stands for itself."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def describe(folder: Path) -> str:
    """The checkpoint in a line: its place and the steps that it has seen."""
    return f"{folder} ({_state(folder)['step']} steps)"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))
