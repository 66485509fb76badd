"""What each saving of the training step is worth.

    python tools/profile_throughput.py savings [--turns 5] [--steps 1] [batch=4 model.frames=4 model.frames_kept=2 ...]

times whole steps (forward, backward, AdamW) of the objectives on random data, in turn with steps in which one saving
is taken back: full, without, full, without, ... all in one process, on the same batches. The ratio is taken turn by
turn: 1.10 means that a step without the saving takes 10 % longer. Every row computes the same losses, but for the two
that say so and for dropout's draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smaug_ds.config import ConfigError, parse, to_dict
from smaug_ds.data.sample import Batch
from smaug_ds.engine.allocator import keep_freed_memory
from smaug_ds.model import layers
from smaug_ds.model.language import MultiModalEncoder
from smaug_ds.model.smaug import SmaugModel
from tools.profiling.command import keys_of, new_parser, run
from tools.profiling.machine import announce
from tools.profiling.report import Bar, Report, add_files, plain, table, write
from tools.profiling.step import Step, StepConfig
from tools.profiling.turns import Spread, time_steps


@dataclass(frozen=True)
class Saving:
    """One saving, and how a step goes without it."""

    name: str
    without: Callable[[Step], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Worth:
    """A saving as measured. Seconds are those of a step, over the medians of all turns."""

    name: str
    seconds_with: Spread
    seconds_without: Spread
    ratio: Spread  # without to with, turn by turn


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``savings``, with what follows it on the command line."""
    parser = new_parser(program, __doc__)
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="with and without each saving")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="of a turn")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="steps before each turn that do not count")
    add_files(parser)
    settings = keys_of(StepConfig(), "model.frames=4")
    write(*run(parser, arguments, settings, _report, {"turns": 1, "steps": 1, "warmup": 0}))


def _report(args: argparse.Namespace) -> Report:
    config = parse(StepConfig, None, args.overrides)
    for name, wanted in (("dtype", ("bf16", "fp32")), ("adamw", ("fused",))):
        if getattr(config, name) not in wanted:
            raise ConfigError(f"{name} is {getattr(config, name)}: savings takes {' or '.join(wanted)}")
    if config.compile:  # compiled code would not see what is taken back
        raise ConfigError(
            "compile is true: savings takes back parts of the model, which compiled code keeps: leave it out"
        )
    told = announce(to_dict(config))
    return measure_all(Step(config), args.turns, args.steps, args.warmup, told)


def measure_all(step: Step, turns: int, steps: int, warmup: int, told: dict[str, Any]) -> Report:
    """Times every saving and prints the table."""
    config = step.config
    title = (
        f"frames {config.model.frames}, kept {config.model.frames_kept}; batch {config.batch}, {config.precision}; "
        f"captions {config.captions}"
    )
    print(f"{title} ({step.caption_tokens:.1f} tokens in the mean)", flush=True)
    worths = [measure(step, saving, turns, steps, warmup) for saving in SAVINGS]
    rows = [["without", "s a step", "s of the full step", "ratio"]]
    rows += [[w.name, w.seconds_without.text(3), w.seconds_with.text(3), w.ratio.text(3)] for w in worths]
    print(table(rows))
    bars = [Bar(worth.name.partition(" (")[0], worth.ratio.median, worth.ratio.text(2)) for worth in worths]
    further = {"rows": [plain(worth) for worth in worths]}
    return Report(told, "savings", "seconds without it, to those of the full step", bars=bars, further=further)


def measure(step: Step, saving: Saving, turns: int, steps: int, warmup: int) -> Worth:
    """Steps with and without the saving, in turn; the two of a turn take the same batches."""
    times: list[list[float]] = []
    for turn in range(turns):
        times.append([])
        for variant in (nullcontext(), saving.without(step)):
            with variant:
                for _ in range(warmup):
                    step()
                step.done = turn * steps
                seconds, _ = time_steps(step, steps, step.device, step.clock)
            times[-1].append(statistics.median(seconds))
    kept, without = zip(*times, strict=True)
    ratio = Spread.of([slow / fast for fast, slow in times])
    return Worth(saving.name, Spread.of(kept), Spread.of(without), ratio)


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
    return replaced(step, "batches", [padded(batch) for batch in step.batches])


def padded(batch: Batch) -> Batch:
    """Each caption goes on with its own words until it is as long as the longest: the arithmetic of padding."""
    longest, lengths = max(batch.lengths), torch.tensor(batch.lengths)
    rows = torch.cat([torch.arange(longest) % length for length in batch.lengths])
    rows = (rows + (lengths.cumsum(0) - lengths).repeat_interleave(longest)).to(batch.input_ids.device)
    places = torch.cat([torch.arange(length) + longest * row for row, length in enumerate(batch.lengths)])
    return dataclasses.replace(
        batch,
        lengths=[longest] * len(batch),
        input_ids=batch.input_ids[rows],
        masked_ids=batch.masked_ids[rows],
        mlm_labels=batch.mlm_labels[rows],
        mlm_positions=places.to(rows.device)[batch.mlm_positions],
    )


def _all_words(step: Step) -> AbstractContextManager[None]:
    every = [torch.arange(len(batch.input_ids), device=step.device) for batch in step.batches]
    batches = [
        dataclasses.replace(batch, mlm_positions=positions, mlm_labels=batch.input_ids)
        for batch, positions in zip(step.batches, every, strict=True)
    ]
    return replaced(step, "batches", batches)


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

    on_cpu = step.device.type == "cpu" and step.config.dtype == "bf16"
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
    Saving("keys and values of a frame projected once", _keys_values_per_pass),
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
