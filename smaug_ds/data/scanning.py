"""Scans one tar for the index: where its samples lie, what their media is, what must be left out and why."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smaug_ds.data.index import FORMAT, SAMPLE_DTYPE
from smaug_ds.data.media import MediaError, MediaFacts
from smaug_ds.data.order import stable_hash
from smaug_ds.data.sample import MEDIA
from smaug_ds.data.shard import (
    MAX_MEDIA_BYTES,
    MAX_TEXT_BYTES,
    SampleError,
    ShardError,
    choose_captions,
    medium_of,
    parse_metadata,
)
from smaug_ds.data.video import probe

NAMED = {"codec": "codecs", "pixel_format": "pixel_formats", "suffix": "suffixes"}  # column -> name in the manifest


@dataclass(frozen=True)
class Reject:
    """A sample that was left out of an index."""

    shard: str  # name of the tar
    key: str
    reason: str  # short code, counted in reports
    detail: str


@dataclass
class Scan:
    """One shard's part of an index. Its columns codec, pixel_format and suffix are positions in its own ``names``."""

    rows: np.ndarray  # (n,) SAMPLE_DTYPE; shard is 0 and key_offset counts from the shard's first key
    keys: bytes
    names: dict[str, list[str]]  # column -> vocabulary
    rejects: list[Reject]

    def to_bytes(self, stamp: list[int]) -> bytes:
        """The scan as the contents of an .npz file, with what tells whether the tar is still the same."""
        buffer = io.BytesIO()
        rest = {"stamp": stamp, "names": self.names, "rejects": [asdict(reject) for reject in self.rejects]}
        texts = (np.frombuffer(text, np.uint8) for text in (self.keys, json.dumps(rest).encode("ascii")))
        np.savez(buffer, allow_pickle=False, rows=self.rows, **dict(zip(("keys", "rest"), texts, strict=True)))
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path) -> tuple[Scan, list[int]]:
        """A scan and its stamp."""
        with np.load(path, allow_pickle=False) as file:
            rest = json.loads(file["rest"].tobytes())
            rejects = [Reject(**reject) for reject in rest["rejects"]]
            return cls(file["rows"], file["keys"].tobytes(), rest["names"], rejects), rest["stamp"]


def stamp_of(path: Path) -> list[int]:
    """Numbers that differ once the tar was written again, or once scans hold something else."""
    status = path.stat()
    return [FORMAT, status.st_size, status.st_mtime_ns]


def scan_tar(path: Path) -> Scan:
    """Reads one tar from end to end and probes its media.

    Raises:
        ShardError: the tar is cut short, damaged or unreadable.
    """
    rows: list[tuple] = []
    keys = bytearray()
    names: dict[str, list[str]] = {column: [] for column in NAMED}
    rejects: list[Reject] = []
    columns_in_order = SAMPLE_DTYPE.names
    assert columns_in_order
    try:
        with path.open("rb") as tar:
            for key, members, twice in _grouped(path, tar):
                try:
                    encoded = key.encode("utf-8")
                    if twice:
                        raise SampleError("duplicate_key", f"{', '.join(sorted(twice))} more than once: whose is what?")
                    columns = _examine(tar, members)
                except (SampleError, MediaError, UnicodeEncodeError) as error:
                    rejects.append(_rejected(path, key, error))
                    continue
                for column, vocabulary in names.items():
                    if columns[column] not in vocabulary:
                        vocabulary.append(columns[column])
                    columns[column] = vocabulary.index(columns[column])
                columns |= {"shard": 0, "key_offset": len(keys), "key_size": len(encoded)}
                rows.append(tuple(columns[column] for column in columns_in_order))
                keys += encoded
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error
    return Scan(np.array(rows, SAMPLE_DTYPE), bytes(keys), names, rejects)


