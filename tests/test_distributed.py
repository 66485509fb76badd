"""Collectives at several ranks against one process that holds everything, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from tests.ranks import run_ranks

ROWS, WIDTH = 3, 4


def rows_of(rank: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def loss_of(rank: int, everything: torch.Tensor) -> torch.Tensor:
    """A loss that differs between ranks and depends on the rows of all of them."""
    return ((rank + 1) * everything.sin() @ torch.arange(WIDTH, dtype=torch.float64)).square().sum()


def gather_and_differentiate() -> dict[str, Any]:
    rank, world_size = distributed.rank(), distributed.world_size()
    x = rows_of(rank).requires_grad_()
    gathered = distributed.all_gather_with_grad(x)
    loss_of(rank, gathered).backward()
    assert x.grad is not None

    y = rows_of(rank).requires_grad_()
    received = distributed.exchange_with_neighbour(y)
    loss_of(rank, received).backward()
    assert y.grad is not None

    total = rows_of(rank)
    return {
        "gathered": gathered.detach().numpy(),
        "gradient": x.grad.numpy(),
        "without_grad": distributed.all_gather(rows_of(rank).requires_grad_()).requires_grad,
        "bools": distributed.all_gather(torch.tensor([rank == 0, True])).tolist(),
        "bfloat16": distributed.all_gather_with_grad(torch.tensor([rank + 0.5], dtype=torch.bfloat16)).tolist(),
        "transposed": distributed.all_gather(rows_of(rank).T).numpy(),
        "sum": distributed.all_reduce_sum(total).numpy(),
        "untouched": bool(torch.equal(total, rows_of(rank))),
        "max": distributed.all_reduce_max(torch.tensor([rank, -rank])).tolist(),
        "received": received.detach().numpy(),
        "sent_gradient": y.grad.numpy(),
        "any": [distributed.any_rank(rank == n) for n in (0, world_size - 1, world_size)],
        "told": [told(rank in failing) for failing in ((), (1,), range(world_size))],
        "objects": distributed.gather_objects({"rank": rank}),
        "main": distributed.is_main(),
    }


def told(fails: bool) -> str | None:
    """What this rank hears when those that ``fails`` have an error."""
    try:
        with distributed.agreeing(ConfigError):
            if fails:
                raise ConfigError(f"{distributed.rank()} failed")
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_collective_equals_one_process(world_size: int) -> None:
    results = run_ranks(gather_and_differentiate, world_size)

    everything = torch.cat([rows_of(rank) for rank in range(world_size)]).requires_grad_()
    torch.stack([loss_of(rank, everything) for rank in range(world_size)]).sum().backward()
    assert everything.grad is not None
    for rank, result in enumerate(results):
        before, after = (rank - 1) % world_size, (rank + 1) % world_size
        torch.testing.assert_close(torch.from_numpy(result["gathered"]), everything.detach())
        mine = everything.grad[rank * ROWS : (rank + 1) * ROWS]
        torch.testing.assert_close(torch.from_numpy(result["gradient"]), mine)
        assert not result["without_grad"]
        assert result["bools"] == [True, True] + [False, True] * (world_size - 1)
        assert result["bfloat16"] == [r + 0.5 for r in range(world_size)]
        columns = torch.cat([rows_of(r).T for r in range(world_size)])
        assert torch.equal(torch.from_numpy(result["transposed"]), columns)
        torch.testing.assert_close(torch.from_numpy(result["sum"]), sum(rows_of(r) for r in range(world_size)))
        assert result["untouched"]
        assert result["max"] == [world_size - 1, 0]
        assert torch.equal(torch.from_numpy(result["received"]), rows_of(before))
        sent = rows_of(rank).requires_grad_()
        loss_of(after, sent).backward()
        assert sent.grad is not None
        torch.testing.assert_close(torch.from_numpy(result["sent_gradient"]), sent.grad)
        assert result["any"] == [True, True, False]
        one = "rank 1: 1 failed" if world_size > 1 else None
        assert result["told"] == [None, one, f"{rank} failed"]
        assert result["objects"] == [{"rank": r} for r in range(world_size)]
        assert result["main"] == (rank == 0)


def test_a_single_process_can_join_its_own_group() -> None:
    distributed.init(timeout_seconds=20)
    try:
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        distributed.barrier()
        assert distributed.any_rank(True) and not distributed.any_rank(False)
    finally:
        distributed.shutdown()
    distributed.shutdown()  # a second time does nothing
