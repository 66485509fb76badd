"""A small module and its batches in place of SMAUG, for tests of the engine and the loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaug_ds import distributed
from smaug_ds.data.order import Order, slots
from smaug_ds.data.sample import Batch, Medium

ROOT = Path(__file__).resolve().parent.parent
WORDS = 11
CPU_JSON = ROOT / "ds_configs" / "cpu.json"


def order_of(global_batch: int) -> Order:
    """Steps of both media."""
    return Order({"image": [30], "video": [70]}, global_batch, seed=0)


def batch_of(step: int, medium: Medium, samples: range) -> Batch:
    """A batch whose rows are numbered words, the same for the same samples whoever asks."""
    generator = torch.Generator().manual_seed(1000 * step)
    words = torch.randint(0, WORDS, (1000, 4), generator=generator)[samples.start : samples.stop]
    nothing = torch.zeros(len(samples), 1)
    tokens = words.flatten()
    return Batch(
        step=step,
        medium=medium,
        frames=nothing.byte(),
        lengths=[words.shape[1]] * len(samples),
        input_ids=tokens,
        masked_ids=tokens,
        mlm_labels=tokens,
        mlm_positions=torch.arange(len(tokens)),
        media_ids=words[:, 0],
        patch_noise=nothing,
        frame_noise=nothing,
        negative_noise=nothing,
        keys=[],
        captions=[],
        all_captions=[],
    )


class Batches:
    """Micro batches of this rank, as the loader gives them."""

    def __init__(self, order: Order, micro_size: int, accumulation: int, first_step: int = 0) -> None:
        self.order, self.micro_size, self.accumulation, self.step = order, micro_size, accumulation, first_step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for micro in range(self.accumulation):
                own = slots(micro, distributed.rank(), distributed.world_size(), self.micro_size)
                yield batch_of(self.step, self.order.medium(self.step), own)
            self.step += 1


class Standin(nn.Module):
    """Predicts each word from itself; the loss is a mean over samples, so that ranks and micro steps average."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(WORDS, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, WORDS)
        self.temperature = nn.Parameter(torch.ones(1))
        self.video_only = nn.Linear(8, 8)  # unused in image steps, as SMAUG's temporal encoder
        self.break_loss_at = self.break_gradient_at = -1  # step
        self.break_on_rank = 1

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x = self.dropout(self.hidden(self.embedding(batch.input_ids)))
        if batch.medium == "video":
            x = x + self.video_only(x)
        logits = self.head(self.norm(x)) * self.temperature
        mlm = F.cross_entropy(logits, batch.mlm_labels)
        vtc = x.square().mean()
        if distributed.rank() == self.break_on_rank:
            if batch.step == self.break_loss_at:
                vtc = vtc * float("nan")
            if batch.step == self.break_gradient_at:
                vtc = vtc + (self.temperature * 0).sqrt().sum()  # 0, but its slope is not finite
        return {"loss": mlm + vtc, "mlm": mlm, "vtc": vtc, "temperature": self.temperature.detach().squeeze()}


def write_json(path: Path, **changes: Any) -> Path:
    """cpu.json with top-level keys changed."""
    path.write_text(json.dumps(json.loads(CPU_JSON.read_text()) | changes))
    return path
