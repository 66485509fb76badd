"""Loaders of small batches of the small corpus, for tests."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import torch

from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.order import Order
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.sample import Batch, BatchShape
from smaug_ds.text import Tokenizer

SHAPE = BatchShape(frames=3, image_size=32, patches=16, max_text_length=24, mlm_probability=0.15)
CPU = torch.device("cpu")
CONFIG = DataConfig(workers=0, shuffle_group=2)


def make_loader(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, config: DataConfig = CONFIG, shape: BatchShape = SHAPE
) -> TrainLoader:
    order = Order(corpus.sizes(), global_batch=8, seed=3, group=config.shuffle_group)
    return TrainLoader(corpus, order, tokenizer, config, shape, 3, 4, 2, CPU, Ledger(folder, rank=0))


def take(loader: TrainLoader, micro_batches: int) -> list[Batch]:
    with loader:
        return list(islice(loader, micro_batches))


def assert_same(ours: Batch, theirs: Batch) -> None:
    for field in dataclasses.fields(Batch):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
