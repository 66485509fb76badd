"""Speeds of whole loaders: ours as training uses it, its workers alone, and what video-language code commonly trains
from; and the memory of ours over a long time.

``loader --against decord`` takes turns with a plain ``torch.utils.data.DataLoader`` that reads clips as Singularity
does (its ``dataset/video_utils.py`` and ``dataset/__init__.py``): decord opens the file on one thread and gives a
random frame of each segment; torchvision crops, resizes and flips in the worker. Both sides do the same work: clips out
of the same tars in the same order, frames of one size in uint8 (Singularity sends normalised floats, four times the
bytes), captions tokenised and masked.
"""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as transforms

from smaug_ds.config import ConfigError
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.pool import Limits, Pool
from smaug_ds.data.quarantine import Ledger
from tools.profiling.machine import cpu_seconds, family
from tools.profiling.stages import SEED, Case, tokens_of

SOAK_MARKS = 10
_TRIMMED = frozenset({"h264"})  # codecs of the side that leaves decoding to NVDEC


@dataclass(frozen=True)
class Rate:
    """How fast batches come."""

    samples_per_second: float
    cpu_ms: float  # of this process and all that it started, for one sample


def rate_of(batches: Iterator[Any], case: Case, seconds: float) -> Rate:
    """Takes batches for so long, after those that may have been made ahead."""
    for _ in range(2 * max(1, case.data.workers) * case.data.prefetch):
        next(batches)
    began, cpu = time.perf_counter(), cpu_seconds()
    taken, elapsed = 0, 0.0
    while elapsed < seconds:
        next(batches)
        taken += case.batch
        elapsed = time.perf_counter() - began
    return Rate(taken / elapsed, 1e3 * (cpu_seconds() - cpu) / taken)


def make_loader(case: Case, scratch: Path) -> TrainLoader:
    ledger = Ledger(scratch / "quarantine", rank=0)
    return TrainLoader(
        case.corpus, case.order, case.tokenizer, case.data, case.shape, SEED, case.batch, 1, case.device, ledger
    )


def loader_rate(case: Case, seconds: float, scratch: Path) -> Rate:
    """Of ``TrainLoader``."""
    with make_loader(case, scratch) as loader:
        return rate_of(iter(loader), case, seconds)


def workers_rate(case: Case, seconds: float, codecs: frozenset[str]) -> Rate:
    """Of the workers alone, nothing done with what they send; clips of ``codecs`` leave them trimmed, not decoded."""
    config = case.data
    limits = Limits(config.sample_seconds)
    pool = Pool(
        case.reader(codecs), itertools.count(), max(1, config.workers), config.prefetch, limits, threading.Event()
    )
    with closing(pool):
        return rate_of(iter(pool), case, seconds)


def soak(cases: Sequence[Case], samples: int, scratch: Path) -> list[dict[str, Any]]:
    """Takes ``samples`` of each case; prints memory and open files of the processes at ``SOAK_MARKS`` marks."""
    figures = []
    for case in cases:
        print(f"\n{case}\n  {'samples':>8}  process number: resident MB, open files; this process first")
        marks = iter([samples * mark // SOAK_MARKS for mark in range(1, SOAK_MARKS + 1)])
        mark = next(marks)
        with make_loader(case, scratch) as loader:
            for number, _ in enumerate(loader, start=1):
                if number * case.batch < mark:
                    continue
                processes = {pid: asdict(used) for pid, used in family().items()}
                shown = [f"{pid}: {u['resident_mb']:.0f}, {u['descriptors']}" for pid, u in processes.items()]
                print(f"  {number * case.batch:8}  {'   '.join(shown)}", flush=True)
                figures.append({"case": str(case), "samples": number * case.batch, "processes": processes})
                if (mark := next(marks, 0)) == 0:
                    break
    return figures


@dataclass(frozen=True)
class Ratio:
    """One side over decord's in the same turn: median, least and greatest of the turns."""

    rate: float  # in samples/s
    lowest: float
    highest: float
    cpu: float  # in samples per second of CPU time, which other work on the machine disturbs less


def import_decord() -> ModuleType:
    """Raises ConfigError where it is not installed: nothing but this comparison needs it."""
    try:
        return importlib.import_module("decord")
    except ImportError as error:
        raise ConfigError(
            f"--against decord: {error}; it is no dependency of this project, install it for the measurement alone: "
            "pip install --no-deps --target FOLDER decord, then set PYTHONPATH=FOLDER"
        ) from error


class DecordClips(Dataset[tuple[Tensor, str]]):
    """Item i is the sample at position i of the case's order: frames (T, 3, S, S) uint8 and a caption."""

    def __init__(self, case: Case) -> None:
        self.case = case
        resize = functools.partial(
            transforms.RandomResizedCrop, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
        )
        crop = resize(case.image_size, scale=case.data.crop_scale, ratio=case.data.crop_ratio)
        self.augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(case.data.flip)])

    def __getitem__(self, position: int) -> tuple[Tensor, str]:
        case, decord = self.case, import_decord()
        decord.bridge.set_bridge("torch")
        sample = case.corpus.read_sample(case.corpus.entry("video", *case.order.candidate("video", position, 0)))
        reader = decord.VideoReader(io.BytesIO(sample.media), num_threads=1)
        frames = reader.get_batch(_one_of_each_segment(len(reader), case.frames))  # (T, H, W, 3) uint8
        return self.augment(frames.permute(0, 3, 1, 2)), sample.captions[0]


