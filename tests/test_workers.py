"""The pool of workers: order, what it does when they hang or die, and that nothing is left over."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.data.pool import Limits, Pool
from smaug_ds.data.quarantine import DataError, Spot, Verdict
from smaug_ds.data.reader import Watched
from smaug_ds.data.sample import Place
from smaug_ds.data.shard import ShardError
from tests.pools import LIMITS, Numbers, Told, at_seven, doze, expected, pool_of, rows


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


def test_verdicts_travel_with_the_reader() -> None:
    reader = Numbers()
    reader.condemn({Spot(4, "video"): Verdict("time", "long ago")})
    assert pickle.loads(pickle.dumps(reader)).verdicts == reader.verdicts
    with pool_of(reader, range(3)) as items:
        assert rows(items) == [expected(index, missing=4) for index in range(3)]
