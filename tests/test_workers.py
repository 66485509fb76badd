"""The pool of workers: order, what it does when they hang or die, and that nothing is left over or grows."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smaug_ds.data import wire
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.order import Order
from smaug_ds.data.pool import Limits, Pool
from smaug_ds.data.prefetch import Prefetcher
from smaug_ds.data.quarantine import DataError, Ledger, Spot, Verdict
from smaug_ds.data.reader import Watched
from smaug_ds.data.sample import BatchShape, Place
from smaug_ds.data.shard import ShardError
from smaug_ds.text import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
LIMITS = Limits(sample=0.5, between=30, start=60)


class Told(Watched):
    """Item i is what the worker knows by then: verdicts, and samples that PyAV has to decode."""

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.01)
        return len(self.verdicts), self.pyav_only


class Numbers(Watched):
    """Item i is made of the three samples 3 i to 3 i + 2: their numbers, tens of kilobytes each; -1 for failed ones.

    ``before`` is called with each number while the worker is at that sample, ``between`` with i before them.
    """

    def __init__(self, before: Callable[[int], Any] = abs, between: Callable[[int], Any] = abs) -> None:
        super().__init__()
        self.before, self.between = before, between

    def __getitem__(self, index: int) -> Any:
        self.between(index)
        row, failures = [], []
        for number in range(3 * index, 3 * index + 3):
            spot = Spot(number, "video")
            if verdict := self.verdicts.get(spot):
                failures.append((number, verdict))
                row.append(-1)
                continue
            with self.at(spot):
                self.before(number)
                row.append(number)
        return torch.tensor(row).repeat_interleave(4000), failures


@contextlib.contextmanager
def pool_of(
    reader: Watched, indices: Any, workers: int = 2, prefetch: int = 2, limits: Limits = LIMITS
) -> Iterator[Iterator[Any]]:
    pool = Pool(reader, indices, workers, prefetch, limits, threading.Event())
    try:
        yield iter(pool)
    finally:
        pool.close()
        assert not multiprocessing.active_children()


def expected(index: int, missing: int = -2) -> list[int]:
    return [-1 if number == missing else number for number in range(3 * index, 3 * index + 3)]


def rows(items: Iterable[Any]) -> list[list[int]]:
    return [item[0][::4000].tolist() for item in items]


def doze(number: int, seconds: float = 0.01) -> None:
    time.sleep(seconds * random.random())


def at_seven(act: str, marker: str, number: int) -> None:
    """Does something evil to its process at sample 7; with a marker only the first time."""
    if number != 7:
        return
    if marker:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    if act == "sleep":
        time.sleep(1000)
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL, "crash": signal.SIGSEGV}[act])


@pytest.mark.parametrize("workers", [1, 3])
def test_items_come_in_order_and_not_too_many_are_begun(workers: int) -> None:
    drawn = []

    def indices() -> Iterator[int]:
        for index in itertools.count(5):
            drawn.append(index)
            yield index

    with pool_of(Numbers(doze), indices(), workers, prefetch=2) as items:
        for index in range(5, 45):
            (row,) = rows([next(items)])
            assert row == expected(index)
            assert len(drawn) <= index - 4 + 2 * workers


def test_pool_ends_with_its_indices() -> None:
    with pool_of(Numbers(), range(5), workers=3) as items:
        assert rows(items) == [expected(index) for index in range(5)]


@pytest.mark.parametrize("act", ["sleep", "stop"])
def test_sample_that_takes_too_long_is_condemned(act: str) -> None:
    reader = Numbers(functools.partial(at_seven, act, ""))
    with pool_of(reader, range(12)) as items:
        found = list(items)
    assert rows(found) == [expected(index, missing=7) for index in range(12)]
    ((number, verdict),) = [failure for item in found for failure in item[1]]
    assert (number, verdict.stage) == (7, "time")
    assert "data.sample_seconds=0.5" in verdict.reason
    assert reader.verdicts == {Spot(7, "video"): verdict}  # also where the batch may have to be read again


def test_condemned_once_is_known_to_workers_that_live() -> None:
    reader = Numbers(functools.partial(at_seven, "crash", ""))
    with pool_of(reader, [2] * 12, workers=3) as items:
        found = list(items)
    assert rows(found) == [expected(2, missing=7)] * 12
    assert {failure[1].stage for item in found for failure in item[1]} == {"crash"}


def test_sample_that_kills_twice_is_condemned() -> None:
    with pool_of(Numbers(functools.partial(at_seven, "crash", "")), range(12)) as items:
        found = list(items)
    assert rows(found) == [expected(index, missing=7) for index in range(12)]
    ((number, verdict),) = [failure for item in found for failure in item[1]]
    assert (number, verdict.stage) == (7, "crash")
    assert "exit code -11 (a library crashed)" in verdict.reason


def test_sample_at_which_a_worker_died_once_stays(tmp_path: Path) -> None:
    reader = Numbers(functools.partial(at_seven, "kill", str(tmp_path / "marker")))
    with pool_of(reader, range(12)) as items:
        assert rows(items) == [expected(index) for index in range(12)]
    assert (tmp_path / "marker").exists() and not reader.verdicts


def leave(index: int) -> None:
    if index == 3:
        os._exit(3)


def dawdle(index: int) -> None:
    if index == 3:
        time.sleep(1000)


@pytest.mark.parametrize(
    ("between", "message"),
    [(leave, r"died 4 times over one batch.*process \d+, exit code 3"), (dawdle, "did nothing between samples")],
)
def test_deaths_that_no_sample_explains_end_the_run(between: Callable[[int], None], message: str) -> None:
    with pool_of(Numbers(between=between), itertools.count(), limits=Limits(30, between=0.1)) as items:
        for index in range(3):
            assert rows([next(items)]) == [expected(index)]
        with pytest.raises(DataError, match=message):
            next(items)


class Late(Numbers):
    """Its copies in workers hang before they can begin."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if multiprocessing.parent_process() is not None:
            time.sleep(1000)


