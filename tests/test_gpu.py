"""The model and a real run on a GPU: bf16, FusedAdam, fused attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from tests.models import random_batch, small_config, small_model
from tests.standin import ROOT
from tests.test_train import finish, launch, settings

pytestmark = pytest.mark.gpu
NAMES = ("loss", "vtc", "vtm", "mlm", "mvm")


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_losses_on_the_gpu_equal_those_on_the_cpu(frames: int, dtype: torch.dtype, tolerance: float) -> None:
    config = small_config(frames, min(frames, 2))
    batch = random_batch(config, 8)
    expected = Pretraining(small_model(config), LossConfig())(batch)
    module = Pretraining(small_model(config), LossConfig()).to("cuda", dtype)
    found = module(batch.to("cuda"))
    found["loss"].backward()
    for name in NAMES:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=tolerance), name
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("json_name", ["zero2_bf16", "zero2_fp16", "zero1"])
def test_a_run_of_both_stages_on_the_gpu(json_name: str, toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    """FusedAdam is compiled at its first use, which takes a minute."""
    gpu = [f"run.deepspeed={ROOT / 'ds_configs' / json_name}.json", "batch.micro_size=16", "evaluation.precision=bf16"]
    first, second = tmp_path / "first", tmp_path / "second"
    finish(launch([*settings(toy_shards, toy_media, first), *gpu], ranks=1, accelerator="cuda"))
    stage_two = ["model.frames=4", "model.frames_kept=2", f"run.init_from={first}"]
    finish(launch([*settings(toy_shards, toy_media, second), *gpu, *stage_two], ranks=1, accelerator="cuda"))
    summary = json.loads((second / "summary.json").read_text())
    assert summary["accelerator"] != "cpu" and summary["steps"] == 8
    assert all(abs(value) < 100 for value in summary["losses_last"].values())
