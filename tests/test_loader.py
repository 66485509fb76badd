"""The loader: same batches whatever the workers, ranks and restarts; bad samples replaced whole; nothing left over."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as F

from smaug_ds.config import ConfigError
from smaug_ds.data.clip import Window
from smaug_ds.data.config import DataConfig
from smaug_ds.data.dali import Decoder, graph
from smaug_ds.data.draw import Draws, centre_crop, random_resized_crop
from smaug_ds.data.image import decode_image
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import EvalLoader, TrainLoader
from smaug_ds.data.order import Order, sample_generator, stable_hash
from smaug_ds.data.quarantine import DataError, Ledger, read_ledgers
from smaug_ds.data.reader import TrainReader
from smaug_ds.data.sample import Batch, BatchShape
from smaug_ds.data.shard import Entry
from smaug_ds.data.video import Video, choose_frames, decode
from smaug_ds.text import IGNORED, Tokenizer

SHAPE = BatchShape(frames=3, image_size=32, patches=16, max_text_length=24, mlm_probability=0.15)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
CONFIG = DataConfig(workers=0, shuffle_group=2)


@pytest.fixture(scope="module")
def tokenizer(toy_media: Path) -> Tokenizer:
    return Tokenizer(toy_media / "vocab.txt")


@pytest.fixture(scope="module")
def corpus(toy_shards: Path) -> Corpus:
    return Corpus.open([toy_shards / "train"], holdout=0.0, split="train")


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


def test_batch_equals_slow_reference(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every part of every sample, made again from the pure order with plain decoding and torchvision."""
    batches = take(make_loader(corpus, tokenizer, tmp_path), 8)
    assert {batch.medium for batch in batches} == {"image", "video"}
    order = Order(corpus.sizes(), global_batch=8, seed=3, group=2)
    for number, batch in enumerate(batches):
        step, micro_step = divmod(number, 2)
        frames = 3 if batch.medium == "video" else 1
        assert batch.step == step
        assert batch.frames.shape == (4, frames, 3, 32, 32)
        for i in range(4):
            position = order.positions(step)[micro_step * 4 + i]
            sample = corpus.read_sample(corpus.entry(batch.medium, *order.candidate(batch.medium, position, 0)))
            draws = Draws.of(sample_generator(3, position, batch.medium), SHAPE, frames)
            if batch.medium == "image":
                pixels = decode_image(sample.media)
            else:
                pixels = decode(sample.media, choose_frames(len(Video(sample.media)), frames, draws.generator))
            window = random_resized_crop(*pixels.shape[1:3], CONFIG.crop_scale, CONFIG.crop_ratio, draws.crop)
            crop = F.crop(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float(), *window)
            resized = F.resize(crop, [32, 32], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
            resized = resized.round().clamp(0, 255)
            expected = F.horizontal_flip(resized) if draws.flip < CONFIG.flip else resized
            assert (batch.frames[i] - expected).abs().max() <= 2
            assert batch.keys[i] == f"{sample.shard}/{sample.key}"
            assert batch.all_captions[i] == sample.captions
            assert batch.captions[i] in sample.captions
            assert batch.media_ids[i] == stable_hash(sample.media_id)
            ids = tokenizer.encode([batch.captions[i]], 24).input_ids
            assert torch.equal(batch.input_ids.split(batch.lengths)[i], ids)
        hidden = batch.mlm_labels != IGNORED
        assert all(caption.any() for caption in hidden.split(batch.lengths))
        assert torch.equal(batch.mlm_positions, torch.tensor([i for i in range(len(hidden)) if hidden[i]]))
        assert torch.equal(batch.mlm_labels[hidden], batch.input_ids[hidden])
        assert batch.patch_noise.shape == (4, 16)
        assert batch.frame_noise.shape == (4, frames)
        assert ((batch.frame_noise > 0) & (batch.frame_noise < 1)).all()
        assert batch.negative_noise.shape == (4, 2)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_and_leave_nothing(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    alone = take(make_loader(corpus, tokenizer, tmp_path), 7)
    random_state = torch.get_rng_state()
    helped = take(make_loader(corpus, tokenizer, tmp_path, dataclasses.replace(CONFIG, workers=workers)), 7)
    assert torch.equal(random_state, torch.get_rng_state())  # a resumed run must find the model's random numbers
    for one, other in zip(alone, helped, strict=True):
        assert_same(one, other)
    assert not multiprocessing.active_children()
    assert "pixels" not in {thread.name for thread in threading.enumerate()}


def test_global_batch_does_not_depend_on_ranks(corpus: Corpus, tokenizer: Tokenizer) -> None:
    order = Order(corpus.sizes(), global_batch=8, seed=3, group=2)

    def read(step: int, world_size: int, micro_batch: int) -> dict[str, tuple[str, bytes]]:
        accumulation = 8 // (world_size * micro_batch)
        seen = {}
        for rank in range(world_size):
            reader = TrainReader(
                corpus, order, tokenizer, CONFIG, SHAPE, 3, micro_batch, accumulation, rank, world_size, frozenset()
            )
            for index in range(step * accumulation, (step + 1) * accumulation):
                raw = reader[index]
                assert raw.batch is not None
                for key, caption, noise, clip in zip(
                    raw.batch.keys, raw.batch.captions, raw.batch.patch_noise, raw.clips.unpack(), strict=True
                ):
                    assert clip.frames is not None
                    seen[key] = (caption, noise.numpy().tobytes() + clip.frames.tobytes() + bytes(clip.window))
        return seen

    for step in range(3):
        alone = read(step, 1, 8)
        assert alone == read(step, 2, 2) == read(step, 4, 2)
        assert len(alone) == 8


def test_resume(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = take(make_loader(corpus, tokenizer, tmp_path), 10)
    first = make_loader(corpus, tokenizer, tmp_path)
    with first:
        batches = iter(first)
        assert first.state_dict() == {"step": 0}
        next(batches)
        assert first.state_dict() == {"step": 0}  # the step is under way
        for _ in range(3):
            next(batches)
        state = json.loads(json.dumps(first.state_dict()))
    assert state == {"step": 2}
    second = make_loader(corpus, tokenizer, tmp_path)
    second.load_state_dict(state)
    for one, other in zip(whole[4:], take(second, 6), strict=True):
        assert_same(one, other)
    third = make_loader(corpus, tokenizer, tmp_path)
    with third:
        assert_same(next(iter(third)), whole[0])
        ended = iter(third)
        next(ended)
        assert_same(next(iter(third)), whole[0])  # a second iteration begins where the state says
        assert not list(ended)  # and ends the first


def overwrite(entry: Entry, media: bytes) -> None:
    with open(entry.shard, "r+b") as shard:
        shard.seek(entry.media_offset)
        shard.write(media)


@pytest.fixture
def damaged(toy_shards: Path, tmp_path: Path) -> tuple[Corpus, set[str]]:
    """The training shards with the media of a fifth of the samples overwritten, and the names of these."""
    folder = tmp_path / "damaged"
    shutil.copytree(toy_shards / "train", folder)
    corpus = Corpus.open([folder], holdout=0.0, split="train")
    bad = set()
    for medium in ("image", "video"):
        for number in range(0, corpus.count(medium), 5):
            entry = corpus.nth(medium, number)
            overwrite(entry, bytes(entry.media_size))
            bad.add(f"{entry.shard}/{entry.key}")
    return corpus, bad


def test_bad_samples_are_replaced_whole(damaged: tuple[Corpus, set[str]], tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus, bad = damaged
    config = dataclasses.replace(CONFIG, max_failed_share=1.0)
    batches = take(make_loader(corpus, tokenizer, tmp_path / "run", config), 20)
    by_name = {}
    for medium in ("image", "video"):
        for number in range(corpus.count(medium)):
            entry = corpus.nth(medium, number)
            by_name[f"{entry.shard}/{entry.key}"] = entry
    for batch in batches:
        assert len(batch) == 4
        for key, captions, media_id in zip(batch.keys, batch.all_captions, batch.media_ids, strict=True):
            assert key not in bad
            sample = corpus.read_sample(by_name[key])
            assert captions == sample.captions
            assert media_id == stable_hash(sample.media_id)
    failures = read_ledgers(tmp_path / "run")
    assert failures
    order = Order(corpus.sizes(), global_batch=8, seed=3, group=2)
    for failure in failures:
        assert f"{failure.shard}/{failure.key}" in bad
        assert failure.stage in ("open", "image")
        assert failure.replaced_by not in bad
        places = order.positions(failure.step)
        batch = batches[failure.step * 2 + (failure.position - places.start) // 4]
        assert batch.keys[(failure.position - places.start) % 4] == failure.replaced_by
    again = take(make_loader(corpus, tokenizer, tmp_path / "again", dataclasses.replace(config, workers=1)), 20)
    for one, other in zip(batches, again, strict=True):
        assert_same(one, other)
    assert read_ledgers(tmp_path / "again") == failures


class RefusingGraph:
    """A DALI graph whose decoder refuses everything."""

    runs = 0

    def run(self, **inputs: object) -> None:
        assert {"encoded", "indices"} <= inputs.keys()
        RefusingGraph.runs += 1
        raise RuntimeError("Critical error in pipeline:\n\nencountered:\n\nno such stream\nin video_decoder.h")


@pytest.fixture
def refusing_nvdec(monkeypatch: pytest.MonkeyPatch) -> type[RefusingGraph]:
    """A loader with ``decoder="nvdec"`` sends H.264 to a graph that cannot decode it; all else is as it is."""

    def choose(setting: str, device: torch.device) -> Decoder:
        return Decoder("nvdec", frozenset({"h264"}), "") if setting == "nvdec" else Decoder("pyav", frozenset(), "")

    def fake(size: int, encoded: bool, on_gpu: bool, **settings: object) -> object:
        return RefusingGraph() if encoded else graph(size, encoded, on_gpu, **settings)

    monkeypatch.setattr("smaug_ds.data.dali.choose_decoder", choose)
    monkeypatch.setattr("smaug_ds.data.dali.graph", fake)
    monkeypatch.setattr(RefusingGraph, "runs", 0)
    return RefusingGraph


@pytest.fixture
def undecodable(toy_shards: Path, tmp_path: Path) -> tuple[Corpus, set[str]]:
    """The training shards with every third H.264 clip nulled after its first packet: only decoding shows it."""
    folder = tmp_path / "undecodable"
    shutil.copytree(toy_shards / "train", folder)
    corpus = Corpus.open([folder], holdout=0.0, split="train")
    entries = [corpus.nth("video", number) for number in range(corpus.count("video"))]
    bad = set()
    for entry in [entry for entry in entries if entry.facts.codec == "h264"][::3]:
        media = bytearray(corpus.read_sample(entry).media)
        with av.open(io.BytesIO(media)) as file:
            for packet in [packet for packet in file.demux(video=0) if packet.size][1:]:
                media[packet.pos : packet.pos + packet.size] = bytes(packet.size)
        assert len(Video(bytes(media)).trim([0, 5])[1]) == 2
        overwrite(entry, bytes(media))
        bad.add(f"{entry.shard}/{entry.key}")
    return corpus, bad


@pytest.mark.parametrize("workers", [0, 1])
def test_what_nvdec_refuses_pyav_decodes_or_replaces(
    undecodable: tuple[Corpus, set[str]],
    tokenizer: Tokenizer,
    tmp_path: Path,
    refusing_nvdec: type[RefusingGraph],
    workers: int,
) -> None:
    corpus, bad = undecodable
    config = dataclasses.replace(CONFIG, max_failed_share=1.0)
    expected = take(make_loader(corpus, tokenizer, tmp_path / "pyav", config), 20)
    assert not refusing_nvdec.runs
    config = dataclasses.replace(config, decoder="nvdec", workers=workers)
    with pytest.warns(RuntimeWarning, match="PyAV decodes this batch"):
        batches = take(make_loader(corpus, tokenizer, tmp_path / "nvdec", config), 20)
    assert refusing_nvdec.runs > 1
    for one, other in zip(batches, expected, strict=True):
        assert_same(one, other)
        assert not set(one.keys) & bad
    written = read_ledgers(tmp_path / "nvdec")
    refused = [failure for failure in written if failure.stage == "dali"]
    assert {failure.name for failure in refused if failure.replaced_by != failure.name} <= bad
    failures = [failure for failure in written if failure not in refused]
    assert failures == read_ledgers(tmp_path / "pyav")
    assert {failure.stage for failure in failures} == {"decode"}
    for failure in failures:
        assert f"{failure.shard}/{failure.key}" in bad
        assert failure.reason
        batch = batches[failure.step * 2 + failure.position % 8 // 4]
        assert batch.keys[failure.position % 4] == failure.replaced_by


def test_evaluation_with_a_refusing_nvdec(
    undecodable: tuple[Corpus, set[str]], tokenizer: Tokenizer, tmp_path: Path, refusing_nvdec: type[RefusingGraph]
) -> None:
    corpus, bad = undecodable

    def read(decoder: Literal["pyav", "nvdec"]) -> list[Batch]:
        config = dataclasses.replace(CONFIG, decoder=decoder)
        loader = EvalLoader(corpus, tokenizer, config, SHAPE, 5, CPU, Ledger(tmp_path / decoder, 0))
        batches = list(loader)
        assert loader.failed == len(bad)
        return batches

    with pytest.warns(RuntimeWarning, match="PyAV decodes this batch"):
        batches = read("nvdec")
    for one, other in zip(batches, read("pyav"), strict=True):
        assert_same(one, other)
    failures = [failure for failure in read_ledgers(tmp_path / "nvdec") if failure.stage != "dali"]
    assert failures == read_ledgers(tmp_path / "pyav")
    assert {failure.name for failure in failures} == bad


def test_an_error_of_the_graph_itself_is_raised(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("smaug_ds.data.dali.graph", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        take(make_loader(corpus, tokenizer, tmp_path), 1)


def test_too_many_failures_stop_the_run(damaged: tuple[Corpus, set[str]], tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus, _ = damaged
    impatient = dataclasses.replace(CONFIG, max_consecutive_failures=1)
    with pytest.raises(
        DataError,
        match=r"^1 candidates .* data\.max_consecutive_failures is 1; 0 samples .* see .*quarantine\.0\.jsonl",
    ):
        take(make_loader(corpus, tokenizer, tmp_path, impatient), 40)
    assert len(read_ledgers(tmp_path)) == 1


# Runs in a process group of its own, to all of which the tests send signals.
JOB = """
import dataclasses, multiprocessing, os, signal, sys
from pathlib import Path
from smaug_ds.data.index import Corpus
from tests.test_loader import CONFIG, Tokenizer, make_loader

caught = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: caught.append(number))
shards, vocabulary, folder = map(Path, sys.argv[1:])
corpus = Corpus.open([shards], holdout=0.0, split="train")
with make_loader(corpus, Tokenizer(vocabulary), folder, dataclasses.replace(CONFIG, workers=2)) as loader:
    batches = iter(loader)
    next(batches)
    for _ in sys.stdin:
        for _ in range(30):
            next(batches)
        print(*[signal.Signals(number).name for number in caught], flush=True)
"""


@pytest.fixture
def job(toy_shards: Path, toy_media: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A rank with two workers that takes 30 batches for each line it is sent, then prints the signals it caught."""
    arguments = [str(path) for path in (toy_shards / "train", toy_media / "vocab.txt", tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-c", JOB, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def take_thirty(job: subprocess.Popen[str]) -> str:
    assert job.stdin is not None and job.stdout is not None
    job.stdin.write("\n")
    job.stdin.flush()
    return job.stdout.readline().strip()


def test_signals_to_a_job_spare_all_that_its_loader_needs(job: subprocess.Popen[str]) -> None:
    assert take_thirty(job) == ""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.killpg(job.pid, number)
        assert take_thirty(job).endswith(number.name), job.communicate()[1]
    output, errors = job.communicate(timeout=60)
    assert (job.returncode, output, errors) == (0, "", "")


def test_a_killed_rank_leaves_no_process(job: subprocess.Popen[str]) -> None:
    assert take_thirty(job) == ""
    job.kill()
    assert job.communicate(timeout=60)[1] == ""  # returns when the last process that inherited stderr is gone


def test_programming_errors_are_not_swallowed(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a slip of the pen")

    monkeypatch.setattr("smaug_ds.data.clip.choose_frames", broken)
    with pytest.raises(TypeError, match="slip"):
        take(make_loader(corpus, tokenizer, tmp_path), 20)
    assert not read_ledgers(tmp_path)


def test_evaluation_sees_every_sample_once(toy_shards: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = Corpus.open([toy_shards / "test"], holdout=1.0, split="test")

    def read(rank: int, world_size: int, workers: int = 0) -> Iterator[Batch]:
        config = dataclasses.replace(CONFIG, workers=workers)
        loader = EvalLoader(corpus, tokenizer, config, SHAPE, 5, CPU, Ledger(tmp_path, 0), rank, world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert loader.failed == 0
        yield from batches

    alone = list(read(0, 1))
    assert [len(batch) for batch in alone] == [5] * 6 + [2]
    assert [batch.keys for batch in read(0, 2)] == [batch.keys for batch in alone[::2]]
    for one, other in zip(read(1, 2, workers=1), alone[1::2], strict=True):
        assert_same(one, other)
    assert not multiprocessing.active_children()
    keys = [key for batch in alone for key in batch.keys]
    assert len(set(keys)) == len(keys) == len(corpus)
    batch = alone[0]
    sample = corpus.read_sample(corpus.nth("video", 0))
    pixels = decode(sample.media, choose_frames(len(Video(sample.media)), 3, None))
    crop = F.crop(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), *centre_crop(*pixels.shape[1:3]))
    expected = F.resize(crop, [32, 32], interpolation=F.InterpolationMode.BICUBIC, antialias=True).round()
    assert (batch.frames[0] - expected.clamp(0, 255)).abs().max() <= 2
    assert batch.all_captions[0] == sample.captions
    assert (batch.mlm_labels == IGNORED).all()


def test_evaluation_leaves_bad_samples_out(
    damaged: tuple[Corpus, set[str]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    corpus, bad = damaged
    loader = EvalLoader(corpus, tokenizer, CONFIG, SHAPE, 1, CPU, Ledger(tmp_path / "run", 0))
    keys = [key for batch in loader for key in batch.keys]
    assert len(keys) == len(corpus) - len(bad)
    assert not set(keys) & bad
    assert loader.failed == len(bad) == len(read_ledgers(tmp_path / "run"))


def test_crop_windows_are_distributed_as_torchvision_draws_them() -> None:
    generator = np.random.default_rng(0)
    image = torch.zeros(3, 90, 160)
    scale, ratio = (0.3, 1.0), (0.75, 4 / 3)
    ours = np.array([random_resized_crop(90, 160, scale, ratio, generator.random((10, 4))) for _ in range(4000)])
    crop = transforms.RandomResizedCrop(8, scale, ratio)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([(d["top"], d["left"], d["height"], d["width"]) for d in drawn])
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=1.2)
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), atol=1.0)
    assert (ours[:, 0] + ours[:, 2] <= 90).all()
    assert (ours[:, 1] + ours[:, 3] <= 160).all()


def test_crop_windows_of_extreme_frames() -> None:
    uniform = np.random.default_rng(0).random((10, 4))
    assert random_resized_crop(16, 1024, (0.9, 1.0), (0.75, 4 / 3), uniform) == Window(0, 501, 16, 21)
    assert random_resized_crop(1024, 16, (0.9, 1.0), (0.75, 4 / 3), uniform) == Window(501, 0, 21, 16)
    assert random_resized_crop(1, 1, (0.1, 0.2), (0.75, 4 / 3), uniform) == Window(0, 0, 1, 1)
    assert random_resized_crop(1, 500, (0.1, 0.2), (0.75, 4 / 3), uniform).width >= 1
    assert centre_crop(30, 51) == Window(0, 10, 30, 30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, r"data\.flip is 1.5"),
        ({"workers": -1}, r"data\.workers is -1: it must be at least 0"),
        ({"crop_scale": (0.5, 1.2)}, r"data\.crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, r"data\.crop_ratio"),
        ({"max_consecutive_failures": 0}, r"data\.max_consecutive_failures"),
        ({"failure_window": 0}, r"data\.failure_window"),
        ({"sample_seconds": 0}, r"data\.sample_seconds is 0: it must be at least 0.1"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_loader_refuses_what_cannot_be(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.decoder"):
        make_loader(corpus, tokenizer, tmp_path, dataclasses.replace(CONFIG, decoder="nvdec"))
    order = Order(corpus.sizes(), global_batch=9, seed=3)
    with pytest.raises(ValueError, match=r"global batch is 9, but 4 \(micro batch\) \* 2"):
        TrainLoader(corpus, order, tokenizer, CONFIG, SHAPE, 3, 4, 2, CPU, Ledger(tmp_path, 0))