def test_workers_that_do_not_start_end_the_run() -> None:
    with (
        pool_of(Late(), range(2), workers=1, limits=Limits(30, start=0.1)) as items,
        pytest.raises(DataError, match="did not start"),
    ):
        next(items)


class Unopened(Numbers):
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if multiprocessing.parent_process() is not None:
            raise ShardError("a tar is gone")


class TwoWords(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def slip(index: int) -> None:
    raise TypeError("a slip of the pen")


def odd(index: int) -> None:
    raise TwoWords("cannot be", "unpickled")


@pytest.mark.parametrize(
    ("reader", "error", "words"),
    [
        (Numbers(between=slip), TypeError, "a slip of the pen"),
        (Numbers(between=odd), RuntimeError, "TwoWords: cannot be unpickled"),
        (Unopened(), ShardError, "a tar is gone"),
    ],
)
def test_errors_of_a_reader_are_raised_with_their_place(reader: Watched, error: type, words: str) -> None:
    with pool_of(reader, itertools.count()) as items, pytest.raises(error, match=words) as raised:
        next(items)
    assert "in a data worker:" in str(raised.value.__cause__)
    assert "tests/test_workers.py" in str(raised.value.__cause__)


def test_workers_killed_at_any_moment_lose_and_double_nothing() -> None:
    chance = random.Random(1)
    with pool_of(Numbers(functools.partial(doze, seconds=0.004)), itertools.count(), workers=3) as items:
        for index in range(400):
            assert rows([next(items)]) == [expected(index)]
            if index % 40 == 20:
                time.sleep(chance.random() * 0.02)
                for worker in chance.sample(multiprocessing.active_children(), 2):
                    os.kill(worker.pid or 0, signal.SIGKILL)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie, which nobody may collect when its server is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return not re.search(r"^State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return False


def test_pool_outlives_the_server_that_forks_its_workers() -> None:
    with pool_of(Numbers(), itertools.count()) as items:
        assert rows([next(items)]) == [expected(0)]
        workers = [worker.pid for worker in multiprocessing.active_children()]
        server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        os.kill(server, signal.SIGKILL)
        assert rows(itertools.islice(items, 20)) == [expected(index) for index in range(1, 21)]
        os.kill(workers[0] or 0, signal.SIGKILL)
        assert rows(itertools.islice(items, 20)) == [expected(index) for index in range(21, 41)]
    deadline = time.monotonic() + 60
    while any(runs(pid or 0) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)  # they have been killed, but nobody could wait for them
    assert not any(runs(pid or 0) for pid in workers)


def test_close_does_not_wait_for_a_worker_that_hangs() -> None:
    began = time.monotonic()
    with pool_of(Numbers(functools.partial(at_seven, "stop", "")), range(12), limits=Limits(1000)) as items:
        assert rows(itertools.islice(items, 2)) == [expected(0), expected(1)]
    assert time.monotonic() - began < 60


FORGETFUL = """
import itertools, threading
from smaug_ds.data.prefetch import Prefetcher
from tests.test_workers import LIMITS, Numbers
class Pixels: pass
from smaug_ds.data import prefetch
prefetch.finish = lambda raw, reader, pixels: (raw, None)
batches = iter(Prefetcher(Numbers(), itertools.count(), Pixels(), 2, 2, LIMITS))
next(batches)
"""


def test_program_that_does_not_close_ends_and_leaves_nothing() -> None:
    command = [sys.executable, "-c", FORGETFUL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    # Output is complete only when the last process that inherited it is gone.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def memory_kb(pid: int) -> int:
    """Private memory of a process; what it shares with the others counts once for all."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def check_nothing_grows(items: Iterator[Any], warm_up: int, count: int) -> None:
    figures = []
    (worker,) = multiprocessing.active_children()
    for number in range(count):
        next(items)
        if number in (warm_up - 1, count - 1):
            gc.collect()
            pids = [worker.pid or 0, os.getpid()]
            figures.append([(memory_kb(pid), descriptors(pid)) for pid in pids])
    for (memory, files), (later_memory, later_files) in zip(*figures, strict=True):
        assert later_memory < 1.02 * memory + 12 * 1024
        assert abs(later_files - files) <= 3  # batches that are under way


def test_memory_and_descriptors_do_not_grow() -> None:
    with pool_of(Numbers(), itertools.count(), workers=1) as items:
        next(items)
        check_nothing_grows(items, 300, 3000)
        (worker,) = multiprocessing.active_children()
        assert "/dev/shm" not in Path(f"/proc/{worker.pid}/maps").read_text()


@pytest.mark.slow
def test_memory_and_descriptors_do_not_grow_over_twenty_thousand_samples(
    toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    """Real media, read and decoded; the batches of 10 go through the whole loader."""
    corpus = Corpus.open([toy_shards / "train"], holdout=0.0, split="train")
    order = Order(corpus.sizes(), global_batch=10, seed=3, group=2)
    shape = BatchShape(frames=3, image_size=32, patches=16, max_text_length=24, mlm_probability=0.15)
    tokenizer, ledger = Tokenizer(toy_media / "vocab.txt"), Ledger(tmp_path, 0)
    config = DataConfig(workers=1)
    cpu = torch.device("cpu")
    with TrainLoader(corpus, order, tokenizer, config, shape, 3, 10, 1, cpu, ledger) as loader:
        batches = iter(loader)
        next(batches)
        check_nothing_grows(batches, 200, 2000)


def test_wire_carries_views_of_large_arrays_and_copies_of_small_ones() -> None:
    here, there = wire.pair()
    with here, there:
        with pytest.raises(BlockingIOError):
            wire.receive(there)
        value: dict[str, Any] = {
            "large": torch.arange(100_000),
            "odd": torch.arange(70_001, dtype=torch.uint8),
            "small": torch.tensor([True, False]),
            "array": np.ones((300, 300), np.float32),
            "nothing": torch.empty(0),
            "words": ["a", "ä"],
        }
        gc.collect()
        before = descriptors(os.getpid())
        wire.send(here, 7, value, wait=lambda: None)
        wire.send(here, 8, "next", wait=lambda: None)
        note, received = wire.receive(there)
        assert note == 7 and received["words"] == value["words"]
        for name in ("large", "odd", "small", "nothing"):
            assert torch.equal(received[name], value[name]) and received[name].dtype == value[name].dtype
        np.testing.assert_array_equal(received["array"], value["array"])
        received["large"] += 1  # it is the receiver's own
        assert received["large"].data_ptr() % 64 == 0
        assert not received["small"].untyped_storage().nbytes() > 64
        assert wire.receive(there) == (8, "next")
        del received
        gc.collect()
        assert descriptors(os.getpid()) == before
        wire.send(there, 9, "never read", wait=lambda: None)
        wire.send(here, 10, "last", wait=lambda: None)
        here.close()
        assert wire.receive(there) == (10, "last")
        with pytest.raises(EOFError):
            wire.receive(there)


def test_item_is_made_elsewhere_for_a_reader_that_may_not_hang() -> None:
    """As where a batch is read again in the loader's process: a copy of the reader, knowing more or less."""
    reader = Numbers(functools.partial(at_seven, "stop", ""))
    prefetcher = Prefetcher(reader, [], None, 1, 1, LIMITS)  # type: ignore[arg-type]
    variant = copy.copy(reader)
    variant.verdicts = dict(reader.verdicts)
    assert rows([variant.again(2)]) == [expected(2, missing=7)]
    assert reader.verdicts.keys() == {Spot(7, "video")}
    prefetcher.close()
    with pytest.raises(DataError, match="closed"):
        reader.again(2)
    assert not multiprocessing.active_children()


def test_new_worker_learns_all_that_is_known() -> None:
    """Verdicts by the thousands, as after a long run: no message would hold them."""
    pool = Pool(Told(), itertools.count(), 1, 2, LIMITS, threading.Event())
    with contextlib.closing(pool):
        items: Iterator[Any] = iter(pool)
        assert next(items) == (0, frozenset())
        for row in range(5000):
            pool._condemn(
                0, Spot(10**6 + row, "video", row), Verdict("time", f"sample {row} not done; its worker was ended")
            )
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        assert max(item[0] for item in itertools.islice(items, 8)) == 5000


def test_workers_learn_what_pyav_has_to_decode() -> None:
    reader = Told()
    with pool_of(reader, itertools.count(), workers=2) as items:
        assert next(items)[1] == frozenset()
        reader.pyav_only = frozenset(Place("video", 3, row) for row in range(1000)) | {"a.tar/k"}
        assert [item[1] for item in itertools.islice(items, 30)][-1] == reader.pyav_only


def test_iteration_ends_when_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smaug_ds.data.prefetch.finish", lambda raw, reader, pixels: (raw, None))
    prefetcher = Prefetcher(Numbers(), itertools.count(), None, 0, 2, LIMITS)  # type: ignore[arg-type]
    items = iter(prefetcher)
    next(items)
    prefetcher.close()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(list(items)), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert found == [[]]


def test_close_gives_up_a_thread_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the storage with ``data.workers=0``, or in the GPU's driver."""
    monkeypatch.setattr("smaug_ds.data.prefetch._PATIENCE_SECONDS", 0.1)
    release, began = threading.Event(), threading.Event()

    class Hanging(Numbers):
        def __getitem__(self, index: int) -> Any:
            began.set()
            release.wait()

    prefetcher = Prefetcher(Hanging(), itertools.count(), None, 0, 2, LIMITS)  # type: ignore[arg-type]
    assert began.wait(timeout=30)
    closing = threading.Thread(target=prefetcher.close, daemon=True)
    closing.start()
    closing.join(timeout=30)
    ended = not closing.is_alive()
    release.set()
    assert ended


def test_verdicts_travel_with_the_reader() -> None:
    reader = Numbers()
    reader.condemn({Spot(4, "video"): Verdict("time", "long ago")})
    assert pickle.loads(pickle.dumps(reader)).verdicts == reader.verdicts
    with pool_of(reader, range(3)) as items:
        assert rows(items) == [expected(index, missing=4) for index in range(3)]
