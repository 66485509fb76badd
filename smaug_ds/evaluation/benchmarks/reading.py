"""A benchmark file, whatever its layout, read and its counts compared with the published ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from smaug_ds.data.annotations import SourceError, json_rows
from smaug_ds.evaluation.benchmarks.formats import (
    MSRVTT_COLUMNS,
    READERS,
    Options,
)
from smaug_ds.evaluation.benchmarks.published import IDS, count_notes, published
from smaug_ds.evaluation.benchmarks.records import Benchmark, BenchmarkError

_SHOWN = 3  # names in a note
_MSRVTT_KEYS = ("info", "videos", "sentences")  # ActivityNet Captions' keys are names of videos

# The fields that tell a layout by the first row of a JSON list; of several that fit the first.
_LAYOUTS = (
    ("didemo", ("video", "description")),
    ("activitynet_qa", ("video_name", "question", "question_id")),
    ("msrvtt_qa", ("video_id", "question", "answer")),
    ("questions", ("video", "question", "answer")),
    ("multiple_choice", ("video", "caption", "answer")),
    ("retrieval", ("video", "caption")),
    ("answers", ("question_id", "answer", "type")),
    ("predictions", ("question_id", "answer")),
)


def read_benchmark(
    path: str | Path,
    *,
    answers: str | Path | None = None,
    ids: str | Path | None = None,
    paragraph: bool = False,
) -> Benchmark:
    """The records of a benchmark file in any layout of ``formats``; the layout is told by the file's content.

    Args:
        answers: of ActivityNet-QA; by default test_a.json beside test_q.json.
        ids: a list of the videos to keep (``read_ids``): the 9k training ids of MSR-VTT, val_ids.json, test_list.txt.
        paragraph: in Singularity's lists, the captions of a video are one query. DiDeMo's and ActivityNet's own files
            are always read so.

    Raises:
        BenchmarkError: no such file, none of these layouts, a row that is not of the layout, ids that name none of the
            videos; names the file and the row. Counts that differ from the published ones are notes, not errors.
    """
    path = Path(path)
    layout = layout_of(path)
    if layout not in READERS:
        raise BenchmarkError(f"{path} holds {layout}, no benchmark")
    if layout == "activitynet_qa":
        answers = answers_beside(path) if answers is None else Path(answers)
    elif answers is not None:
        raise BenchmarkError(f"{path} has the layout {layout}: its answers are not in a file of their own ({answers})")
    wanted = read_ids(ids) if ids is not None else None
    task, read = READERS[layout]
    options = Options(Path(answers) if answers else None, frozenset(wanted) if wanted is not None else None, paragraph)
    try:
        records = read(path, options)
    except OSError as error:
        raise BenchmarkError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    if not records:
        raise BenchmarkError(f"{path} has no rows" + (f" of the {len(wanted)} videos in {ids}" if wanted else ""))
    known = published(layout, path)
    files = tuple(str(file) for file in (path, options.answers) if file is not None)
    task = "paragraph retrieval" if paragraph and layout == "retrieval" else task
    benchmark = Benchmark(known.name if known else layout, layout, task, files, tuple(records))
    if wanted is not None:
        notes = _id_notes(benchmark, wanted, ids)
    else:
        notes = count_notes(known, benchmark.counts) if known else []
    return dataclasses.replace(benchmark, notes=tuple(notes))


_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def layout_of(path: Path) -> str:
    """The layout of a file: a key of ``formats.READERS``, or "ids", "answers", "predictions", "no rows".

    Raises BenchmarkError if its content does not tell.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            head = file.read(4096).lstrip()
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}") from error
    if head.startswith("["):
        return _layout_of_row(path)
    if head.startswith("{"):
        first_key = re.match(r'\{\s*"([^"]*)"', head)
        return "msrvtt_data" if first_key and first_key[1] in _MSRVTT_KEYS else "activitynet_captions"
    columns = head.split("\n", 1)[0].strip().split(",")
    if set(MSRVTT_COLUMNS) <= set(columns):
        return "msrvtt_csv"
    # What is not UTF-8 is told when the ids are read; a list of them has no control characters.
    if (
        head
        and not _CONTROL.search(head)
        and all(len(line.split()) <= 1 and "," not in line for line in head.splitlines())
    ):
        return "ids"
    raise BenchmarkError(f"{path}: neither JSON, nor a csv with {', '.join(MSRVTT_COLUMNS)}, nor a list of ids")


def read_ids(path: str | Path) -> tuple[str, ...]:
    """Names of videos, each once: a JSON list, a csv with the one column video_id, or a line each.

    Raises BenchmarkError for anything else.
    """
    path = Path(path)
    if layout_of(path) != "ids":
        raise BenchmarkError(f"{path} is no list of video ids")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    if text.startswith("["):
        try:
            names: list[Any] = list(json_rows(path))
        except SourceError as error:
            raise BenchmarkError(str(error)) from error
    else:
        names = text.split()
        names = names[1:] if names[0] == "video_id" else names
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise BenchmarkError(f"{path}, row {row}: wants the name of a video, found {name!r:.80}")
    return tuple(dict.fromkeys(names))


def id_count_notes(path: Path, ids: Collection[str]) -> list[str]:
    """A line where a list of ids of a known name is not as long as published."""
    expected = IDS.get(path.stem, len(ids))
    return [] if expected == len(ids) else [f"{path.name}: {len(ids)} videos, published {expected}"]


def answers_beside(path: Path) -> Path:
    """test_a.json for test_q.json. Raises BenchmarkError if there is none."""
    beside = path.with_name(re.sub(r"_q(?=[_.])", "_a", path.name, count=1))
    if beside == path or not beside.is_file():
        raise BenchmarkError(f"{path} holds questions: give the file of their answers, too ({beside} is none)")
    return beside


def _layout_of_row(path: Path) -> str:
    try:
        first = next(json_rows(path), None)
    except SourceError as error:
        raise BenchmarkError(str(error)) from error
    if first is None:
        return "no rows"
    if isinstance(first, str):
        return "ids"
    for layout, fields in _LAYOUTS:
        if isinstance(first, dict) and all(field in first for field in fields):
            return layout
    raise BenchmarkError(f"{path}, row 0: of no known layout: {first!r:.120}")


def _id_notes(benchmark: Benchmark, wanted: Collection[str], ids: str | Path | None) -> list[str]:
    found = {name for record in benchmark.records for name in record.names}
    absent = [name for name in wanted if name not in found]
    if not absent:
        return []
    names = ", ".join(absent[:_SHOWN]) + (" ..." if len(absent) > _SHOWN else "")
    return [f"{len(absent)} of {len(wanted)} videos in {ids} have no text in {benchmark.files[0]}: {names}"]
