"""Runs a function on several gloo ranks and returns what each rank returned."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _entry(rank: int, function: Callable[..., Any], world_size: int, port: int, results: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        if world_size > 1:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """``function(*args)`` on ``world_size`` processes joined by gloo; results in rank order, as plain Python or numpy.

    ``function`` must be importable (module level). A rank's exception is raised here with its traceback.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_entry, args=(rank, function, world_size, port, results, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        answers = [results.get(timeout=timeout) for _ in ranks]
    finally:
        for process in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    errors = [f"rank {rank}:\n{error}" for rank, _, error in answers if error]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [answer for _, answer, _ in sorted(answers, key=lambda item: item[0])]
