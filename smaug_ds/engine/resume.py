"""May this run go on from that checkpoint? What fixes the run has to be as it was; where it lies may change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.text import Tokenizer

# Settings and sections that a checkpoint fixes: a run that went on with others would not be the same run.
FIXED = (
    "run.seed",
    "task",
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
# These change memory and time only; the micro batch, if the pool of negatives stays (``require_pool``).
FREE = ("batch.micro_size", "model.vision.checkpoint_every", "model.text.checkpoint_every")


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
    require_pool(before, now, state["world_size"], checkpoint)
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


def require_pool(before: Mapping[str, Any], now: Mapping[str, Any], ranks: int, checkpoint: Path) -> None:
    """Raises ConfigError where the pairs that are contrasted at a time are not as many as in ``checkpoint``, made on
    so many ``ranks``: the losses would be others."""
    here = distributed.world_size()
    pool, wanted = now["batch.micro_size"] * here, before["batch.micro_size"] * ranks
    if pool != wanted:
        advice = f"set batch.micro_size to {wanted // here}" if wanted % here == 0 else "use another number of ranks"
        raise ConfigError(
            f"batch.micro_size is {now['batch.micro_size']} on {here} ranks, so that {pool} pairs are contrasted at a "
            f"time, but {checkpoint} was made with {before['batch.micro_size']} on {ranks} = {wanted}: {advice}"
        )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one of dotted keys."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves
