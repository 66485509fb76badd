"""Builds the shard index (``smaug_ds.data.index``): scans tars, probes media, leaves out what cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.lib.format import open_memmap

from smaug_ds.data.index import COLUMNS, FORMAT, SAMPLE_DTYPE
from smaug_ds.data.order import stable_hash
from smaug_ds.data.sample import MEDIA
from smaug_ds.data.shard import SampleError, ShardError, choose_captions, medium_of, parse_metadata, tar_sizes
from smaug_ds.data.video import MediaError, MediaFacts, probe
from smaug_ds.progress import bar

MAX_MEDIA_BYTES = 2**30  # a sample is read at once: it must fit into memory, and pread returns at most 2 GiB
MAX_TEXT_BYTES = 2**24

_NAMED = {"codec": "codecs", "pixel_format": "pixel_formats", "suffix": "suffixes"}  # column -> name in the manifest

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reject:
    """A sample that was left out of an index."""

    shard: str  # name of the tar
    key: str
    reason: str  # short code, counted in reports
    detail: str


@dataclass
class IndexReport:
    """What an index holds: the totals in its manifest."""

    samples: int = 0
    images: int = 0
    videos: int = 0
    captions: int = 0
    media_bytes: int = 0
    video_hours: float = 0.0
    cut_short: int = 0  # videos with fewer frames than their header declares
    codecs: dict[str, int] = field(default_factory=dict)  # codec -> samples
    rejects: dict[str, int] = field(default_factory=dict)  # reason -> samples

    def __str__(self) -> str:
        codecs = ", ".join(f"{codec} {count}" for codec, count in self.codecs.items())
        lines = [
            f"{self.samples} samples ({self.videos} videos of {self.video_hours:.2f} hours, {self.images} images), "
            f"{self.captions} captions, {self.media_bytes / 1e6:.1f} MB of media",
            f"codecs: {codecs}",
        ]
        if self.cut_short:
            lines.append(f"{self.cut_short} videos have fewer frames than their header declares")
        if self.rejects:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejects.items())
            lines.append(f"{sum(self.rejects.values())} rejected: {reasons}")
        return "\n".join(lines)


@dataclass
class _Scan:
    """One shard's part of an index. Its columns codec, pixel_format and suffix are positions in its own ``names``."""

    rows: np.ndarray  # (n,) SAMPLE_DTYPE; shard is 0 and key_offset counts from the shard's first key
    keys: bytes
    names: dict[str, list[str]]  # column -> vocabulary
    rejects: list[Reject]


def build_index(folder: str | Path, workers: int = 1, progress: bool = False) -> IndexReport:
    """Indexes every tar of ``folder`` on ``workers`` processes and puts the index in place in one move.

    The shards stay untouched. A sample without captions or without media that can be probed is left out and stands,
    with its reason, in ``index/rejects.jsonl``.

    Raises:
        ShardError: no folder, no tar, a tar that is cut short or damaged, or not one usable sample.
    """
    folder = Path(folder)
    sizes = tar_sizes(folder)
    with parallel_map(_scan, [folder / name for name in sizes], workers) as results:
        scans = list(bar(results, len(sizes), "index", "shards", shown=progress))
    report = _report(scans)
    if not report.samples:
        first = next((reject for scan in scans for reject in scan.rejects), None)
        why = f"the first: {first.key}: {first.reason}, {first.detail}" if first else "no members at all"
        raise ShardError(f"{folder}: not one usable sample in {len(sizes)} tars; {why}")
    aside = folder / ".index.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    _write(aside, sizes, scans, report)
    if (folder / "index").exists():
        os.replace(folder / "index", aside / "replaced")
    os.replace(aside, folder / "index")
    shutil.rmtree(folder / "index" / "replaced", ignore_errors=True)
    return report


