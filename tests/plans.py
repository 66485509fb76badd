"""Models and runs for tests of the planner."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from smaug_ds.losses import LossConfig
from smaug_ds.model import recompute
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.planner.media import MediaConfig
from smaug_ds.planner.memory import Precision
from smaug_ds.planner.prediction import Work

ROOT = Path(__file__).resolve().parent.parent
BF16 = Precision.of(json.loads((ROOT / "ds_configs/zero2_bf16.json").read_text()))
FP32 = Precision.of(json.loads((ROOT / "ds_configs/cpu.json").read_text()))


def sized(size: str, frames: int = 1, frames_kept: int = 1, **changes: Any) -> ModelConfig:
    """A preset with BERT's vocabulary; ``vision__mask_ratio=0.1`` changes a setting of a part."""
    config = dataclasses.replace(ModelConfig.of_size(size), frames=frames, frames_kept=frames_kept)
    for key, value in {"text__vocab_size": 30522, **changes}.items():
        part, _, name = key.rpartition("__")
        if part:
            value, name = dataclasses.replace(getattr(config, part), **{name: value}), part
        config = dataclasses.replace(config, **{name: value})
    return config


def work(model: ModelConfig | None = None, precision: Precision = BF16, **changes: Any) -> Work:
    mix = {"image": 0.5, "video": 0.5}
    plan = Work(model or sized("base"), LossConfig(), MediaConfig(), precision, mix, 1024, 128)  # type: ignore[arg-type]
    return dataclasses.replace(plan, **changes)


def keep_caches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Tensor]]:
    """From here on, what ``checkpoint_what=cheap`` keeps of the layers that it runs, in no saved tensor of autograd."""
    modes: list[Any] = []

    def contexts(*arguments: Any) -> Any:
        modes.append(create_selective_checkpoint_contexts(*arguments))
        return modes[-1]

    def kept() -> list[Tensor]:
        results = tree_leaves([list(caching.storage.values()) for caching, _ in modes])
        held = [getattr(result, "val", result) for result in results]
        return [tensor for tensor in held if isinstance(tensor, Tensor)]

    monkeypatch.setattr(recompute, "create_selective_checkpoint_contexts", contexts)
    return kept
