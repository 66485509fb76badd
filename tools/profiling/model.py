"""Where the parameters and the arithmetic of the model are, and how fast whole training steps of it are.

    python tools/profile_throughput.py model --size base [model.frames=4 model.frames_kept=2 ...]
    python tools/profile_throughput.py model --size base --steps 10 [batch=8 dtype=bf16 captions=msrvtt ...]

counts parameters, and forward floating-point operations of one sample (2 per multiply-add), part by part, with torch's
flop counter on tensors without storage: nothing is computed, so base size takes seconds on any machine.

``--steps`` then times forward, backward and AdamW on random data in a fresh process: seconds, samples/s, peak memory,
the operations really executed, and their share of the fastest matrix product of this machine (MFU).
``--largest-batch`` first finds the largest batch that fits onto the GPU, and takes it for ``--steps``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smaug_ds import distributed
from smaug_ds.config import ConfigError, parse, to_dict
from smaug_ds.model.packing import Packing
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from tools.profiling.command import keys_of, new_parser, run
from tools.profiling.machine import conditions, describe, matrix_peak
from tools.profiling.report import Bar, Report, add_files, write
from tools.profiling.step import StepConfig
from tools.profiling.turns import Facts, OutOfMemoryError, Runner, Timing

# Forward GFLOPs of one single-frame sample at base size: as planned, and of Singularity, which masks nothing.
PLANNED = {
    "vision encoder": (35.0, 12.8),
    "pixel decoder": (None, 3.7),
    "text encoder": (8.2, 8.2),
    "multi-modal encoder": (11.9, 7.9),
    "vocabulary logits": (1.5, 0.2),
}


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """The model to count."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mlm_probability: float = 0.15  # share of the words whose logits are computed


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``model``, with what follows it on the command line."""
    parser = new_parser(program, __doc__)
    parser.add_argument("--size", default="base", help="base or tiny")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="time so many whole steps")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before them that do not count")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a torch profiler trace (.json) of two steps")
    parser.add_argument("--largest-batch", action="store_true", help="find the largest batch that a GPU holds")
    add_files(parser)
    write(*run(parser, arguments, keys_of(StepConfig(), "model.frames=4"), _report, {"steps": 0, "warmup": 0}))


def _report(args: argparse.Namespace) -> Report:
    if args.largest_batch and distributed.device().type == "cpu":
        raise ConfigError("--largest-batch needs a GPU: a CPU's memory ends with the kernel killing processes")
    if args.trace and not args.steps:
        raise ConfigError(f"--trace {args.trace}: there is no step to trace: give --steps")
    step = parse(StepConfig, None, [f"model.size={args.size}", *args.overrides])
    config = ProfileConfig(step.whole_model, step.loss.mlm_probability)
    told = conditions(to_dict(step))
    parameters, flops = count_parameters(config.model), count_flops(config)
    print_table(config, parameters, flops)
    further: dict[str, Any] = {"parameters": parameters, "forward_flops": flops}
    if args.largest_batch:
        step = dataclasses.replace(step, batch=largest(lambda batch: fits(step, batch), step.batch))
        further["largest_batch"] = step.batch
        print(f"\nlargest batch: {step.batch}", flush=True)
    if args.steps:
        report = time_steps(step, args.steps, args.warmup, args.trace, told)
        report.further = further
    else:
        bars = [Bar(name, flops.get(name, 0) / 1e9, f"{flops.get(name, 0) / 1e9:.2f}") for name in parameters]
        report = Report(told, "model", "forward GFLOPs of a sample", bars=bars, further=further)
    return report


def time_steps(config: StepConfig, steps: int, warmup: int, trace: Path | None, told: dict[str, Any]) -> Report:
    """Times ``steps`` in a fresh process and prints what came out. Raises ConfigError where they cannot be done."""
    print(f"\n{describe(told)}")
    with Runner("model", config, warmup) as runner:
        runner.turn(steps)
        facts = runner.facts()
        if trace:
            runner.trace(trace)
    measured = record(config, runner.timing, facts, peak_of(config))
    print("\n".join(tell(measured)))
    phases = [Bar(name, value, f"{value:.3f} s") for name, value in measured["phases"].items()]
    seconds = runner.timing.seconds
    bars = [Bar("whole step", seconds.median, f"{seconds.text(3)} s"), *phases]
    return Report(told, f"{config.model.size} model, batch {config.batch}", "seconds a step", "", bars, [measured])


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that ``fits``, to within a sixteenth: doubled or halved from ``start`` on, then bisected.

    Raises ConfigError when not even 1 fits.
    """
    low, high = (start, 2 * start) if fits(start) else (start // 2, start)
    while low == high // 2 and low >= start and fits(high):
        low, high = high, 2 * high
    while low and low < start and not fits(low):
        low, high = low // 2, low
    if not low:
        raise ConfigError("batch: not even 1 fits: take checkpointing (model.vision.checkpoint_every) or fewer frames")
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits(config: StepConfig, batch: int) -> bool:
    """Whether steps of this batch go through in a fresh process."""
    try:
        with Runner(f"batch {batch}", dataclasses.replace(config, batch=batch, batches=1), 0) as runner:
            runner.turn(1)
    except OutOfMemoryError:
        return False
    return True


def peak_of(config: StepConfig) -> float:
    """Operations a second of the fastest matrix product on this process's device, in the step's own dtype."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16}
    return matrix_peak(dtypes.get(config.computed_dtype, torch.bfloat16), distributed.device())


def record(config: StepConfig, timing: Timing, facts: Facts, peak: float) -> dict[str, Any]:
    """What was measured of one step, as JSON: what ``tools/plan_run.py --profile`` reads."""
    seconds = timing.seconds
    return {
        "what": "model",
        "size": config.model.size,
        "frames": config.model.frames,
        "frames_kept": config.model.frames_kept,
        "batch": config.batch,
        "dtype": config.computed_dtype,
        "compiled": config.compile,
        "device": facts.device,
        "world_size": 1,
        "captions": config.captions,
        "caption_tokens_mean": facts.caption_tokens,
        "seconds_per_step": dataclasses.asdict(seconds),
        "steps": sum(len(turn) for turn in timing.turns),
        "samples_per_second": config.batch / seconds.median,
        "flops_per_step": facts.flops,
        "matrix_peak_flops": peak,
        "mfu": facts.flops / seconds.median / peak,
        "peak_memory_bytes": facts.peak_bytes,
        "phases": timing.phase_medians,
    }


def tell(measured: dict[str, Any]) -> list[str]:
    """``record`` in a few lines."""
    seconds = measured["seconds_per_step"]
    phases = ", ".join(f"{name} {value:.3f}" for name, value in measured["phases"].items() if value)
    return [
        f"frames {measured['frames']}, kept {measured['frames_kept']}, batch {measured['batch']}, {measured['dtype']}, "
        f"captions {measured['captions']} ({measured['caption_tokens_mean']:.1f} tokens in the mean)",
        f"{seconds['median']:.3f} s a step ({seconds['low']:.3f} to {seconds['high']:.3f}, {measured['steps']} steps): "
        f"{phases}",
        f"{measured['samples_per_second']:.2f} samples/s, peak memory {measured['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"{measured['flops_per_step'] / 1e9:.1f} GFLOPs a step executed, {measured['mfu']:.1%} of the "
        f"{measured['matrix_peak_flops'] / 1e9:.0f} GFLOP/s of the fastest matrix product",
    ]


def parts_of(model: SmaugModel) -> dict[str, list[nn.Module]]:
    """The modules behind each row of the table."""
    optional = {"temporal encoder": "temporal", "frame selector": "selector"}
    parts: dict[str, list[nn.Module]] = {
        "vision encoder": [model.vision],
        **{name: [getattr(model, part)] for name, part in optional.items() if hasattr(model, part)},
        "pixel decoder": [model.pixel_decoder],
        "text encoder": [model.text],
        "multi-modal encoder": [model.fusion],
        "vocabulary logits": [model.word_head],
        "projections and match head": [model.vision_projection, model.text_projection, model.match_head],
    }
    if hasattr(model, "answers"):
        parts["answer decoder"] = [model.answers]  # which no pre-training step runs
    return parts


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part. The word embedding is shared with the vocabulary logits and counted in the text encoder."""
    with torch.device("meta"):
        model = SmaugModel(config)
    counts = {name: sum(count(module) for module in modules) for name, modules in parts_of(model).items()}
    counts["temperature"] = model.logit_scale.numel() + model.logit_bias.numel()
    assert sum(counts.values()) == count(model), "a part of the model is missing from the table"
    return counts


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(config: ProfileConfig) -> dict[str, int]:
    """Forward FLOPs of one training sample by part, captions at full length, as one process computes them: its own
    videos are the hard negatives, so each is projected once for all passes of the multi-modal encoder."""
    shape = config.model
    length = shape.text.max_length
    with torch.device("meta"):
        model = SmaugModel(shape).train()
        frames = torch.zeros(1, shape.frames, 3, shape.vision.image_size, shape.vision.image_size, dtype=torch.uint8)
        noise = torch.zeros(1, shape.vision.patches)
        words = torch.zeros(length, dtype=torch.long)
        hidden = round(config.mlm_probability * length)
        flops: dict[str, int] = {}
        encoded = counted(flops, "vision encoder", lambda: model.vision(model.patchify(frames), noise))
        tokens = encoded.tokens
        if shape.frames > 1:
            tokens = counted(flops, "temporal encoder", lambda: model.temporal(encoded.tokens))
        both = Packing.of([length] * 2, "meta")  # a caption, and the same with words hidden
        states = counted(flops, "text encoder", lambda: model.text(words.repeat(2), both))
        # positive, hard negative text, hard negative video: each chooses its frames
        clips, sentence = torch.zeros(3, dtype=torch.long), states[:1].repeat(3, 1)
        if shape.frames > shape.frames_kept:
            counted(flops, "frame selector", lambda: model.choose_for_pairs(tokens, clips, sentence, None))
        choice = model.choose_for_pairs(tokens, clips, sentence, None)
        # and the masked caption, which looks at what the positive chose
        choice = None if choice is None else choice.repeat_first(1)
        clips, passes = torch.zeros(4, dtype=torch.long), Packing.of([length] * 4, "meta")
        wanted = torch.zeros(3 + hidden, dtype=torch.long)

        def fuse() -> Tensor:
            seen = model.look_at_pairs(tokens, clips, choice)
            return model.fuse(states.repeat(2, 1), passes, seen, wanted)

        fused = counted(flops, "multi-modal encoder", fuse)
        visual = model.encode_frames(frames, noise)
        if visual.masked_ids is not None:
            counted(flops, "pixel decoder", lambda: model.predict_pixels(visual, frames))
        counted(flops, "vocabulary logits", lambda: model.word_logits(fused[3:]))
        heads = [(model.vision_projection, tokens[:, 0, 0]), (model.text_projection, states[:1])]
        heads += [(model.match_head, fused[:3])]
        counted(flops, "projections and match head", lambda: [head(x) for head, x in heads])
    return flops


def counted(flops: dict[str, int], name: str, function: Callable):
    """Runs ``function``, adds what it cost to ``flops`` and returns its result."""
    counter = FlopCounterMode(display=False)
    with counter:
        result: Tensor | list = function()
    flops[name] = counter.get_total_flops()
    return result


def print_table(config: ProfileConfig, parameters: dict[str, int], flops: dict[str, int]) -> None:
    model = config.model
    compared = model == dataclasses.replace(ModelConfig.of_size("base"), text=model.text)
    print(f"size {model.size}, frames {model.frames}, kept {model.frames_kept}, caption {model.text.max_length} tokens")
    print(f"tokens per frame, class token included: {' -> '.join(map(str, model.vision.token_counts()))}\n")
    header = f"{'part':28} {'parameters':>12} {'GFLOPs':>9}"
    print(header + (f" {'planned':>9} {'Singularity':>12}" if compared else ""))
    for name in parameters:
        row = f"{name:28} {parameters[name]:12,} {flops.get(name, 0) / 1e9:9.3f}"
        if compared and name in PLANNED:
            singularity, planned = PLANNED[name]
            row += f" {planned:9.1f} {'-' if singularity is None else singularity:>12}"
        print(row)
    total = f"{'sum':28} {sum(parameters.values()):12,} {sum(flops.values()) / 1e9:9.3f}"
    if compared:
        planned_sum = sum(planned for _, planned in PLANNED.values())
        total += f" {planned_sum:9.1f} {sum(value or 0 for value, _ in PLANNED.values()):12.1f}"
    print(total)
