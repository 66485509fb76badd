"""A benchmark's clips in place of a corpus: the videos that were found, each once, with the benchmark's texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smaug_ds.data.index import ShardIndex
from smaug_ds.data.media import MediaFacts
from smaug_ds.data.sample import Medium, Sample
from smaug_ds.data.shard import Entry, ShardError
from smaug_ds.evaluation.benchmarks import Benchmark, BenchmarkError, Found, find_in_folder, find_in_shards

_UNKNOWN = MediaFacts("", "", 0, 0, 0, 0, 0.0, 0.0, 0, 0)  # of a file in a folder: no decoder but PyAV takes it


@dataclass(frozen=True)
class BenchmarkClip:
    """One video and what is asked about it."""

    video: str  # as the benchmark names it; the sample's media id
    place: Entry | Path  # in a shard, or a file
    texts: tuple[str, ...]  # the sample's captions


class BenchmarkClips:
    """What an evaluation asks of a corpus. Can be pickled."""

    def __init__(self, clips: Sequence[BenchmarkClip], indexes: Sequence[ShardIndex] = ()) -> None:
        self.clips, self.indexes = tuple(clips), tuple(indexes)
        self._by_shard = {path: index for index in self.indexes for path in index.shards}
        self._by_name = {_name(_entry(clip.place)): clip for clip in self.clips}

    def __reduce__(self) -> tuple:
        return BenchmarkClips, (self.clips, self.indexes)

    def count(self, medium: Medium) -> int:
        """Number of clips."""
        return len(self.clips) if medium == "video" else 0

    def nth(self, medium: Medium, number: int) -> Entry:
        """The ``number``-th clip, in the order of the benchmark."""
        return _entry(self.clips[number].place)

    def read_sample(self, entry: Entry) -> Sample:
        """Media of ``entry`` with the benchmark's texts. Raises ShardError when it cannot be read."""
        clip = self._by_name[_name(entry)]
        if isinstance(clip.place, Path):
            try:
                media = clip.place.read_bytes()
            except OSError as error:
                raise ShardError(f"{clip.place} cannot be read: {error.strerror}") from error
            return Sample(entry.shard, entry.key, clip.video, "video", entry.suffix, media, clip.texts)
        sample = self._by_shard[entry.shard].read_sample(entry)
        return dataclasses.replace(sample, media_id=clip.video, captions=clip.texts)


def find_clips(
    benchmark: Benchmark,
    texts: Mapping[str, Sequence[str]],
    media: Path | None,
    shards: Sequence[str],
    allowed_missing: int = 0,
) -> tuple[BenchmarkClips, dict[str, int]]:
    """The videos of ``benchmark`` in the folder ``media``, or in folders of indexed ``shards``, and those that are
    missing, with the row that names them.

    Args:
        texts: of each video, at least one.

    Raises BenchmarkError when more than ``allowed_missing`` videos are missing or two are the same file, ShardError
    when shards cannot be used.
    """
    indexes = [] if media is not None else [ShardIndex.open(folder) for folder in shards]
    found: Found[Path] | Found[Entry] = (
        find_in_folder(benchmark, media) if media is not None else find_in_shards(benchmark, indexes)
    )
    found.require(allowed_missing)
    clips = [BenchmarkClip(video, place, tuple(texts[video])) for video, place in found.places.items()]
    seen: dict[str, str] = {}
    for clip in clips:
        other = seen.setdefault(_name(_entry(clip.place)), clip.video)
        if other != clip.video:
            raise BenchmarkError(f"{benchmark.files[0]}: {other} and {clip.video} are both {_name(_entry(clip.place))}")
    return BenchmarkClips(clips, indexes), found.missing


def _entry(place: Entry | Path) -> Entry:
    if isinstance(place, Entry):
        return place
    suffix = place.suffix.lower().removeprefix(".")
    return Entry(str(place.parent), place.name, "video", suffix, 0, 0, 0, 0, 0, 0, 0, 1, _UNKNOWN)


def _name(entry: Entry) -> str:
    return f"{entry.shard}/{entry.key}"
