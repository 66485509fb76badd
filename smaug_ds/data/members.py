"""One sample of a shard, made of a media file and its captions."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from smaug_ds.data.annotations import Annotation
from smaug_ds.data.media import MediaError
from smaug_ds.data.reencode import Reencoding, reencode
from smaug_ds.data.shard import (
    MAX_MEDIA_BYTES,
    MAX_TEXT_BYTES,
    SampleError,
    choose_captions,
    medium_of,
    parse_metadata,
)
from smaug_ds.data.video import probe

# First bytes -> suffix of images whose names have none, as downloaders that name files by url leave them.
_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"BM", "bmp"))


def find_media(media_root: Path, annotation: Annotation) -> str:
    """The first of the annotation's places where a file lies; the first of all if there is none."""
    places = (annotation.path, *annotation.elsewhere)
    return next((place for place in places if os.path.exists(media_root / place)), places[0])


def read_media(media_root: Path, annotation: Annotation) -> tuple[str, bytes, str]:
    """(place below ``media_root``, bytes, suffix) of a media file. Raises SampleError if it cannot be read."""
    try:
        place = find_media(media_root, annotation)
        path = media_root / place
        suffix = path.suffix[1:].lower()
        if medium_of(suffix) is None and annotation.medium == "image":
            suffix = _image_suffix(path) or suffix
        medium = medium_of(suffix)
        if medium is None:
            raise SampleError("suffix", f".{suffix} is neither an image nor a video that can be read")
        if medium != annotation.medium:
            raise SampleError("medium", f"listed as {annotation.medium}, but .{suffix} is read as {medium}")
        media = _read(path, MAX_MEDIA_BYTES)
    except FileNotFoundError as error:
        raise SampleError("missing", str(error)) from error
    except OSError as error:
        raise SampleError("unreadable", str(error)) from error
    if not media:
        raise SampleError("empty", f"{place} has 0 bytes")
    return place, media, suffix


def sample_members(
    media_root: Path, annotation: Annotation, reencoding: Reencoding | None
) -> tuple[dict[str, bytes], int]:
    """(suffix -> bytes of one sample, bytes of its media file on disk). Raises SampleError if it cannot be used."""
    if annotation.beside:
        captions, media_id = _captions_beside(media_root / annotation.path)
    else:
        captions, _ = choose_captions(None, {"captions": list(annotation.captions)})
        media_id = None
    place, source, suffix = read_media(media_root, annotation)
    media = source
    try:
        facts = probe(media, suffix)
        if reencoding:
            media, suffix = reencode(source, suffix, facts, reencoding)
            facts = facts if media is source else probe(media, suffix)
    except MediaError as error:
        raise SampleError(f"media_{error.stage}", error.reason) from error
    metadata = {
        "captions": captions,
        "media_id": media_id or annotation.media_id,
        "source": place,
        "media_facts": asdict(facts),
    }
    members = {suffix: media, "txt": captions[0].encode("utf-8"), "json": json.dumps(metadata).encode("ascii")}
    return members, len(source)


def _captions_beside(path: Path) -> tuple[tuple[str, ...], str | None]:
    """Captions of ``KEY.json`` or ``KEY.txt`` beside a media file, and the url that img2dataset noted in the json."""
    text, record = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        metadata = parse_metadata(_read(record, MAX_TEXT_BYTES)) if record.exists() else {}
        captions, _ = choose_captions(_read(text, MAX_TEXT_BYTES) if text.exists() else None, metadata)
    except OSError as error:
        raise SampleError("unreadable", str(error)) from error
    url = metadata.get("url")
    return captions, url if isinstance(url, str) else None


def _read(path: Path, limit: int) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise SampleError("too_large", f"{path.name} has {size} bytes, at most {limit} can be read at once")
    return path.read_bytes() if size else b""  # a pipe, which has no size, would keep the reader for ever


def _image_suffix(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), None)
