"""Real runs of the smallest model through the deepspeed launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from smaug_ds.engine import checkpoint
from tests.ranks import free_port
from tests.standin import CPU_JSON, ROOT

TIMINGS = ("seconds_per_step", "samples_per_second")


def settings(shards: Path, media: Path, folder: Path) -> list[str]:
    """A run of 8 steps of a model that is as small as it gets."""
    text = {"width": 32, "heads": 2, "mlp_width": 64, "text_layers": 1, "fusion_layers": 1, "dropout": 0.1}
    vision = {"width": 32, "heads": 2, "mlp_width": 64, "depth": 2, "sparsify_layers": [1], "checkpoint_every": 1}
    return [
        f"run.folder={folder}", f"run.deepspeed={CPU_JSON}", "run.max_steps=8", "run.log_every=1", "run.save_every=3",
        "run.timeout_seconds=60", "batch.global_size=16", "batch.micro_size=4", "model.size=tiny",
        f"model.vision={json.dumps(vision)}", f"model.text={json.dumps(text)}", f"data.train=[{shards / 'train'}]",
        f"data.test=[{shards / 'test'}]", f"data.tokenizer={media / 'vocab.txt'}", "data.workers=0",
        "optim.warmup_steps=2", "optim.lr=1e-3", "evaluation.rerank_depth=4",
    ]  # fmt: skip


def launch(
    arguments: Sequence[str], ranks: int = 2, accelerator: str = "cpu", module: str = "smaug_ds.pretrain"
) -> subprocess.Popen:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port"]
    command = [*launcher, str(free_port()), "--module", module, *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": accelerator, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock had a hand in."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMINGS)} for line in lines]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Every figure that was logged, and every weight at the end, bit for bit."""
    assert figures(one) == figures(other)
    weights = checkpoint.load_weights(other)
    assert all(torch.equal(value, weights[name]) for name, value in checkpoint.load_weights(one).items())


@contextmanager
def signals_kept() -> Iterator[None]:
    """What a run does to the handlers of this process is undone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