def _one_of_each_segment(frames: int, wanted: int) -> list[int]:
    """A random frame of each of ``wanted`` equal parts of the clip."""
    edges = np.linspace(0, frames, wanted + 1).astype(int).tolist()
    return [np.random.randint(low, max(low + 1, high)) for low, high in itertools.pairwise(edges)]


def _collate(case: Case, samples: Sequence[tuple[Tensor, str]]) -> tuple[Tensor, ...]:
    noise = [np.random.random((case.shape.max_text_length, 3)).astype(np.float32) for _ in samples]
    return torch.stack([frames for frames, _ in samples]), *tokens_of(case, [caption for _, caption in samples], noise)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def decord_rate(case: Case, seconds: float) -> Rate:
    """Of the plain loader, with as many workers and as many batches ahead of each as the case says for ours."""
    workers = case.data.workers
    loader: DataLoader[Any] = DataLoader(
        DecordClips(case),
        batch_size=case.batch,
        sampler=itertools.count(),  # endless, as ours is
        collate_fn=functools.partial(_collate, case),
        num_workers=workers,
        prefetch_factor=case.data.prefetch if workers else None,
        # torch would fork, which a process with DALI's threads cannot do safely; once workers run, it is the same
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_one_thread,
    )
    return rate_of(iter(loader), case, seconds)  # dropping the iterator ends its workers


def compare(cases: Sequence[Case], repeats: int, seconds: float, scratch: Path) -> list[dict[str, Any]]:
    """Takes turns, ``repeats`` of each; prints every turn, medians and ratios."""
    figures = []
    for case in cases:
        if case.medium != "video":
            continue
        print(f"\n{case}: samples/s (ms of CPU time a sample)\n  {'ours':>16} {'decord':>16} {'trim only':>16}")
        turns: list[dict[str, Rate]] = []
        for _ in range(repeats):
            turn = {
                "ours": loader_rate(case, seconds, scratch),
                "decord": decord_rate(case, seconds),
                "trim only": workers_rate(case, seconds, _TRIMMED),
            }
            print("  " + " ".join(f"{rate.samples_per_second:8.1f} ({rate.cpu_ms:5.2f})" for rate in turn.values()))
            turns.append(turn)
        ratios = {name: _ratio(turns, name) for name in ("ours", "trim only")}
        for name, ratio in ratios.items():
            print(
                f"  {name} / decord: {ratio.rate:.2f} in samples/s ({ratio.lowest:.2f} to {ratio.highest:.2f}), "
                f"{ratio.cpu:.2f} in samples per second of CPU time"
            )
        figures.append(
            {
                "case": str(case),
                "turns": [{name: asdict(rate) for name, rate in turn.items()} for turn in turns],
                "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
            }
        )
    print("trim only: what the workers would feed to NVDEC, which then decodes and crops; no GPU is part of it")
    return figures


def _ratio(turns: Sequence[dict[str, Rate]], name: str) -> Ratio:
    rates = [turn[name].samples_per_second / turn["decord"].samples_per_second for turn in turns]
    cpu = statistics.median(turn["decord"].cpu_ms / turn[name].cpu_ms for turn in turns)
    return Ratio(statistics.median(rates), min(rates), max(rates), cpu)
