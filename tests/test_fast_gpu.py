"""On a GPU: the step waits for the device once, and the fast paths equal the CPU's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from tests.models import random_batch, small_config, small_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("frames", [1, 4])
def test_the_forward_pass_waits_for_nothing_but_the_draw(frames: int) -> None:
    """Waiting for the draw's numbers is an event's business, which this mode of torch's lets pass."""
    config = small_config(frames, min(frames, 2))
    module = Pretraining(small_model(config), LossConfig()).to("cuda")
    batch = random_batch(config, 8).to("cuda")
    module(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = module(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses["loss"])


@pytest.mark.parametrize("what", ["layer", "cheap"])
def test_checkpointing_changes_nothing(what: str) -> None:
    """Dropout's draws included; sums on a GPU may come in another order."""
    results = []
    for every in (0, 1):
        config = small_config(4, 2, checkpoint_every=every, checkpoint_what=what)
        text = dataclasses.replace(config.text, checkpoint_every=every, checkpoint_what=what, dropout=0.1)
        module = Pretraining(small_model(dataclasses.replace(config, text=text)), LossConfig()).to("cuda")
        torch.manual_seed(3)
        loss = module(random_batch(config, 4).to("cuda"))["loss"]
        loss.backward()
        results.append((loss, [p.grad for p in module.parameters() if p.grad is not None]))
    (plain, gradients), (recomputed, others) = results
    torch.testing.assert_close(recomputed, plain)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
