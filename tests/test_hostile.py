"""Broken, odd and mislabelled files between good ones: training goes through, and no caption meets another's media."""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch

from smaug_ds import distributed
from smaug_ds.data.clip import PackedClips, make_clip
from smaug_ds.data.config import DataConfig
from smaug_ds.data.dali import Pixels
from smaug_ds.data.draw import Draws, random_resized_crop
from smaug_ds.data.image import decode_image
from smaug_ds.data.index import Corpus
from smaug_ds.data.indexing import build_index
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.media import MediaError, MediaFacts
from smaug_ds.data.order import Order, sample_generator, slots, stable_hash
from smaug_ds.data.quarantine import Failure, Ledger, read_ledgers
from smaug_ds.data.sample import Batch, BatchShape, Medium
from smaug_ds.data.shard import medium_of
from smaug_ds.data.video import Video
from smaug_ds.text import Tokenizer
from tests.launching import finish, launch, settings
from tests.shards import write_tar

SHAPE = BatchShape(frames=4, image_size=32, patches=16, max_text_length=16, mlm_probability=0.15)
SEED, GLOBAL, RANKS = 3, 16, 2
CONFIG = DataConfig(train=("unused",), shuffle_group=3, max_failed_share=0.8, max_consecutive_failures=40)
PER_SHARD = 24
HANG_SECONDS = 400  # after which a test has hung: all stacks are printed and the test run ends


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@dataclass(frozen=True)
class Hostile:
    """Shards in which every other sample is a hostile file, stated in the index to be like any other."""

    shards: Path
    media: dict[str, tuple[str, bytes]]  # key -> suffix, bytes
    names: dict[str, str]  # key -> file name, of the hostile ones
    never: set[str]  # keys that cannot be used, whatever frames are drawn
    sometimes: set[str]  # keys that cannot be used for some frames


def usable(medium: Medium, media: bytes, frames: list[int] | None) -> bool:
    """Whether the medium gives ``frames``, or all of them."""
    try:
        if medium == "image":
            decode_image(media)
        else:
            video = Video(media)
            video.decode(range(len(video)) if frames is None else frames)
    except MediaError:
        return False
    return True


