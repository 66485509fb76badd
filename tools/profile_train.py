"""A real run from shards: how long a step waits for data and for the other ranks, and how long it computes.

    python tools/profile_throughput.py train [--ranks 2] [--steps 8] [--dtype bf16] [--data FOLDER data.tokenizer=FILE]
        [model.frames=4 model.frames_kept=2 batch.micro_size=8 data.workers=2 ...]

``smaug_ds.pretrain`` itself runs, loader, engine and loop, with the settings that are given, and ends after the steps
that are timed, without a checkpoint. Without ``--data``, clips of 10 s and captions of 10 to 18 tokens are rendered
first. Without ``run.deepspeed``, a CPU trains with ZeRO-2 in fp32 or bf16 autocast, a GPU with
``ds_configs/zero2_bf16.json``.

Waiting for data is the loop's phase ``data`` without what it spends on the ranks' agreement. Communication is the time
inside collectives: on a CPU of the thread that calls them, waiting for slower ranks included; on a GPU of NCCL's
kernels.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from smaug_ds.config import ConfigError, parse, to_dict
from smaug_ds.engine.monitor import PHASES, Monitor, Stopwatch
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.text import Tokenizer
from tools.profile_clips import ClipStyle, caption, render_corpus
from tools.profile_machine import conditions, describe, peak_memory
from tools.profile_output import Bar, Report, add_arguments, check_arguments, plain, table, write
from tools.profile_step import BERT_VOCABULARY
from tools.profile_turns import Spread

ROOT = Path(__file__).resolve().parent.parent
_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
    *("barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "monitored_barrier", "recv"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send"),
)
_TIMEOUT = 3600.0  # seconds that a run may take


class Measured(SystemExit):
    """Ends a run when its last timed step is over; the watchdog takes no leave of this kind for a failure."""


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``train``, with what follows it on the command line."""
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="that are timed")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="on a CPU: autocast or not")
    parser.add_argument("--data", action="append", default=[], metavar="FOLDER", help="indexed shards; may be repeated")
    parser.add_argument("--clips", type=int, default=32, metavar="N", help="that are rendered without --data")
    add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of smaug_ds.pretrain (as model.frames=4)")
    args = parser.parse_intermixed_args(arguments)
    try:
        check_arguments(args)
        for name, least in (("ranks", 1), ("steps", 1), ("warmup", 0), ("clips", 1)):
            if getattr(args, name) < least:
                raise ConfigError(f"--{name} is {getattr(args, name)}: it must be at least {least}")
        with tempfile.TemporaryDirectory(prefix="profile.") as scratch:
            report = train(args, Path(scratch))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    write(report, args)


