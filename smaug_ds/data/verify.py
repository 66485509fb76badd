"""Decodes every frame of every sample of a shard folder, on processes that are ended when a sample takes too long.

Indexing reads a clip's packets and decodes its first frame; damage further in shows only here: a decoder that stops,
frames that do not come, frames that the decoder itself marks as corrupt.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

from smaug_ds.data.image import decode_image
from smaug_ds.data.index import ShardIndex
from smaug_ds.data.media import MediaError
from smaug_ds.data.parallel import die_with_parent, room_in
from smaug_ds.data.sample import Sample
from smaug_ds.data.shard import ShardError
from smaug_ds.data.video import Video, all_frames
from smaug_ds.progress import bar

LEDGER = "verify.jsonl"
_START_SECONDS = 120.0  # that a process has to come up, on a busy machine


@dataclass(frozen=True)
class Failed:
    """A sample that does not decode as a whole."""

    shard: str  # name of the tar
    key: str
    reason: str  # stage of the failure, "time" or "crash"
    detail: str


@dataclass
class VerifyReport:
    """What a verification found."""

    samples: int = 0
    failures: list[Failed] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = f"{self.samples} samples decoded in {self.seconds:.1f} s, {self.samples / self.seconds:.0f} samples/s"
        if not self.failures:
            return f"{rate}; all are whole"
        reasons = Counter(failed.reason for failed in self.failures).most_common()
        counted = ", ".join(f"{reason} {count}" for reason, count in reasons)
        return f"{rate}; {len(self.failures)} failed ({counted}): see {LEDGER}"


def verify(folder: str | Path, workers: int = 1, seconds: float = 60.0, progress: bool = False) -> VerifyReport:
    """Decodes all samples of the indexed ``folder`` on ``workers`` processes; each may take ``seconds``.

    Failures go to ``folder/verify.jsonl``, one line each, in the order of the samples, once all are decoded.

    Raises:
        ShardError: as ``ShardIndex.open``, and where a decoding process does not come up.
    """
    started = time.monotonic()
    folder = Path(folder)
    index = ShardIndex.open(folder)
    if seconds <= 0:
        raise ShardError(f"--seconds is {seconds}: a sample needs some time")
    shards = [range(start, end) for start, end in pairwise(index.starts)]
    todo = [rows for rows in reversed(shards) if rows]
    found: dict[int, tuple[str, str]] = {}
    crew = [_Decoder(folder, seconds) for _ in range(max(1, min(workers, len(todo))))]
    try:
        with bar(range(0), len(index), "verify", "samples", shown=progress) as work:
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
                    if failure := decoder.take(decoder.pipe in ready):
                        if failure != ("", ""):
                            found[row] = failure
                        work.update()
    finally:
        for decoder in crew:
            decoder.end()
    failures = []
    for row, (reason, detail) in sorted(found.items()):
        entry = index.entry(row)
        failures.append(Failed(Path(entry.shard).name, entry.key, reason, detail))
    with room_in(folder), (folder / LEDGER).open("w", encoding="ascii") as ledger:
        ledger.writelines(json.dumps(asdict(failed)) + "\n" for failed in failures)
    return VerifyReport(len(index), failures, time.monotonic() - started)


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
            self._up = True
            return None
        if not self._up:  # no sample has been touched, so none is to blame
            waited = max(_START_SECONDS, self._seconds)
            ended = outcome[1] if outcome[0] == "crash" else f"it was not up after {waited:g} s"
            raise ShardError(
                f"{self._folder}: a decoding process does not start: {ended}; "
                "nothing was written; fewer --workers need less memory"
            )
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
        self._up = False
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
