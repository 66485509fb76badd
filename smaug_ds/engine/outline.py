"""A run's model without values, on the device "meta": how large it is, and whether what it starts from fits it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from smaug_ds.config import naming
from smaug_ds.data.config import DataConfig
from smaug_ds.engine import checkpoint
from smaug_ds.engine.finetuning import TASKS, FinetuneConfig
from smaug_ds.engine.tasks import RetrievalTask
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.engine.trained import require_vision
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.text import Tokenizer


def source_of_weights(config: PretrainConfig) -> str | None:
    """``run.init_from``, or None where the run goes on from a checkpoint and has weights of its own."""
    goes_on = checkpoint.resumable(Path(config.run.folder) / "checkpoints")
    return None if goes_on else config.run.init_from


def starting_weights(config: PretrainConfig) -> str:
    """What the run takes of ``run.init_from``, told by the header of the weights alone; empty where it takes nothing.

    Raises ConfigError where they do not fit the model.
    """
    if not (source := source_of_weights(config)):
        return ""
    task = TASKS[config.task] if isinstance(config, FinetuneConfig) else RetrievalTask
    with naming("run.init_from"):
        require_vision(source, config.model)
        taken = checkpoint.compare(
            _outline(config.model, config.data), task.start(config, checkpoint.load_headers(source))
        )
    return f"run.init_from {source}: {taken}"


def parameters(config: ModelConfig, data: DataConfig) -> int:
    """Number of the model's parameters, without making them."""
    return sum(parameter.numel() for parameter in _outline(config, data).parameters())


def _outline(config: ModelConfig, data: DataConfig) -> SmaugModel:
    """The model without values."""
    with naming("data.tokenizer"):
        vocab_size = Tokenizer(data.tokenizer).vocab_size
    with torch.device("meta"):
        return SmaugModel(dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size)))
