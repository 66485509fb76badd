"""What benchmark files are, their counts, and what reading them costs.

python -m smaug_ds.evaluation.benchmarks FILE... [--media FOLDER [--list OUT]] [--ids FILE]

Exit codes: 0 all could be read, 2 one could not, or the command line is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from smaug_ds.evaluation.benchmarks.formats import READERS
from smaug_ds.evaluation.benchmarks.lists import write_list
from smaug_ds.evaluation.benchmarks.questions import read_predictions
from smaug_ds.evaluation.benchmarks.reading import answers_beside, id_count_notes, layout_of, read_benchmark, read_ids
from smaug_ds.evaluation.benchmarks.records import BenchmarkError
from smaug_ds.evaluation.benchmarks.videos import find_in_folder

Result = TypeVar("Result")


def describe(path: Path, media: Path | None, ids: Path | None, out: Path | None) -> list[str]:
    """What ``path`` is, and what is to be said about it: a line each; with ``media``, which videos are missing there.
    The others are listed in the file ``out``. Raises BenchmarkError if something cannot be read, or ``out`` written."""
    layout = layout_of(path)
    if layout not in READERS and out is None:
        return _describe_other(path, layout)
    benchmark, cost = _measured(lambda: read_benchmark(path, ids=ids))
    counts = ", ".join(f"{number} {what}" for what, number in benchmark.counts.items())
    lines = list(benchmark.notes)
    if layout == "activitynet_qa":
        lines.append(f"answers from {answers_beside(path).name}")
    if media is not None:
        found = find_in_folder(benchmark, media)
        lines.append(str(found))
        if out is not None:
            found.require(len(found.missing))
            try:
                write_list(out, benchmark, found)
            except OSError as error:
                raise BenchmarkError(f"--list {out} cannot be written: {error.strerror}") from error
            lines.append(f"{out}: list of {len(found.places)} videos for tools/build_shards.py")
    title = benchmark.name if benchmark.name == layout else f"{benchmark.name} ({layout})"
    return [f"{path.name}: {title}, {counts}, {cost}", *_indented(lines)]


def _describe_other(path: Path, layout: str) -> list[str]:
    if layout == "ids":
        names, cost = _measured(lambda: read_ids(path))
        return [f"{path.name}: list of {len(names)} videos, {cost}", *_indented(id_count_notes(path, names))]
    if layout == "predictions":
        predictions, cost = _measured(lambda: read_predictions(path))
        return [f"{path.name}: {len(predictions)} predicted answers, {cost}"]
    if layout == "answers":
        return [f"{path.name}: answers of ActivityNet-QA, read with the file of their questions"]
    raise BenchmarkError(f"{path} holds {layout}")


def _measured(read: Callable[[], Result]) -> tuple[Result, str]:
    """What ``read`` gives, with its seconds and the greatest memory that it takes; it is called twice, because
    watching memory costs time."""
    start = time.perf_counter()
    result = read()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    try:
        read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, f"{seconds:.2f} s, {peak / 1e6:.1f} MB"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 2 if a file could not be read, which is a line on standard error each."""
    parser = argparse.ArgumentParser(
        prog="python -m smaug_ds.evaluation.benchmarks",
        description="What benchmark files are, and their counts.",
        epilog="Exit codes: 0 all could be read, 2 one could not, or the command line is wrong.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--media", type=Path, help="folder of videos: tells which of them are missing")
    parser.add_argument("--ids", type=Path, help="list of the videos to keep")
    parser.add_argument(
        "--list", type=Path, dest="out", metavar="OUT", help="of one FILE: writes the videos found there"
    )
    options = parser.parse_args(arguments)
    if options.out and (len(options.files) > 1 or not options.media):
        parser.error("--list wants one FILE and --media")
    failed = 0
    for path in options.files:
        try:
            print("\n".join(describe(path, options.media, options.ids, options.out)))
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 2
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
