"""The loader: batches equal a slow reference and are the same whatever the workers, ranks and restarts."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2.functional as F

from smaug_ds.config import ConfigError
from smaug_ds.data.config import DataConfig
from smaug_ds.data.draw import Draws, centre_crop, random_resized_crop
from smaug_ds.data.image import decode_image
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import EvalLoader, TrainLoader
from smaug_ds.data.order import Order, sample_generator, stable_hash
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.reader import TrainReader
from smaug_ds.data.sample import Batch
from smaug_ds.data.video import Video, choose_frames, decode
from smaug_ds.text import IGNORED, Tokenizer
from tests.loading import CONFIG, CPU, SHAPE, assert_same, make_loader, take


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
