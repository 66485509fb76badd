"""Decodes every frame of every sample of a shard folder, on processes that are ended when a sample takes too long.

Indexing reads a clip's packets and decodes its first frame; damage further in shows only here: a decoder that stops,
frames that do not come, frames that the decoder itself marks as corrupt.

What is found in a tar is noted in ``FOLDER/.verify.partial`` until all are done, so a broken-off verification goes on
where it was; a tar that changed since (size or time) is decoded again.
"""

from __future__ import annotations

import contextlib
import json
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from smaug_ds.data.image import decode_image
from smaug_ds.data.index import ShardIndex
from smaug_ds.data.media import MediaError
from smaug_ds.data.parallel import alone_in, clear, die_with_parent, room_in
from smaug_ds.data.sample import Sample
from smaug_ds.data.scanning import stamp_of
from smaug_ds.data.shard import ShardError
from smaug_ds.data.video import Video, all_frames
from smaug_ds.progress import bar

LEDGER = "verify.jsonl"
_PARTIAL = ".verify.partial"
_DONE = "done.jsonl"  # in it: a line per tar that was decoded as a whole
_START_SECONDS = 120.0  # that a process has to come up, on a busy machine


@dataclass(frozen=True)
class Failed:
    """A sample that does not decode as a whole."""

    shard: str  # name of the tar
    row: int  # of the tar's samples in the index, from 0
    key: str
    reason: str  # stage of the failure, "time" or "crash"
    detail: str


@dataclass
class VerifyReport:
    """What a verification found."""

    samples: int = 0
    failures: list[Failed] = field(default_factory=list)
    seconds: float = 0.0
    earlier: int = 0  # of the samples: decoded by a command that was broken off

    def __str__(self) -> str:
        now = self.samples - self.earlier
        rate = f"{now} samples decoded in {self.seconds:.1f} s, {now / self.seconds:.0f} samples/s"
        rate += f", {self.earlier} earlier" if self.earlier else ""
        if not self.failures:
            return f"{rate}; all are whole"
        reasons = Counter(failed.reason for failed in self.failures).most_common()
        counted = ", ".join(f"{reason} {count}" for reason, count in reasons)
        return f"{rate}; {len(self.failures)} failed ({counted}): see {LEDGER}"


def verify(folder: str | Path, workers: int = 1, seconds: float = 60.0, progress: bool = False) -> VerifyReport:
    """Decodes all samples of the indexed ``folder`` on ``workers`` processes; each may take ``seconds``.

    Failures go to ``folder/verify.jsonl``, one line each, in the order of the samples, once all are decoded. The tars
    that a command with the same ``seconds`` has finished before it was broken off are not decoded again.

    Raises:
        ShardError: as ``ShardIndex.open``; another command is at work, no room, no right to write there.
    """
    started = time.monotonic()
    folder = Path(folder)
    index = ShardIndex.open(folder)
    if seconds <= 0:
        raise ShardError(f"--seconds is {seconds}: a sample needs some time")
    with alone_in(folder / _PARTIAL), room_in(folder):
        found, earlier = _decode_all(index, workers, seconds, progress)
        failures = []
        for number, rows in sorted(found.items()):
            for row, reason, detail in sorted(rows):
                entry = index.entry(index.starts[number] + row)
                failures.append(Failed(Path(entry.shard).name, row, entry.key, reason, detail))
        with (folder / LEDGER).open("w", encoding="ascii") as ledger:
            ledger.writelines(json.dumps(asdict(failed)) + "\n" for failed in failures)
        clear(folder / _PARTIAL)
    return VerifyReport(len(index), failures, time.monotonic() - started, earlier)


def is_broken_off(folder: Path) -> bool:
    """Whether a verification of ``folder`` was broken off, and the tars are still those of its index."""
    try:
        return (folder / _PARTIAL / _DONE).exists() and len(ShardIndex.open(folder)) > 0
    except ShardError:
        return False


_Found = dict[int, list[tuple[int, str, str]]]  # by number of the shard: row in it, reason, detail


