"""Memory and open files of loader and workers do not grow."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.order import Order
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.sample import BatchShape
from smaug_ds.text import Tokenizer
from tests.pools import Numbers, descriptors, pool_of


def memory_kb(pid: int) -> int:
    """Private memory of a process; what it shares with the others counts once for all."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def check_nothing_grows(items: Iterator[Any], warm_up: int, count: int) -> None:
    figures = []
    (worker,) = multiprocessing.active_children()
    for number in range(count):
        next(items)
        if number in (warm_up - 1, count - 1):
            gc.collect()
            pids = [worker.pid or 0, os.getpid()]
            figures.append([(memory_kb(pid), descriptors(pid)) for pid in pids])
    for (memory, files), (later_memory, later_files) in zip(*figures, strict=True):
        assert later_memory < 1.02 * memory + 12 * 1024
        assert abs(later_files - files) <= 3  # batches that are under way


def test_memory_and_descriptors_do_not_grow() -> None:
    with pool_of(Numbers(), itertools.count(), workers=1) as items:
        next(items)
        check_nothing_grows(items, 300, 3000)
        (worker,) = multiprocessing.active_children()
        assert "/dev/shm" not in Path(f"/proc/{worker.pid}/maps").read_text()


@pytest.mark.slow
def test_memory_and_descriptors_do_not_grow_over_twenty_thousand_samples(
    toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    """Real media, read and decoded; the batches of 10 go through the whole loader."""
    corpus = Corpus.open([toy_shards / "train"], holdout=0.0, split="train")
    order = Order(corpus.sizes(), global_batch=10, seed=3, group=2)
    shape = BatchShape(frames=3, image_size=32, patches=16, max_text_length=24, mlm_probability=0.15)
    tokenizer, ledger = Tokenizer(toy_media / "vocab.txt"), Ledger(tmp_path, 0)
    config = DataConfig(workers=1)
    cpu = torch.device("cpu")
    with TrainLoader(corpus, order, tokenizer, config, shape, 3, 10, 1, cpu, ledger) as loader:
        batches = iter(loader)
        next(batches)
        check_nothing_grows(batches, 200, 2000)
