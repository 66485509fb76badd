"""Where the videos of a benchmark lie: in a media folder or in indexed shards, whatever ending or prefix they have.

A benchmark's name and a file's name mean the same video when they agree after their endings are taken off; where that
finds nothing, with ActivityNet's ``v_`` put before the name or taken off. Names with folders must agree as far as both
go: ``test/7.mp4`` is not ``train/7.mp4``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from smaug_ds.data.index import ShardIndex
from smaug_ds.data.media import VIDEO_SUFFIXES
from smaug_ds.data.shard import Entry, SampleError, ShardError, parse_metadata
from smaug_ds.evaluation.benchmarks.records import Benchmark, BenchmarkError

ENDINGS = VIDEO_SUFFIXES | {""}  # DiDeMo has names that end in a bare dot
_PREFIX = "v_"  # of ActivityNet's file names
_SHOWN = 5  # names in a report

Where = TypeVar("Where")


@dataclass(frozen=True)
class Found(Generic[Where]):
    """Where each video of a benchmark lies, and which are missing."""

    file: str  # of the benchmark
    searched: str  # folders that were searched
    places: dict[str, Where]  # video, as the benchmark names it -> file or shard entry
    missing: dict[str, int]  # video -> row of the benchmark's file where it stands first

    def __str__(self) -> str:
        total = len(self.places) + len(self.missing)
        if not self.missing:
            return f"{self.file}: all {total} videos are in {self.searched}"
        first = [f"{video} (row {row})" for video, row in list(self.missing.items())[:_SHOWN]]
        more = " ..." if len(self.missing) > _SHOWN else ""
        return (
            f"{self.file}: {len(self.missing)} of {total} videos are missing in {self.searched}: "
            f"{', '.join(first)}{more}"
        )

    def require(self, allowed_missing: int = 0) -> None:
        """Raises BenchmarkError where more than ``allowed_missing`` videos are missing, or all of them."""
        if len(self.missing) > allowed_missing or not self.places:
            raise BenchmarkError(f"{self}; {allowed_missing} may be missing")


def find_in_folder(benchmark: Benchmark, folder: str | Path) -> Found[Path]:
    """The video files of ``benchmark`` in ``folder``, at any depth.

    Raises BenchmarkError where there is no folder, or a name fits several different videos.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BenchmarkError(f"{folder} is no folder: give the one that holds the videos of {benchmark.files[0]}")
    names: _Names[Path] = _Names()
    for current, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if "." not in file or file.rpartition(".")[2].lower() in ENDINGS:
                path = Path(current, file)
                names.add(path.relative_to(folder).as_posix(), path)
    return _find(benchmark, [names], str(folder))


def find_in_shards(benchmark: Benchmark, indexes: Sequence[ShardIndex]) -> Found[Entry]:
    """The video samples of ``benchmark`` in indexed shards, by the ``media_id`` and ``source`` in a sample's json, and
    by its key where neither fits. ``f"{entry.shard}/{entry.key}"`` is what ``Batch.keys`` holds.

    Reads the json of every video sample: meant for folders of the size of a test set.

    Raises BenchmarkError where a name fits several different samples, ShardError where a shard cannot be read.
    """
    stated: _Names[Entry] = _Names()
    keys: _Names[Entry] = _Names()
    for index in indexes:
        for entry, labels in _labels(index):
            for label in labels:
                stated.add(label, entry)
            keys.add(f"{entry.shard}/{entry.key}", entry)
    return _find(benchmark, [stated, keys], ", ".join(str(index.folder) for index in indexes))


def stem(name: str) -> str:
    """``name`` without the endings of video files: ``x.mov`` and ``x.mov.mp4`` are x, ``x.y`` stays."""
    while "." in name and (parts := name.rpartition("."))[2].lower() in ENDINGS and parts[0]:
        name = parts[0]
    return name


class _Candidate(NamedTuple, Generic[Where]):
    parts: tuple[str, ...]  # of its path, the last one without endings
    name: str
    where: Where


class _Names(Generic[Where]):
    """Places by the stem of their last name."""

    def __init__(self) -> None:
        self._by_stem: dict[str, list[_Candidate[Where]]] = {}

    def add(self, name: str, where: Where) -> None:
        parts = _parts(name)
        self._by_stem.setdefault(parts[-1], []).append(_Candidate(parts, name.rpartition("/")[2], where))

    def find(self, wanted: Sequence[str]) -> Where | None:
        """The place of a video of which ``wanted`` are all names. Raises BenchmarkError if several videos fit."""
        endings = [name.rpartition("/")[2] for name in wanted]
        for prefixed in (False, True):
            for name in wanted:
                for parts in _prefixed(_parts(name)) if prefixed else [_parts(name)]:
                    fitting = [c for c in self._by_stem.get(parts[-1], ()) if _agree(c.parts, parts)]
                    if fitting:
                        return min(_one_video(fitting, name), key=lambda c: (c.name not in endings, c.name)).where
        return None


def _parts(name: str) -> tuple[str, ...]:
    *folders, last = [part for part in name.split("/") if part not in ("", ".")] or [name]
    return (*folders, stem(last))


def _prefixed(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    *folders, last = parts
    bare = [last.removeprefix(_PREFIX)] if last.startswith(_PREFIX) else []
    return [(*folders, name) for name in (_PREFIX + last, *bare)]


def _agree(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    common = min(len(one), len(other))
    return one[-common:] == other[-common:]


def _one_video(fitting: list[_Candidate[Where]], name: str) -> list[_Candidate[Where]]:
    paths = sorted({"/".join(candidate.parts) for candidate in fitting})
    if len(paths) > 1:
        raise BenchmarkError(
            f"video {name} may be {paths[0]} or {paths[1]}: search a folder that holds only one of them"
        )
    return fitting


def _labels(index: ShardIndex) -> Iterator[tuple[Entry, list[str]]]:
    """Every video sample of ``index``, with the names that its json states."""
    for path, start, end in zip(index.shards, index.starts, index.starts[1:], strict=False):
        try:
            with open(path, "rb") as tar:
                for entry in (index.entry(row) for row in range(start, end)):
                    if entry.medium == "video":
                        data = os.pread(tar.fileno(), entry.json_size, entry.json_offset)
                        record = parse_metadata(data) if entry.json_size else {}
                        stated = (record.get("media_id"), record.get("source"))
                        yield entry, [name for name in stated if isinstance(name, str) and name]
        except (OSError, SampleError) as error:
            raise ShardError(f"{path} is not what was indexed: {error}") from error


def _find(benchmark: Benchmark, tables: Iterable[_Names[Where]], searched: str) -> Found[Where]:
    found: Found[Where] = Found(benchmark.files[0], searched, {}, {})
    for video, record in benchmark.videos.items():
        where = next((w for names in tables if (w := names.find(record.names)) is not None), None)
        if where is None:
            found.missing[video] = record.row
        else:
            found.places[video] = where
    return found
