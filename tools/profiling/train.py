"""A real run from shards: how long a step waits for data and for the other ranks, and how long it computes.

    python tools/profile_throughput.py train [--ranks 2] [--steps 8] [--dtype bf16] [--data FOLDER data.tokenizer=FILE]
        [model.frames=4 model.frames_kept=2 batch.micro_size=8 data.workers=2 ...]

``smaug_ds.pretrain`` itself runs, loader, engine and loop, with the settings that are given, and ends after the steps
that are timed, without a checkpoint. Without ``--data`` (or ``data.train`` or ``data.corpus``, in its place), clips of
10 s and captions of 10 to 18 tokens are rendered first. Without ``run.deepspeed``, a CPU trains with
``ds_configs/cpu_bf16.json`` or, in fp32, ``cpu.json``, a GPU with ``zero2_bf16.json``.

Waiting for data is the loop's phase ``data`` without what it spends on the ranks' agreement. Communication is the time
inside collectives: on a CPU of the thread that calls them, waiting for slower ranks included; on a GPU of NCCL's
kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from smaug_ds import distributed
from smaug_ds.config import ConfigError, naming, parse, to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.engine.monitor import PHASES
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.planner.media import MediaConfig
from smaug_ds.text import Tokenizer
from tools.planning.corpus import BERT_VOCABULARY, ROOT
from tools.planning.measured import step_flops_of, work_of_run
from tools.profiling.command import new_parser, run
from tools.profiling.corpora import ClipStyle, caption, render_corpus
from tools.profiling.machine import announce
from tools.profiling.ranks import run_ranks
from tools.profiling.report import Bar, Report, add_files, plain, table, write
from tools.profiling.step import engine_dtype
from tools.profiling.turns import Spread


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``train``, with what follows it on the command line."""
    parser = new_parser(program, __doc__)
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="that are timed")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp32"],
        default="bf16",
        help="of the weights, on a CPU (bf16 is told as deepspeed, since the engine holds them so)",
    )
    parser.add_argument("--data", action="append", default=[], metavar="FOLDER", help="indexed shards; may be repeated")
    parser.add_argument("--clips", type=int, default=32, metavar="N", help="that are rendered without data")
    add_files(parser)
    settings = "of smaug_ds.pretrain (as model.frames=4)"
    write(*run(parser, arguments, settings, _report, {"ranks": 1, "steps": 1, "warmup": 0, "clips": 1}))