@pytest.fixture(scope="module")
def hostile(shared_data: Path, toy_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    files = sorted(path for path in (shared_data / "hostile").rglob("*") if path.is_file())
    assert len(files) > 80
    clips = sorted(path for suffix in ("mp4", "webm") for path in toy_media.rglob(f"*.{suffix}"))
    good = clips[:60] + sorted(toy_media.rglob("*.jpg"))[:30]
    media: dict[str, tuple[str, bytes]] = {}
    names: dict[str, str] = {}
    for number, path in enumerate(files):
        suffix = path.suffix[1:].lower()
        in_images = path.parent.name == "images"
        media[f"hostile{number:03d}"] = (
            suffix if medium_of(suffix) else "jpg" if in_images else "mp4",
            path.read_bytes(),
        )
        names[f"hostile{number:03d}"] = path.name
    for number, path in enumerate(good):
        media[f"good{number:03d}"] = path.suffix[1:], path.read_bytes()
    order = sorted(media, key=lambda key: (int(key[-3:]), key))  # good and hostile ones in turn
    shards = tmp_path_factory.mktemp("hostile")
    for shard, start in enumerate(range(0, len(order), PER_SHARD)):
        members: list[tuple[str, bytes]] = []
        for key in order[start : start + PER_SHARD]:
            suffix, content = media[key]
            stated = MediaFacts("h264", "yuv420p", 320, 240, 100, 100, 25.0, 4.0, 0, 1)
            record = {"captions": [f"this is {key}"], "media_id": key, "media_facts": dataclasses.asdict(stated)}
            members += [(f"{key}.{suffix}", content), (f"{key}.json", json.dumps(record).encode())]
        write_tar(shards / "train" / f"{shard:05d}.tar", members)
    report = build_index(shards / "train")
    assert report.samples == len(media) and not report.rejects
    never, sometimes = set(), set()
    for key in names:
        medium = medium_of(media[key][0])
        assert medium is not None
        if not usable(medium, media[key][1], None):
            sometimes.add(key)
            if not usable(medium, media[key][1], [0]):
                never.add(key)
    assert len(never) > 15 and len(sometimes) > len(never)
    return Hostile(shards, media, names, never, sometimes)


def assert_pairs(batch: Batch, hostile: Hostile, order: Order, rank: int, pixels: Pixels) -> None:
    """Every row holds the caption, the id and the pixels of the one sample that its key names."""
    own = slots(0, rank, RANKS, GLOBAL // RANKS)
    for row, (slot, name) in enumerate(zip(own, batch.keys, strict=True)):
        key = name.rpartition("/")[2]
        assert batch.all_captions[row] == (f"this is {key}",) and batch.captions[row] == f"this is {key}"
        assert batch.media_ids[row] == stable_hash(key)
        if key in hostile.names and row % 3:
            continue  # decoding everything twice takes long: all good samples and a third of the others
        position = order.positions(batch.step)[slot]
        frames = SHAPE.frames if batch.medium == "video" else 1
        draws = Draws.of(sample_generator(SEED, position, batch.medium), SHAPE, frames)
        window = functools.partial(
            random_resized_crop, scale=CONFIG.crop_scale, ratio=CONFIG.crop_ratio, uniform=draws.crop
        )
        corpus = Corpus.open([hostile.shards / "train"], 0.0, "train")
        entry = next(
            corpus.nth(batch.medium, n)
            for n in range(corpus.count(batch.medium))
            if corpus.nth(batch.medium, n).key == key
        )
        sample = dataclasses.replace(corpus.read_sample(entry), media=hostile.media[key][1])
        clip = make_clip(sample, entry.facts, frames, draws.generator, draws.flip < CONFIG.flip, window, frozenset())
        assert torch.equal(pixels(PackedClips.pack([clip]).unpack())[0], batch.frames[row]), key


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_pairs_stay_together_and_the_ledger_names_what_failed(
    hostile: Hostile, workers: int, toy_media: Path, tmp_path: Path
) -> None:
    """Both ranks, each sample of the corpus at least once."""
    corpus = Corpus.open([hostile.shards / "train"], 0.0, "train")
    order = Order(corpus.sizes(), GLOBAL, SEED, CONFIG.shuffle_group)
    tokenizer = Tokenizer(toy_media / "vocab.txt")
    pixels = Pixels(SHAPE.image_size, 1, torch.device("cpu"), 1)
    steps = order.steps_per_epoch + 4  # a medium's epoch may end in the middle of a step
    seen: set[str] = set()
    for rank in range(RANKS):
        config = dataclasses.replace(CONFIG, workers=workers)
        ledger = Ledger(tmp_path, rank)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            patch.setattr(distributed, "world_size", lambda: RANKS)
            loader = TrainLoader(
                corpus, order, tokenizer, config, SHAPE, SEED, GLOBAL // RANKS, 1, torch.device("cpu"), ledger
            )
            with loader:
                for batch in islice(loader, steps):
                    assert_pairs(batch, hostile, order, rank, pixels)
                    seen |= {name.rpartition("/")[2] for name in batch.keys}
    failures = read_ledgers(tmp_path)
    failed = {failure.key for failure in failures}
    assert failed | seen == set(hostile.media)
    assert not seen & hostile.never
    assert hostile.never <= failed <= hostile.sometimes
    for failure in failures:
        assert_told(failure, hostile)


def assert_told(failure: Failure, hostile: Hostile) -> None:
    expected = {"image"} if medium_of(hostile.media[failure.key][0]) == "image" else {"open", "demux", "decode"}
    assert failure.stage in expected and len(failure.reason) > 5, failure
    assert failure.replaced_by is not None and not failure.replaced_by.endswith("/" + failure.key)
    assert failure.replaced_by.rpartition("/")[2] not in hostile.never
    assert failure.place is not None and failure.shard.startswith(str(hostile.shards))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_a_training_run_of_two_ranks_goes_through(
    hostile: Hostile, workers: int, toy_media: Path, tmp_path: Path
) -> None:
    corpus = Corpus.open([hostile.shards / "train"], 0.0, "train")
    steps = -(-len(corpus) // GLOBAL) + 4
    arguments = [
        *settings(hostile.shards, toy_media, tmp_path), "data.test=[]", f"data.workers={workers}",
        f"run.max_steps={steps}", "run.save_every=5", "batch.micro_size=8", "data.max_failed_share=0.8",
        "data.max_consecutive_failures=40",
    ]  # fmt: skip
    finish(launch(arguments))
    summary = json.loads((tmp_path / "summary.json").read_text())
    failures = read_ledgers(tmp_path / "quarantine")
    failed = {failure.key for failure in failures}
    assert hostile.never <= failed <= hostile.sometimes
    assert summary["steps"] == steps and summary["quarantined"] == len(failed)
    for failure in failures:
        assert_told(failure, hostile)

    # What is in the checkpoint's quarantine is passed over by the run that goes on from it.
    finish(launch([*arguments, f"run.max_steps={2 * steps}"]))
    later = [failure for failure in read_ledgers(tmp_path / "quarantine") if failure.step >= steps]
    assert not {failure.key for failure in later} & failed
    assert {failure.key for failure in later} <= hostile.sometimes


def test_tars_that_change_while_a_run_goes_on(toy_media: Path, tmp_path: Path) -> None:
    """Four shards: one is left alone, one is cut short, one is removed, one gets other content of the same length."""
    clips = sorted(toy_media.rglob("*.mp4"))[:32]
    for shard in range(4):
        members: list[tuple[str, bytes]] = []
        for number in range(8):
            key = f"s{shard}n{number}"
            record = {"captions": [f"this is {key}"], "media_id": key}
            members += [
                (f"{key}.mp4", clips[8 * shard + number].read_bytes()),
                (f"{key}.json", json.dumps(record).encode()),
            ]
        write_tar(tmp_path / "train" / f"{shard:05d}.tar", members)
    build_index(tmp_path / "train")
    corpus = Corpus.open([tmp_path / "train"], 0.0, "train")
    order = Order(corpus.sizes(), 8, SEED, 2)
    cut, gone, other = (tmp_path / "train" / f"{shard:05d}.tar" for shard in (1, 2, 3))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    gone.unlink()
    content = other.read_bytes().replace(b"s3n", b"s9n")  # the checksums of its headers are now wrong as well
    other.write_bytes(content)
    config = dataclasses.replace(CONFIG, workers=1, max_failed_share=1.0)
    tokenizer = Tokenizer(toy_media / "vocab.txt")
    arguments = (SHAPE, SEED, 8, 1, torch.device("cpu"), Ledger(tmp_path, 0))
    with TrainLoader(corpus, order, tokenizer, config, *arguments) as loader:
        batches = list(islice(loader, order.steps_per_epoch))
    for batch in batches:
        for name, captions in zip(batch.keys, batch.all_captions, strict=True):
            assert captions == (f"this is {name.rpartition('/')[2]}",)
            assert name.startswith((str(tmp_path / "train" / "00000.tar"), str(cut)))
    failures = read_ledgers(tmp_path)
    failed = {(failure.shard, failure.key) for failure in failures}
    for shard, path in ((2, gone), (3, other)):
        assert {(str(path), f"s{shard}n{number}") for number in range(8)} <= failed
    assert (str(cut), "s1n7") in failed and (str(cut), "s1n0") not in failed
    assert {failure.stage for failure in failures} == {"read"}
    reasons = {failure.shard: failure.reason for failure in failures}
    assert "ends at byte" in reasons[str(cut)]
    assert "cannot be read" in reasons[str(gone)]
    assert "index it again" in reasons[str(other)]
