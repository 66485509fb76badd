"""What DALI refuses: culprits are found, and every other sample of the batch stays as it was.

DALI's decoder on the CPU takes VP9 and refuses H.264, so it stands in for an NVDEC that lacks a codec. A VP9 clip with
broken frame markers is refused by both decoders.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smaug_ds.data import dali
from smaug_ds.data.clip import Clip, GraphError, Window
from smaug_ds.data.config import DataConfig
from smaug_ds.data.dali import Pixels
from smaug_ds.data.index import Corpus
from smaug_ds.data.indexing import build_index
from smaug_ds.data.order import Order
from smaug_ds.data.quarantine import Failure, Verdict
from smaug_ds.data.reader import EvalReader, RawBatch, TrainReader
from smaug_ds.data.rescue import find_culprits, finish
from smaug_ds.data.sample import Batch, BatchShape, Sample
from smaug_ds.data.shard import Entry
from smaug_ds.text import Tokenizer
from tests.clips import CONTAINERS, damaged, moving_clip
from tests.shards import crawled, overwrite, write_tar

CPU = torch.device("cpu")
SHAPE = BatchShape(frames=3, image_size=32, patches=16, max_text_length=12, mlm_probability=0.15)
CODECS = frozenset({"vp9", "h264"})
MICRO = 8  # samples of a batch


class Watching(Pixels):
    """Counts calls and refusals; ``refuse`` may refuse clips that DALI would take."""

    def __init__(self, batch: int = MICRO) -> None:
        super().__init__(SHAPE.image_size, batch, CPU, threads=1)
        self.calls: list[int] = []
        self.refusals = self.rebuilt = 0

    def refuse(self, clips: Sequence[Clip]) -> str:
        return ""

    def __call__(self, clips: Sequence[Clip]) -> Tensor:
        self.calls.append(len(clips))
        try:
            if words := self.refuse(clips):
                raise GraphError(words)
            return super().__call__(clips)
        except GraphError:
            self.refusals += 1
            raise

    def rebuild(self) -> None:
        self.rebuilt += 1
        super().rebuild()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two shards of 20 clips: in each, one that PyAV has to decode and two that nothing decodes."""
    folder = tmp_path_factory.mktemp("refused")
    kinds = ["vp9"] * 17 + ["h264"] + ["bad"] * 2
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        for number, kind in enumerate(kinds):
            codec = "h264" if kind == "h264" else "vp9"
            media = moving_clip(codec, 100 * shard + number)
            members += crawled(f"{kind}{shard}{number:02d}", media, CONTAINERS[codec], f"the clip {number}")
        write_tar(folder / f"{shard:05d}.tar", members)
    build_index(folder)
    corpus = Corpus.open([folder], 0.0, "train")
    for number in range(corpus.count("video")):
        entry = corpus.nth("video", number)
        if entry.key.startswith("bad"):
            overwrite(entry, damaged(corpus.read_sample(entry).media))
    return corpus


def train_reader(corpus: Corpus, tokenizer: Tokenizer, codecs: frozenset[str] = CODECS) -> TrainReader:
    order = Order(corpus.sizes(), MICRO, seed=3, group=2)
    return TrainReader(corpus, order, tokenizer, DataConfig(), SHAPE, 3, MICRO, 1, 0, 1, codecs)


def eval_reader(corpus: Corpus, tokenizer: Tokenizer, codecs: frozenset[str] = CODECS) -> EvalReader:
    return EvalReader(corpus, tokenizer, SHAPE, 10, 0, 1, codecs)


def assert_same(ours: Batch | None, theirs: Batch | None) -> None:
    assert ours is not None and theirs is not None
    for field in dataclasses.fields(Batch):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name


def packed(media: bytes) -> Clip:
    return Clip(
        Window(0, 0, 128, 128), False, encoded=np.frombuffer(media, np.uint8), indices=np.array([0, 5, 11], "i4")
    )


@pytest.mark.parametrize("bad", [{0}, {15}, {6, 7}, {0, 5, 10}, {1, 2, 3, 4, 8, 12}])
def test_bisection_finds_every_culprit(bad: set[int]) -> None:
    good, broken = packed(moving_clip("vp9", 1)), packed(damaged(moving_clip("vp9", 2)))
    clips = [broken if number in bad else good for number in range(16)]
    pixels = Watching(16)
    with pytest.raises(GraphError) as caught:
        pixels(clips)
    found = find_culprits(clips, pixels, caught.value)
    assert list(found) == sorted(bad)
    assert all("Failed to send packet" in words for words in found.values())
    assert len(pixels.calls) - 1 <= 2 * math.log2(len(clips)) * len(bad)
    assert max(pixels.calls[1:]) == 8