def _report(args: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory(prefix="profile.") as scratch:
        return train(args, Path(scratch))


def train(args: argparse.Namespace, scratch: Path) -> Report:
    """Does the run and prints what a step went into. Raises ConfigError for a setting that is wrong."""
    settings = _settings(args, scratch)
    data = parse(PretrainConfig, None, settings).data
    rendered = not (args.data or data.train or data.corpus)
    settings += _data_settings(args.data, data, scratch / "corpus")
    config = parse(PretrainConfig, None, settings)
    config.batch.accumulation(args.ranks)
    told = announce({**to_dict(config), "ranks": args.ranks})
    tokens = _render(scratch, args.clips, config) if rendered else None
    run_ranks(args.ranks, settings, args.warmup + args.steps)
    lines = [json.loads(line) for line in (scratch / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = record(config, lines[args.warmup :], args.ranks, engine_dtype(config.run.deepspeed), tokens)
    print(tell(measured))
    return _chart(measured, told)


def _settings(args: argparse.Namespace, scratch: Path) -> list[str]:
    """What the entry point is told: defaults first, then what was given, then what this measurement needs."""
    given = {override.partition("=")[0] for override in args.overrides}
    micro = next((o.partition("=")[2] for o in args.overrides if o.startswith("batch.micro_size=")), "8")
    defaults = {
        "batch.micro_size": micro,
        "batch.global_size": str(int(micro) * args.ranks) if micro.isdigit() else micro,
        "run.deepspeed": str(_engine(args.dtype)),
        "optim.warmup_steps": "1",
    }
    needed = {
        "run.folder": str(scratch / "run"),
        "run.max_steps": str(args.warmup + args.steps + 1),
        "run.log_every": "1",
        "run.save_every": "0",
        "run.picture_every": "0",
        "run.evaluate_every": "0",
    }
    for key in needed:
        if key in given:
            raise ConfigError(f"{key} cannot be set here: this command decides it; see --steps and --warmup")
    settings = [f"{key}={value}" for key, value in defaults.items() if key not in given]
    return [*settings, *args.overrides, *(f"{key}={value}" for key, value in needed.items())]


def _data_settings(folders: list[str], data: DataConfig, rendered: Path) -> list[str]:
    """What ``data`` lacks to train on ``folders`` of ``--data``, or on what will be rendered.

    Raises ConfigError where it names others than ``folders``.
    """
    if data.train or data.corpus:
        own = f"data.corpus={data.corpus}" if data.corpus else f"data.train={json.dumps(data.train)}"
        if folders:
            raise ConfigError(f"--data {' '.join(folders)} and {own}: give one of them")
        return []
    if folders:
        return [f"data.train={json.dumps(folders)}"]
    tokenizer = [] if data.tokenizer else [f"data.tokenizer={rendered}/vocab.txt"]
    return [f"data.train={json.dumps([f'{rendered}/video'])}", *tokenizer]


def _engine(dtype: str) -> Path:
    """The DeepSpeed JSON of this device and dtype."""
    name = "zero2_bf16" if _on_gpu() else "cpu" if dtype == "fp32" else "cpu_bf16"
    return ROOT / "ds_configs" / f"{name}.json"


def _on_gpu() -> bool:
    return distributed.device().type == "cuda"


def _render(scratch: Path, clips: int, config: PretrainConfig) -> float:
    """Writes the shards, with a vocabulary as large as BERT's; returns the mean tokens of a caption in the run."""
    render_corpus(scratch / "corpus", clips, ClipStyle(), os.cpu_count() or 1)
    path = scratch / "corpus" / "vocab.txt"
    words = path.read_text(encoding="utf-8").splitlines()
    words += [f"[unused{number}]" for number in range(BERT_VOCABULARY - len(words))]
    path.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    captions = [caption(number) for number in range(clips)]
    with naming("data.tokenizer"):
        return sum(Tokenizer(config.data.tokenizer).encode(captions, config.model.text.max_length).lengths) / clips


def record(
    config: PretrainConfig, lines: Sequence[dict[str, Any]], ranks: int, dtype: str, tokens: float | None
) -> dict[str, Any]:
    """What lines of metrics.jsonl, one a step, say: as ``tools/plan_run.py --profile`` reads it.

    ``phases`` are medians in seconds: waiting for data, computing forward, backward and step, and communication, which
    is in none of the others; but on a GPU, where it may run beside the computing, it is in them, too.
    ``flops_per_step`` is what the planner counts for captions of ``tokens``, by default for those of ``MediaConfig``.
    """
    media = MediaConfig()
    if tokens is not None:
        media = MediaConfig(caption_tokens=tokens, longest_caption=max(tokens, media.longest_caption))
    work = work_of_run(config, lines, media)
    seconds = Spread.of([config.batch.global_size / line["samples_per_second"] for line in lines])

    def median(key: Callable[[dict[str, Any]], float]) -> float:
        return Spread.of([key(line) for line in lines]).median

    def apart(phase: str) -> float:
        return median(lambda line: line[f"seconds_per_step/{phase}"] - line[f"communication/{phase}"])

    phases = {phase: apart(phase) for phase in PHASES}
    phases["communication"] = median(lambda line: sum(v for k, v in line.items() if k.startswith("communication/")))
    return {
        "what": "train",
        "size": config.model.size,
        "frames": config.model.frames,
        "frames_kept": config.model.frames_kept,
        "batch": config.batch.micro_size,
        "global_batch": config.batch.global_size,
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if _on_gpu() else "cpu",
        "world_size": ranks,
        "caption_tokens_mean": tokens,
        "seconds_per_step": plain(seconds),
        "steps": len(lines),
        "samples_per_second": config.batch.global_size / seconds.median,
        "flops_per_step": step_flops_of(work, ranks),
        "parameters": work.parameters,
        "matrix_peak_flops": None,
        "mfu": None,
        "peak_memory_bytes": int(lines[-1]["peak_memory_bytes"]),
        "phases": phases,
        "share_waiting_for_data": median(
            lambda line: (
                (line["seconds_per_step/data"] - line["communication/data"])
                * line["samples_per_second"]
                / config.batch.global_size
            )
        ),
    }


def tell(measured: dict[str, Any]) -> str:
    """``record`` as a table."""
    total = measured["seconds_per_step"]["median"]
    names = {"data": "waits for data", "step": "optimizer"}
    rows = [["", "s a step", "share"]]
    for name, value in measured["phases"].items():
        rows.append([names.get(name, name), f"{value:.3f}", f"{value / total:.1%}"])
    apart = [value for name, value in measured["phases"].items() if measured["device"] == "cpu" or name in PHASES]
    rest = total - sum(apart)
    rows += [["the rest", f"{rest:.3f}", f"{rest / total:.1%}"]]
    rows += [["whole step", Spread(**measured["seconds_per_step"]).text(3), ""]]
    return "\n".join(
        [
            f"{measured['size']} model, {measured['frames']} frames, {measured['frames_kept']} kept; "
            f"{measured['world_size']} ranks of batch {measured['batch']}, {measured['dtype']}",
            table(rows),
            f"{measured['samples_per_second']:.2f} samples/s; waits for data "
            f"{measured['share_waiting_for_data']:.1%} of a step; "
            f"peak memory of a rank {measured['peak_memory_bytes'] / 2**30:.2f} GiB",
        ]
    )


def _chart(measured: dict[str, Any], told: dict[str, Any]) -> Report:
    total = measured["seconds_per_step"]["median"]
    bars = [Bar(name, value, f"{value:.3f} s, {value / total:.1%}") for name, value in measured["phases"].items()]
    title = f"train, {measured['size']}, {measured['world_size']} ranks"
    return Report(told, title, f"seconds of a step of {total:.2f}", "", bars, [measured])
