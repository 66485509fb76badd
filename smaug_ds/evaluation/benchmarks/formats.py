"""The layouts of the benchmark files, each read into records.

====================  ==================================================================================
msrvtt_csv            MSRVTT_JSFUSION_test.csv: key, vid_key, video_id, sentence (the 1k-A test pairs)
msrvtt_data           MSRVTT_data.json: {"videos": [...], "sentences": [{"video_id", "caption"}, ...]}
didemo                train_data.json, val_data.json, test_data.json: rows {"video", "description", ...}
activitynet_captions  train.json, val_1.json, val_2.json: {name: {"sentences": [...], ...}}
retrieval             Singularity's rows {"video", "caption": text or [texts]}
multiple_choice       Singularity's rows {"video", "caption": [texts], "answer": position}
activitynet_qa        test_q.json {"video_name", "question", "question_id"} with its test_a.json
msrvtt_qa             test_qa.json: rows {"video_id", "question", "answer", "id"}
questions             Singularity's rows {"question_id", "video", "question", "answer"}
====================  ==================================================================================
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smaug_ds.data.annotations import SourceError, json_rows
from smaug_ds.evaluation.benchmarks.records import BenchmarkError, Choice, Question, Record, Task, VideoTexts, words
from smaug_ds.evaluation.benchmarks.videos import stem

MSRVTT_COLUMNS = ("video_id", "sentence")


class Options(NamedTuple):
    """How a file is read."""

    answers: Path | None  # of ActivityNet-QA
    ids: Collection[str] | None  # names of the videos to keep, as the file spells them
    paragraph: bool  # the captions of a video are one query together


def msrvtt_csv(path: Path, options: Options) -> list[Record]:
    """The 1k-A pairs; every sentence is a query."""
    texts = _Texts(options)
    for row, fields in csv_rows(path, MSRVTT_COLUMNS):
        texts.add(fields["video_id"], fields["sentence"], row, f"{path}, row {row}")
    return texts.records()


def msrvtt_data(path: Path, options: Options) -> list[Record]:
    """All captions of MSR-VTT, or those of the videos in ``options.ids``."""
    document = json_object(path)
    texts = _Texts(options)
    for row, sentence in enumerate(_field(document, "sentences", list, str(path))):
        place = f"{path}, sentence {row}"
        texts.add(_field(sentence, "video_id", str, place), _field(sentence, "caption", str, place), row, place)
    return texts.records()


def didemo(path: Path, options: Options) -> list[Record]:
    """One paragraph a video: all its descriptions in the order of the file.

    The file names some videos twice, with different endings (33 of 1004 in the test split, ``x.mov`` and ``x.mp4``,
    of one download link): they are one video here. With ``options.ids`` only rows of exactly these names count, as in
    loaders that go by collaborative-experts' test_list.txt.
    """
    texts = _Texts(options._replace(paragraph=True), same=stem)
    for row, fields in rows(path):
        place = f"{path}, row {row}"
        texts.add(_field(fields, "video", str, place), _field(fields, "description", str, place), row, place)
    return texts.records()


def activitynet_captions(path: Path, options: Options) -> list[Record]:
    """One paragraph a video: its sentences in the order of the file; the time stamps are not read."""
    texts = _Texts(options._replace(paragraph=True))
    for row, (video, fields) in enumerate(json_object(path).items()):
        place = f"{path}, video {video}"
        sentences = _field(fields, "sentences", list, place)
        if not sentences:
            raise BenchmarkError(f"{place}: no sentences")
        for sentence in sentences:
            texts.add(video, sentence, row, place)
    return texts.records()


def retrieval(path: Path, options: Options) -> list[Record]:
    """Singularity's list; rows of the same video are put together."""
    texts = _Texts(options)
    for row, fields in rows(path):
        place = f"{path}, row {row}"
        video, captions = _field(fields, "video", str, place), _field(fields, "caption", (str, list), place)
        if not captions:
            raise BenchmarkError(f"{place}: no caption")
        for caption in [captions] if isinstance(captions, str) else captions:
            texts.add(video, caption, row, place)
    return texts.records()


def multiple_choice(path: Path, options: Options) -> list[Record]:
    """Singularity's list of descriptions to choose from."""
    records: list[Record] = []
    for row, fields in rows(path):
        place = f"{path}, row {row}"
        video, captions = _field(fields, "video", str, place), _field(fields, "caption", list, place)
        choices = tuple(_text(caption, place) for caption in captions)
        answer = _field(fields, "answer", int, place)
        if not 0 <= answer < len(choices):
            raise BenchmarkError(f"{place}: answer is {answer}, but there are {len(choices)} captions, counted from 0")
        if _kept(video, options):
            records.append(Choice(video, choices, answer, row))
    return records


