"""AdamW's settings, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from smaug_ds.config import ConfigError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay (SMAUG, section 4.1); the DeepSpeed JSON names the implementation."""

    lr: float = 1e-4  # at the end of the warm-up
    min_lr: float = 1e-6  # at the last step
    weight_decay: float = 0.02  # of the weights of linear layers; see parameter_groups
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the first and second moment
    eps: float = 1e-8  # added to the root of the second moment
    epochs: float = 10.0  # passes over the corpus; run.max_steps overrules
    warmup_epochs: float = 1.0  # passes over the corpus while the rate grows from 0 to lr
    warmup_steps: int = 0  # the same in steps, overrules warmup_epochs; 0 leaves it to warmup_epochs
    gradient_clip: float = 1.0  # greatest norm of the whole gradient; 0 does not clip

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr is {self.lr}: it must be above 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"optim.min_lr is {self.min_lr}: it must lie between 0 and optim.lr, which is {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas is {list(self.betas)}: both must be at least 0 and below 1")
        for name in ("weight_decay", "warmup_epochs", "warmup_steps", "gradient_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: it must be at least 0")
        for name in ("eps", "epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: it must be above 0")


@dataclass(frozen=True)
class Schedule:
    """Learning rate over one run, as a factor of ``OptimConfig.lr``. Callable, so that LambdaLR takes it as it is."""

    total_steps: int  # optimizer steps of the run
    warmup_steps: int  # steps of linear growth; the first step already moves
    final_factor: float  # reached at the last step

    @classmethod
    def of(cls, config: OptimConfig, steps_per_epoch: int, max_steps: int = 0) -> Schedule:
        """The schedule of a run of ``max_steps`` steps, or of ``config.epochs`` epochs if that is 0.

        Raises ConfigError when the warm-up does not end before the run does.
        """
        total = max_steps or math.ceil(config.epochs * steps_per_epoch)
        warmup = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)
        if warmup >= total:
            key = "warmup_steps" if config.warmup_steps else "warmup_epochs"
            raise ConfigError(
                f"optim.{key} makes {warmup} warm-up steps, but the run has only {total}: lower it (optim.warmup_steps "
                "counts in steps) or raise run.max_steps or optim.epochs"
            )
        return cls(total, warmup, config.min_lr / config.lr)

    def __call__(self, step: int) -> float:
        """Factor of the step that follows ``step`` finished ones: (step + 1) / warmup_steps, then half a cosine."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - 1 - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_factor + (1 - self.final_factor) * cosine


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices with weight decay; norms, biases, embeddings and other vectors without.

    Embeddings are the rows of ``nn.Embedding`` and every parameter called ``*position*``: pulling them to zero would
    only forget what is seldom seen. Frozen parameters are in neither group.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim > 1 and id(parameter) not in embeddings and "position" not in name
        (decayed if is_matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
