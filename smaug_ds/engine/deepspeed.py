"""Run config and DeepSpeed JSON -> engine. The only module that imports deepspeed.

The JSON says how to compute: precision, ZeRO stage, offload, which AdamW. The run config says what to compute: batch
sizes, learning rate, clipping. Each key has one owner; they meet in ``resolve``.
"""

from __future__ import annotations

import copyreg
import difflib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.engine.optim import OptimConfig, parameter_groups

# Top-level keys and what they hold. DeepSpeed ignores a key that it does not know, so a typo would pass in silence.
KNOWN: dict[str, type] = {
    "aio": dict,
    "autotuning": dict,
    "bf16": dict,
    "checkpoint": dict,
    "comms_logger": dict,
    "communication_data_type": str,
    "compile": dict,
    "data_types": dict,
    "disable_allgather": bool,
    "flops_profiler": dict,
    "fp16": dict,
    "gradient_predivide_factor": float,
    "log_level": str,
    "memory_breakdown": bool,
    "optimizer": dict,
    "prescale_gradients": bool,
    "steps_per_print": int,
    "timers": dict,
    "torch_autocast": dict,
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "zero_optimization": dict,
}
# Checkpoints hold the ZeRO stage. Python 3.11.0 to 3.11.3 pickle an enum as a call of getattr, which no safe load
# allows; by value it is what the other versions write.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))

_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}

OWNED_BY_RUN_CONFIG = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optim.gradient_clip",
    "scheduler": "optim.warmup_epochs, optim.epochs and optim.min_lr",
    "activation_checkpointing": "model.vision.checkpoint_every and model.text.checkpoint_every",
    "compile": "run.compile",
    "tensorboard": "run.log_every",
    "csv_monitor": "run.log_every",
}
OPTIMIZER_OWNED_BY_RUN_CONFIG = {name: f"optim.{name}" for name in ("lr", "betas", "eps", "weight_decay")}
# Which AdamW: torch's, or DeepSpeed's own for GPUs and for offload.
TORCH_ADAMW = ("torch_adam", "fused")
DEEPSPEED_ADAMW = ("torch_adam", "bias_correction", "fp32_optimizer_states")


