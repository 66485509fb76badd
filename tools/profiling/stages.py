"""The stages of the data path timed one by one, with the functions that training calls, on one core."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smaug_ds.data import nvdec, wire
from smaug_ds.data.clip import Clip, PackedClips
from smaug_ds.data.config import DataConfig
from smaug_ds.data.dali import Decoder, Pixels
from smaug_ds.data.draw import Draws, random_resized_crop
from smaug_ds.data.image import decode_image
from smaug_ds.data.index import Corpus
from smaug_ds.data.order import Order, sample_generator
from smaug_ds.data.reader import TrainReader
from smaug_ds.data.sample import BatchShape, Medium, Sample
from smaug_ds.data.shard import Entry
from smaug_ds.data.video import Video, choose_frames
from smaug_ds.text import TextIds, Tokenizer, mask_tokens

SEED = 1
NVDEC_BATCHES = 10  # timed, after one to warm up

Where = Literal["worker", "rank"]


@dataclass(frozen=True)
class Stage:
    """Time of one stage."""

    name: str
    where: Where  # in the workers, which share it out, or in the rank's process, once
    milliseconds: float  # a sample
    counted: bool = True  # False: another way of doing a stage that is counted, told for comparison


@dataclass(frozen=True)
class Case:
    """One medium at one number of frames: what is measured at a time."""

    corpus: Corpus
    tokenizer: Tokenizer
    data: DataConfig
    medium: Medium
    frames: int
    image_size: int
    batch: int
    device: torch.device
    decoder: Decoder

    def __str__(self) -> str:
        return "images" if self.medium == "image" else f"clips, {self.frames} frame{'s' * (self.frames > 1)}"

    @functools.cached_property
    def order(self) -> Order:
        """Steps of this medium only."""
        sizes = {self.medium: self.corpus.sizes()[self.medium].tolist()}
        return Order(sizes, self.batch, SEED, self.data.shuffle_group)

    @property
    def shape(self) -> BatchShape:
        patches = (self.image_size // 16) ** 2
        return BatchShape(self.frames, self.image_size, patches, max_text_length=32, mlm_probability=0.15)

    def reader(self, codecs: frozenset[str]) -> TrainReader:
        """Of one rank, a micro batch a step; videos of ``codecs`` leave it encoded."""
        return TrainReader(
            self.corpus, self.order, self.tokenizer, self.data, self.shape, SEED, self.batch, 1, 0, 1, codecs
        )


@dataclass(frozen=True)
class NvdecRate:
    """Clips a second that NVDEC decodes, crops and resizes."""

    one_session: float  # one at a time keeps one engine busy at most
    all_sessions: float | None  # with data.dali_threads of them; None: not measured, ``one_session`` is assumed


class Laps:
    """A stopwatch that adds each lap to a named sum of seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now


def measure(case: Case, repeats: int) -> list[Stage]:
    """Median over ``repeats`` batches of the time a sample takes in each stage; one batch before them warms up."""
    with _as_in_a_worker():
        pixels = Pixels(case.image_size, case.batch, case.device, case.data.dali_threads)
        rounds = [_time_batch(case, pixels, step) for step in range(repeats + 1)][1:]
    encoded = case.medium == "video" and bool(case.decoder.codecs)
    stages: dict[str, tuple[Where, bool]] = {
        "order and index": ("worker", True),
        "read": ("worker", True),
        "read, file not cached": ("worker", False),
        "demux, frame choice": ("worker", True),
        "decode": ("worker", not encoded),
        "trim": ("worker", encoded),
        "draws, tokens": ("worker", True),
        "pack, send": ("worker", True),
        "receive": ("rank", True),
        "graph": ("rank", True),
        "copy to device": ("rank", True),
    }
    took = {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}
    return [
        Stage(name, where, 1e3 * took[name] / case.batch, counted)
        for name, (where, counted) in stages.items()
        if name in took
    ]


