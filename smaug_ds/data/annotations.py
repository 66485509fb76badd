"""Readers of the corpora's own file formats, and what a folder given as ``--data`` holds.

A Singularity-style list is a JSON array of ``{"video": path, "caption": text or [texts]}`` or ``{"image": ...}``, paths
relative to a media root; further fields are left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smaug_ds.data.sample import MEDIA, Medium

TRAIN_LISTS = ("video_train.json", "image_train.json")
TEST_LISTS = ("video_test.json", "image_test.json")
_LIST_DEPTH = 3  # data/annotations/project/video_train.json


class SourceError(ValueError):
    """Annotations or a data folder that cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Annotation:
    """One media file with all its captions."""

    medium: Medium
    path: str  # relative to the media root
    captions: tuple[str, ...]  # may be empty
    media_id: str


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
    for number, row in enumerate(_rows(Path(path))):
        media = [medium for medium in MEDIA if isinstance(row, dict) and isinstance(row.get(medium), str)]
        if len(media) != 1:
            raise SourceError(f'{path}, row {number}: wants "video" or "image" with a path, found {_shown(row)}')
        texts = row.get("caption")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise SourceError(
                f'{path}, row {number}: wants "caption" with a text or a list of texts, found {_shown(row)}'
            )
        known = captions.setdefault((media[0], row[media[0]]), {})
        known.update(dict.fromkeys(text.strip() for text in texts if text.strip()))
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


def _rows(path: Path) -> list:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"list {path} does not exist") from None
    except ValueError as error:
        raise SourceError(f"{path} is not a JSON list in UTF-8: {error}") from error
    if not isinstance(rows, list):
        raise SourceError(f"{path} holds a JSON {type(rows).__name__}, not a list of rows")
    return rows


def _shown(row: object) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