def train(args: argparse.Namespace, scratch: Path) -> Report:
    """Does the run and prints what a step went into. Raises ConfigError for a setting that is wrong."""
    settings = _settings(args, scratch)
    config = parse(PretrainConfig, None, settings)
    config.batch.accumulation(args.ranks)
    told = conditions({**to_dict(config), "ranks": args.ranks})
    print(describe(told), flush=True)
    tokens = None if args.data else _render(scratch, args.clips)
    _run_ranks(args.ranks, settings, args.warmup + args.steps)
    lines = [json.loads(line) for line in (scratch / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = record(config, lines[args.warmup :], args.ranks, _dtype(config), tokens)
    print(tell(measured))
    return _report(measured, told)


def _settings(args: argparse.Namespace, scratch: Path) -> list[str]:
    """What the entry point is told: defaults first, then what was given, then what this measurement needs."""
    given = {override.partition("=")[0] for override in args.overrides}
    micro = next((o.partition("=")[2] for o in args.overrides if o.startswith("batch.micro_size=")), "8")
    defaults = {
        "batch.micro_size": micro,
        "batch.global_size": str(int(micro) * args.ranks) if micro.isdigit() else micro,
        "run.deepspeed": str(_engine(args.dtype, scratch)),
        "optim.warmup_steps": "1",
    }
    if args.data:
        defaults["data.train"] = json.dumps(args.data)
    else:
        defaults |= {"data.train": f'["{scratch}/corpus/video"]', "data.tokenizer": f"{scratch}/corpus/vocab.txt"}
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


def _engine(dtype: str, scratch: Path) -> Path:
    """The DeepSpeed JSON of this device and dtype."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return ROOT / "ds_configs" / "zero2_bf16.json"
    plain_engine = ROOT / "ds_configs" / "cpu.json"
    if dtype == "fp32":
        return plain_engine
    engine = json.loads(plain_engine.read_text(encoding="utf-8"))
    path = scratch / "autocast.json"
    path.write_text(json.dumps(engine | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), encoding="utf-8")
    return path


def _dtype(config: PretrainConfig) -> str:
    engine = json.loads(Path(config.run.deepspeed).read_text(encoding="utf-8"))
    names = {"bf16": "deepspeed", "fp16": "fp16", "torch_autocast": "bf16"}
    return next((name for key, name in names.items() if engine.get(key, {}).get("enabled")), "fp32")


def _render(scratch: Path, clips: int) -> float:
    """Writes the shards, with a vocabulary as large as BERT's; returns the mean tokens of a caption."""
    render_corpus(scratch / "corpus", clips, ClipStyle(), os.cpu_count() or 1)
    path = scratch / "corpus" / "vocab.txt"
    words = path.read_text(encoding="utf-8").splitlines()
    words += [f"[unused{number}]" for number in range(BERT_VOCABULARY - len(words))]
    path.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    lengths = Tokenizer(path).encode([caption(number) for number in range(clips)], 32).lengths
    return sum(lengths) / clips


def _run_ranks(ranks: int, settings: list[str], steps: int) -> None:
    """Starts the ranks and waits for them. Raises ConfigError when one fails, which has said why by then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    context = get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, ranks, port, settings, steps)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + _TIMEOUT
        for process in processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise ConfigError(f"the run ended with the codes {codes} of its ranks; see above")


def _rank(rank: int, ranks: int, port: int, settings: list[str], steps: int) -> None:
    """One rank of the run, in a process of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with watched_communication() as spent:
        from smaug_ds import pretrain  # DeepSpeed keeps the collectives that it finds when it is imported

        _log_communication(spent, steps)
        try:
            code = pretrain.main(settings)
        except Measured:
            return
    raise SystemExit(code or 1)  # it never reached the last timed step


@contextmanager
def watched_communication() -> Iterator[Callable[[], float]]:
    """Within it the collectives of ``torch.distributed`` are timed; yields what tells their seconds so far."""
    spent, inside = 0.0, False

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent, inside
            if inside:  # one collective made of others counts once
                return function(*args, **kwargs)
            inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside, spent = False, spent + time.perf_counter() - began

        return call

    places = [(torch.distributed, name) for name in _COLLECTIVES] + [(torch.distributed.Work, "wait")]
    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, function in originals:
        setattr(place, name, timed(function))
    try:
        yield lambda: spent
    finally:
        for place, name, function in originals:
            setattr(place, name, function)


def _log_communication(spent: Callable[[], float], steps: int) -> None:
    """Adds to each line of metrics.jsonl what the collectives took by phase; ends the run after ``steps``."""
    by_phase: dict[str, float] = defaultdict(float)
    original_call, original_log = Stopwatch.__call__, Monitor.log
    kernels = _NcclKernels()

    @contextmanager
    def call(self: Stopwatch, phase: str) -> Iterator[None]:
        before = spent()
        with original_call(self, phase):
            yield
        by_phase[phase] += spent() - before

    def log(self: Monitor, step: int, figures: dict[str, float]) -> None:
        told = {f"communication/{phase}": by_phase[phase] for phase in PHASES}
        if kernels.on_gpu:
            told = {f"communication/{phase}": 0.0 for phase in PHASES} | {"communication/kernels": kernels.read()}
        by_phase.clear()
        device = torch.device("cuda" if kernels.on_gpu else "cpu")
        original_log(self, step, {**figures, **told, "peak_memory_bytes": float(peak_memory(device))})
        if step == steps:
            raise Measured

    Stopwatch.__call__ = call  # type: ignore[method-assign]
    Monitor.log = log  # type: ignore[method-assign,assignment]


class _NcclKernels:
    """Seconds of NCCL's kernels on this rank's GPU since they were last asked for."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        self._profile: torch.profiler.profile | None = None

    def read(self) -> float:
        seconds = 0.0
        if self._profile is not None:
            torch.cuda.synchronize()
            self._profile.stop()
            seconds = (
                sum(e.self_device_time_total for e in self._profile.key_averages() if "nccl" in e.key.lower()) / 1e6
            )
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.start()
        return seconds


def record(
    config: PretrainConfig, lines: Sequence[dict[str, Any]], ranks: int, dtype: str, tokens: float | None
) -> dict[str, Any]:
    """What lines of metrics.jsonl, one a step, say: as ``tools/plan_run.py --profile`` reads it.

    ``phases`` are medians in seconds: waiting for data, computing forward, backward and step, and communication, which
    is in none of the others.
    """
    seconds = Spread.of([config.batch.global_size / line["samples_per_second"] for line in lines])

    def median(key: Callable[[dict[str, Any]], float]) -> float:
        return Spread.of([key(line) for line in lines]).median

    phases = {
        phase: median(lambda line, p=phase: line[f"seconds_per_step/{p}"] - line[f"communication/{p}"])
        for phase in PHASES
    }
    phases["communication"] = median(lambda line: sum(v for k, v in line.items() if k.startswith("communication/")))
    return {
        "what": "train",
        "size": config.model.size,
        "frames": config.model.frames,
        "frames_kept": config.model.frames_kept,
        "batch": config.batch.micro_size,
        "global_batch": config.batch.global_size,
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": ranks,
        "caption_tokens_mean": tokens,
        "seconds_per_step": plain(seconds),
        "steps": len(lines),
        "samples_per_second": config.batch.global_size / seconds.median,
        "flops_per_step": None,  # see the subcommand model
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
    rest = total - sum(measured["phases"].values())
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


def _report(measured: dict[str, Any], told: dict[str, Any]) -> Report:
    total = measured["seconds_per_step"]["median"]
    bars = [Bar(name, value, f"{value:.3f} s, {value / total:.1%}") for name, value in measured["phases"].items()]
    title = f"train, {measured['size']}, {measured['world_size']} ranks"
    return Report(told, title, f"seconds of a step of {total:.2f}", "", bars, [measured])