@contextmanager
def _as_in_a_worker() -> Iterator[None]:
    """One thread for torch and the tokenizer."""
    name, threads = "TOKENIZERS_PARALLELISM", torch.get_num_threads()
    before = os.environ.get(name)
    os.environ[name] = "false"
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _time_batch(case: Case, pixels: Pixels, step: int) -> dict[str, float]:
    """Seconds of each stage for the batch of one step."""
    laps = Laps()
    clips, captions, noise = [], [], []
    for position in case.order.positions(step):
        laps.restart()
        entry = case.corpus.entry(case.medium, *case.order.candidate(case.medium, position, 0))
        laps.lap("order and index")
        _forget(entry.shard)
        laps.restart()
        case.corpus.read_sample(entry)
        laps.lap("read, file not cached")
        sample = case.corpus.read_sample(entry)
        laps.lap("read")
        draws = Draws.of(sample_generator(SEED, position, case.medium), case.shape, case.frames)
        laps.lap("draws, tokens")
        clip = _time_clip(case, sample, entry, draws, laps)
        laps.restart()
        height, width = (entry.facts.height, entry.facts.width) if clip.frames is None else clip.frames.shape[1:3]
        window = random_resized_crop(height, width, case.data.crop_scale, case.data.crop_ratio, draws.crop)
        clips.append(replace(clip, window=window, flip=draws.flip < case.data.flip))
        captions.append(sample.captions[0])
        noise.append(draws.mlm_noise)
        laps.lap("draws, tokens")
    laps.restart()
    hidden = tokens_of(case, captions, noise)
    laps.lap("draws, tokens")
    arrived = _time_transport(PackedClips.pack(clips), hidden, laps)
    frames = pixels(arrived.unpack())
    laps.lap("graph")
    if case.device.type == "cuda":  # pixels are there already: the rest of a batch, text and draws
        rest = [*hidden, torch.empty(case.batch, case.shape.patches)]
        laps.restart()
        for tensor in rest:
            tensor.to(frames.device, non_blocking=True)
        torch.cuda.synchronize()
        laps.lap("copy to device")
    return laps.seconds


def _time_clip(case: Case, sample: Sample, entry: Entry, draws: Draws, laps: Laps) -> Clip:
    """What leaves a worker, window and flip not yet chosen. Trims and decodes a video, whichever is wanted."""
    nowhere = random_resized_crop(1, 1, (1, 1), (1, 1), np.zeros((0, 4)))
    if case.medium == "image":
        image = decode_image(sample.media)
        laps.lap("decode")
        return Clip(nowhere, False, frames=image)
    video = Video(sample.media)
    indices = choose_frames(len(video), case.frames, draws.generator)
    laps.lap("demux, frame choice")
    trimmed, local = video.trim(indices)
    file = nvdec.uncropped(entry.facts.codec, trimmed)
    laps.lap("trim")
    frames = video.decode(indices)
    laps.lap("decode")
    if file is None or not nvdec.takes(entry.facts, case.decoder.codecs):
        return Clip(nowhere, False, frames=frames)
    return Clip(nowhere, False, encoded=np.frombuffer(file, dtype=np.uint8), indices=local.astype(np.int32))


def tokens_of(case: Case, captions: list[str], noise: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of all captions, the same with hidden words, and labels, (S,) each; ``noise`` as ``Draws`` has it."""
    text: TextIds = case.tokenizer.encode(captions, case.shape.max_text_length)
    own = np.concatenate([rows[:length] for rows, length in zip(noise, text.lengths, strict=True)])
    masked, labels = mask_tokens(text, torch.from_numpy(own), case.shape.mlm_probability, case.tokenizer)
    return text.input_ids, masked, labels


def _time_transport(packed: PackedClips, tokens: tuple[Tensor, ...], laps: Laps) -> PackedClips:
    """Sends a batch as a worker does, to this same process."""
    ours, theirs = wire.pair()
    with ours, theirs:
        wire.send(ours, None, (packed, tokens), wait=lambda: None)
        laps.lap("pack, send")
        _, (arrived, _) = wire.receive(theirs)
        laps.lap("receive")
    return arrived


def _forget(path: str) -> None:
    """Drops the file from the page cache, as far as the kernel follows the advice."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def nvdec_rate(case: Case) -> NvdecRate:
    """NVDEC's speed on the trimmed clips of a case whose decoder has it."""
    reader = case.reader(case.decoder.codecs)
    batches = [reader[step].clips.unpack() for step in range(3)]

    def rate(threads: int) -> float:
        pixels = Pixels(case.image_size, case.batch, case.device, threads)
        pixels(batches[0])
        began = time.perf_counter()
        for number in range(NVDEC_BATCHES):
            pixels(batches[number % len(batches)])
        torch.cuda.synchronize()
        return NVDEC_BATCHES * case.batch / (time.perf_counter() - began)

    return NvdecRate(rate(1), rate(case.data.dali_threads))
