"""What becomes of samples that fail: in the ledger, in a run that is resumed, and when workers hang or die on them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import EvalLoader, TrainLoader
from smaug_ds.data.order import Order, stable_hash
from smaug_ds.data.quarantine import (
    Budget,
    DataError,
    Failure,
    Ledger,
    known_bad,
    merge,
    pyav_only,
    read_ledgers,
    summary,
)
from smaug_ds.data.reader import TrainReader
from smaug_ds.data.sample import Place
from smaug_ds.text import Tokenizer
from tests import loading
from tests.hostile import open_hostile
from tests.loading import CPU, SHAPE, assert_same, take

CONFIG = DataConfig(workers=2, shuffle_group=2, sample_seconds=0.5, max_failed_share=1.0)
ACTS = {"stop": "time", "sleep": "time", "crash": "crash", "fail": "decode"}  # -> stage


def make_loader(corpus: Corpus, tokenizer: Tokenizer, folder: Path, config: DataConfig = CONFIG) -> TrainLoader:
    return loading.make_loader(corpus, tokenizer, folder, config)


def keys_of(corpus: Corpus) -> list[str]:
    return [corpus.nth(medium, number).key for medium in ("image", "video") for number in range(corpus.count(medium))]


def test_samples_that_hang_or_crash_are_replaced_like_any_that_fail(
    toy_shards: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = keys_of(open_hostile(toy_shards / "train", "train", {}))
    hostile = dict(zip(keys[::12], [*ACTS, *ACTS], strict=False))
    assert len(hostile) == 8
    failing = open_hostile(toy_shards / "train", "train", dict.fromkeys(hostile, "fail"))
    expected = take(make_loader(failing, tokenizer, tmp_path / "fail", dataclasses.replace(CONFIG, workers=0)), 22)
    corpus = open_hostile(toy_shards / "train", "train", hostile)
    batches = take(make_loader(corpus, tokenizer, tmp_path / "run"), 22)
    entries = {corpus.nth(m, n).key: corpus.nth(m, n) for m in ("image", "video") for n in range(corpus.count(m))}
    for batch, other in zip(batches, expected, strict=True):
        assert_same(batch, other)
        for name, captions, media_id in zip(batch.keys, batch.all_captions, batch.media_ids, strict=True):
            sample = Corpus.read_sample(corpus, entries[name.rsplit("/", 1)[1]])
            assert (captions, media_id) == (sample.captions, stable_hash(sample.media_id))
    failures = read_ledgers(tmp_path / "run")
    assert len((tmp_path / "run" / "quarantine.0.jsonl").read_text().splitlines()) == len(failures)
    assert {failure.stage for failure in failures} == {"time", "crash", "decode"}
    assert all(failure.stage == ACTS[hostile[failure.key]] for failure in failures)

    def bare(failure: Failure) -> Failure:
        return dataclasses.replace(failure, stage="", reason="")

    # A sample that comes again fails again, but workers are not lost to it a second time.
    again = [failure for failure in read_ledgers(tmp_path / "fail") if bare(failure) not in map(bare, failures)]
    earlier = {failure.key for failure in failures}
    assert len(failures) + len(again) == len(read_ledgers(tmp_path / "fail"))
    assert {failure.key for failure in again} <= earlier


def test_evaluation_leaves_out_what_hangs(toy_shards: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = keys_of(open_hostile(toy_shards / "test", "test", {}))
    corpus = open_hostile(toy_shards / "test", "test", {keys[3]: "stop", keys[17]: "crash"})
    loader = EvalLoader(corpus, tokenizer, CONFIG, SHAPE, 5, CPU, Ledger(tmp_path, 0))
    found = [name.rsplit("/", 1)[1] for batch in loader for name in batch.keys]
    assert found == [key for key in keys if key not in corpus.acts]
    failures = read_ledgers(tmp_path)
    assert loader.failed == 2
    assert [(f.step, f.position, f.place, f.key, f.stage) for f in failures] == [
        (-1, 3, None, keys[3], "time"),
        (-1, 17, None, keys[17], "crash"),
    ]


def test_killed_workers_lose_and_double_nothing(toy_shards: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = Corpus.open([toy_shards / "train"], holdout=0.0, split="train")
    config = dataclasses.replace(CONFIG, sample_seconds=60)
    expected = take(make_loader(corpus, tokenizer, tmp_path, dataclasses.replace(config, workers=0)), 40)
    chance = random.Random(4)
    with make_loader(corpus, tokenizer, tmp_path, config) as loader:
        for number, (batch, other) in enumerate(zip(loader, expected, strict=False)):
            assert_same(batch, other)
            if number % 9 == 5:
                time.sleep(chance.random() * 0.05)
                os.kill(chance.choice(multiprocessing.active_children()).pid or 0, signal.SIGKILL)
            if number == 39:
                break
    assert not read_ledgers(tmp_path)
    assert not multiprocessing.active_children()


def test_failures_are_honoured_on_any_number_of_ranks(toy_shards: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = keys_of(open_hostile(toy_shards / "train", "train", {}))
    corpus = open_hostile(toy_shards / "train", "train", dict.fromkeys(keys[::6], "fail"))
    config = dataclasses.replace(CONFIG, workers=0, max_consecutive_failures=4)
    whole = take(make_loader(corpus, tokenizer, tmp_path / "first", config), 44)
    failures = read_ledgers(tmp_path / "first")
    assert failures
    # Passed over without a try: they need not be readable, and count neither as failures in a row nor for the share.
    impatient = dataclasses.replace(config, max_consecutive_failures=1, max_failed_share=0.0, failure_window=1)
    resumed = make_loader(corpus, tokenizer, tmp_path / "second", impatient)
    resumed.load_state_dict({"step": 4})
    resumed.honour(failures)
    for one, other in zip(take(resumed, 36), whole[8:], strict=True):
        assert_same(one, other)
    assert not read_ledgers(tmp_path / "second")
    order = Order(corpus.sizes(), global_batch=8, seed=3, group=2)
    names: list[str] = []
    for step in range(4, 22):
        for rank in range(4):
            reader = TrainReader(corpus, order, tokenizer, impatient, SHAPE, 3, 2, 1, rank, 4, frozenset())
            reader.known_bad = known_bad(failures)
            raw = reader[step]
            assert raw.batch is not None and not raw.failures
            names += raw.batch.keys
    assert names == [name for batch in whole[8:] for name in batch.keys]


def test_what_is_honoured() -> None:
    def failure(stage: str, row: int, replaced_by: str | None = "a.tar/other", place: bool = True) -> Failure:
        found = Place("video", 0, row) if place else None
        return Failure(1, row, found, "a.tar", f"k{row}", stage, "", replaced_by)

    failures = [
        failure("decode", 0),
        failure("time", 1),  # it may have been slow
        failure("crash", 2, None),
        failure("read", 3),  # the storage may be back
        failure("dali", 4),  # PyAV could not decode it either
        failure("dali", 5, "a.tar/k5"),
        failure("decode", 6, place=False),
    ]
    assert known_bad(failures) == {Place("video", 0, row) for row in (0, 2, 4)}
    assert pyav_only(failures) == {Place("video", 0, 5)}  # wherever the tars lie by then
    assert pyav_only([dataclasses.replace(failures[5], place=None)]) == {"a.tar/k5"}
    figures = summary([*failures, failures[0]])
    assert figures == {
        "quarantine/decode": 3,
        "quarantine/time": 1,
        "quarantine/crash": 1,
        "quarantine/read": 1,
        "quarantine/dali": 2,
        "quarantine/samples": 7,
    }
    assert summary([]) == {"quarantine/samples": 0}


def test_samples_that_pyav_decodes_do_not_count_as_lost(toy_shards: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = Corpus.open([toy_shards / "train"], holdout=0.0, split="train")
    config = dataclasses.replace(CONFIG, workers=0, max_failed_share=0.0, failure_window=1)
    loader = make_loader(corpus, tokenizer, tmp_path, config)
    raw = loader._reader[0]
    refused = Failure(0, 0, Place("video", 0, 0), "a.tar", "k", "dali", "no such stream", "a.tar/k")
    loader._account(dataclasses.replace(raw, failures=[refused]))
    with pytest.raises(DataError, match=r"more than 0% of the latest 1 samples.*quarantine\.0\.jsonl"):
        loader._account(dataclasses.replace(raw, failures=[dataclasses.replace(refused, replaced_by="a.tar/other")]))


def test_the_error_counts_the_candidates_of_the_place_that_stayed_empty(
    toy_shards: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    corpus = Corpus.open([toy_shards / "train"], holdout=0.0, split="train")
    loader = make_loader(corpus, tokenizer, tmp_path, dataclasses.replace(CONFIG, workers=0))
    replaced = Failure(3, 40, Place("video", 0, 1), "a.tar", "k1", "decode", "broken", "a.tar/k2")
    first, second = (Failure(3, 41, Place("video", 0, row), "a.tar", f"k{row}", "decode", "broken") for row in (3, 4))
    refused = dataclasses.replace(first, stage="dali")  # and then PyAV could not decode it either
    elsewhere = dataclasses.replace(refused, position=39, place=Place("video", 0, 9))  # the batch has no row of it now
    loader.honour([dataclasses.replace(first, place=Place("video", 1, row)) for row in range(7)])
    raw = dataclasses.replace(loader._reader[0], batch=None, step=3)
    told = r"2 candidates for one place of step 3 failed in a row, .* 7 samples are known to be bad and were not tried"
    with pytest.raises(DataError, match=told):
        loader._account(dataclasses.replace(raw, failures=[refused, elsewhere, replaced, first, second]))
    with pytest.raises(DataError, match=r"^0 candidates for one place"):
        loader._account(dataclasses.replace(raw, failures=[replaced]))


def test_budget() -> None:
    budget = Budget(share=0.25, window=8)
    assert budget.spend(4, 4)  # too early to judge
    assert not budget.spend(4, 0)
    assert budget.spend(4, 1)  # the first batch has left the window
    assert budget.spend(4, 1)
    assert not budget.spend(4, 2)


def test_ledgers_of_all_ranks_are_read_together(tmp_path: Path) -> None:
    late = Failure(7, 60, Place("video", 3, 4), "a.tar", "k1", "decode", "broken: ä", replaced_by="a.tar/k2")
    early = Failure(2, 11, None, "b.tar", "k3", "read", "gone")
    Ledger(tmp_path, rank=0).write(late)
    Ledger(tmp_path, rank=1).write(early)
    assert read_ledgers(tmp_path) == [early, late]


def test_merged_failures_count_once(tmp_path: Path) -> None:
    first = Failure(1, 1, Place("video", 3, 4), "a.tar", "k1", "decode", "broken", replaced_by="a.tar/k2")
    second, third = (dataclasses.replace(first, position=position) for position in (2, 3))
    assert merge([third, first, second, first, third]) == [first, second, third]
    assert merge([]) == []


def test_ledger_takes_what_no_encoding_spells(tmp_path: Path) -> None:
    """Names in a tar and paths need not be UTF-8; Python shows their bytes as lone surrogates."""
    odd = Failure(1, 1, Place("image", 0, 1), "/caf\udce9/0.tar", "k\u2028", "read", "found \udcff.jpg", "caf\udce9/k")
    Ledger(tmp_path, 0).write(odd)
    Ledger(tmp_path, 0).write(dataclasses.replace(odd, step=2))
    assert read_ledgers(tmp_path) == [odd, dataclasses.replace(odd, step=2)]


def test_half_a_line_of_a_killed_run_spoils_nothing(tmp_path: Path) -> None:
    one = Failure(1, 1, Place("video", 3, 4), "a.tar", "k1", "decode", "gebrochen: ä", replaced_by="a.tar/k2")
    two, three = (dataclasses.replace(one, position=position) for position in (2, 3))
    ledger = Ledger(tmp_path, 0)
    ledger.write(one)
    whole = ledger.path.read_bytes()
    for cut in range(len(whole)):
        ledger.path.write_bytes(whole)
        ledger.write(two)
        with ledger.path.open("ab") as file:
            file.write(whole[:cut])
        assert read_ledgers(tmp_path) in ([one, two], [one, two, one])
        ledger.write(three)
        assert read_ledgers(tmp_path) == [one, two, three]


def test_what_failed_again_after_a_restart_counts_once(tmp_path: Path) -> None:
    failure = Failure(5, 41, Place("image", 0, 2), "a.tar", "k1", "image", "torn", replaced_by="a.tar/k2")
    Ledger(tmp_path, 0).write(failure)
    Ledger(tmp_path, 1).write(failure)  # the step was done again, on another number of ranks
    Ledger(tmp_path, 1).write(dataclasses.replace(failure, step=50, position=400))
    assert [found.step for found in read_ledgers(tmp_path)] == [5, 50]


def test_ledger_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    failure = Failure(5, 41, Place("image", 0, 2), "a.tar", "k1", "image", "torn")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/quarantine\.0\.jsonl cannot be written .*a\.tar/k1"):
        Ledger(tmp_path / "file", 0).write(failure)
    (tmp_path / "quarantine.1.jsonl").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"quarantine\.1\.jsonl cannot be written .*No space left"):
        Ledger(tmp_path, 1).write(failure)
