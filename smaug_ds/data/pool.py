"""Deals items to workers, hands them out in order, and decides what happens when a worker hangs or dies.

- A worker that is at one sample for longer than ``Limits.sample`` is killed, and the sample condemned (stage "time").
- A worker that dies is replaced and what it had not finished is done again. If it dies twice in a row at the same
  sample of an item, that sample is condemned (stage "crash").
- Condemned: the item is made again, and the reader treats the sample as failed. So what replaces it, and the line in
  the ledger, come about as for any other failure.
- A worker that hangs between samples, or does not start, is killed and counts as dead.
- Four deaths over one item, with no sample of it condemned in between, end the run.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import pickle
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from smaug_ds.data.quarantine import DataError, Spot, Verdict
from smaug_ds.data.reader import RawBatch, Watched
from smaug_ds.data.sample import Place
from smaug_ds.data.workers import UNREADY, Raised, Status, Worker

_MOST_DEATHS = 3  # over one item, for which no sample is to blame
_RETRY_SECONDS = 0.5  # after a worker that could not be started: a server that was killed is for a moment neither
_LOOK_SECONDS = 0.1  # between looks at the workers
_MOST_TOLD = 256  # samples that PyAV has to decode, told with one item: a message has a limit, and they can wait
_LATE_LOOKS = 10  # in a row that have to find a worker late: after the whole job was stopped all are, for a moment
_ADVICE = {
    -signal.SIGKILL: "killed, perhaps for memory: fewer data.workers or a smaller data.prefetch need less",
    -signal.SIGSEGV: "a library crashed",
    -signal.SIGABRT: "a library gave up",
    -signal.SIGBUS: "a file was cut short while it was read, or memory ran out",
    1: "see its error above",
    255: "what became of it is not known",
}


@dataclass(frozen=True)
class Limits:
    """Seconds that a worker may take."""

    sample: float  # for reading and decoding one
    between: float = 60.0  # from a sample to the next, and for sending a batch
    start: float = 120.0  # until it runs: the storage that Python lies on may be slow


@dataclass
class _Seat:
    """The place of one worker; when that is gone another takes it."""

    worker: Worker | None = None
    unfinished: dict[int, float] = field(default_factory=dict)  # items that it was given, in order -> when
    told: int = 0  # verdicts that it knows
    pyav_only: frozenset[Place | str] = frozenset()  # of the reader's, what it knows
    late: int = 0  # looks in a row


class Pool:
    """Iterates over ``reader[index]`` for each of ``indices``, in this order, made by ``workers`` processes.

    To be used by one thread, except for ``close``.

    Args:
        indices: perhaps endless.
        prefetch: items that each worker may have unfinished; as many times ``workers`` are under way at most.
        stop: ends the iteration while it waits.

    Raises:
        DataError: workers die through no sample's fault, or cannot be started.
        Exception: what the reader raised in a worker, caused by a WorkerTraceback.
    """

    def __init__(
        self,
        reader: Watched,
        indices: Iterable[int],
        workers: int,
        prefetch: int,
        limits: Limits,
        stop: threading.Event,
    ) -> None:
        self._reader = reader
        self._fresh = enumerate(indices)
        self._prefetch, self._limits, self._stop = prefetch, limits, stop
        self._seats = [_Seat() for _ in range(workers)]
        self._next = 0  # number of the item that is handed out next
        self._indices: dict[int, int] = {}  # item -> index, of the items that are under way
        self._again: list[int] = []  # heap of the items that lost their worker
        self._done: dict[int, RawBatch | Raised] = {}
        self._verdicts: list[tuple[Spot, Verdict]] = []
        self._suspects: dict[int, Spot | None] = {}  # item -> where its last worker died
        self._deaths: Counter[int] = Counter()  # by item
        self._looked = 0.0
        # A program that ends without ``close`` would wait for its workers, and they ignore what should end them.
        weakref.finalize(self, _dismiss, self._seats)

    def __iter__(self) -> Iterator[RawBatch]:
        self._deal()
        while self._indices:
            self._attend(0)
            while self._next not in self._done:
                if self._stop.is_set():
                    return
                self._attend(_LOOK_SECONDS)
            item = self._done.pop(self._next)
            del self._indices[self._next]
            self._next += 1
            self._deal()
            if isinstance(item, Raised):
                item.throw()
            else:
                yield item

    def close(self) -> None:
        """Ends all workers at once."""
        _dismiss(self._seats)

    def _deal(self) -> None:
        """Gives items to the workers with the fewest, as many as they may have."""
        while True:
            seat = min(self._seats, key=lambda seat: len(seat.unfinished))
            if len(seat.unfinished) >= self._prefetch:
                return
            if not self._again:
                if len(self._indices) >= len(self._seats) * self._prefetch or not (fresh := next(self._fresh, None)):
                    return
                number, self._indices[fresh[0]] = fresh
                self._again.append(number)
            worker = seat.worker or self._hire(seat)
            if worker is not None:
                number = self._again[0]
                verdicts = dict(self._verdicts[seat.told :])
                refused = frozenset(itertools.islice(self._reader.pyav_only - seat.pyav_only, _MOST_TOLD))
                if not worker.give(number, self._indices[number], verdicts, refused):
                    return
                heapq.heappop(self._again)
                seat.told = len(self._verdicts)
                seat.pyav_only |= refused
                seat.unfinished[number] = time.monotonic()

    def _hire(self, seat: _Seat) -> Worker | None:
        """A new worker for the seat, with all that is known by now; None if none could be had this time."""
        theirs = copy.copy(self._reader)
        theirs.elsewhere = None
        seat.told, seat.pyav_only = len(self._verdicts), theirs.pyav_only
        pickled = pickle.dumps(theirs)
        try:
            seat.worker = Worker(pickled)
        except (OSError, EOFError) as error:
            self._count_death(self._again[0], f"it could not be started: {error!r}")
            self._stop.wait(_RETRY_SECONDS)
        return seat.worker

    def _attend(self, seconds: float) -> None:
        """Waits up to that long for results, and sees to workers that are gone or hang."""
        filled = [(seat, seat.worker) for seat in self._seats if seat.worker is not None]
        ready = wait([worker.fileno() for _, worker in filled], seconds)
        look = time.monotonic() - self._looked >= _LOOK_SECONDS
        for seat, worker in filled:
            if worker.fileno() in ready and self._collect(seat, worker):
                self._replace(seat, worker)
            elif look:
                self._look(seat, worker)
        self._looked = time.monotonic() if look else self._looked
        self._deal()

    def _collect(self, seat: _Seat, worker: Worker) -> bool:
        """Takes what the worker has finished. True if it is gone."""
        try:
            for number, item in worker.results():
                if number == UNREADY:
                    item.throw()
                self._done[number] = item
                del seat.unfinished[number]
                self._suspects.pop(number, None)
                self._deaths.pop(number, None)
        except EOFError:
            return True
        return False

    def _look(self, seat: _Seat, worker: Worker) -> None:
        """Kills the worker if it is late for long enough."""
        if not seat.unfinished:
            return
        status = worker.board.read()
        limits = self._limits
        limit = limits.start if not status.started else limits.between if status.spot is None else limits.sample
        since = max(status.changed, next(iter(seat.unfinished.values())))
        seat.late = seat.late + 1 if time.monotonic() - since > limit else 0
        if seat.late >= _LATE_LOOKS:
            worker.kill()
            self._collect(seat, worker)
            self._replace(seat, worker, late=status)

    def _replace(self, seat: _Seat, worker: Worker, late: Status | None = None) -> None:
        """Empties the seat and settles who is to blame. ``late``: what the worker was killed for."""
        status = worker.board.read()
        worker.close()
        unfinished = list(seat.unfinished)
        seat.worker, seat.late = None, 0
        seat.unfinished.clear()
        for number in unfinished:
            heapq.heappush(self._again, number)
        if not unfinished:  # it was killed at rest
            return
        number = unfinished[0]
        spot = status.spot if status.number == number else None
        code = worker.exit_code()
        end = f"process {worker.process.pid}, exit code {code} ({_ADVICE.get(code or 0, 'unexpected')})"
        if late is not None and spot is not None and late.spot == spot:
            reason = f"not done after data.sample_seconds={self._limits.sample:g}; its worker was ended"
            self._condemn(number, spot, Verdict("time", reason))
        elif late is not None:
            what = "did nothing between samples" if late.started else "did not start"
            self._count_death(number, f"process {worker.process.pid} {what} for too long and was ended")
        elif spot is not None and self._suspects.get(number) == spot:
            self._condemn(number, spot, Verdict("crash", f"workers died on it twice: {end}"))
        else:
            self._suspects[number] = spot
            self._count_death(number, end)

    def _condemn(self, number: int, spot: Spot, verdict: Verdict) -> None:
        self._reader.condemn({spot: verdict})
        self._verdicts.append((spot, verdict))
        self._suspects.pop(number, None)
        self._deaths.pop(number, None)

    def _count_death(self, number: int, end: str) -> None:
        self._deaths[number] += 1
        if self._deaths[number] > _MOST_DEATHS:
            deaths = self._deaths[number]
            raise DataError(f"data workers died {deaths} times over one batch, and no sample is to blame; last: {end}")


def _dismiss(seats: Sequence[_Seat]) -> None:
    workers = [seat.worker for seat in seats if seat.worker is not None]
    for seat in seats:
        seat.worker = None
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.close()
