"""What a plan for ranks on the cores of this host needs to know of it, measured in a minute.

    python tools/plan_run.py host [--json FILE] [--config FILE] key=value ...

takes the settings of the run and prints settings of its cluster: matrix products of one core, the share of them that
the model's forward and backward pass reach, how much slower a pass is while all cores do one, and how fast and after
what delay ranks exchange a tensor over gloo. Nothing of a run is measured with several ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from smaug_ds.config import ConfigError, add_arguments, parse
from smaug_ds.data.sample import Batch
from smaug_ds.engine.allocator import keep_freed_memory
from smaug_ds.engine.deepspeed import load_json
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.planner.flops import Captions, Step, step_flops
from smaug_ds.planner.memory import Precision
from tools.planning.corpus import with_vocabulary
from tools.profiling.command import require_writable
from tools.profiling.machine import announce

CAPTION = 12  # tokens of every caption
SECONDS = 4.0  # that each timing takes
LARGE, SMALL = 8 << 20, 256  # elements of the tensors that are all-reduced
SQUARE = 1024  # rows of the matrices whose product is the peak
BETWEEN, TURNS = 128, 200  # rows of what is computed between small exchanges, and how often


def main(arguments: Sequence[str], program: str) -> int:
    """The subcommand ``host``, with what follows it on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="that will share the cores (one on each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    args = parser.parse_intermixed_args(arguments)
    cores = len(os.sched_getaffinity(0))
    ranks = cores if args.ranks is None else args.ranks
    try:
        config = with_vocabulary(parse(PretrainConfig, args.config, args.overrides))
        autocast = Precision.of(load_json(config.run.deepspeed)).activation_bytes == 2
        if ranks < 1:
            raise ConfigError(f"--ranks is {ranks}: it must be at least 1")
        if args.json:
            require_writable(f"--json {args.json}", args.json)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = announce({"model": config.model.size, "frames": config.model.frames, "batch": config.batch.micro_size})
    found = measure(config, autocast, ranks, cores)
    print(" ".join(f"cluster.{name}={value:.4g}" for name, value in found.items()))
    if args.json:
        args.json.write_text(json.dumps({"conditions": told, "cluster": found}, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(config: PretrainConfig, autocast: bool, ranks: int, cores: int) -> dict[str, Any]:
    """Settings of ``ClusterConfig`` that describe this host for ``config`` on so many ranks."""
    peak, alone, _, _ = _together(1, config, autocast)
    _, crowded, large, small = _together(ranks, config, autocast)
    hidden = round(config.loss.mlm_probability * CAPTION)
    step = Step(config.model.frames, config.batch.micro_size, 1, Captions.full(CAPTION), hidden)
    flops = sum(part.total for part in step_flops(config.model, config.loss, step).values())
    found = {
        "cores": cores,
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "peak_tflops": 2.0 * SQUARE**3 / peak / 1e12,
        "efficiency": flops / alone / (2.0 * SQUARE**3 / peak),
        "contention": max(1.0, crowded / alone / max(1.0, ranks / cores)),
    }
    if ranks > 1:
        # each rank of a ring sends 2 (W - 1) / W of the tensor; the host moves that of all ranks
        found |= {"link_gb_s": 2 * (ranks - 1) * LARGE * 4 / large / 1e9}
        found |= {"latency_us": small * 1e6 / (ranks - 1).bit_length()}
    return found


def _together(count: int, config: PretrainConfig, autocast: bool) -> list[float]:
    """Seconds on the slowest of ``count`` processes at once: of a matrix product, of a forward and backward pass, and
    of all-reducing a large and a small tensor between them."""
    barrier = processes.get_context("spawn").Barrier(count)
    with tempfile.TemporaryDirectory(prefix="host.") as folder:
        processes.spawn(_rank, (count, folder, barrier, config, autocast), nprocs=count)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    return [max(times) for times in zip(*found, strict=True)]


def _rank(rank: int, count: int, folder: str, barrier: Any, config: PretrainConfig, autocast: bool) -> None:
    keep_freed_memory()  # as training does
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dtype = torch.bfloat16 if autocast else torch.float32
    left, right = torch.randn(2, SQUARE, SQUARE, dtype=dtype)
    times = [_median(lambda: left @ right, barrier)]
    # before ranks know of each other: nothing is exchanged
    times.append(_median(training_pass(config, autocast), barrier))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)
    times.append(_median(partial(dist.all_reduce, torch.zeros(LARGE)), barrier, repeats=8))
    times.append(_mean_between(lambda: left[:BETWEEN] @ right, partial(dist.all_reduce, torch.zeros(SMALL))))
    Path(folder, f"{rank}.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def training_pass(config: PretrainConfig, autocast: bool) -> Callable[[], None]:
    """A forward and backward pass of the run's model on noise, as a call without arguments."""
    objective = Pretraining(SmaugModel(config.model), config.loss).train()
    batch = noise_batch(config.model, config.batch.micro_size)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = objective(batch)["loss"]
        loss.backward()

    return step


def noise_batch(model: ModelConfig, size: int) -> Batch:
    """``size`` clips of noise with captions of ``CAPTION`` random words, of which every seventh is hidden."""
    side, words = model.vision.image_size, size * CAPTION
    input_ids = torch.randint(model.text.vocab_size, (words,))
    hidden = torch.arange(words) % 7 == 1
    return Batch(
        step=0,
        medium="image" if model.frames == 1 else "video",
        frames=torch.randint(256, (size, model.frames, 3, side, side), dtype=torch.uint8),
        lengths=[CAPTION] * size,
        input_ids=input_ids,
        masked_ids=input_ids,
        mlm_labels=torch.where(hidden, input_ids, -100),
        mlm_positions=hidden.nonzero().squeeze(1),
        media_ids=torch.arange(size),
        patch_noise=torch.rand(size, model.vision.patches),
        frame_noise=torch.rand(size, model.frames).clamp(min=1e-6),
        negative_noise=torch.rand(size, 2),
        keys=[str(number) for number in range(size)],
        captions=[""] * size,
        all_captions=[("",)] * size,
    )


def _mean_between(compute: Callable[[], object], exchange: Callable[[], object]) -> float:
    """Mean seconds of ``exchange`` with ``compute`` between, as in a step: some ranks are late, and threads asleep."""
    times = []
    for _ in range(TURNS):
        compute()
        start = time.perf_counter()
        exchange()
        times.append(time.perf_counter() - start)
    return sum(times) / TURNS


def _median(call: Callable[[], object], barrier: Any, repeats: int = 0) -> float:
    """Median seconds of ``call``, which all processes begin together, over so many repeats or ``SECONDS``."""
    call()
    barrier.wait()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeats or (not repeats and (time.perf_counter() - began < SECONDS or len(times) < 3)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
