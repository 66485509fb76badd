"""Ranks, gathering with gradient, and agreement between ranks. Everything works in one process without a process group.

Letters: B rows of one rank, W world size.

Gradients follow one convention: what leaves this module's backward is the gradient of the *sum* over ranks of their
losses, so the engine's average over ranks is the gradient of the mean loss, which is what a single process would see.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smaug_ds.config import ConfigError

SECONDS_TO_SPEAK = 5.0  # that the ranks of a host may differ in starting up


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Where this rank computes: its own GPU, or the CPU if there is none or ``DS_ACCELERATOR=cpu`` asks for it."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init(timeout_seconds: float, store: dist.Store | None = None) -> None:
    """Joins the process group named by the launcher's environment, or makes one of a single rank.

    store: that the ranks share already; None: rank 0 opens one at MASTER_ADDR and MASTER_PORT.

    NCCL for tensors on GPUs, gloo for those on the CPU. A collective that waits longer than ``timeout_seconds`` raises,
    so that a rank that died or stopped ends the run instead of hanging it.

    Raises ConfigError on rank 0 when another process listens at MASTER_PORT.
    """
    timeout = timedelta(seconds=timeout_seconds)
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    # Both on a GPU: agreement on flags and objects then goes through gloo and never waits for the device.
    backend, device_id = ("cpu:gloo,cuda:nccl", where) if where.type == "cuda" else ("gloo", None)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            dist.init_process_group(
                backend, timeout=timeout, store=store, rank=number, world_size=size, device_id=device_id
            )
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            where_to = f"MASTER_PORT {os.environ['MASTER_PORT']} on {os.environ['MASTER_ADDR']}"
            raise ConfigError(
                f"{where_to} is taken by another process: give another one, as deepspeed --master_port N"
            ) from error
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        store = dist.HashStore()
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1, device_id=device_id)


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Returns when every rank has arrived."""
    if world_size() > 1:
        dist.barrier()


def all_gather(x: Tensor) -> Tensor:
    """Rows (B, ...) of every rank in rank order, (W * B, ...), without gradient. B is the same on all ranks."""
    x = x.detach()
    if world_size() == 1:
        return x
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(rows, x.contiguous())
    return torch.cat(rows)


class _AllGatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank's loss depends on these rows. Slicing without this sum would shrink the gradient by the world size.
        total = all_reduce_sum(grads[0])
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Rows (B, ...) of every rank in rank order, (W * B, ...); the gradient sums what all ranks' losses ask of x."""
    return x if world_size() == 1 else _AllGatherWithGrad.apply(x)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _all_to_all(x, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _all_to_all(grads[0], ctx.received, ctx.sent), None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
    rows = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(rows, x.contiguous(), received, sent)
    return rows


def exchange_rows(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Sends the first ``sent[0]`` rows of x to rank 0, the next ``sent[1]`` to rank 1, ...; returns what came, in rank
    order, ``received[r]`` rows from rank r. The gradient of a row travels back to the rank that sent it.

    All ranks call it, and have to use the result even if it has no rows: its backward is a collective, too.
    """
    return x if world_size() == 1 else _ExchangeRows.apply(x, sent, received)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, a new tensor of the same shape, without gradient."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def all_reduce_max(x: Tensor) -> Tensor:
    """Elementwise maximum over ranks, a new tensor of the same shape, without gradient."""
    greatest = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
    return greatest


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; the same answer on all ranks, without waiting for the device."""
    return any_ranks(flag)[0]


def any_ranks(*flags: bool) -> list[bool]:
    """``any_rank`` of each flag, in one exchange."""
    return [bool(value) for value in all_reduce_max(torch.tensor(flags, dtype=torch.int64)).tolist()]


@contextmanager
def agreeing(*kinds: type[Exception]) -> Iterator[None]:
    """Raises an error of these ``kinds`` that a rank meets within on all ranks, so that none waits for it in vain.

    All ranks enter together; nothing within may wait for another rank. ``kinds`` are made from one text. Unless all
    ranks have failed, the message begins with the number of the first one that has.
    """
    error: Exception | None = None
    try:
        yield
    except kinds as caught:
        error = caught
    if not any_rank(error is not None):
        return
    errors = gather_objects(error)
    first = next(number for number, told in enumerate(errors) if told is not None)
    if error is not None and None not in errors:
        raise error
    raise type(errors[first])(f"rank {first}: {errors[first]}") from error


def print_error(error: Exception) -> None:
    """One line on standard error from the first rank of a host, for an error that all its ranks meet.

    The others wait a little: when a rank leaves, the launcher ends all of them, and the first one has to have spoken.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # a file on a full disk; the exit code tells, too
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_TO_SPEAK)


def _shift(x: Tensor, distance: int) -> Tensor:
    """Sends x to the rank ``distance`` further on the ring and returns what came from ``distance`` before."""
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    target, source = (rank() + distance) % world_size(), (rank() - distance) % world_size()
    exchange = [dist.P2POp(dist.isend, x.contiguous(), target), dist.P2POp(dist.irecv, received, source)]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _shift(x, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _shift(grads[0], -1)


def exchange_with_neighbour(x: Tensor) -> Tensor:
    """One turn of the ring: rank r sends x to r + 1 and returns what r - 1 sent; gradients travel back the other way.

    The shape is the same on all ranks. W - 1 turns show each rank the rows of all the others (sigmoid VTC).
    """
    return x if world_size() == 1 else _Exchange.apply(x)


def gather_objects(value: Any) -> list[Any]:
    """One picklable value of each rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