def load_json(path: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed JSON and checks its keys.

    Raises ConfigError naming run.deepspeed, the file and the key: not readable, not JSON, unknown key, wrong type, a
    key that the run config owns, an optimizer other than AdamW, a ZeRO stage other than 1 and 2.
    """
    source = f"run.deepspeed={path}"
    try:
        config = json.loads(Path(path).read_text(), object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{source}: not valid JSON: {_one_line(error)}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{source}: expected a JSON object, found {type(config).__name__}")
    _refuse(source, config, "", OWNED_BY_RUN_CONFIG)
    for key, value in config.items():
        if key not in KNOWN:
            close = difflib.get_close_matches(key, KNOWN, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(KNOWN)}"
            raise ConfigError(f"{source}: unknown key {key}; {hint}")
        _require_type(source, key, value, KNOWN[key])
    _check_optimizer(source, config.get("optimizer", {}))
    stage = config.get("zero_optimization", {}).get("stage", 0)
    _require_type(source, "zero_optimization.stage", stage, int)
    if stage not in (1, 2):
        raise ConfigError(f"{source}: zero_optimization.stage is {stage}: it must be 1 or 2")
    return config


def _check_optimizer(source: str, optimizer: dict[str, Any]) -> None:
    for key in optimizer:
        if key not in ("type", "params"):
            raise ConfigError(f"{source}: unknown key optimizer.{key}; known here: type, params")
    kind, parameters = optimizer.get("type", "AdamW"), optimizer.get("params", {})
    if not isinstance(kind, str) or kind.lower() != "adamw":
        raise ConfigError(f"{source}: optimizer.type is {json.dumps(kind)}: it must be AdamW, which optim configures")
    _require_type(source, "optimizer.params", parameters, dict)
    _refuse(source, parameters, "optimizer.params.", OPTIMIZER_OWNED_BY_RUN_CONFIG)
    known = TORCH_ADAMW if parameters.get("torch_adam") else DEEPSPEED_ADAMW
    for key, value in parameters.items():
        if key not in known:
            chosen = "with" if known == TORCH_ADAMW else "without"
            raise ConfigError(
                f"{source}: unknown key optimizer.params.{key}; known {chosen} torch_adam: {', '.join(known)}"
            )
        _require_type(source, f"optimizer.params.{key}", value, bool)


def _refuse(source: str, section: dict[str, Any], prefix: str, owners: dict[str, str]) -> None:
    for key, owner in owners.items():
        if key in section:
            raise ConfigError(f"{source}: {prefix}{key} belongs to the run config: remove it here and set {owner}")


def _require_type(source: str, key: str, value: Any, wanted: type) -> None:
    fits = type(value) in ((int, float) if wanted is float else (wanted,))  # in JSON true is not 1
    if not fits:
        found = f"{_JSON_NAMES[type(value)]}: {json.dumps(value)}" if value is not None else "null"
        raise ConfigError(f"{source}: {key}: expected {_JSON_NAMES[wanted]}, found {found}")


def resolve(config: dict[str, Any], optim: OptimConfig, micro_size: int, accumulation: int) -> dict[str, Any]:
    """The JSON with what the run config owns filled in: all that DeepSpeed is told."""
    optimizer = config.get("optimizer", {})
    return config | {
        "train_micro_batch_size_per_gpu": micro_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.gradient_clip,
        "optimizer": {
            "type": optimizer.get("type", "AdamW"),
            "params": optimizer.get("params", {})
            | {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay},
        },
    }


def build_engine(
    module: nn.Module,
    path: str | Path,
    optim: OptimConfig,
    schedule: Callable[[int], float],
    micro_size: int,
    accumulation: int,
) -> deepspeed.DeepSpeedEngine:
    """Wraps ``module`` into a ZeRO engine; ``engine.config`` is the resolved DeepSpeed config.

    ``schedule`` maps finished steps to a factor of ``optim.lr``. Needs the process group (``distributed.init``).
    Raises ConfigError for a bad JSON, see ``load_json``.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its shared-memory collectives would be compiled for a minute at start-up; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)
    with distributed.agreeing(ConfigError):
        config = resolve(load_json(path), optim, micro_size, accumulation)
        if config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
            device = get_accelerator().device_name()
            raise ConfigError(f"run.deepspeed={path}: {device} cannot do fp16: use bf16 or fp32")
        try:
            DeepSpeedConfig(config)
        except (DeepSpeedConfigError, ValueError, AssertionError) as error:  # all three are its ways to refuse a value
            raise ConfigError(f"run.deepspeed={path}: {_one_line(error)}") from error
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameter_groups(module, optim.weight_decay),
        # DeepSpeed's own WarmupCosineLR spends its first two steps at rate 0. The inner lambda keeps LambdaLR from
        # saving the schedule, which belongs to the config: a run may be resumed with more steps.
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: schedule(step)),
        config=config,
    )
    return engine


def zero_stage(engine: deepspeed.DeepSpeedEngine) -> int:
    """ZeRO stage of the engine, 1 or 2."""
    return int(engine.zero_optimization_stage())


def renew_rate(engine: deepspeed.DeepSpeedEngine) -> None:
    """Sets the rate of the next step by the engine's schedule, after the steps that its optimizer has taken.

    A loaded optimizer still has the rate that the schedule of its own run held for that step; with more steps in all,
    or fewer, it would be used once.
    """
    scheduler = engine.lr_scheduler
    factors = [schedule(scheduler.last_epoch) for schedule in scheduler.lr_lambdas]
    for group, base, factor in zip(engine.optimizer.param_groups, scheduler.base_lrs, factors, strict=True):
        group["lr"] = base * factor


@contextmanager
def safe_load() -> Iterator[None]:
    """Within it ``engine.load_checkpoint`` unpickles tensors and a few named classes only.

    DeepSpeed asks torch for ``weights_only=False``; this environment variable of torch's overrules it.
    """
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[_WEIGHTS_ONLY]
        if before is not None:
            os.environ[_WEIGHTS_ONLY] = before


_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
