"""One shard: a WebDataset tar whose samples are ``KEY.mp4|jpg|... KEY.txt KEY.json``, as img2dataset and video2dataset
write them: members of a sample adjacent, no dots in keys."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smaug_ds.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaFacts
from smaug_ds.data.sample import Medium, Sample
from smaug_ds.text import clean

MAX_MEDIA_BYTES = 2**30  # a sample is read at once: it must fit into memory, and pread returns at most 2 GiB
MAX_TEXT_BYTES = 2**24  # of KEY.txt and KEY.json
MAX_CAPTION_LENGTH = 10_000  # characters; what is longer is no caption but a page, and slow to tokenise


class ShardError(ValueError):
    """A corpus folder, shard or index that cannot be used as it is; the message names it and says what to do."""


class SampleError(ValueError):
    """One sample that cannot be used. ``reason`` is a short code that reports count, ``detail`` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Entry:
    """Where one sample lies and what its media is. Offsets and sizes in bytes within the tar ``shard``."""

    shard: str
    key: str
    medium: Medium
    suffix: str  # of the media member, lower case, without the dot
    media_offset: int
    media_size: int
    text_offset: int
    text_size: int  # 0: the captions are in the json
    json_offset: int
    json_size: int  # 0: the json is not needed
    media_hash: int
    captions: int  # number of captions
    facts: MediaFacts


def medium_of(suffix: str) -> Medium | None:
    """The medium of a suffix (lower case, without the dot); None for what is no media. GIF is a video."""
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None


def parse_metadata(data: bytes) -> dict[str, Any]:
    """The object in the bytes of ``KEY.json``. Raises SampleError if they hold none."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("json_invalid", str(error)) from error
    if not isinstance(record, dict):
        raise SampleError("json_invalid", f"{type(record).__name__} instead of an object")
    return record


def choose_captions(text: bytes | None, metadata: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    """(captions, whether they are those of ``KEY.txt``), stripped; those too long and those of which ``text.clean``
    leaves nothing are left out.

    The json's list ``captions`` comes first (several captions of one media), then the txt, then the json's ``caption``.
    Raises SampleError if there is no caption, one that is not UTF-8, or none of at most ``MAX_CAPTION_LENGTH``.
    """
    several = metadata.get("captions")
    longest = 0
    try:
        for captions, from_text in (
            (several if isinstance(several, list) else [], False),
            ([(text or b"").decode("utf-8")], True),
            ([metadata.get("caption")], False),
        ):
            found = [caption.strip() for caption in captions if isinstance(caption, str)]
            kept = tuple(caption for caption in found if len(caption) <= MAX_CAPTION_LENGTH and clean(caption))
            if kept:
                "".join(kept).encode("utf-8")  # raises on lone surrogates, which JSON can spell
                return kept, from_text
            longest = max([longest, *map(len, found)])
    except UnicodeError as error:
        raise SampleError("caption_not_utf8", str(error)) from error
    if longest > MAX_CAPTION_LENGTH:
        raise SampleError("caption_too_long", f"{longest} characters, at most {MAX_CAPTION_LENGTH}")
    raise SampleError("no_caption", "neither the txt nor the json holds one with a word")


class ShardFile:
    """An open tar, read by offset: ``os.pread`` moves no file position, so threads and forks may share it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, entry: Entry) -> Sample:
        spans = [(entry.media_offset, entry.media_size)]
        spans += [(entry.text_offset, entry.text_size)] if entry.text_size else []
        spans += [(entry.json_offset, entry.json_size)] if entry.json_size else []
        start = min(offset for offset, _ in spans) - tarfile.BLOCKSIZE  # with the header of the first member
        end = max(offset + size for offset, size in spans)
        data = memoryview(os.pread(self._descriptor, end - start, start))
        if len(data) < end - start:
            raise ShardError(f"{self.path} ends at byte {start + len(data)}, but sample {entry.key} goes to byte {end}")

        def member(suffix: str, offset: int, size: int) -> bytes:
            self._check_header(data[offset - start - tarfile.BLOCKSIZE : offset - start], f"{entry.key}.{suffix}", size)
            return bytes(data[offset - start : offset - start + size])

        media = member(entry.suffix, entry.media_offset, entry.media_size)
        text = member("txt", entry.text_offset, entry.text_size) if entry.text_size else None
        try:
            metadata = parse_metadata(member("json", entry.json_offset, entry.json_size)) if entry.json_size else {}
            captions, _ = choose_captions(text, metadata)
        except SampleError as error:
            raise ShardError(f"{self.path}: sample {entry.key} is not what was indexed: {error}") from error
        media_id = metadata.get("media_id")
        media_id = f"{entry.media_hash:016x}" if media_id is None else str(media_id)
        return Sample(self.path, entry.key, media_id, entry.medium, entry.suffix, media, captions)

    def _check_header(self, header: memoryview, name: str, size: int) -> None:
        """The tar may have been written anew since it was indexed, with the same length but other contents."""
        try:
            found = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ShardError(f"{self.path}: no member {name} where it was indexed ({error}); index it again") from error
        # Other names are shortened in this header; the whole name stands in an extension header before.
        whole = name.isascii() and len(name) <= tarfile.LENGTH_NAME
        if found.size != size or (whole and found.name.lower() != name.lower()):
            raise ShardError(
                f"{self.path}: found {found.name} ({found.size} bytes) where {name} ({size} bytes) was indexed; "
                "index it again"
            )


def tar_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of the tars in ``folder``, sorted by name. Raises ShardError for no folder or no tar."""
    if not folder.is_dir():
        raise ShardError(f"shard folder {folder} does not exist")
    with os.scandir(folder) as files:
        sizes = {file.name: file.stat().st_size for file in files if file.name.endswith(".tar") and file.is_file()}
    if not sizes:
        raise ShardError(f"{folder} holds no .tar file; tools/build_shards.py makes them from media and captions")
    return dict(sorted(sizes.items()))