def activitynet_qa(path: Path, options: Options) -> list[Record]:
    """The questions with their answers and types, joined by question_id; both files must hold the same ids."""
    if options.answers is None:
        raise BenchmarkError(f"{path} holds questions: give the file of their answers, too")
    answers: dict[str, tuple[str, int]] = {}
    for row, fields in rows(options.answers):
        place = f"{options.answers}, row {row}"
        key, kind = _field(fields, "question_id", str, place), _field(fields, "type", int, place)
        if not 0 <= kind <= 8:
            raise BenchmarkError(f"{place}: type is {kind}; ActivityNet-QA's go from 0 to 8")
        if key in answers:
            raise BenchmarkError(f"{place}: question_id {key} stands there twice")
        answers[key] = _field(fields, "answer", str, place), kind
    records: list[Record] = []
    asked: set[str] = set()
    for row, fields in rows(path):
        place = f"{path}, row {row}"
        key = _field(fields, "question_id", str, place)
        video, question = _field(fields, "video_name", str, place), _text(fields.get("question"), place)
        if key not in answers:
            raise BenchmarkError(f"{place}: question_id {key} has no answer in {options.answers}")
        if key in asked:
            raise BenchmarkError(f"{place}: question_id {key} stands there twice")
        asked.add(key)
        if _kept(video, options):
            records.append(Question(key, video, question, answers[key][0], row, answers[key][1]))
    if unasked := [key for key in answers if key not in asked]:
        raise BenchmarkError(f"{options.answers}: {len(unasked)} answers have no question in {path}: {_some(unasked)}")
    return records


def msrvtt_qa(path: Path, options: Options) -> list[Record]:
    """MSRVTT-QA's own files; a video_id that is a number N is videoN, and a missing id is the row."""
    return _questions(path, options, "id", "video_id")


def questions(path: Path, options: Options) -> list[Record]:
    """Singularity's lists of questions."""
    return _questions(path, options, "question_id", "video")


def _questions(path: Path, options: Options, id_field: str, video_field: str) -> list[Record]:
    records: list[Record] = []
    seen: set[str] = set()
    for row, fields in rows(path):
        place = f"{path}, row {row}"
        video = _field(fields, video_field, (str, int), place)
        video = f"video{video}" if isinstance(video, int) else video
        key = str(fields.get(id_field, row))
        if key in seen:
            raise BenchmarkError(f"{place}: {id_field} {key} stands there twice")
        seen.add(key)
        answer = _field(fields, "answer", (str, list), place)
        several = set(answer) if isinstance(answer, list) and all(isinstance(a, str) for a in answer) else {answer}
        if len(several) != 1:
            raise BenchmarkError(f"{place}: wants one answer, found {answer!r:.80}")
        question = _text(fields.get("question"), place)
        if _kept(video, options):
            records.append(Question(key, video, question, _utf8(several.pop(), place), row))
    return records


class _Texts:
    """Gathers sentences by video, in the order in which the videos appear."""

    def __init__(self, options: Options, same: Callable[[str], str] = str) -> None:
        self._options, self._same = options, same
        self._found: dict[str, tuple[int, dict[str, None], list[str]]] = {}  # row, names, sentences

    def add(self, video: str, sentence: Any, row: int, place: str) -> None:
        sentence = _text(sentence, place)
        if _kept(video, self._options):
            _, names, sentences = self._found.setdefault(self._same(video), (row, {}, []))
            names[video] = None
            sentences.append(sentence)

    def records(self) -> list[Record]:
        return [
            VideoTexts(next(iter(names)), tuple(sentences), row, self._options.paragraph, tuple(names)[1:])
            for row, names, sentences in self._found.values()
        ]


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, object) of a JSON list of objects. Raises BenchmarkError for anything else."""
    try:
        for row, fields in enumerate(json_rows(path)):
            if not isinstance(fields, dict):
                raise BenchmarkError(f"{path}, row {row}: wants an object, found {fields!r:.80}")
            yield row, fields
    except SourceError as error:
        raise BenchmarkError(str(error)) from error


def csv_rows(path: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, fields) of a csv with a header. Raises BenchmarkError where one of ``columns`` is missing."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise BenchmarkError(f"{path}: no column {', '.join(sorted(missing))}; found {reader.fieldnames}")
        try:
            for row, fields in enumerate(reader):
                if None in fields or None in fields.values():
                    raise BenchmarkError(f"{path}, row {row}: not as many columns as the header")
                yield row, fields
        except csv.Error as error:
            raise BenchmarkError(f"{path}: {error}") from error


def json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises BenchmarkError for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BenchmarkError(f"{path} holds a JSON {type(document).__name__}, not an object")
    return document


def _field(fields: Any, name: str, kind: type | tuple[type, ...], place: str) -> Any:
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise BenchmarkError(f'{place}: wants "{name}" ({kinds}), found {fields!r:.120}')
    return _utf8(value, place) if isinstance(value, str) else value


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BenchmarkError(f"{place}: wants a text, found {value!r:.80}")
    return words(_utf8(value, place))


def _utf8(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BenchmarkError(f"{place}: {text!r:.80} is not UTF-8 ({error.reason})") from None
    return text


def _kept(video: str, options: Options) -> bool:
    return options.ids is None or video in options.ids


def _some(names: Iterable[str]) -> str:
    first = [*names]
    return ", ".join(first[:3]) + (" ..." if len(first) > 3 else "")


# layout -> (what it is used for, its reader)
READERS: dict[str, tuple[Task, Callable[[Path, Options], list[Record]]]] = {
    "msrvtt_csv": ("retrieval", msrvtt_csv),
    "msrvtt_data": ("retrieval", msrvtt_data),
    "didemo": ("paragraph retrieval", didemo),
    "activitynet_captions": ("paragraph retrieval", activitynet_captions),
    "retrieval": ("retrieval", retrieval),
    "multiple_choice": ("multiple choice", multiple_choice),
    "activitynet_qa": ("question answering", activitynet_qa),
    "msrvtt_qa": ("question answering", msrvtt_qa),
    "questions": ("question answering", questions),
}
