"""Models and runs for tests of the planner."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from smaug_ds.losses import LossConfig
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
