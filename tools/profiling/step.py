"""A whole training step on random data: forward, backward and AdamW of model and objectives, without a loader.

The batches have the shapes, the caption lengths and the dtype that are asked for; their content does not matter for
time, memory and arithmetic.

Letters: B pairs, T frames, N patches, S text tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.sample import Batch, Medium
from smaug_ds.engine.allocator import keep_freed_memory
from smaug_ds.engine.compiled import compile_static
from smaug_ds.engine.monitor import Stopwatch
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.engine.optim import OptimConfig, parameter_groups
from smaug_ds.engine.train import require_objective
from smaug_ds.losses import LossConfig
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.text import IGNORED
from tools.planning.corpus import BERT_VOCABULARY, ROOT
from tools.profiling.captions import draw_lengths

# What a DeepSpeed run with bf16 weights does, with the AdamW that needs no compiler.
BF16_ENGINE = ROOT / "ds_configs" / "cpu_bf16.json"
_WORDS_FROM = 1000  # ids below are BERT's special and unused tokens
_Run = Callable[[Batch], Tensor]  # one step, its loss


@dataclass(frozen=True)
class StepConfig:
    """The step that is measured."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: int = 8  # B
    # fp32; bf16: autocast over fp32 weights; deepspeed: the engine of ``deepspeed``
    dtype: Literal["fp32", "bf16", "deepspeed"] = "bf16"
    deepspeed: str = ""  # JSON of that engine; empty: ds_configs/cpu_bf16.json, which runs on any device
    adamw: Literal["fused", "foreach", "loop"] = "fused"  # torch's implementations; the engine brings its own
    compile: bool = False  # the parts of static shapes, as run.compile does
    captions: str = "msrvtt"  # full, msrvtt (lengths drawn as MSR-VTT's are), or a file of captions
    tokenizer: str = ""  # that cuts the captions of a file into tokens
    batches: int = 4  # different ones, taken in turn
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.deepspeed and self.dtype != "deepspeed":
            raise ConfigError(f"deepspeed is {self.deepspeed}, but dtype is {self.dtype}: set dtype=deepspeed")
        require_objective(self.loss, self.model.vision)

    @property
    def computed_dtype(self) -> str:
        """What the step computes in; of an engine as ``engine_dtype`` tells it, which raises ConfigError."""
        return engine_dtype(self.deepspeed or BF16_ENGINE) if self.dtype == "deepspeed" else self.dtype

    @property
    def precision(self) -> str:
        """For titles: dtype, and whether the step is compiled."""
        return f"{self.dtype}, compiled" if self.compile else self.dtype

    @property
    def whole_model(self) -> ModelConfig:
        """The model with BERT's vocabulary, where none is given."""
        text = self.model.text
        filled = dataclasses.replace(text, vocab_size=text.vocab_size or BERT_VOCABULARY)
        return dataclasses.replace(self.model, text=filled)


def engine_dtype(path: str | Path) -> str:
    """What the engine of a DeepSpeed JSON computes in: fp32, bf16 (autocast over fp32 weights), fp16, or deepspeed,
    whose weights are bf16. Raises ConfigError for a JSON that cannot be used."""
    from smaug_ds.engine.deepspeed import load_json  # takes seconds, and only a step of the engine needs it

    engine = load_json(path)
    cast = str(engine.get("torch_autocast", {}).get("dtype", "bfloat16")).removeprefix("torch.")
    names = {
        "bf16": "deepspeed",
        "fp16": "fp16",
        "torch_autocast": {"float16": "fp16", "fp16": "fp16", "half": "fp16"}.get(cast, "bf16"),
    }
    return next((name for key, name in names.items() if engine.get(key, {}).get("enabled")), "fp32")