def test_bisection_ends_when_most_are_culprits() -> None:
    pixels = Watching(16)
    clips = [packed(damaged(moving_clip("vp9", 2)))] * 16
    found = find_culprits(clips, pixels, GraphError("as a whole"))
    assert len(found) == 9
    assert len(pixels.calls) < 24


def test_failure_that_no_clip_causes_is_raised() -> None:
    class Small(Watching):
        def refuse(self, clips: Sequence[Clip]) -> str:
            return "out of memory" if len(clips) > 3 else ""

    clips = [packed(moving_clip("vp9", 1))] * 8
    with pytest.raises(GraphError, match="out of memory"):
        find_culprits(clips, Small(), GraphError("out of memory"))


def test_training_batches_are_those_of_pyav_alone(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """More than two epochs: what was refused once is not tried again, though the worker's reader does not know."""
    worker, rank, pyav = (train_reader(corpus, tokenizer, codecs) for codecs in (CODECS, CODECS, frozenset[str]()))
    pixels, plain = Watching(), Pixels(SHAPE.image_size, MICRO, CPU, threads=1)
    failures: list[Failure] = []
    for index in range(12):
        raw, batch = finish(worker[index], rank, pixels)
        expected, other = finish(pyav[index], pyav, plain)
        assert_same(batch, other)
        decoded = [failure for failure in raw.failures if failure.stage != "dali"]
        assert decoded == expected.failures
        failures += [failure for failure in raw.failures if failure.stage == "dali"]
        if index == 5:
            known = pixels.refusals
            assert known > 0
    assert pixels.refusals == known and not pixels.rebuilt
    assert len(failures) == len({failure.name for failure in failures}) == 6
    for failure in failures:
        assert failure.place is not None
        entry = corpus.entry(*failure.place)
        assert (entry.shard, entry.key) == (failure.shard, failure.key)
        assert (failure.replaced_by == failure.name) == failure.key.startswith("h264")
        assert failure.replaced_by is not None
        assert ("Failed to" in failure.reason) or ("decoder" in failure.reason.lower())
    assert rank.pyav_only == {failure.place for failure in failures}
    assert not worker.pyav_only


def test_others_in_the_batch_come_out_bit_for_bit(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Compared with each clip alone in a graph that never saw a bad one."""
    reader = train_reader(corpus, tokenizer)
    alone = Pixels(SHAPE.image_size, 1, CPU, threads=1)
    rescued = 0
    for index in range(5):
        before = reader[index]
        assert before.batch is not None
        _, batch = finish(before, copy.copy(reader), Watching())
        assert batch is not None
        for row, (name, clip) in enumerate(zip(before.batch.keys, before.clips.unpack(), strict=True)):
            if name.rpartition("/")[2].startswith("vp9"):
                assert clip.encoded is not None and batch.keys[row] == name
                assert torch.equal(batch.frames[row], alone([clip])[0])
            else:
                rescued += 1
    assert rescued == 6


def test_evaluation_leaves_out_what_nothing_decodes(corpus: Corpus, tokenizer: Tokenizer) -> None:
    reader, pyav = eval_reader(corpus, tokenizer), eval_reader(corpus, tokenizer, frozenset())
    pixels = Watching(10)
    failures = []
    for index in range(len(reader)):
        raw, batch = finish(eval_reader(corpus, tokenizer)[index], reader, pixels)
        expected, other = finish(pyav[index], pyav, pixels)
        assert_same(batch, other)
        failures += raw.failures
        assert [failure for failure in raw.failures if failure.stage == "decode"] == expected.failures
    dali_lines = {failure.key[:3]: failure.replaced_by for failure in failures if failure.stage == "dali"}
    assert dali_lines.keys() == {"h26", "bad"} and dali_lines["bad"] is None
    assert sum(failure.stage == "dali" for failure in failures) == 6
    assert all(failure.place is None and failure.step == -1 for failure in failures)
    assert all(failure.replaced_by == failure.name for failure in failures if failure.key.startswith("h264"))


def test_what_a_worker_died_on_is_not_read_again(
    corpus: Corpus, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict came from elsewhere; the rank, which reads again for another sample, must not touch the culprit."""
    worker, rank = train_reader(corpus, tokenizer), train_reader(corpus, tokenizer)
    index = next(i for i in range(5) if any("h264" in name for name in named(worker[i])))
    spot, name = next(pair for pair in zip(worker[index].spots, named(worker[index]), strict=True) if "vp9" in pair[1])
    worker.condemn({spot: Verdict("time", "took too long")})
    raw = worker[index]
    touched: list[str] = []
    read = corpus.read_sample

    def note(entry: Entry) -> Sample:
        touched.append(f"{entry.shard}/{entry.key}")
        return read(entry)

    monkeypatch.setattr(corpus, "read_sample", note)
    done, batch = finish(raw, rank, Watching())
    assert touched and name not in touched
    assert batch is not None and batch.keys == named(raw)
    assert [failure for failure in done.failures if failure.stage == "time"] == raw.failures
    assert len(done.failures) == len(raw.failures) + 1


def named(raw: RawBatch) -> list[str]:
    assert raw.batch is not None
    return raw.batch.keys


def test_refused_pixels_are_replaced(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """A clip that PyAV decoded and DALI refuses all the same: the next candidate, in evaluation none."""

    class Picky(Watching):
        hated: bytes = b""

        def refuse(self, clips: Sequence[Clip]) -> str:
            return "hated" if any(c.frames is not None and c.frames.tobytes() == self.hated for c in clips) else ""

    for make in (train_reader, eval_reader):
        reader = make(corpus, tokenizer, frozenset())
        raw = reader[0]
        assert raw.batch is not None
        before = raw.failures
        pixels = Picky(10)
        frames = raw.clips.unpack()[2].frames
        assert frames is not None
        pixels.hated = frames.tobytes()
        done, batch = finish(raw, reader, pixels)
        assert batch is not None
        (failure,) = [failure for failure in done.failures if failure not in before]
        assert (failure.stage, failure.reason, failure.name) == ("dali", "hated", raw.batch.keys[2])
        stay = [0, 1, *range(3, len(raw.batch.keys))]
        if isinstance(reader, TrainReader):
            assert failure.place in reader.known_bad
            assert failure.replaced_by == batch.keys[2] != raw.batch.keys[2]
            assert [batch.keys[i] for i in stay] == [raw.batch.keys[i] for i in stay]
        else:
            assert batch.keys == [raw.batch.keys[i] for i in stay] and failure.replaced_by is None


def test_graph_that_fails_whatever_it_gets_is_an_error(corpus: Corpus, tokenizer: Tokenizer) -> None:
    class Broken(Watching):
        def refuse(self, clips: Sequence[Clip]) -> str:
            return "CUDA error"

    reader = train_reader(corpus, tokenizer)
    with pytest.warns(RuntimeWarning, match="CUDA error"), pytest.raises(GraphError, match="CUDA error"):
        finish(reader[0], reader, Broken())
    assert not reader.known_bad


def test_dead_pipeline_is_rebuilt(corpus: Corpus, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that fails from one batch on, whatever comes; a new one takes the same batch, and nobody is blamed."""
    built: list[Any] = []
    real = dali.graph

    class Mortal:
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            self.pipeline = real(*arguments, **settings)
            built.append(self)
            self.dead = len(built) == 1

        def run(self, **inputs: Any) -> Any:
            if self.dead:
                raise RuntimeError("no longer valid")
            return self.pipeline.run(**inputs)

    monkeypatch.setattr(dali, "graph", Mortal)
    reader = eval_reader(corpus, tokenizer)
    assert all("vp9" in name for name in named(reader[0]))
    raw, batch = finish(reader[0], reader, Watching(10))
    assert len(built) == 2 and not raw.failures and batch is not None
    assert not reader.pyav_only


def test_other_errors_are_not_swallowed(corpus: Corpus, tokenizer: Tokenizer) -> None:
    class Typo(Watching):
        def refuse(self, clips: Sequence[Clip]) -> str:
            raise AttributeError("typo")

    reader = train_reader(corpus, tokenizer)
    with pytest.raises(AttributeError, match="typo"):
        finish(reader[0], reader, Typo())


def test_when_most_are_refused_pyav_decodes_the_batch(corpus: Corpus, tokenizer: Tokenizer) -> None:
    class NoVideo(Watching):
        def refuse(self, clips: Sequence[Clip]) -> str:
            return "NVDEC is gone" if any(clip.encoded is not None for clip in clips) else ""

    reader, pyav = train_reader(corpus, tokenizer), train_reader(corpus, tokenizer, frozenset())
    pixels = NoVideo()
    with pytest.warns(RuntimeWarning, match="NVDEC is gone; PyAV decodes this batch"):
        raw, batch = finish(reader[0], reader, pixels)
    assert_same(batch, finish(pyav[0], pyav, Watching())[1])
    assert pixels.rebuilt == 1 and len(pixels.calls) < 30
    assert sum(failure.stage == "dali" for failure in raw.failures) == MICRO // 2 + 1
