"""An index of 17 million samples in 2,000 shards: what it holds in memory, and that every look-up hits.

Figures on the clock come from ``tools/profile_throughput.py index``.
"""

from __future__ import annotations

import itertools
import multiprocessing
from dataclasses import asdict
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch

from smaug_ds.data.config import DataConfig
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.mixture import Mixture, open_mixture
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.sample import BatchShape, Medium
from smaug_ds.text import Tokenizer, train_vocabulary
from tools.profiling.corpora import CAPTION, MANIFEST, SETS, SyntheticSet, set_of, write_corpus
from tools.profiling.index import Memory, fill_records, put_first_batch, shuffle_quality

SAMPLES, SHARDS = 17_000_000, 2000
SHAPE = BatchShape(frames=2, image_size=32, patches=4, max_text_length=16, mlm_probability=0.15)
BATCH = 8


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[SyntheticSet]:
    """The corpus; its records and media are holes until a test fills those that it looks at."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), SAMPLES, SHARDS, filled=False)


@pytest.fixture(scope="module")
def config(sets: list[SyntheticSet]) -> DataConfig:
    folder = sets[0].folder.parent
    train_vocabulary([CAPTION], 100, folder / "vocab.txt")
    return DataConfig(corpus=str(folder / MANIFEST), tokenizer=str(folder / "vocab.txt"), workers=0)


@pytest.fixture(scope="module")
def mixture(config: DataConfig) -> Mixture:
    return open_mixture(config)


def test_every_sample_is_counted(sets: list[SyntheticSet], mixture: Mixture) -> None:
    assert sum(len(one.counts) for one in sets) == SHARDS
    assert len(mixture.corpus) == SAMPLES
    videos = round(SAMPLES * SETS["webvid"][1] / sum(count for _, count in SETS.values()))
    assert abs(mixture.corpus.count("video") - videos) <= 1
    order = mixture.order(1024, seed=3, group=8)
    assert order.draws("video") + order.draws("image") == SAMPLES


@pytest.mark.parametrize("medium", ["image", "video"])
def test_look_ups_hit_distinct_samples(sets: list[SyntheticSet], mixture: Mixture, medium: Medium) -> None:
    order = mixture.order(1024, seed=3, group=8)
    draws = order.draws(medium)
    spread = range(0, draws, draws // 500)
    positions = sorted({*range(2000), *range(draws - 2000, draws), *spread})
    places = [order.candidate(medium, position, 0) for position in positions]
    sizes = mixture.sizes()[medium]
    assert all(0 <= index < sizes[shard] for shard, index in places)
    assert len(set(places)) == len(places)  # all in one epoch
    fill_records(sets, mixture, medium, places)
    for shard, index in places:
        entry = mixture.corpus.entry(medium, shard, index)
        own = set_of(sets, entry)
        local = int(Path(entry.shard).stem)
        assert int(entry.key) == own.starts[local] + index
        assert entry.medium == own.medium == medium
        assert entry.media_offset == index * own.stride + 512


def test_first_batches_come_out_of_the_tars(
    sets: list[SyntheticSet], config: DataConfig, mixture: Mixture, tmp_path: Path
) -> None:
    order = mixture.order(BATCH, seed=3, group=8)
    put_first_batch(sets, mixture, order, BATCH)
    ledger, cpu = Ledger(tmp_path, rank=0), torch.device("cpu")
    tokenizer = Tokenizer(config.tokenizer)
    media = set()
    with TrainLoader(mixture.corpus, order, tokenizer, config, SHAPE, 3, BATCH, 1, cpu, ledger) as loader:
        for step, batch in enumerate(itertools.islice(loader, 12)):
            media.add(batch.medium)
            places = [order.candidate(batch.medium, position, 0) for position in order.positions(step)]
            entries = [mixture.corpus.entry(batch.medium, *place) for place in places]
            assert batch.keys == [f"{entry.shard}/{entry.key}" for entry in entries]
            assert batch.captions == [CAPTION] * BATCH
            assert batch.frames.shape == (BATCH, 2 if batch.medium == "video" else 1, 3, 32, 32)
    assert media == {"image", "video"}
    assert not ledger.path.exists()


def _open(config: DataConfig, together: Barrier, results: Any) -> None:
    before = Memory.now()
    mixture = open_mixture(config)
    order = mixture.order(1024, seed=3, group=8)
    together.wait(60)
    opened = Memory.now()
    together.wait(60)
    for position in range(20_000):
        mixture.corpus.entry("image", *order.candidate("image", position, 0))
    used = Memory.now()
    together.wait(60)
    results.put([asdict(memory) for memory in (before, opened, used)])


@pytest.fixture(scope="module")
def memories(config: DataConfig) -> list[tuple[Memory, Memory, Memory]]:
    """Of two ranks: before opening, with the index open in both, and after many look-ups."""
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(2), context.SimpleQueue()
    ranks = [context.Process(target=_open, args=(config, together, results), daemon=True) for _ in range(2)]
    for rank in ranks:
        rank.start()
    told = [tuple(Memory(**memory) for memory in results.get()) for _ in ranks]
    for rank in ranks:
        rank.join()
    return told  # type: ignore[return-value]


def test_memory_of_a_rank_is_bounded_and_shared(memories: list[tuple[Memory, Memory, Memory]]) -> None:
    columns = SAMPLES * 5 / 1e6  # MB: medium and bucket, the two that are mapped
    for before, opened, used in memories:
        assert opened.resident - before.resident < 300
        assert opened.private - before.private < 50  # the mapped columns are not this rank's own
        assert opened.resident - before.resident > columns / 2  # the figure is about what it claims to be about
        assert used.resident - opened.resident < 50  # looking samples up maps nothing more


def test_neighbours_are_mixed(mixture: Mixture) -> None:
    order = mixture.order(1024, seed=3, group=8)
    images, videos = (shuffle_quality(order, mixture, medium, batches=4) for medium in ("image", "video"))
    assert images.sets_per_batch == len(SETS) - 1
    assert videos.sets_per_batch == 1
    assert images.shards_per_batch >= 5 * 7  # a group of 8 of each of five sets, less one that is nearly used up
    assert videos.shards_per_batch >= 7
    assert images.same_shard < 0.15
    assert images.distance > 0.5 * images.uniform_distance
