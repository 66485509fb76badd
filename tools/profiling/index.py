"""Size and speed of the index of a large corpus, and quality of its shuffle.

    python tools/profile_throughput.py index [--samples 17000000] [--shards 2000] [--ranks 2] [key=value ...]

writes the index of a synthetic corpus of six sets to a temporary folder (records of about 110 bytes a sample; the tars
are holes, but for the first batch), then opens it in so many processes at once, as the ranks of a node do, and tells
for each: time and memory of opening, time to the first batch, and time to look a sample up. Settings are those of a
run's ``data`` section: ``shuffle_group=16``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smaug_ds.config import ConfigError, parse, to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.data.dali import choose_decoder
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.mixture import Mixture, open_mixture
from smaug_ds.data.order import Order
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.sample import MEDIA, BatchShape, Medium
from smaug_ds.text import Tokenizer, train_vocabulary
from tools.profiling.command import new_parser, run, write_json
from tools.profiling.corpora import CAPTION, MANIFEST, SETS, SyntheticSet, set_of, write_corpus
from tools.profiling.machine import announce
from tools.profiling.processes import run_together

BATCH = 32
GLOBAL_BATCH = 1024  # of the order whose shuffle is judged
SEED = 1
LOOKED_UP = 20_000  # samples of each medium
CPU = torch.device("cpu")  # where the ranks have their batches
_GRACE = 1.0  # seconds after which a failed rank is given up by the others, which wait for it
SHAPE = BatchShape(frames=4, image_size=224, patches=196, max_text_length=32, mlm_probability=0.15)


@dataclass(frozen=True)
class Memory:
    """Of one process, MB, from /proc/self/smaps_rollup."""

    resident: float  # all pages that are there, shared ones included
    proportional: float  # pages shared by n processes counted 1/n
    private: float

    @classmethod
    def now(cls) -> Memory:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        kb = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
        return cls(kb["Rss"] / 1e3, kb["Pss"] / 1e3, (kb["Private_Clean"] + kb["Private_Dirty"]) / 1e3)


@dataclass(frozen=True)
class Shuffle:
    """How well ``positions`` consecutive samples of one medium's stream are mixed."""

    positions: int
    same_shard: float  # share of neighbours out of one shard
    distance: float  # mean distance of neighbours, in samples of the corpus
    uniform_distance: float  # the same if every sample were equally likely at every place: a third of the corpus
    shards_per_batch: float  # different ones in a global batch
    shards_per_1000: float
    sets_per_batch: float


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``index``, with what follows it on the command line."""
    parser = new_parser(program, __doc__)
    parser.add_argument("--samples", type=int, default=17_000_000)
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=2, help="processes that open the index at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    figures, args = run(parser, arguments, None, _figures, {"samples": 1, "shards": 1, "ranks": 1})
    if args.json:
        write_json(args.json, figures)


def _figures(args: argparse.Namespace) -> dict[str, Any]:
    config = parse(DataConfig, None, args.overrides)
    choose_decoder(config.decoder, CPU)  # which every rank would refuse by itself
    told = announce(to_dict(config))
    with tempfile.TemporaryDirectory(prefix="profile.") as name:
        folder = Path(name)
        config = replace(config, corpus=str(folder / MANIFEST), tokenizer=str(folder / "vocab.txt"))
        began = time.perf_counter()
        sets = write_corpus(folder, args.samples, args.shards, filled=True)
        train_vocabulary([CAPTION], 1000, folder / "vocab.txt")
        mixture = open_mixture(config)
        images, videos = (sum(mixture.sizes()[medium]) for medium in MEDIA)
        if not (images and videos):
            raise ConfigError(
                f"--samples is {args.samples}: with holdout={config.holdout} that leaves {images} images and {videos} "
                "videos to train on, and at least 1 of each is needed: raise --samples"
            )
        put_first_batch(sets, mixture, mixture.order(BATCH, SEED, config.shuffle_group), BATCH)
        size = sum(path.stat().st_size for path in folder.glob("*/index/*"))
        print(
            f"{args.samples:,} samples in {sum(len(one.counts) for one in sets)} shards of {len(sets)} sets: "
            f"index of {size / 1e9:.2f} GB written in {time.perf_counter() - began:.0f} s"
        )
        ranks = _measure_ranks(config, folder, args.ranks)
        order = mixture.order(GLOBAL_BATCH, SEED, config.shuffle_group)
        shuffles = {medium: shuffle_quality(order, mixture, medium) for medium in MEDIA}
    _print(ranks, shuffles, config)
    judged = {medium: asdict(shuffle) for medium, shuffle in shuffles.items()}
    return {**told, "figures": {"ranks": ranks, "shuffle": judged}}


def put_first_batch(sets: Sequence[SyntheticSet], mixture: Mixture, order: Order, batch: int) -> None:
    """Gives records and bytes to the samples of the first steps of ``batch`` samples, those made ahead included."""
    for step in range(64):
        medium = order.medium(step)
        for position in order.positions(step)[:batch]:
            place = order.candidate(medium, position, 0)
            fill_records(sets, mixture, medium, [place])
            entry = mixture.corpus.entry(medium, *place)
            set_of(sets, entry).put_media(entry)


def fill_records(
    sets: Sequence[SyntheticSet], mixture: Mixture, medium: Medium, places: Sequence[tuple[int, int]]
) -> None:
    """Writes the records of samples given as (shard of the corpus, index in it); every shard holds one medium."""
    ends = np.cumsum([len(one.counts) for one in sets])
    for number, one in enumerate(sets):
        first = int(ends[number]) - len(one.counts)
        rows = [int(one.starts[shard - first]) + index for shard, index in places if first <= shard < ends[number]]
        assert not rows or one.medium == medium, "a sample of one medium in a shard of the other"
        if rows:
            one.fill(np.array(rows))


def _measure_ranks(config: DataConfig, folder: Path, ranks: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(ranks)
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    run_together([context.Process(target=_rank, args=(config, file, together)) for file in files], _GRACE)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _rank(config: DataConfig, file: Path, together: Barrier) -> None:
    """Writes what one rank measures; all open at the same time and look at their memory while all have it open."""
    before = Memory.now()
    together.wait()
    began = time.perf_counter()
    mixture = open_mixture(config)
    opening = time.perf_counter() - began
    together.wait()
    after = Memory.now()
    together.wait()
    order = mixture.order(BATCH, SEED, config.shuffle_group)
    ledger = Ledger(file.with_suffix(""), rank=0)
    began = time.perf_counter()
    tokenizer = Tokenizer(config.tokenizer)
    with TrainLoader(mixture.corpus, order, tokenizer, config, SHAPE, SEED, BATCH, 1, CPU, ledger) as loader:
        next(iter(loader))
        first_batch = time.perf_counter() - began
    together.wait()
    figures = {
        "opening_seconds": opening,
        "memory_before": asdict(before),
        "memory_after": asdict(after),
        "first_batch_seconds": first_batch,
        "lookup_microseconds": {medium: _time_lookups(mixture, order, medium) for medium in MEDIA},
        "memory_end": asdict(Memory.now()),
    }
    write_json(file, figures)


def _time_lookups(mixture: Mixture, order: Order, medium: Medium) -> dict[str, dict[str, float]]:
    """Microseconds a sample: of the order; of the entry on first touch (the index not cached), and again."""
    for index in mixture.corpus.indexes:
        for name in ("samples.npy", "keys.npy"):
            descriptor = os.open(index.folder / "index" / name, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    first = order.draws(medium) // 2
    positions = range(first, first + LOOKED_UP)
    places = [order.candidate(medium, position, 0) for position in positions]
    fresh = mixture.order(BATCH, SEED, order.group)  # has no layout of an epoch or group ready
    return {
        "order": _timed(positions, lambda position: fresh.candidate(medium, position, 0)),
        "entry, first touch": _timed(places, lambda place: mixture.corpus.entry(medium, *place)),
        "entry": _timed(places, lambda place: mixture.corpus.entry(medium, *place)),
    }


def _timed(items: Sequence[Any], look_up: Callable[[Any], Any]) -> dict[str, float]:
    """Means in microseconds: of CPU time, which a busy machine stretches less, and of time on the clock."""
    cpu, clock = time.thread_time(), time.perf_counter()
    for item in items:
        look_up(item)
    cpu, clock = time.thread_time() - cpu, time.perf_counter() - clock
    return {"cpu": cpu / len(items) * 1e6, "clock": clock / len(items) * 1e6}


def shuffle_quality(order: Order, mixture: Mixture, medium: Medium, batches: int = 20) -> Shuffle:
    """Of ``batches`` global batches from the middle of the medium's epoch."""
    sizes = np.asarray(mixture.sizes()[medium])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    batch = order.global_batch
    first = order.draws(medium) // 2 // batch * batch
    located = [order.candidate(medium, position, 0) for position in range(first, first + batches * batch)]
    shards, within = np.array(located).T
    numbers = starts[shards] + within
    set_ends = np.array([part.end for part in mixture.sets])
    sets = np.searchsorted(set_ends, shards, side="right")

    def different(values: np.ndarray, window: int) -> float:
        whole = values[: len(values) // window * window].reshape(-1, window)
        return float(np.mean([len(np.unique(row)) for row in whole]))

    return Shuffle(
        positions=len(numbers),
        same_shard=float(np.mean(shards[1:] == shards[:-1])),
        distance=float(np.mean(np.abs(np.diff(numbers)))),
        uniform_distance=float(sizes.sum() / 3),
        shards_per_batch=different(shards, batch),
        shards_per_1000=different(shards, 1000),
        sets_per_batch=different(sets, batch),
    )


def _print(ranks: Sequence[dict[str, Any]], shuffles: dict[str, Shuffle], config: DataConfig) -> None:
    for number, rank in enumerate(ranks):
        before, after, end = (Memory(**rank[f"memory_{name}"]) for name in ("before", "after", "end"))
        private, proportional = after.private - before.private, after.proportional - before.proportional
        print(
            f"rank {number}: opening {rank['opening_seconds']:.2f} s, {after.resident - before.resident:.0f} MB more "
            f"resident ({private:.0f} MB private, {proportional:.0f} MB proportional); "
            f"{end.resident - before.resident:.0f} MB more at the end\n"
            f"  first batch of {BATCH} after {rank['first_batch_seconds']:.2f} s ({config.workers} workers started)"
        )
        for medium, took in rank["lookup_microseconds"].items():
            parts = ", ".join(f"{name} {mean['cpu']:.1f} ({mean['clock']:.1f})" for name, mean in took.items())
            print(f"  {LOOKED_UP:,} {medium}s looked up, microseconds of CPU (of the clock) a sample: {parts}")
    print(f"shuffle of {GLOBAL_BATCH} samples a step, shuffle_group {config.shuffle_group}:")
    for medium, judged in shuffles.items():
        print(
            f"  {medium}s, {judged.positions:,} positions: neighbours out of one shard {judged.same_shard:.1%}, mean "
            f"distance {judged.distance:,.0f} samples (uniform: {judged.uniform_distance:,.0f})\n"
            f"    shards in a step {judged.shards_per_batch:.1f}, in 1000 samples {judged.shards_per_1000:.1f}, "
            f"sets in a step {judged.sets_per_batch:.1f} of {len(SETS)}"
        )
