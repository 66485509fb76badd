"""Builds the shard index (``smaug_ds.data.index``) out of the scans of its tars.

Scans are kept in ``FOLDER/.index.partial`` until the index is in place, so a broken-off indexing goes on where it was;
a tar that changed since (size or time) is scanned again. Memory holds one shard at a time, whatever their number.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from smaug_ds.data.index import FORMAT, SAMPLE_DTYPE
from smaug_ds.data.parallel import alone_in, clear, on_processes, room_in, write_whole
from smaug_ds.data.sample import MEDIA
from smaug_ds.data.scanning import NAMED, Scan, scan_tar, stamp_of
from smaug_ds.data.shard import ShardError, tar_sizes
from smaug_ds.progress import bar

_PARTIAL = ".index.partial"
_SHOWN_SIZES = 8  # of the most frequent frame sizes
_REMEDY = (
    "copy or build them again and run the same command, which goes on where it was; or take them out of the folder, "
    "or leave them out of the index (tools/index_shards.py --skip-bad-shards)"
)


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
    sizes: dict[str, int] = field(default_factory=dict)  # "WIDTHxHEIGHT" -> samples, the most frequent ones
    distinct_sizes: int = 0
    rejects: dict[str, int] = field(default_factory=dict)  # reason -> samples
    skipped_tars: int = 0  # that cannot be used

    def __str__(self) -> str:
        lines = [
            f"{self.samples} samples ({self.videos} videos of {self.video_hours:.2f} hours, {self.images} images), "
            f"{self.captions} captions, {self.media_bytes / 1e6:.1f} MB of media",
            f"codecs: {_counted(self.codecs)}",
            f"sizes: {_counted(self.sizes)}; {self.distinct_sizes} different ones",
        ]
        if self.cut_short:
            lines.append(f"{self.cut_short} videos have fewer frames than their header declares")
        if self.rejects:
            lines.append(f"{sum(self.rejects.values())} rejected: {_counted(self.rejects)}")
        if self.skipped_tars:
            lines.append(
                f'{self.skipped_tars} tars skipped, which cannot be used: see "skipped" in index/manifest.json'
            )
        return "\n".join(lines)


def build_index(
    folder: str | Path, workers: int = 1, progress: bool = False, skip_bad_shards: bool = False
) -> IndexReport:
    """Indexes every tar of ``folder`` on ``workers`` processes and puts the index in place in one move.

    The shards stay untouched. A sample without captions or without media that can be probed is left out and stands,
    with its reason, in ``index/rejects.jsonl``. With ``skip_bad_shards`` tars that cannot be read are left out, too;
    the manifest keeps them as "skipped" (name, bytes, reason).

    Raises:
        ShardError: no folder, no tar, tars that are cut short or damaged (all of them are named), not one usable
            sample, no room, no right to write there.
    """
    folder = Path(folder)
    sizes = tar_sizes(folder)
    partial = folder / _PARTIAL
    with alone_in(partial), room_in(folder):
        skipped = _scan_all(folder, list(sizes), workers, progress)
        if skipped and not skip_bad_shards:
            reasons = "\n".join(skipped.values())
            raise ShardError(f"{len(skipped)} of {len(sizes)} tars cannot be used:\n{reasons}\n{_REMEDY}")
        good = [name for name in sizes if name not in skipped]
        report = _write(partial, {name: sizes[name] for name in good}, [
            {"name": name, "bytes": sizes[name], "reason": reason} for name, reason in skipped.items()
        ])  # fmt: skip
        shutil.rmtree(partial / "replaced", ignore_errors=True)
        if (folder / "index").exists():
            os.replace(folder / "index", partial / "replaced")
        os.replace(partial / "index", folder / "index")
        clear(partial)
    return report


def read_report(folder: Path) -> IndexReport:
    """What an indexed folder holds."""
    return IndexReport(**json.loads((folder / "index" / "manifest.json").read_text())["totals"])


def _scan_all(folder: Path, names: Sequence[str], workers: int, progress: bool) -> dict[str, str]:
    """Scans the tars that have no valid scan yet. Returns the name and reason of those that cannot be used."""
    left = [folder / name for name in names if not _is_scanned(folder / name)]
    bad: dict[str, str] = {}
    samples = 0
    with (
        on_processes(_scan_aside, left, workers) as results,
        bar(range(0), len(names), "index", "shards", shown=progress) as work,
    ):
        work.initial = work.n = work.last_print_n = len(names) - len(left)  # no part of the rate
        for name, found, reason in results:
            samples += found
            if reason:
                bad[name] = reason
            work.set_postfix_str(f"{samples} samples", refresh=False)
            work.update()
    return dict(sorted(bad.items()))


def _scan_aside(path: Path) -> tuple[str, int, str]:
    """(name, samples, why the tar cannot be used) of one tar; its scan goes to the disk."""
    try:
        stamp = stamp_of(path)
        scan = scan_tar(path)
    except (ShardError, FileNotFoundError) as error:
        return path.name, 0, str(error)
    with room_in(path.parent):
        write_whole(_scan_of(path), scan.to_bytes(stamp))
    return path.name, len(scan.rows), ""


def _scan_of(path: Path) -> Path:
    return path.parent / _PARTIAL / f"{path.name}.npz"


def _is_scanned(path: Path) -> bool:
    try:
        return Scan.load(_scan_of(path))[1] == stamp_of(path)
    except FileNotFoundError:
        return False


def _write(partial: Path, sizes: dict[str, int], skipped: list[dict[str, Any]]) -> IndexReport:
    """Writes ``partial/index``, in two passes over the scans: one for totals and vocabularies, one for the columns."""

    def scans() -> Iterator[Scan]:
        return (Scan.load(partial / f"{name}.npz")[0] for name in sizes)

    aside = partial / "index"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    report, lengths, vocabularies = _totals(scans(), skipped, partial.parent)
    report.skipped_tars = len(skipped)
    kinds: tuple[np.dtype, ...] = (SAMPLE_DTYPE, np.dtype(np.uint8), np.dtype(np.uint32))
    key_bytes = sum(keys for _, keys in lengths)
    with (
        (aside / "samples.npy").open("wb") as samples,
        (aside / "medium.npy").open("wb") as medium,
        (aside / "bucket.npy").open("wb") as bucket,
        (aside / "keys.npy").open("wb") as keys,
        (aside / "rejects.jsonl").open("w", encoding="ascii") as ledger,
    ):
        for file, kind in zip((samples, medium, bucket), kinds, strict=True):
            _write_header(file, kind, report.samples)
        _write_header(keys, np.dtype(np.uint8), key_bytes)
        key_offset = 0
        for shard, scan in enumerate(scans()):
            rows = scan.rows
            for column, vocabulary in vocabularies.items():
                renumbered = np.array([vocabulary.index(name) for name in scan.names[column]], dtype=np.uint8)
                rows[column] = renumbered[rows[column]]
            rows["shard"] = shard
            rows["key_offset"] += key_offset
            key_offset += len(scan.keys)
            samples.write(rows.tobytes())
            medium.write(rows["medium"].tobytes())
            bucket.write((rows["media_hash"] >> 31).astype(np.uint32).tobytes())  # the upper 32 of its 63 bits
            keys.write(scan.keys)
            ledger.writelines(json.dumps(asdict(reject)) + "\n" for reject in scan.rejects)
    shards = [
        {"name": name, "bytes": size, "samples": rows}
        for (name, size), (rows, _) in zip(sizes.items(), lengths, strict=True)
    ]
    manifest = {
        "format": FORMAT,
        "shards": shards,
        "skipped": skipped,
        "key_bytes": key_bytes,
        **{NAMED[column]: vocabulary for column, vocabulary in vocabularies.items()},
        "totals": asdict(report),
    }
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return report


def _write_header(file: Any, kind: np.dtype, length: int) -> None:
    write_array_header_1_0(file, {"descr": dtype_to_descr(kind), "fortran_order": False, "shape": (length,)})


def _totals(
    scans: Iterator[Scan], skipped: list[dict[str, Any]], folder: Path
) -> tuple[IndexReport, list[tuple[int, int]], dict[str, list[str]]]:
    """(totals, (samples, bytes of keys) of each shard, column -> vocabulary). Raises ShardError for no sample."""
    codecs: Counter[str] = Counter()
    sizes: Counter[int] = Counter()  # width * 2**32 + height
    rejects: Counter[str] = Counter()
    names: dict[str, set[str]] = {column: set() for column in NAMED}
    lengths = []
    first_reject = None
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
        shapes, counts = np.unique((rows["width"].astype(np.int64) << 32) + rows["height"], return_counts=True)
        sizes.update(dict(zip(shapes.tolist(), counts.tolist(), strict=True)))
        rejects.update(reject.reason for reject in scan.rejects)
        first_reject = first_reject or next(iter(scan.rejects), None)
        for column, found in names.items():
            found.update(scan.names[column])
        lengths.append((len(rows), len(scan.keys)))
    if not report.samples:
        why = "no members at all"
        if first_reject:
            why = f"the first: {first_reject.key}: {first_reject.reason}, {first_reject.detail}"
        elif skipped:
            why = f"the first: {skipped[0]['reason']}"
        raise ShardError(f"{folder}: not one usable sample in {len(lengths) + len(skipped)} tars; {why}")
    report.images = report.samples - report.videos
    report.codecs = dict(codecs.most_common())
    report.sizes = {f"{size >> 32}x{size & 0xFFFFFFFF}": n for size, n in sizes.most_common(_SHOWN_SIZES)}
    report.distinct_sizes = len(sizes)
    report.rejects = dict(rejects.most_common())
    return report, lengths, {column: sorted(found) for column, found in names.items()}


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
