"""Readers of the large corpora's own files: each gives a stream of ``Annotation`` (and ``BadRow``), nothing held whole
but the two small JSON objects of COCO and SBU.

=============  =========================================================================================
singularity    JSON array of {"video" or "image": path, "caption": text or [texts]}
jsonl          the same, one object a line; "captions" for "caption" is read, too
webvid         csv: videoid, name, page_dir, duration, ...; clips PAGE_DIR/VIDEOID.mp4 or VIDEOID.mp4
cc             tsv of CC3M (caption TAB url) and CC12M (url TAB caption); files named by ``--media-name``
sbu            JSON {"image_urls": [...], "captions": [...]}, or ..._urls.txt beside ..._captions.txt
vg             region_descriptions.json of Visual Genome; images VG_100K/ID.jpg, VG_100K_2/ID.jpg or ID.jpg
coco           captions_train2014.json and its like, or Karpathy's dataset_coco.json; images FOLDER/NAME or NAME
folder         a folder of KEY.mp4|jpg|... with KEY.txt or KEY.json beside them, at any depth: the ``files`` output
               of img2dataset and video2dataset
=============  =========================================================================================
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smaug_ds.data.annotations import Annotation, SourceError, json_rows, parse_row
from smaug_ds.data.shard import medium_of

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_LONGEST_FIELD = 2**24  # characters of a csv field; more is an open quotation mark
_DURATION = re.compile(r"PT(\d+H)?(\d+M)?(\d+(\.\d+)?S)?")  # ISO 8601
_URL = re.compile(r"https?://")


@dataclass(frozen=True)
class BadRow:
    """A row that was left out."""

    row: int  # from 0, a header not counted
    reason: str  # short code, counted in reports
    detail: str


@dataclass(frozen=True)
class Reading:
    """How a corpus file is read."""

    media_root: Path  # folder that media paths start from
    media_name: str = ""  # of ``cc`` and ``sbu``: "{basename}", "{md5}.jpg" ... with the fields of ``name_of``
    split: Split = "train"  # of Karpathy's file; "train" holds "restval", as usual


Rows = Iterator[Annotation | BadRow]


def read_corpus(path: str | Path, reading: Reading, form: str = "auto") -> Rows:
    """The rows of one corpus file (or folder) in the order in which they stand there.

    A row that is damaged by itself (not UTF-8, a column too many) becomes a ``BadRow``. One without a caption does not:
    another row may have one for the same file.

    Raises:
        SourceError: a file that is not of the format ``form``, or of none that can be told; names the file and row.
    """
    path = Path(path)
    try:
        form = detect(path) if form == "auto" else form
        for row, found in enumerate(READERS[form](path, reading)):
            if isinstance(found, Annotation) and (bad := _flaw(found)):
                found = BadRow(row, *bad)
            yield found
    except FileNotFoundError:
        raise SourceError(f"list {path} does not exist") from None
    except OSError as error:
        raise SourceError(f"list {path} cannot be read: {error}") from error


def texts_of(path: Path) -> tuple[Path, ...]:
    """The files that a list consists of: ``path`` alone, or the two texts of SBU."""
    return tuple(dict.fromkeys((path, *filter(Path.is_file, _sbu_texts(path))))) if path.suffix == ".txt" else (path,)


def detect(path: Path) -> str:
    """The format of a file by its first bytes, of a folder: "folder". Raises SourceError if they do not tell."""
    if path.is_dir():
        return "folder"
    with _text(path) as file:
        head = file.read(4096).lstrip()
    line = head.split("\n", 1)[0]
    if head.startswith("["):
        return "vg" if re.match(r'\[\s*\{[^{]*"regions"\s*:', head) else "singularity"
    if first_key := re.match(r'\{\s*"(\w+)"', head):
        if first_key[1] in ("image_urls", "captions", "user_ids"):
            return "sbu"
        if first_key[1] in ("info", "images", "licenses", "annotations", "dataset", "type"):
            return "coco"
        return "jsonl"
    if "videoid" in line.split(","):
        return "webvid"
    if len(line.split("\t")) == 2 and _URL.search(line):
        return "cc"
    if _URL.match(line):
        return "sbu"
    raise SourceError(f"{path}: its first bytes tell no format; give --format ({', '.join(READERS)})")


def name_of(pattern: str, url: str, row: int) -> str:
    """A file's name by its url and row number (from 0): fields row, md5, sha1, sha256, crc32 and basename of the url.

    Raises:
        SourceError: an unknown field or a broken pattern.
    """
    data = url.encode("utf-8", "surrogateescape")
    fields: dict[str, str | int] = {
        "row": row,
        "md5": hashlib.md5(data).hexdigest(),
        "sha1": hashlib.sha1(data).hexdigest(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "crc32": zlib.crc32(data),
        "basename": url.split("?")[0].rstrip("/").rpartition("/")[2],
    }
    try:
        return pattern.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise SourceError(f"--media-name {pattern!r}: wants fields {', '.join(fields)} ({error!r})") from error


def _flaw(found: Annotation) -> tuple[str, str] | None:
    """(reason, detail) of what is wrong with a row of any format."""
    try:
        "".join([found.path, found.media_id, *found.captions]).encode("utf-8")
    except UnicodeEncodeError as error:
        return "not_utf8", f"{found.path.encode('ascii', 'backslashreplace').decode()}: {error.reason}"
    if "\0" in found.path:
        return "columns", f"a zero byte in {found.path!r:.80}"
    return None


def _text(path: Path) -> Any:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _singularity(path: Path, reading: Reading) -> Rows:
    for row, value in enumerate(json_rows(path)):
        yield parse_row(value, f"{path}, row {row}")


def _jsonl(path: Path, reading: Reading) -> Rows:
    with _text(path) as file:
        for row, line in enumerate(file):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{path}, row {row}: not a JSON object ({error})") from error
            yield parse_row(value, f"{path}, row {row}")


def _webvid(path: Path, reading: Reading) -> Rows:
    csv.field_size_limit(_LONGEST_FIELD)
    row = -1
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        missing = {"videoid", "name"} - set(reader.fieldnames or ())
        if missing:
            raise SourceError(f"{path}: a WebVid csv has columns videoid and name; found {reader.fieldnames}")
        try:
            for row, fields in enumerate(reader):
                name, caption, duration = (fields.get(key) or "" for key in ("videoid", "name", "duration"))
                if None in fields or None in fields.values() or not re.fullmatch(r"[\w-]+", name):
                    yield BadRow(row, "columns", f"videoid {name[:80]!r}, or not as many columns as the header")
                elif duration and not _DURATION.fullmatch(duration):
                    yield BadRow(row, "duration", f"{name}: {duration[:80]!r} is not as PT00H00M17S")
                else:
                    file_name, folder = f"{name}.mp4", fields.get("page_dir") or ""
                    places = ([f"{folder}/{file_name}"] if folder else []) + [file_name]
                    yield _annotation("video", places, [caption], f"webvid/{name}")
        except csv.Error as error:
            raise SourceError(f"{path}, row {row + 1}: {error}") from error


def _cc(path: Path, reading: Reading) -> Rows:
    url_column = -1
    with _text(path) as file:
        for row, line in enumerate(file):
            columns = line.rstrip("\r\n").split("\t")
            if row == 0:
                url_column = next((i for i, text in enumerate(columns) if _URL.match(text)), -1)
                if len(columns) != 2 or url_column < 0:
                    raise SourceError(f"{path}, row 0: wants caption TAB url or url TAB caption, found {line[:80]!r}")
            if len(columns) != 2 or not _URL.match(columns[url_column]):
                yield BadRow(row, "columns", f"{len(columns)} columns, url in none or another: {line[:80]!r}")
            else:
                yield _downloaded(path, reading, columns[url_column], columns[1 - url_column], row)


def _sbu(path: Path, reading: Reading) -> Rows:
    if path.suffix == ".txt":
        urls_of, captions_of = _sbu_texts(path)
        with _text(urls_of) as urls, _text(captions_of) as captions:
            for row, (url, caption) in enumerate(_pairs(path, urls, captions)):
                yield _downloaded(path, reading, url.strip(), caption, row)
        return
    record = _object(path)
    urls, captions = record.get("image_urls"), record.get("captions")
    if not isinstance(urls, list) or not isinstance(captions, list):
        raise SourceError(f"{path}: wants lists image_urls and captions, found {', '.join(record)}")
    for row, (url, caption) in enumerate(_pairs(path, urls, captions)):
        if not isinstance(url, str) or not isinstance(caption, str):
            yield BadRow(row, "columns", f"{url!r:.80}, {caption!r:.80}")
        else:
            yield _downloaded(path, reading, url, caption, row)


def _sbu_texts(path: Path) -> tuple[Path, Path]:
    """The urls and the captions, whichever of the two ``path`` is."""
    stem = path.name.removesuffix("captions.txt").removesuffix("urls.txt")
    return path.with_name(f"{stem}urls.txt"), path.with_name(f"{stem}captions.txt")


def _pairs(path: Path, urls: Any, captions: Any) -> Iterator[tuple[Any, Any]]:
    try:
        yield from zip(urls, captions, strict=True)
    except ValueError as error:
        raise SourceError(f"{path}: not as many urls as captions ({error})") from error


def _vg(path: Path, reading: Reading) -> Rows:
    for row, image in enumerate(json_rows(path)):
        if not isinstance(image, dict) or not isinstance(image.get("regions"), list):
            raise SourceError(f'{path}, row {row}: wants {{"id": image, "regions": [...]}}, found {image!r:.80}')
        regions = [region for region in image["regions"] if isinstance(region, dict)]
        number = image.get("id", regions[0].get("image_id") if regions else None)
        if not isinstance(number, int):
            yield BadRow(row, "columns", f"image id {number!r:.80}")
            continue
        name = f"{number}.jpg"
        places = [f"VG_100K/{name}", f"VG_100K_2/{name}", name]
        yield _annotation("image", places, [region.get("phrase") for region in regions], f"vg/{number}")


def _coco(path: Path, reading: Reading) -> Rows:
    record = _object(path)
    images = record.get("images")
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise SourceError(f"{path}: wants a list of images, found {', '.join(record)}")
    if images and "sentences" in images[0]:
        yield from _karpathy(path, images, reading)
        return
    captions: dict[Any, list[str]] = {}
    for row, annotation in enumerate(record.get("annotations") or ()):
        if not isinstance(annotation, dict) or "image_id" not in annotation:
            raise SourceError(f"{path}, annotation {row}: wants image_id and caption, found {annotation!r:.80}")
        captions.setdefault(annotation["image_id"], []).append(annotation.get("caption", ""))
    folder = path.stem.rpartition("_")[2]  # captions_train2014.json -> train2014
    for row, image in enumerate(images):
        name = image.get("file_name")
        if not isinstance(name, str):
            yield BadRow(row, "columns", f"no file_name: {image!r:.80}")
        else:
            yield _annotation("image", [f"{folder}/{name}", name], captions.get(image.get("id"), []), f"coco/{name}")


def _karpathy(path: Path, images: list[dict[str, Any]], reading: Reading) -> Rows:
    wanted = ("train", "restval") if reading.split == "train" else (reading.split,)
    for row, image in enumerate(images):
        name, sentences = image.get("filename"), image.get("sentences")
        if not isinstance(name, str) or not isinstance(sentences, list):
            raise SourceError(f"{path}, image {row}: wants filename and sentences, found {image!r:.80}")
        if image.get("split") in wanted:
            texts = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
            folder = image.get("filepath") or ""
            yield _annotation("image", ([f"{folder}/{name}"] if folder else []) + [name], texts, f"coco/{name}")


def _folder(path: Path, reading: Reading) -> Rows:
    if not path.is_dir():
        raise SourceError(f"{path} is no folder: --format folder reads KEY.mp4 with KEY.txt beside it")
    try:
        start = path.resolve().relative_to(reading.media_root.resolve())
    except ValueError:
        raise SourceError(f"{path} lies outside --media-root {reading.media_root}") from None
    row = 0
    for current, folders, files in os.walk(path):
        folders.sort()
        here = start / Path(current).relative_to(path)
        keys: dict[str, list[str]] = {}
        for name in sorted(files):
            keys.setdefault(Path(name).stem, []).append(name)
        for key, names in keys.items():
            media = [(medium, name) for name in names if (medium := medium_of(Path(name).suffix[1:].lower()))]
            captioned = f"{key}.txt" in names or f"{key}.json" in names
            others = [name for name in names if captioned and name not in (f"{key}.txt", f"{key}.json")]
            if media:
                kind, chosen = max(media)  # a video comes before its thumbnail, as in an index
                place = (here / chosen).as_posix()
                yield Annotation(kind, place, (), place, beside=True)
                others = [name for medium, name in media if medium == kind and name != chosen]
            for name in others:
                why = "same_key" if media else "suffix"
                detail = f"{chosen} has the same name" if media else "neither an image nor a video that can be read"
                yield BadRow(row, why, f"{(here / name).as_posix()}: {detail}")
            row += 1


def _object(path: Path) -> dict[str, Any]:
    try:
        with _text(path) as file:
            record = json.load(file)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise SourceError(f"{path} holds a JSON {type(record).__name__}, not an object")
    return record


def _downloaded(path: Path, reading: Reading, url: str, caption: str, row: int) -> Annotation:
    if not reading.media_name:
        raise SourceError(
            f"{path} names images by url: say with --media-name how the files are called, as '{{md5}}.jpg' or "
            "'{row:09d}.jpg'; an img2dataset folder is read with --list FOLDER instead"
        )
    return _annotation("image", [name_of(reading.media_name, url, row)], [caption], url)


def _annotation(medium: Literal["image", "video"], places: list[str], captions: list[Any], media_id: str) -> Annotation:
    texts = dict.fromkeys(text.strip() for text in captions if isinstance(text, str) and text.strip())
    return Annotation(medium, places[0], tuple(texts), media_id, elsewhere=tuple(places[1:]))


READERS: dict[str, Callable[[Path, Reading], Rows]] = {
    "singularity": _singularity,
    "jsonl": _jsonl,
    "webvid": _webvid,
    "cc": _cc,
    "sbu": _sbu,
    "vg": _vg,
    "coco": _coco,
    "folder": _folder,
}
