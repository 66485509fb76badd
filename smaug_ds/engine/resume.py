"""May this run go on from that checkpoint? What fixes the run has to be as it was; where it lies may change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smaug_ds.config import ConfigError
from smaug_ds.text import Tokenizer

# Settings and sections that a checkpoint fixes: a run that went on with others would not be the same run.
FIXED = (
    "run.seed",
    "batch",
    "model",
    "loss",
    "data.holdout",
    "data.shuffle_group",
    "data.crop_scale",
    "data.crop_ratio",
    "data.flip",
    "optim.lr",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.gradient_clip",
)
FREE = ("model.vision.checkpoint_every", "model.text.checkpoint_every")  # change memory and time only


def fingerprints(corpus: str, tokenizer: Tokenizer) -> dict[str, str]:
    """What stands in a checkpoint for the settings that are paths, so that the same files may be found elsewhere.

    corpus: ``Mixture.fingerprint``.
    """
    return {
        "data.train": corpus,
        "data.tokenizer": hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(),
    }


def check_resumable(
    state: Mapping[str, Any], config: Mapping[str, Any], found: Mapping[str, str], checkpoint: Path
) -> None:
    """Raises ConfigError naming the first setting that differs from the checkpoint's and may not.

    state: of ``checkpoint``, with ``config`` and ``fingerprints``. config, found: the same of this run.
    """
    remedy = "set it back, or start anew in another run.folder with run.init_from"
    before, now = flat(state["config"]), flat(config)
    for key, value in now.items():
        fixed = any(key == name or key.startswith(f"{name}.") for name in FIXED) and key not in FREE
        if fixed and key in before and before[key] != value:
            raise ConfigError(f"{key} is {value}, but {checkpoint} was made with {before[key]}: {remedy}")
    for key, fingerprint in found.items():
        if state["fingerprints"][key] != fingerprint:
            what = "other shards or weights" if key == "data.train" else "another vocabulary"
            name = "data.corpus" if key == "data.train" and now["data.corpus"] else key
            raise ConfigError(
                f"{name} is {now[name]}, which holds {what} than {checkpoint} was made with ({before[name]}): {remedy}"
            )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one of dotted keys."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves
