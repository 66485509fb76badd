"""What each saving of the training step is worth.

    python tools/profile_throughput.py savings [--frames 4 --kept 2 --batch 4] [--dtype bf16] [model.KEY=value ...]

times whole steps (forward, backward, AdamW) of the objectives on random data, in turn with steps in which one saving
is taken back: full, without, full, without, ... The ratio is that of the medians: 1.10 means that a step without the
saving takes 10 % longer. Every row computes the same losses, but for the two that say so and for dropout's draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smaug_ds import distributed
from smaug_ds.config import ConfigError, parse
from smaug_ds.data.sample import Batch
from smaug_ds.engine.allocator import keep_freed_memory
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.engine.optim import parameter_groups
from smaug_ds.losses import LossConfig
from smaug_ds.model import layers
from smaug_ds.model.language import MultiModalEncoder
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from tools.profile_machine import conditions, describe
from tools.profile_step import BERT_VOCABULARY

# Tokens of captions, [CLS] and [SEP] included, as short and as varied as those of MSR-VTT's training set.
SHORT_CAPTIONS = (9, 12, 8, 11, 14, 10, 9, 16)
MASKED_WORDS = 0.15


@dataclasses.dataclass(frozen=True)
class SavingsConfig:
    """The model and the objectives to time."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)


@dataclasses.dataclass
class Step:
    """All that a training step needs."""

    module: Pretraining
    optimizer: torch.optim.Optimizer
    batch: Batch
    dtype: torch.dtype

    def run(self) -> float:
        """Forward, backward and AdamW; returns the seconds, until the device has finished."""
        device = self.batch.frames.device
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.module(self.batch)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Saving:
    """One saving, and how a step goes without it."""

    name: str
    without: Callable[[Step], AbstractContextManager[Any]]


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``savings``, with what follows it on the command line."""
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", help="base or tiny")
    parser.add_argument("--frames", type=int, default=1, help="of a clip")
    parser.add_argument("--kept", type=int, default=0, help="frames that the fusion sees; 0: all")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16: autocast of fp32 weights")
    parser.add_argument("--captions", choices=("short", "full"), default="short", help="MSR-VTT's lengths, or the most")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps with and without each saving")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(arguments)
    frames = [f"model.frames={args.frames}", f"model.frames_kept={args.kept or args.frames}"]
    try:
        for name in ("batch", "rounds"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name} is {getattr(args, name)}: it must be at least 1")
        config = parse(SavingsConfig, None, [f"model.size={args.size}", *frames, *args.overrides])
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    told = conditions({**dataclasses.asdict(config), **{key: str(value) for key, value in vars(args).items()}})
    print(describe(told))
    keep_freed_memory()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    step = make_step(config, args.batch, args.captions == "full", dtype, distributed.device())
    rows = [measure(step, saving, args.rounds) for saving in SAVINGS]
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps({"conditions": told, "rows": rows}, indent=1))


def make_step(config: SavingsConfig, size: int, full: bool, dtype: torch.dtype, device: torch.device) -> Step:
    """A training step of ``size`` random pairs; ``full`` captions have as many tokens as the model takes."""
    text = config.model.text
    text = dataclasses.replace(text, vocab_size=text.vocab_size or BERT_VOCABULARY)
    model = SmaugModel(dataclasses.replace(config.model, text=text)).train().to(device)
    module = Pretraining(model, config.loss)
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.02), lr=1e-5, fused=True)
    most = text.max_length
    lengths = [most if full else min(most, SHORT_CAPTIONS[row % len(SHORT_CAPTIONS)]) for row in range(size)]
    return Step(module, optimizer, random_batch(model.config, lengths).to(device), dtype)


def random_batch(config: ModelConfig, lengths: list[int]) -> Batch:
    """Noise for frames and words, captions of ``lengths`` tokens, all of different media."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    size, tokens, side = len(lengths), sum(lengths), config.vision.image_size
    input_ids = (uniform(tokens) * config.text.vocab_size).long()
    hidden = uniform(tokens) < MASKED_WORDS
    hidden[1] = True
    return Batch(
        step=0,
        medium="image" if config.frames == 1 else "video",
        frames=(uniform(size, config.frames, 3, side, side) * 256).to(torch.uint8),
        lengths=lengths,
        input_ids=input_ids,
        masked_ids=torch.where(hidden, 4, input_ids),
        mlm_labels=torch.where(hidden, input_ids, -100),
        mlm_positions=hidden.nonzero().squeeze(1),
        media_ids=torch.arange(size),
        patch_noise=uniform(size, config.vision.patches),
        frame_noise=uniform(size, config.frames),
        negative_noise=uniform(size, 2),
        keys=[str(row) for row in range(size)],
        captions=[""] * size,
        all_captions=[("",)] * size,
    )


def measure(step: Step, saving: Saving, rounds: int) -> dict[str, Any]:
    """Seconds of a step with and without the saving, in turn, each after a step that is not counted."""
    kept, without = [], []
    for _ in range(rounds):
        step.run()
        kept.append(step.run())
        with saving.without(step):
            step.run()
            without.append(step.run())
    ratios = [slow / fast for slow, fast in zip(without, kept, strict=True)]
    return {
        "name": saving.name,
        "seconds_with": statistics.median(kept),
        "seconds_without": statistics.median(without),
        "ratio": statistics.median(without) / statistics.median(kept),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'without':62} {'step, s':>8} {'full, s':>8} {'ratio':>6}  of single rounds")
    for row in rows:
        print(
            f"{row['name']:62} {row['seconds_without']:8.3f} {row['seconds_with']:8.3f} {row['ratio']:6.3f}"
            f"  {row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        )


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The attribute ``name`` of ``owner`` is ``value`` within."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _padded(step: Step) -> AbstractContextManager[None]:
    """Each caption goes on with words until it is as long as the longest: the arithmetic of padding."""
    batch, longest = step.batch, max(step.batch.lengths)
    rows = torch.cat([torch.arange(longest) % length for length in batch.lengths])
    starts = torch.tensor(batch.lengths).cumsum(0) - torch.tensor(batch.lengths)
    rows = (rows + starts.repeat_interleave(longest)).to(batch.input_ids.device)
    places = torch.cat([torch.arange(length) + longest * row for row, length in enumerate(batch.lengths)])
    padded = dataclasses.replace(
        batch,
        lengths=[longest] * len(batch),
        input_ids=batch.input_ids[rows],
        masked_ids=batch.masked_ids[rows],
        mlm_labels=batch.mlm_labels[rows],
        mlm_positions=places.to(rows.device)[batch.mlm_positions],
    )
    return replaced(step, "batch", padded)


def _all_words(step: Step) -> AbstractContextManager[None]:
    every = torch.arange(len(step.batch.input_ids), device=step.batch.input_ids.device)
    words = dataclasses.replace(step.batch, mlm_positions=every, mlm_labels=step.batch.input_ids)
    return replaced(step, "batch", words)


def _keys_values_per_pass(step: Step) -> AbstractContextManager[None]:
    def look(self: MultiModalEncoder, visual: Tensor, rows: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        seen = visual.index_select(0, rows.flatten())
        if weights is not None:
            seen = seen * weights.view(-1, 1, 1).to(seen.dtype)
        return self.project(seen.unflatten(0, rows.shape).flatten(1, 2))

    return replaced(MultiModalEncoder, "look", look)


def _two_text_passes(step: Step) -> AbstractContextManager[None]:
    def encode_twice(self: SmaugModel, input_ids: Tensor, masked_ids: Tensor, lengths: Sequence[int]) -> Any:
        text = self.encode_text(input_ids, lengths)
        return text, self.text(masked_ids, text.packing)

    return replaced(SmaugModel, "encode_twice", encode_twice)


def _whole_last_fusion_layer(step: Step) -> AbstractContextManager[None]:
    fuse = SmaugModel.fuse

    def everything(self: SmaugModel, states: Tensor, packing: Any, visual: Any, rows: Tensor | None = None) -> Tensor:
        fused = fuse(self, states, packing, visual)
        return fused if rows is None else fused.index_select(0, rows)

    return replaced(SmaugModel, "fuse", everything)


def _whole_last_decoder_block(step: Step) -> AbstractContextManager[None]:
    forward = layers.ViTBlock.forward

    def everything(self: layers.ViTBlock, x: Tensor, wanted: int | None = None) -> Tensor:
        return forward(self, x)[:, :wanted]

    return replaced(layers.ViTBlock, "forward", everything)


def _other_attention(step: Step) -> AbstractContextManager[None]:
    def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return F.dropout(scores.softmax(dim=-1), dropout) @ v

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    on_cpu = step.batch.frames.device.type == "cpu" and step.dtype == torch.bfloat16
    return replaced(layers, "attend", fused if on_cpu else products)


def _plain_quick_gelu(step: Step) -> AbstractContextManager[None]:
    return replaced(layers.QuickGelu, "forward", lambda self, x: x * torch.sigmoid(1.702 * x))


def _torch_dropout(step: Step) -> AbstractContextManager[None]:
    return replaced(layers, "drop_out", F.dropout)


@contextmanager
def _loop_adamw(step: Step) -> Iterator[None]:
    for group in step.optimizer.param_groups:
        group["fused"], group["foreach"] = None, False
    try:
        yield
    finally:
        for group in step.optimizer.param_groups:
            group["fused"], group["foreach"] = True, None


@contextmanager
def _memory_given_back(step: Step) -> Iterator[None]:
    keep_freed_memory(False)
    try:
        yield
    finally:
        keep_freed_memory()


SAVINGS = (
    Saving("packed captions (padded to the longest; other losses)", _padded),
    Saving("keys and values of a frame shared by all passes", _keys_values_per_pass),
    Saving("clean and masked captions in one pass", _two_text_passes),
    Saving("words predicted only where hidden (everywhere; other losses)", _all_words),
    Saving("last fusion layer only where its result is read", _whole_last_fusion_layer),
    Saving("last decoder block only for masked patches", _whole_last_decoder_block),
    Saving("the faster attention (bf16 on a CPU: products, else fused)", _other_attention),
    Saving("QuickGELU as one function", _plain_quick_gelu),
    Saving("dropout with four draws of one number", _torch_dropout),
    Saving("fused AdamW (one parameter after the other)", _loop_adamw),
    Saving("freed memory kept by the process (CPU)", _memory_given_back),
)
