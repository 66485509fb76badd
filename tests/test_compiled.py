"""torch.compile changes neither losses nor the names of weights."""

from __future__ import annotations

import pytest
import torch

from smaug_ds.engine.compiled import compile_static
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.model.smaug import ModelConfig
from tests.models import random_batch, small_config, small_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_losses_and_gradients_are_the_same(dtype: torch.dtype) -> None:
    """The graphs as torch traces them, forward and backward, before a compiler makes code of them."""
    compare(small_config(frames=3, frames_kept=2, depth=2), dtype, "aot_eager")


@pytest.mark.slow
def test_compiled_losses_and_gradients_are_the_same() -> None:
    compare(small_config(depth=1, sparsify_layers=(1,)), torch.float32, "inductor")


def compare(config: ModelConfig, dtype: torch.dtype, backend: str) -> None:
    torch._dynamo.reset()
    plain, compiled = (Pretraining(small_model(config), LossConfig()).to(dtype) for _ in range(2))
    told: list[str] = []
    compile_static(compiled.model, compiled, told.append, backend)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for seed in (0, 1):
        batch = random_batch(config, 4, seed)
        expected, found = plain(batch), compiled(batch)
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        for name in ("vtc", "vtm", "mlm", "mvm"):
            torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance)
        expected["loss"].backward()
        found["loss"].backward()
    assert len(told) == 1
    assert "graphs of vision and pixels, 0 graph breaks" in told[0], told
    assert not told[0].startswith("torch.compile: 0 graphs")
    parameters = zip(plain.named_parameters(), compiled.parameters(), strict=True)
    ours, theirs = zip(*((p.grad, q.grad) for (_, p), q in parameters if p.grad is not None), strict=True)
    flat, other = (torch.cat([gradient.flatten().float() for gradient in some]) for some in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(flat, other, dim=0) > (1 - 1e-5 if dtype == torch.float32 else 0.99)
