"""Media files with their captions as lists name them, and what a folder given as ``--data`` holds.

A Singularity-style list is a JSON array of ``{"video": path, "caption": text or [texts]}`` or ``{"image": ...}``, paths
relative to a media root; further fields are left alone. ``corpora`` reads the formats of the large corpora.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smaug_ds.data.sample import MEDIA, Medium

TRAIN_LISTS = ("video_train.json", "image_train.json")
TEST_LISTS = ("video_test.json", "image_test.json")
_LIST_DEPTH = 3  # data/annotations/project/video_train.json
_CHUNK = 2**20  # characters read at a time
_LONGEST_ROW = 2**26  # characters: past this a row is taken for damage, not for data
_BLANK = re.compile(r"[ \t\n\r]*")


class SourceError(ValueError):
    """Annotations or a data folder that cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Annotation:
    """One media file with all its captions."""

    medium: Medium
    path: str  # relative to the media root
    captions: tuple[str, ...]  # may be empty
    media_id: str
    elsewhere: tuple[str, ...] = ()  # where else the file may lie, tried in this order
    beside: bool = False  # the captions stand in KEY.json or KEY.txt beside the file


@dataclass(frozen=True)
class Source:
    """What a ``--data`` argument holds: lists of media files to build shards from, or shards."""

    kind: Literal["lists", "shards"]
    media_root: Path  # of the paths in the lists
    train: tuple[Path, ...]  # lists or shard folders
    test: tuple[Path, ...]  # the same; empty: hold out a share of the training samples


def read_list(path: str | Path) -> Iterator[Annotation]:
    """The media files of one list, each once, in the order of their first rows; captions of all their rows together.

    Raises:
        SourceError: no such file, no JSON, or a row that is not of this format; names the file and the row.
    """
    captions: dict[tuple[Medium, str], dict[str, None]] = {}
    for number, row in enumerate(json_rows(Path(path))):
        new = parse_row(row, f"{path}, row {number}")
        captions.setdefault((new.medium, new.path), {}).update(dict.fromkeys(new.captions))
    for (medium, file), texts in captions.items():
        yield Annotation(medium, file, tuple(texts), media_id=file)


def read_lists(paths: Iterable[str | Path]) -> list[Annotation]:
    """The media files of several lists, each once, captions together. Raises SourceError as ``read_list`` does."""
    merged: dict[tuple[Medium, str], Annotation] = {}
    for path in paths:
        for new in read_list(path):
            old = merged.get((new.medium, new.path), new)
            captions = tuple(dict.fromkeys(old.captions + new.captions))
            merged[new.medium, new.path] = Annotation(new.medium, new.path, captions, new.media_id)
    return list(merged.values())


def parse_row(row: Any, place: str) -> Annotation:
    """One row of a Singularity-style list; captions stripped, without empty and repeated ones.

    Raises:
        SourceError: not such a row; the message begins with ``place``.
    """
    media = [medium for medium in MEDIA if isinstance(row, dict) and isinstance(row.get(medium), str)]
    if len(media) != 1:
        raise SourceError(f'{place}: wants "video" or "image" with a path, found {_shown(row)}')
    texts = row.get("caption", row.get("captions"))
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SourceError(f'{place}: wants "caption" with a text or a list of texts, found {_shown(row)}')
    path = row[media[0]]
    return Annotation(media[0], path, tuple(dict.fromkeys(text.strip() for text in texts if text.strip())), path)


def json_rows(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, one at a time: files of some GB are never held whole. Bytes that are not UTF-8
    become lone surrogates. Raises SourceError for what is no such array; names the row."""
    decode = json.JSONDecoder().raw_decode
    row = 0
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            text, place, wanted = file.read(_CHUNK), 0, "["
            while True:
                place = _end_of_blanks(text, place)
                more = file.read(_CHUNK) if place == len(text) else ""
                if more:
                    text, place = more, 0
                elif wanted:  # "[" first, then "," or "]" after each element
                    found = text[place : place + 1]
                    if found == "]" and wanted == ",":
                        return
                    if found != wanted:
                        if wanted == "[":
                            kind = {"{": "dict", '"': "str"}.get(found, "value or nothing")
                            raise SourceError(f"{path} holds a JSON {kind}, not a list of rows")
                        raise SourceError(f"{path} is no JSON list: no comma or end after row {row - 1}")
                    place, wanted = place + 1, ""
                elif text[place : place + 1] == "]" and row == 0:
                    return
                else:
                    try:
                        value, place = decode(text, place)
                    except json.JSONDecodeError as error:
                        more = file.read(max(_CHUNK, len(text) - place))  # twice as much: no quadratic time
                        if not more or len(text) - place > _LONGEST_ROW:
                            raise SourceError(f"{path} is no JSON list: row {row} is damaged ({error.msg})") from None
                        text, place = text[place:] + more, 0
                        continue
                    except RecursionError:
                        raise SourceError(f"{path} is no JSON list: row {row} is nested too deeply") from None
                    yield value
                    row, wanted = row + 1, ","
    except FileNotFoundError:
        raise SourceError(f"list {path} does not exist") from None
    except OSError as error:
        raise SourceError(f"list {path} cannot be read: {error}") from error


def _end_of_blanks(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    assert match  # the pattern matches nothing, too
    return match.end()


def find_lists(folder: str | Path) -> dict[str, Path]:
    """File name -> path of the lists (``TRAIN_LISTS``, ``TEST_LISTS``) in ``folder`` or up to three levels below.

    Raises:
        SourceError: two lists of the same name.
    """
    found: dict[str, Path] = {}
    for current, folders, files in os.walk(folder):
        depth = len(Path(current).relative_to(folder).parts)
        folders[:] = sorted(folders) if depth < _LIST_DEPTH else []
        for name in sorted(set(files) & {*TRAIN_LISTS, *TEST_LISTS}):
            if name in found:
                raise SourceError(f"{folder} holds two lists {name}: {found[name]} and {Path(current, name)}; keep one")
            found[name] = Path(current, name)
    return found


def describe_source(data: str | Path, media_root: str | Path | None = None) -> Source:
    """What ``data`` is: a folder of tars, one with tars in ``train`` (and ``test``), one with lists, or one JSON list.

    ``media_root`` is where the paths of the lists start: by default the folder, or the folder of the list.

    Raises:
        SourceError: none of these; says what was looked for.
    """
    data = Path(data)
    if data.is_file():
        return Source("lists", Path(media_root or data.parent), (data,), ())
    if not data.is_dir():
        raise SourceError(f"{data} does not exist: give a folder of shards, a folder with lists, or a list")
    train, test = data / "train", data / "test"
    if _has_tars(train):
        return Source("shards", data, (train,), (test,) if _has_tars(test) else ())
    if _has_tars(data):
        return Source("shards", data, (data,), (test,) if _has_tars(test) else ())
    lists = find_lists(data)
    train_lists, test_lists = (
        tuple(lists[name] for name in names if name in lists) for names in (TRAIN_LISTS, TEST_LISTS)
    )
    if not train_lists:
        raise SourceError(
            f"{data} holds no training data: looked for *.tar in it and in {train}, and for {' or '.join(TRAIN_LISTS)} "
            f"in it and up to {_LIST_DEPTH} folders below"
        )
    return Source("lists", Path(media_root or data), train_lists, test_lists)


def _has_tars(folder: Path) -> bool:
    return any(folder.glob("*.tar"))


def _shown(row: object) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