def _grouped(path: Path, tar: BinaryIO) -> Iterator[tuple[str, dict[str, tuple[int, int]], set[str]]]:
    """(key, suffix -> (offset, size) of its members' data, suffixes that come again) of each sample of a tar.

    Where some come again, two samples of one key stand in a row, and nothing says which member belongs to which.

    Raises:
        ShardError: the tar is cut short or damaged; ``tarfile`` alone takes both, past the first member, for the end.
    """
    key, members, twice = "", dict[str, tuple[int, int]](), set[str]()
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            for member in archive:
                dot = member.name.find(".", member.name.rfind("/") + 1)
                if not member.isreg() or dot < 0:
                    continue
                if member.name[:dot] != key:
                    if members:
                        yield key, members, twice
                    key, members, twice = member.name[:dot], {}, set()
                suffix = member.name[dot + 1 :].lower()
                if suffix in members:
                    twice.add(suffix)
                members[suffix] = member.offset_data, member.size
            end = archive.offset
    except tarfile.TarError as error:
        raise ShardError(f"{path} is cut short or damaged ({error})") from error
    if members:
        yield key, members, twice
    block = os.pread(tar.fileno(), tarfile.BLOCKSIZE, end)
    if len(block) < tarfile.BLOCKSIZE:
        raise ShardError(f"{path} is cut short: it ends at byte {end + len(block)} without an end marker")
    if any(block):
        raise ShardError(f"{path} is damaged: no member and no end marker at byte {end}")


def _examine(tar: BinaryIO, members: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Columns of one sample, names still spelt out. Raises SampleError or MediaError if it cannot be used."""

    def read(suffix: str, limit: int) -> bytes:
        offset, size = members[suffix]
        if size > limit:
            raise SampleError("too_large", f"{suffix} of {size} bytes, at most {limit} can be read at once")
        return os.pread(tar.fileno(), size, offset)

    media = sorted((medium_of(suffix) or "", suffix) for suffix in members if medium_of(suffix))
    if not media:
        raise SampleError("no_media", f"members are {', '.join(sorted(members))} (a key must hold no dots)")
    medium, suffix = media[-1]  # a video before its thumbnail
    text = read("txt", MAX_TEXT_BYTES) if "txt" in members else None
    metadata = parse_metadata(read("json", MAX_TEXT_BYTES)) if "json" in members else {}
    captions, from_text = choose_captions(text, metadata)
    media_id = metadata.get("media_id")
    facts = _stated_facts(metadata)
    content = read(suffix, MAX_MEDIA_BYTES) if facts is None or media_id is None else b""
    json_needed = not from_text or media_id is not None
    return {
        "medium": MEDIA.index(medium),
        "suffix": suffix,
        "media_offset": members[suffix][0],
        "media_size": members[suffix][1],
        "text_offset": members["txt"][0] if from_text else 0,
        "text_size": members["txt"][1] if from_text else 0,
        "json_offset": members["json"][0] if json_needed else 0,
        "json_size": members["json"][1] if json_needed else 0,
        "media_hash": stable_hash(content if media_id is None else str(media_id)),
        "captions": len(captions),
        **asdict(facts or probe(content, suffix)),
    }


def _stated_facts(metadata: dict[str, Any]) -> MediaFacts | None:
    """The facts that the shard builder left in the json: media of its own shards are not probed again. None where they
    cannot be a probe's."""
    stated = metadata.get("media_facts")
    if not isinstance(stated, dict):
        return None
    types = {name: type(value).__name__ for name, value in stated.items()}
    if types != {field.name: field.type for field in fields(MediaFacts)}:
        return None
    possible = all(map(_is_possible, stated, stated.values())) and stated["rotation"] in (0, 90, 180, 270)
    return MediaFacts(**stated) if possible else None


def _is_possible(column: str, value: str | int | float) -> bool:
    """Whether a fact fits its column of the index: a json may claim -1, 2**70 or NaN."""
    kind = SAMPLE_DTYPE[column]
    if isinstance(value, str):
        return True
    if isinstance(value, float):
        return 0 <= value <= float(np.finfo(kind).max)
    least = 0 if column in ("declared_frames", "rotation") else 1
    return least <= value <= np.iinfo(kind).max


def _rejected(path: Path, key: str, error: SampleError | MediaError | UnicodeEncodeError) -> Reject:
    name = key.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(error, SampleError):
        return Reject(path.name, name, error.reason, error.detail)
    if isinstance(error, MediaError):
        return Reject(path.name, name, f"media_{error.stage}", error.reason)
    return Reject(path.name, name, "key_not_utf8", str(error))