class Step:
    """The model of a config with its optimizer and batches, on this process's device; each call is a step.

    done: steps so far, which is what the next batch follows from: set it to take batches again.

    Raises ConfigError where captions or the engine's JSON cannot be used.
    """

    def __init__(self, config: StepConfig) -> None:
        self.config, self.device = config, distributed.device()
        if self.device.type == "cpu":
            keep_freed_memory()  # as training does
        self.clock = Stopwatch(self.device)
        generator = torch.Generator().manual_seed(config.seed)
        longest, count = config.model.text.max_length, config.batch * config.batches
        lengths = draw_lengths(config.captions, config.tokenizer, longest, count, generator)
        if min(lengths) < 3:
            raise ConfigError(f"captions: {config.captions} has a caption without a word")
        self.caption_tokens = sum(lengths) / count
        parts = [lengths[start : start + config.batch] for start in range(0, count, config.batch)]
        self.batches = [random_batch(config, part, generator).to(self.device) for part in parts]
        torch.manual_seed(config.seed)
        self.module = Pretraining(SmaugModel(config.whole_model), config.loss).train()
        if config.compile:
            compile_static(self.module.model, self.module, print)
        make = _engine if config.dtype == "deepspeed" else _plain
        self.optimizer, self._run = make(self.module, config, self)
        self.done = 0

    @property
    def cycle(self) -> int:
        """Steps after which the batches come again."""
        return len(self.batches)

    def __call__(self) -> Tensor:
        """Does one step; returns its loss."""
        batch = self.batches[self.done % self.cycle]
        self.done += 1
        return self._run(batch)


def _plain(module: Pretraining, config: StepConfig, step: Step) -> tuple[torch.optim.Optimizer, _Run]:
    """torch alone: autocast or not, AdamW with the groups of training."""
    module.to(step.device)
    optim = OptimConfig()
    optimizer = torch.optim.AdamW(
        parameter_groups(module, optim.weight_decay),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        **{"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}[config.adamw],
    )

    def run(batch: Batch) -> Tensor:
        bf16 = config.dtype == "bf16"
        with step.clock("forward"), torch.autocast(step.device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = module(batch)["loss"]
        with step.clock("backward"):
            loss.backward()
        with step.clock("step"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return optimizer, run


def _engine(module: Pretraining, config: StepConfig, step: Step) -> tuple[torch.optim.Optimizer, _Run]:
    """The DeepSpeed engine that trains, as a world of one rank."""
    from smaug_ds.engine.deepspeed import build_engine  # takes seconds, and nothing else here needs it

    distributed.init(timeout_seconds=600.0)
    path = config.deepspeed or BF16_ENGINE
    engine = build_engine(module, path, OptimConfig(), lambda step: 1.0, config.batch, 1)

    def run(batch: Batch) -> Tensor:
        with step.clock("forward"):
            loss = engine(batch)["loss"]
        with step.clock("backward"):
            engine.backward(loss)
        with step.clock("step"):
            engine.step()
        return loss.detach()

    return engine.optimizer, run


def random_batch(config: StepConfig, lengths: list[int], generator: torch.Generator) -> Batch:
    """Noise for frames and for captions of ``lengths`` tokens, with every draw of the model, as from the loader."""
    model, size = config.whole_model, config.batch
    side = model.vision.image_size

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    total, first = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    low = min(_WORDS_FROM, model.text.vocab_size - 1)
    input_ids = torch.randint(low, model.text.vocab_size, (total,), generator=generator)
    is_word = torch.ones(total, dtype=torch.bool)
    is_word[first[:-1]] = is_word[first[1:] - 1] = False  # [CLS] and [SEP]
    rank = uniform(total).masked_fill(~is_word, torch.inf)
    # each word with mlm_probability, and of each caption at least the first one to come, as training does
    least = torch.cat([torch.arange(len(own)) == own.argmin() for own in rank.split(lengths)])
    hidden = ((rank < config.loss.mlm_probability) | least) & is_word
    medium: Medium = "image" if model.frames == 1 else "video"
    return Batch(
        step=0,
        medium=medium,
        frames=torch.randint(0, 256, (size, model.frames, 3, side, side), generator=generator, dtype=torch.uint8),
        lengths=lengths,
        input_ids=input_ids,
        masked_ids=torch.where(hidden, low, input_ids),
        mlm_labels=torch.where(hidden, input_ids, IGNORED),
        mlm_positions=hidden.nonzero().squeeze(1),
        media_ids=torch.arange(size),
        patch_noise=uniform(size, model.vision.patches),
        frame_noise=uniform(size, model.frames).clamp(min=1e-6),
        negative_noise=uniform(size, 2),
        keys=[f"random/{row}" for row in range(size)],
        captions=cast("list[str]", [""] * size),
        all_captions=[("",)] * size,
    )
