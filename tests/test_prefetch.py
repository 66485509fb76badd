"""Batches made ahead: where they are made again, and how making them ends."""

from __future__ import annotations

import copy
import functools
import itertools
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.data.prefetch import Prefetcher
from smaug_ds.data.quarantine import DataError, Spot
from tests.pools import LIMITS, Numbers, at_seven, expected, rows

ROOT = Path(__file__).resolve().parent.parent
FORGETFUL = """
import itertools, threading
from smaug_ds.data.prefetch import Prefetcher
from tests.pools import LIMITS, Numbers
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
