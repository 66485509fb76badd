"""The order in which a backward pass delivers gradients, by which ZeRO-2 adds up those of several ranks.

DeepSpeed copies gradients one after the other into a flat bucket as they come, and sums the buckets of all ranks place
by place: ranks that deliver in different orders would silently get sums of different parameters. The negatives that a
rank draws decide how much of its work is done which way.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from pytest import MonkeyPatch

from smaug_ds import distributed
from smaug_ds.engine import negatives
from smaug_ds.engine.deepspeed import build_engine
from smaug_ds.engine.negatives import Draw
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.engine.optim import OptimConfig, Schedule
from smaug_ds.losses import LossConfig
from tests.models import random_batch, share, small_config, small_model
from tests.ranks import run_ranks
from tests.standin import write_json

SIZE, WORLD = 4, 2
# Of 4 frames one is kept. Rows of the videos that both ranks draw: all their own, all foreign, and one rank each way.
OWN, FOREIGN = [1, 2, 3, 0], [5, 6, 7, 4]
DRAWS = {
    "own": [*OWN, *FOREIGN],
    "foreign": [*FOREIGN, *OWN],
    "mixed": [1, 6, 3, 4, 5, 2, 3, 0],
    "different": [*OWN, *OWN],
}


def pretraining() -> Pretraining:
    config = small_config(4, 1)
    two_layers = dataclasses.replace(config.text, fusion_layers=2, dropout=0.0)
    return Pretraining(small_model(dataclasses.replace(config, text=two_layers)), LossConfig())


def drawing(videos: list[int]) -> Any:
    """Stands in for ``negatives.draw``: each clip gets the next text, and each text the given video."""
    texts = [(row + 1) % (WORLD * SIZE) for row in range(WORLD * SIZE)]
    valid = torch.ones(SIZE, dtype=torch.bool)
    return lambda *_: Draw(lambda: [list(pair) for pair in zip(texts, videos, strict=True)], valid, valid)


def delivered(dtype: torch.dtype) -> dict[str, list[str]]:
    """The names of the parameters in the order of their gradients, for each draw."""
    module = pretraining()
    order: list[str] = []
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    batch = share(random_batch(module.model.config, WORLD * SIZE), distributed.rank(), WORLD)
    orders = {}
    with MonkeyPatch.context() as patch:
        for draw, videos in DRAWS.items():
            patch.setattr(negatives, "draw", drawing(videos))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = module(batch)["loss"]
            loss.backward()
            orders[draw] = order.copy()
            order.clear()
    return orders


def orders_and_gradients(path: str) -> tuple[list[dict[str, list[str]]], float, float]:
    """Orders under autocast and without; the largest gradient, and the largest difference, of ZeRO-2's mean from ours.

    The ranks draw differently: one looks at fewer frames than there are, the other at as many.
    """
    orders = [delivered(dtype) for dtype in (torch.bfloat16, torch.float32)]
    module = pretraining()
    batch = share(random_batch(module.model.config, WORLD * SIZE), distributed.rank(), WORLD)
    with MonkeyPatch.context() as patch:
        patch.setattr(negatives, "draw", drawing(DRAWS["different"]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(batch)["loss"]
        loss.backward()
        expected = {
            name: parameter.grad.float() for name, parameter in module.named_parameters() if parameter.grad is not None
        }
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= WORLD
        again, optim = pretraining(), OptimConfig(gradient_clip=0.0)
        engine = build_engine(again, path, optim, Schedule.of(optim, 1, 2), SIZE, 1)
        engine.backward(engine(batch)["loss"])
    found = {name: safe_get_full_grad(parameter) for name, parameter in again.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return orders, largest, max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items())


def test_ranks_that_draw_differently_add_up_the_same_parameters(tmp_path: Path) -> None:
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]}
    json = write_json(tmp_path / "zero2.json", zero_optimization={"stage": 2}, torch_autocast=autocast)
    ranks = run_ranks(orders_and_gradients, WORLD, str(json))
    for dtype in range(2):
        first = ranks[0][0][dtype]["own"]
        assert len(first) == len(set(first)) > 100
        for orders, _, _ in ranks:
            assert all(order == first for order in orders[dtype].values())
    for _, largest, difference in ranks:
        assert largest > 0.1
        assert difference < 0.01 * largest