@contextmanager
def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Iterable[Result]]:
    """``with parallel_map(function, items, workers) as results``: the results in order, from ``workers`` processes.

    One worker is this process itself. More are spawned, because a fork would copy the locks of running threads.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield map(function, items)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _scan(path: Path) -> _Scan:
    """Reads one tar from end to end and probes its media."""
    rows: list[np.ndarray] = []
    keys = bytearray()
    names: dict[str, list[str]] = {column: [] for column in _NAMED}
    rejects: list[Reject] = []
    with path.open("rb") as tar:
        for key, members in _grouped(path, tar):
            try:
                encoded = key.encode("utf-8")
                columns = _examine(tar, members)
            except (SampleError, MediaError, UnicodeEncodeError) as error:
                rejects.append(_rejected(path, key, error))
                continue
            for column, vocabulary in names.items():
                if columns[column] not in vocabulary:
                    vocabulary.append(columns[column])
                columns[column] = vocabulary.index(columns[column])
            row = np.zeros(1, SAMPLE_DTYPE)
            for column, value in columns.items():
                row[column] = value
            row["key_offset"], row["key_size"] = len(keys), len(encoded)
            rows.append(row)
            keys += encoded
    return _Scan(np.concatenate([np.zeros(0, SAMPLE_DTYPE), *rows]), bytes(keys), names, rejects)


def _grouped(path: Path, tar: BinaryIO) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, suffix -> (offset, size) of its members' data) of each sample of a tar.

    Raises:
        ShardError: the tar is cut short or damaged; ``tarfile`` alone takes both, past the first member, for the end.
    """
    key, members = "", dict[str, tuple[int, int]]()
    remedy = "copy or build it again, or take it out of the folder"
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            for member in archive:
                dot = member.name.find(".", member.name.rfind("/") + 1)
                if not member.isreg() or dot < 0:
                    continue
                if member.name[:dot] != key:
                    if members:
                        yield key, members
                    key, members = member.name[:dot], {}
                members[member.name[dot + 1 :].lower()] = member.offset_data, member.size
            end = archive.offset
    except tarfile.TarError as error:
        raise ShardError(f"{path} is cut short or damaged ({error}); {remedy}") from error
    if members:
        yield key, members
    block = os.pread(tar.fileno(), tarfile.BLOCKSIZE, end)
    if len(block) < tarfile.BLOCKSIZE:
        raise ShardError(f"{path} is cut short: it ends at byte {end + len(block)} without an end marker; {remedy}")
    if any(block):
        raise ShardError(f"{path} is damaged: no member and no end marker at byte {end}; {remedy}")


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
    """The facts that the shard builder left in the json: media of its own shards are not probed again."""
    stated = metadata.get("media_facts")
    if not isinstance(stated, dict):
        return None
    types = {name: type(value).__name__ for name, value in stated.items()}
    return MediaFacts(**stated) if types == {field.name: field.type for field in fields(MediaFacts)} else None


def _rejected(path: Path, key: str, error: SampleError | MediaError | UnicodeEncodeError) -> Reject:
    name = key.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(error, SampleError):
        return Reject(path.name, name, error.reason, error.detail)
    if isinstance(error, MediaError):
        return Reject(path.name, name, f"media_{error.stage}", error.reason)
    return Reject(path.name, name, "key_not_utf8", str(error))


def _report(scans: Sequence[_Scan]) -> IndexReport:
    codecs: Counter[str] = Counter()
    report = IndexReport()
    for scan in scans:
        rows = scan.rows
        videos = rows["medium"] == MEDIA.index("video")
        report.samples += len(rows)
        report.videos += int(videos.sum())
        report.captions += int(rows["captions"].sum())
        report.media_bytes += int(rows["media_size"].sum())
        report.video_hours += float(rows["duration_s"][videos].sum(dtype=np.float64)) / 3600
        report.cut_short += int((rows["frames"] < rows["declared_frames"]).sum())
        codecs.update(scan.names["codec"][number] for number in rows["codec"])
    report.images = report.samples - report.videos
    report.codecs = dict(codecs.most_common())
    report.rejects = dict(Counter(reject.reason for scan in scans for reject in scan.rejects).most_common())
    return report


def _write(folder: Path, sizes: dict[str, int], scans: Sequence[_Scan], report: IndexReport) -> None:
    vocabularies = {column: sorted({name for scan in scans for name in scan.names[column]}) for column in _NAMED}
    kinds: tuple[np.dtype, ...] = (SAMPLE_DTYPE, np.dtype(np.uint8), np.dtype(np.uint32))
    samples, medium, bucket = (
        open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=(report.samples,))
        for name, kind in zip(COLUMNS, kinds, strict=True)
    )
    row = key_bytes = 0
    for shard, scan in enumerate(scans):
        rows = scan.rows
        for column, vocabulary in vocabularies.items():
            renumbered = np.array([vocabulary.index(name) for name in scan.names[column]], dtype=np.uint8)
            rows[column] = renumbered[rows[column]]
        rows["shard"] = shard
        rows["key_offset"] += key_bytes
        here = slice(row, row + len(rows))
        samples[here] = rows
        medium[here] = rows["medium"]
        bucket[here] = rows["media_hash"] >> 31  # the upper 32 of its 63 bits
        row, key_bytes = here.stop, key_bytes + len(scan.keys)
    for mapped in (samples, medium, bucket):
        mapped.flush()
    np.save(folder / "keys.npy", np.frombuffer(b"".join(scan.keys for scan in scans), dtype=np.uint8))
    with (folder / "rejects.jsonl").open("w", encoding="utf-8") as ledger:
        for scan in scans:
            ledger.writelines(json.dumps(asdict(reject)) + "\n" for reject in scan.rejects)
    manifest = {
        "format": FORMAT,
        "shards": [
            {"name": name, "bytes": size, "samples": len(scan.rows)}
            for (name, size), scan in zip(sizes.items(), scans, strict=True)
        ],
        "key_bytes": key_bytes,
        **{_NAMED[column]: vocabulary for column, vocabulary in vocabularies.items()},
        "totals": asdict(report),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
