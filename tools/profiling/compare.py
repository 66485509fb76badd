"""Our training step and somebody else's in turns, A B A B, each in a process of its own.

    SINGULARITY=CHECKOUT python tools/profile_throughput.py compare --peer tools/peers/singularity.py
        [--turns 4] [--steps 2] [model.frames=4 model.frames_kept=2 batch=4 dtype=bf16 captions=full ...]

``--peer`` is a Python file with ``make_step(batch, frames, dtype)``, which returns a function that does one whole step
(forward, backward, optimizer) at that batch size. dtype is "fp32" or "bf16" (autocast). A turn is the median of
``--steps`` steps; the ratio is taken turn by turn, so that a slow minute of the machine hits both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from smaug_ds.config import ConfigError, parse, to_dict
from tools.profiling.command import keys_of, new_parser, run
from tools.profiling.machine import announce
from tools.profiling.model import peak_of, record
from tools.profiling.report import Bar, Report, add_files, plain, table, write
from tools.profiling.step import StepConfig
from tools.profiling.turns import External, Facts, Runner, Spread, Timing, take_turns


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``compare``, with what follows it on the command line."""
    parser = new_parser(program, __doc__)
    parser.add_argument("--peer", type=Path, required=True, metavar="FILE", help="Python file with make_step")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="of each side")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="of a turn")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="steps of each side that do not count")
    add_files(parser)
    write(
        *run(parser, arguments, keys_of(StepConfig(), "model.frames=4"), _report, {"turns": 1, "steps": 1, "warmup": 0})
    )


def _report(args: argparse.Namespace) -> Report:
    if not args.peer.is_file():
        raise ConfigError(f"--peer {args.peer} does not exist: name a Python file with make_step")
    config = parse(StepConfig, None, args.overrides)
    told = announce({**to_dict(config), "peer": str(args.peer)})
    return compare(config, args.peer, args.turns, args.steps, args.warmup, told)


def compare(config: StepConfig, peer: Path, turns: int, steps: int, warmup: int, told: dict[str, Any]) -> Report:
    """Times both sides and prints the table. Raises ConfigError where one of them cannot be made."""
    external = External(peer, config.batch, config.model.frames, config.dtype)
    with ExitStack() as stack:
        ours = stack.enter_context(Runner("our step", config, warmup))
        theirs = stack.enter_context(Runner(peer.stem, external, warmup))
        times = take_turns([ours, theirs], turns, steps)
        facts = [ours.facts(), theirs.facts()]
    peak = peak_of(config)
    measured = [record(config, ours.timing, facts[0], peak), _foreign(peer, external, theirs.timing, facts[1], peak)]
    speed = Spread.of([their / our for our, their in times])
    memory = facts[0].peak_bytes / facts[1].peak_bytes
    print(tell(config, peer.stem, measured, speed, memory))
    bars = []
    for name, figures in zip(("ours", peer.stem), measured, strict=True):
        rate = figures["samples_per_second"]
        bars.append(Bar(name, rate, f"{rate:.2f} samples/s"))
    title = (
        f"{config.model.frames} frames, batch {config.batch}, {config.precision}, captions {Path(config.captions).name}"
    )
    further = {"turns_seconds": times, "speed_ratio": plain(speed), "memory_ratio": memory}
    return Report(told, title, f"samples/s, ratio {speed.text(2)}", "", bars, measured, further)


def _foreign(peer: Path, external: External, timing: Timing, facts: Facts, peak: float) -> dict[str, Any]:
    """The record of the other side."""
    seconds = timing.seconds
    return {
        "what": "peer",
        "file": str(peer),
        "frames": external.frames,
        "batch": external.batch,
        "dtype": external.dtype,
        "device": facts.device,
        "world_size": 1,
        "seconds_per_step": plain(seconds),
        "samples_per_second": external.batch / seconds.median,
        "flops_per_step": facts.flops,
        "matrix_peak_flops": peak,
        "mfu": facts.flops / seconds.median / peak,
        "peak_memory_bytes": facts.peak_bytes,
    }


def tell(config: StepConfig, peer: str, measured: list[dict[str, Any]], speed: Spread, memory: float) -> str:
    """The table and the ratios."""
    rows = [["", "s a step", "samples/s", "GFLOPs a sample", "MFU", "peak memory"]]
    for name, figures in zip(("ours", peer), measured, strict=True):
        seconds = figures["seconds_per_step"]
        rows.append(
            [
                name,
                Spread(**seconds).text(3),
                f"{figures['samples_per_second']:.2f}",
                f"{figures['flops_per_step'] / figures['batch'] / 1e9:.1f}",
                f"{figures['mfu']:.0%}",
                f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB",
            ]
        )
    tokens = measured[0]["caption_tokens_mean"]
    return "\n".join(
        [
            f"frames {config.model.frames}, ours keeps {config.model.frames_kept}; batch {config.batch}, "
            f"{config.precision}; our captions {config.captions} ({tokens:.1f} tokens in the mean)",
            table(rows),
            f"samples/s, ours to {peer}'s: {speed.text(2)}; peak memory: {memory:.0%}",
        ]
    )
