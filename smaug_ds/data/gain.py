"""What encoding a corpus again would gain: measured on some of its files before anything is written."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from smaug_ds.data.annotations import Annotation
from smaug_ds.data.corpora import BadRow, Reading, read_corpus
from smaug_ds.data.media import MediaError, MediaFacts
from smaug_ds.data.members import read_media
from smaug_ds.data.reencode import Reencoding, reencode
from smaug_ds.data.shard import SampleError, ShardError
from smaug_ds.data.video import Video, choose_frames, probe

TRIED = 32  # files at least, where the lists have as many
_SHOWN = (1, 4)  # frames of a sample for which the decoder's work is counted


@dataclass
class Gain:
    """What encoding again would change, summed over a sample of clips and images."""

    files: int = 0
    clips: int = 0
    before_bytes: int = 0
    after_bytes: int = 0
    seconds: float = 0.0  # of encoding, on one process
    unusable: int = 0
    decoded: dict[int, list[int]] = field(default_factory=lambda: {shown: [0, 0] for shown in _SHOWN})  # before, after
    pixels: dict[int, list[int]] = field(default_factory=lambda: {shown: [0, 0] for shown in _SHOWN})

    def add(self, source: tuple[bytes, MediaFacts], made: tuple[bytes, MediaFacts], is_clip: bool) -> None:
        self.files += 1
        self.before_bytes += len(source[0])
        self.after_bytes += len(made[0])
        if not is_clip:
            return
        self.clips += 1
        for shown in _SHOWN:
            for side, (media, facts) in enumerate((source, made)):
                frames = frames_to_decode(media, shown)
                self.decoded[shown][side] += frames
                self.pixels[shown][side] += frames * facts.width * facts.height

    def __str__(self) -> str:
        lines = [
            f"{self.files} files tried: {self.before_bytes / 1e6:.2f} MB would become {self.after_bytes / 1e6:.2f} MB "
            f"({self.after_bytes / max(1, self.before_bytes):.0%}); encoding took {self.seconds:.1f} s on one process"
        ]
        for shown in _SHOWN if self.clips else ():
            (before, after), (area, area_after) = self.decoded[shown], self.pixels[shown]
            lines.append(
                f"for {shown} of a clip's frames, decode {before / self.clips:.1f} -> {after / self.clips:.1f} frames, "
                f"{area / self.clips / 1e6:.1f} -> {area_after / self.clips / 1e6:.2f} megapixels "
                f"({area / max(1, area_after):.1f} times less)"
            )
        return "\n".join(lines)


def frames_to_decode(media: bytes, shown: int) -> int:
    """Pictures in the packets that a reader keeps (``Video.trim``) to show ``shown`` frames, one of each segment."""
    clip = Video(media)
    trimmed, _ = clip.trim(choose_frames(len(clip), shown, None))
    return len(Video(trimmed))


def estimate(
    lists: Iterable[str | Path],
    media_root: str | Path,
    reencoding: Reencoding,
    form: str,
    reading: Reading,
    progress: bool = False,
) -> Gain:
    """Encodes files at equal distances in the lists again, and compares. Writes nothing but a bar of ``progress``.

    Raises:
        SourceError: as ``read_corpus``.
        ShardError: not one of the files tried can be used.
    """
    gain = Gain()
    tried = _spread(found for path in lists for found in read_corpus(path, reading, form))
    for annotation in tqdm(tried, "encoding", unit="file", disable=not progress):
        try:
            media, suffix = read_media(Path(media_root), annotation)[1:]
            facts = probe(media, suffix)
            started = time.monotonic()
            made, made_suffix = reencode(media, suffix, facts, reencoding)
            gain.seconds += time.monotonic() - started
            gain.add((media, facts), (made, probe(made, made_suffix)), annotation.medium == "video")
        except (SampleError, MediaError):
            gain.unusable += 1
    if not gain.files:
        raise ShardError(
            f"not one of {gain.unusable} media files tried can be used: is --media-root {media_root} right?"
        )
    return gain


def _spread(rows: Iterable[Annotation | BadRow]) -> list[Annotation]:
    """Rows at equal distances, ``TRIED`` to twice as many, without knowing beforehand how many there are."""
    kept: list[Annotation] = []
    step, number = 1, 0
    for row in rows:
        if isinstance(row, BadRow):
            continue
        if number % step == 0:
            kept.append(row)
            if len(kept) == 2 * TRIED:
                kept, step = kept[::2], step * 2
        number += 1
    return kept
