"""THE loop, and the config of a pre-training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.config import DataConfig
from smaug_ds.data.order import Order
from smaug_ds.data.quarantine import DataError
from smaug_ds.data.sample import Batch, Medium
from smaug_ds.engine.monitor import Monitor, non_finite
from smaug_ds.engine.optim import OptimConfig
from smaug_ds.engine.preempt import StopRequest
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.losses import LossConfig
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.model.sparsify import visible_count
from smaug_ds.model.vision import VisionConfig


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, how long it is and how often it does what."""

    folder: str = "runs/pretrain"  # everything that the run writes; an existing run in it is resumed
    seed: int = 0  # of weights, order and every random draw
    init_from: str | None = None  # run folder or checkpoint whose weights to start from, e.g. the single-frame stage
    deepspeed: str = "ds_configs/zero2_bf16.json"  # DeepSpeed JSON: precision, ZeRO stage, implementation of AdamW
    max_steps: int = 0  # optimizer steps of the whole run; 0: optim.epochs decides
    compile: bool = False  # torch.compile of the parts that see no text; the first step takes minutes
    log_every: int = 10  # steps
    save_every: int = 1000  # steps; 0: only at the end
    keep_checkpoints: int = 2  # the newest ones; older ones are removed
    keep_every: int = 0  # steps, a multiple of save_every: checkpoints of its multiples stay for good; 0: none
    keep_best: str = ""  # metric of the evaluations in between, such as t2v_r1, whose best checkpoint is made and stays
    save_in_background: bool = True  # training goes on while files are written; takes host memory for one copy more
    on_full_disk: Literal["continue", "stop"] = "continue"  # when a checkpoint cannot be written
    picture_every: int = 1000  # steps; 0: never
    evaluate_every: int = 0  # steps; 0: only at the end
    timeout_seconds: float = 1800.0  # a rank that waits longer for the others gives up
    hang_seconds: float = 1200.0  # without a finished step that end a rank, with the stacks of its threads; 0: never
    wall_minutes: float = 0.0  # that this start may take; 0: until SLURM_JOB_END_TIME, if it is set
    stop_minutes: float = 5.0  # before that time is over, the run saves and leaves with code 85

    def __post_init__(self) -> None:
        counts = ("seed", "max_steps", "save_every", "keep_every", "picture_every", "evaluate_every")
        for name in (*counts, "hang_seconds", "wall_minutes", "stop_minutes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"run.{name} is {getattr(self, name)}: it must be at least 0")
        if self.seed >= 2**31:
            raise ConfigError(f"run.seed is {self.seed}: it must be below 2**31 = {2**31}")
        for name in ("log_every", "keep_checkpoints", "timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"run.{name} is {getattr(self, name)}: it must be above 0")
        if self.keep_every and not (self.save_every and self.keep_every % self.save_every == 0):
            raise ConfigError(
                f"run.keep_every is {self.keep_every}, not a multiple of run.save_every, which is {self.save_every}: "
                "its checkpoints would not be written"
            )
        if self.keep_best and not self.evaluate_every:
            raise ConfigError(f"run.keep_best is {self.keep_best}, but run.evaluate_every is 0: set it, in steps")


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of a step; with the number of ranks they fix the gradient accumulation."""

    global_size: int = 256  # samples of an optimizer step over all ranks
    micro_size: int = 32  # samples of one forward pass on one rank

    def __post_init__(self) -> None:
        for name in ("global_size", "micro_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"batch.{name} is {getattr(self, name)}: it must be at least 1")

    def accumulation(self, world_size: int) -> int:
        """Micro steps of a step. Raises ConfigError when the global batch cannot be divided so."""
        at_once = self.micro_size * world_size
        if self.global_size % at_once:
            raise ConfigError(
                f"batch.global_size is {self.global_size}, not a multiple of {at_once} = "
                f"batch.micro_size {self.micro_size} * {world_size} ranks: change batch.global_size or batch.micro_size"
            )
        return self.global_size // at_once

    def require(self, samples: Mapping[Medium, int]) -> None:
        """Raises ConfigError when a step of a medium that occurs takes more than its ``samples``: some come twice.

        A set with a weight of several times its share may still bring a sample back within a step: copies count as
        positives of each other.
        """
        for medium, count in samples.items():
            if 0 < count < self.global_size:
                raise ConfigError(
                    f"batch.global_size is {self.global_size}, but the corpus has only {count} samples of medium "
                    f"{medium}, so that a step would repeat some: lower batch.global_size to {count} or less, or leave "
                    f"the {medium}s out of the corpus"
                )


@dataclass(frozen=True)
class PretrainConfig:
    """All settings of pre-training; what DeepSpeed is told beside them is in the JSON named by ``run.deepspeed``."""

    run: RunConfig = field(default_factory=RunConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: RetrievalConfig = field(default_factory=RetrievalConfig)

    def __post_init__(self) -> None:
        require_objective(self.loss, self.model.vision)


def require_objective(loss: LossConfig, vision: VisionConfig) -> None:
    """Raises ConfigError where no objective has a weight, or that of masked patches has one and none is masked."""
    if not (loss.vtc or loss.vtm or loss.mlm or loss.mvm):
        raise ConfigError("loss.vtc, loss.vtm, loss.mlm and loss.mvm are all 0: nothing to learn; raise one")
    if loss.mvm and visible_count(vision.patches, vision.mask_ratio) == vision.patches:
        raise ConfigError(
            f"model.vision.mask_ratio is {vision.mask_ratio}, which masks none of the {vision.patches} patches, "
            f"but loss.mvm is {loss.mvm}: raise model.vision.mask_ratio or set loss.mvm to 0"
        )


@dataclass(frozen=True)
class Actions:
    """What the loop does now and then."""

    finished: Callable[[int], object]  # told of every finished step
    save: Callable[[int], object]  # writes the checkpoint of so many finished steps, or begins to
    writing: Callable[[], bool]  # whether this rank is still at it
    advance: Callable[[bool], object]  # told after every step whether any rank is
    evaluate: Callable[[int], bool]  # measures the model after so many finished steps; whether it is to be saved
    draw: Callable[[Batch], Mapping[str, np.ndarray]]  # pictures (H, W, 3) uint8; called on the main rank alone


def train(
    engine: Any,
    batches: Iterable[Batch],
    order: Order,
    config: RunConfig,
    total_steps: int,
    accumulation: int,
    monitor: Monitor,
    stop: StopRequest,
    actions: Actions,
) -> int:
    """Trains from ``monitor.first_step`` to ``total_steps`` or until a rank is told to stop; saves in either case.

    Returns the number of finished steps. Raises on all ranks: DataError when the data of one of them fails, and
    NonFiniteError, before the optimizer steps, when a loss or the gradient is no longer finite (in fp16 DeepSpeed's
    loss scaler skips such steps instead); and what ``actions`` raise.
    """
    micro_batches = iter(batches)
    fp16 = engine.fp16_enabled()
    for step in range(monitor.first_step, total_steps):
        done, lr = step + 1, engine.get_lr()[0]

        for micro_step in range(accumulation):
            # ---- batch: of one medium on all ranks, since ZeRO's gradient buckets have to fill alike
            with monitor.time("data"), distributed.agreeing(DataError):
                batch = next(micro_batches).to(engine.device)
            assert (batch.step, batch.medium) == (step, order.medium(step)), f"batch of step {batch.step} in {step}"

            # ---- forward
            with monitor.time("forward"):
                losses = engine(batch)

            # ---- losses
            monitor.meters.add(batch.medium, losses)
            monitor.finite.add(losses)

            # ---- backward and step
            with monitor.time("backward"):
                engine.backward(losses["loss"])
            if micro_step + 1 == accumulation and not fp16:
                monitor.finite.require(step)
            with monitor.time("step"):
                engine.step()  # updates at the end of the accumulation, and only if the gradient is finite
        if not fp16 and not engine.was_step_applied():
            raise non_finite(step, ["gradient"])
        actions.finished(done)

        # ---- log
        if done % config.log_every == 0 or done == total_steps:
            monitor.log(done, {"lr": lr, "gradient_norm": float(engine.get_global_grad_norm())})
        if config.picture_every and done % config.picture_every == 0 and distributed.is_main():
            monitor.pictures(done, actions.draw(batch))

        # ---- evaluate
        best = False
        if config.evaluate_every and done % config.evaluate_every == 0 and done < total_steps:
            try:
                best = actions.evaluate(done)
            except (ConfigError, DataError):  # all ranks meet it, and the steps are not to be lost with it
                actions.save(done)
                raise

        # ---- save and stop
        stopping, writing = distributed.any_ranks(stop.requested, actions.writing())
        actions.advance(writing)
        if stopping or best or done == total_steps or (config.save_every and done % config.save_every == 0):
            actions.save(done)
        if stopping:
            return done
    return max(monitor.first_step, total_steps)  # a finished run may be asked for fewer