def _decode_all(index: ShardIndex, workers: int, seconds: float, progress: bool) -> tuple[_Found, int]:
    """What fails, and how many samples were decoded by a command that was broken off."""
    folder = index.folder
    marks = [
        [*stamp_of(Path(path)), end - start, seconds]
        for path, (start, end) in zip(index.shards, pairwise(index.starts), strict=True)
    ]
    found = _read_done(folder / _PARTIAL / _DONE, index, marks)
    shards = [range(start, end) for start, end in pairwise(index.starts)]
    todo = [rows for number, rows in reversed(list(enumerate(shards))) if rows and number not in found]
    earlier = sum(len(shards[number]) for number in found)
    crew = [_Decoder(folder, seconds) for _ in range(min(max(1, workers), len(todo)))]
    try:
        with (
            (folder / _PARTIAL / _DONE).open("a", encoding="ascii") as done,
            bar(range(0), len(index), "verify", "samples", shown=progress) as work,
        ):
            work.initial = work.n = work.last_print_n = earlier  # no part of the rate
            while True:
                for decoder in crew:
                    if not decoder.rows and todo:
                        decoder.give(todo.pop())
                busy = [decoder for decoder in crew if decoder.rows]
                if not busy:
                    break
                patience = max(0.0, min(decoder.deadline for decoder in busy) - time.monotonic())
                ready = wait([decoder.pipe for decoder in busy], patience)
                for decoder in busy:
                    row = decoder.rows[0]
                    number = bisect_right(index.starts, row) - 1
                    if failure := decoder.take(decoder.pipe in ready):
                        own = found.setdefault(number, [])
                        if failure != ("", ""):
                            own.append((row - index.starts[number], *failure))
                        if not decoder.rows:  # the blank line parts it from one that was cut short
                            line = {"shard": Path(index.shards[number]).name, "mark": marks[number], "failed": own}
                            done.write(f"\n{json.dumps(line)}\n")
                            done.flush()
                        work.update()
    finally:
        for decoder in crew:
            decoder.end()
    return found, earlier


def _read_done(path: Path, index: ShardIndex, marks: list[list[Any]]) -> _Found:
    """What was found in the tars that are the same since."""
    numbers = {Path(shard).name: number for number, shard in enumerate(index.shards)}
    found: _Found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # half a line, of a command that was killed while it wrote
                told = json.loads(line)
                number = numbers.get(told["shard"], -1)
                if number >= 0 and marks[number] == told["mark"]:
                    found[number] = [(row, reason, detail) for row, reason, detail in told["failed"]]
    return found


class _Decoder:
    """One process, and the rows it has still to decode; started again where it has to be ended."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self.rows = range(0)
        self.deadline = 0.0  # of the first row
        self._start()

    def give(self, rows: range) -> None:
        if not self._process.is_alive():
            self.end()
            self._start()
        self.rows = rows
        self.deadline = max(self.deadline, time.monotonic() + self._seconds)
        self.pipe.send(rows)

    def take(self, ready: bool) -> tuple[str, str] | None:
        """The outcome of the first row, ("", "") if it is whole; None if there is none yet."""
        outcome: tuple[str, str] | None = None
        if ready:
            try:
                outcome = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                outcome = ("crash", f"its process ended with code {self._process.exitcode}")
        elif time.monotonic() >= self.deadline:
            outcome = ("time", f"not decoded after {self._seconds:g} s")
        if outcome is None:
            return None
        self.deadline = time.monotonic() + self._seconds
        if outcome == _UP:
            return None
        self.rows = self.rows[1:]
        if outcome[0] in ("time", "crash"):
            self.end()
            self._start()
            if self.rows:
                self.pipe.send(self.rows)
        return outcome

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._folder), daemon=True)
        self._process.start()
        theirs.close()
        self.deadline = time.monotonic() + _START_SECONDS


_UP = ("up", "")


def _serve(pipe: Connection, folder: Path) -> None:
    die_with_parent()
    index = ShardIndex.open(folder)
    pipe.send(_UP)
    while True:
        for row in pipe.recv():
            try:
                pipe.send(check(index.read_sample(index.entry(row))))
            except ShardError as error:
                pipe.send(("read", str(error)))


def check(sample: Sample) -> tuple[str, str]:
    """(stage, reason) of what keeps a sample's media from being decoded as a whole, ("", "") if nothing does."""
    try:
        if sample.medium == "image":
            decode_image(sample.media)
            return "", ""
        expected = len(Video(sample.media))
        frames = corrupt = 0
        for frame in all_frames(sample.media):
            frames += 1
            corrupt += frame.is_corrupt
        if frames < expected:
            return "decode", f"{frames} frames come out, the packets promise {expected}"
        if corrupt:
            return "decode", f"{corrupt} of {frames} frames are damaged"
    except MediaError as error:
        return error.stage, error.reason
    return "", ""
