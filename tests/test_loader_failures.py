"""Samples that fail in the loader: replaced whole in training, left out in evaluation, told in the ledger."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Literal

import av
import pytest
import torch

from smaug_ds.data.dali import Decoder, graph
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import EvalLoader
from smaug_ds.data.order import Order, stable_hash
from smaug_ds.data.quarantine import DataError, Ledger, read_ledgers
from smaug_ds.data.sample import Batch
from smaug_ds.data.video import Video
from smaug_ds.text import Tokenizer
from tests.loading import CONFIG, CPU, SHAPE, assert_same, make_loader, take
from tests.shards import overwrite


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


def test_programming_errors_are_not_swallowed(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a slip of the pen")

    monkeypatch.setattr("smaug_ds.data.clip.choose_frames", broken)
    with pytest.raises(TypeError, match="slip"):
        take(make_loader(corpus, tokenizer, tmp_path), 20)
    assert not read_ledgers(tmp_path)


def test_evaluation_leaves_bad_samples_out(
    damaged: tuple[Corpus, set[str]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    corpus, bad = damaged
    loader = EvalLoader(corpus, tokenizer, CONFIG, SHAPE, 1, CPU, Ledger(tmp_path / "run", 0))
    keys = [key for batch in loader for key in batch.keys]
    assert len(keys) == len(corpus) - len(bad)
    assert not set(keys) & bad
    assert loader.failed == len(bad) == len(read_ledgers(tmp_path / "run"))
