"""What a plan for ranks on the CPU needs to know of this host, measured in half a minute.

    python tools/plan_run.py host [--json FILE]

prints settings of the cluster: matrix products of one core, how much slower they are while all cores work, and how fast
and after what delay ranks of this host exchange a tensor over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from tools.profile_machine import conditions, describe

WIDTH, ROWS = 768, 1024  # of the layer whose time is taken
SECONDS = 2.0  # that each timing takes
LARGE, SMALL = 8 << 20, 256  # elements of the tensors that are all-reduced


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``host``, with what follows it on the command line."""
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    args = parser.parse_args(arguments)
    told = conditions({})
    print(describe(told))
    found = measure()
    print(" ".join(f"cluster.{name}={value:.4g}" for name, value in found.items()))
    if args.json:
        args.json.write_text(json.dumps({"conditions": told, "cluster": found}, indent=1) + "\n", encoding="utf-8")


def measure() -> dict[str, Any]:
    """Settings of ``ClusterConfig`` that describe this host."""
    cores = len(os.sched_getaffinity(0))
    alone, _, _ = _together(1)
    layers, seconds, latency = _together(cores)
    flops = 3 * 2 * 2.0 * ROWS * WIDTH * 4 * WIDTH
    link = {}
    if cores > 1:
        # each rank of a ring sends 2 (W - 1) / W of the tensor; the host moves that of all ranks
        moved = 2 * (cores - 1) * LARGE * 4
        link = {"link_gb_s": moved / seconds / 1e9, "latency_us": latency * 1e6 / max(1.0, cores.bit_length() - 1)}
    return {
        "cores": cores,
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "peak_tflops": flops / alone / 1e12,
        "contention": max(1.0, layers / alone),
        **link,
    }


def _together(count: int) -> tuple[float, float, float]:
    """Seconds of a layer's training step on each of ``count`` processes at once (the slowest's median), and of a large
    and a small all-reduce between them."""
    with tempfile.TemporaryDirectory(prefix="host.") as folder:
        processes.spawn(_rank, (count, folder), nprocs=count)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    layer, large, small = (max(times) for times in zip(*found, strict=True))
    return layer, large, small


def _rank(rank: int, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)
    torch.manual_seed(rank)
    layer = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH)
    )
    rows = torch.randn(ROWS, WIDTH, requires_grad=True)

    def step() -> None:
        layer(rows).sum().backward()

    times = [_median(step)]
    for elements in (LARGE, SMALL):
        tensor = torch.zeros(elements)
        times.append(_median(lambda tensor=tensor: dist.all_reduce(tensor), repeats=8))
    Path(folder, f"{rank}.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def _median(call: Any, repeats: int = 0) -> float:
    """Median seconds of ``call``, over so many repeats or ``SECONDS``."""
    call()
    dist.barrier()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeats or (not repeats and time.perf_counter() - began < SECONDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
