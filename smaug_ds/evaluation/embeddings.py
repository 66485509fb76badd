"""Embeddings of a whole corpus on disk, and exact search in them. Memory does not grow with the corpus.

    OUT/manifest.json   what was embedded with which weights
        video.npy       (C, P) float32, unit length; zeros where a clip could not be decoded
        text.npy        (Q, P) float32, of every caption; zeros where its clip could not be decoded
        keys.jsonl      one line a clip: [path of the shard, key]
        texts.jsonl     one line a text: [row of its clip, text]
        progress.json   clips, texts and bytes of texts.jsonl that are done

Both arrays can be memory-mapped: ``np.load("OUT/video.npy", mmap_mode="r")``.

Letters: C clips, Q texts, P projection size.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import EvalLoader
from smaug_ds.data.quarantine import DataError, Ledger
from smaug_ds.data.reader import EVALUATION_ORDER
from smaug_ds.data.sample import Batch, Medium, Sample
from smaug_ds.data.shard import Entry
from smaug_ds.evaluation.encoding import device_of, progress
from smaug_ds.evaluation.held_out import batch_shape
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer

FORMAT = 1
_BATCHES = 16  # of each rank between two writes
_TEXTS = 256  # encoded at once
_ROWS = 65536  # compared with the queries at once


class Rows:
    """The samples of a corpus as rows 0 to ``len`` - 1, videos first, from row ``first`` on. Can be pickled."""

    def __init__(self, corpus: Corpus, first: int = 0) -> None:
        self.corpus, self.first = corpus, first
        self._skipped: dict[Medium, int] = {}
        for medium in EVALUATION_ORDER:
            self._skipped[medium] = min(first, corpus.count(medium))
            first -= self._skipped[medium]

    def __reduce__(self) -> tuple:
        return Rows, (self.corpus, self.first)

    def count(self, medium: Medium) -> int:
        """Samples of ``medium`` from ``first`` on."""
        return self.corpus.count(medium) - self._skipped[medium]

    def nth(self, medium: Medium, number: int) -> Entry:
        """The ``number``-th of them."""
        return self.corpus.nth(medium, self._skipped[medium] + number)

    def read_sample(self, entry: Entry) -> Sample:
        """See ``Corpus.read_sample``."""
        return self.corpus.read_sample(entry)

    def batches(self, size: int) -> list[range]:
        """Rows that an evaluation from ``first`` on puts together into a batch."""
        found, start = [], self.first
        for medium in EVALUATION_ORDER:
            end = start + self.count(medium)
            found += [range(row, min(row + size, end)) for row in range(start, end, size)]
            start = end
        return found

    def entry(self, row: int) -> Entry:
        """The sample of ``row``, wherever ``first`` is."""
        for medium in EVALUATION_ORDER:
            if row < self.corpus.count(medium):
                return self.corpus.nth(medium, row)
            row -= self.corpus.count(medium)
        raise IndexError(row)


class _Embedded(NamedTuple):
    """What one rank made of one sample."""

    row: int
    video: NDArray[np.float32]  # (P,)
    texts: tuple[str, ...]
    text: NDArray[np.float32]  # (texts, P)


@torch.no_grad()
def write_embeddings(
    out: Path,
    corpus: Corpus,
    model: SmaugModel,
    tokenizer: Tokenizer,
    data: DataConfig,
    batch_size: int,
    facts: Mapping[str, Any],
    ledger: Ledger,
) -> int:
    """Embeds what ``out`` still lacks of ``corpus``; returns the number of clips that could not be decoded this time.

    All ranks call it; what was broken off goes on where it was, on any number of ranks.

    Args:
        facts: what was embedded with which weights, for the manifest. Whatever differs makes another ``out``.

    Raises ConfigError when ``out`` cannot be made or holds embeddings of something else, DataError when a data worker
    dies or a shard is not what was indexed.
    """
    every = Rows(corpus)
    with distributed.agreeing(ConfigError):
        opened = _open_store(out, every, model.config.projection, facts) if distributed.is_main() else {}
    done: dict[str, int] = distributed.gather_objects(opened)[0]
    rest = Rows(corpus, done["clips"])
    batches = rest.batches(batch_size)
    own = batches[distributed.rank() :: distributed.world_size()]
    # Of a corpus EvalLoader uses no more than ``count``, ``nth`` and ``read_sample``.
    loader = EvalLoader(
        cast(Corpus, rest), tokenizer, data, batch_shape(model.config), batch_size, device_of(model), ledger
    )
    embedded = _by_batch(progress(loader, "embed"), own, every)
    at_once = _BATCHES * distributed.world_size()
    for start in range(0, len(batches), at_once):
        with distributed.agreeing(DataError):
            some = itertools.islice(embedded, _BATCHES)
            part = [sample for rows, batch in some for sample in _embed(model, tokenizer, rows, batch)]
        parts = distributed.gather_objects(part)
        if distributed.is_main():
            rows = range(done["clips"], batches[min(start + at_once, len(batches)) - 1].stop)
            done = _write(out, every, rows, {sample.row: sample for own in parts for sample in own}, done)
    return sum(distributed.gather_objects(loader.failed))


def _by_batch(
    batches: Iterable[Batch], ranges: Iterable[range], every: Rows
) -> Iterator[tuple[dict[str, int], Batch | None]]:
    """For each of this rank's ``ranges`` the rows of its samples by name, and its batch; None where all failed."""
    coming = iter(batches)
    batch = next(coming, None)
    for rows in ranges:
        names = {_name(every.entry(row)): row for row in rows}
        if batch is not None and batch.keys[0] in names:
            yield names, batch
            batch = next(coming, None)
        else:
            yield names, None


def _embed(
    model: SmaugModel, tokenizer: Tokenizer, rows: Mapping[str, int], batch: Batch | None
) -> Iterator[_Embedded]:
    if batch is None:
        return
    video = model.encode_frames(batch.frames.to(device_of(model)), None).embedding.float().cpu().numpy()
    texts = [text for several in batch.all_captions for text in several]
    pieces = []
    for start in range(0, len(texts), _TEXTS):
        ids = tokenizer.encode(texts[start : start + _TEXTS], model.config.text.max_length)
        encoded = model.encode_text(ids.input_ids.to(device_of(model)), ids.lengths)
        pieces.append(encoded.embedding.float().cpu().numpy())
    ends = np.cumsum([len(several) for several in batch.all_captions])
    for key, own, several, text in zip(
        batch.keys, video, batch.all_captions, np.split(np.concatenate(pieces), ends[:-1]), strict=True
    ):
        yield _Embedded(rows[key], own, several, text)


def _open_store(out: Path, every: Rows, size: int, facts: Mapping[str, Any]) -> dict[str, int]:
    """What is done already in ``out``, which is made if it is not there."""
    manifest = out / "manifest.json"
    if manifest.is_file():
        found = read_manifest(out)
        for name, value in {"format": FORMAT, **facts}.items():
            if found.get(name) != value:
                raise ConfigError(f"{manifest}: {name} is {found.get(name)}, but now it is {value}: name another --out")
        return json.loads((out / "progress.json").read_text(encoding="utf-8"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made ({error.strerror}): name another --out") from error
    clips = texts = 0
    with (out / "keys.jsonl").open("w", encoding="utf-8") as keys:
        for medium in EVALUATION_ORDER:
            for number in range(every.count(medium)):
                entry = every.nth(medium, number)
                keys.write(json.dumps([entry.shard, entry.key]) + "\n")
                clips, texts = clips + 1, texts + entry.captions
    for name, length in (("video", clips), ("text", texts)):
        np.lib.format.open_memmap(out / f"{name}.npy", mode="w+", dtype=np.float32, shape=(length, size)).flush()
    (out / "texts.jsonl").write_bytes(b"")
    done = {"clips": 0, "texts": 0, "texts_bytes": 0}
    _write_json(out / "progress.json", done)
    _write_json(manifest, {"format": FORMAT, "clips": clips, "texts": texts, **facts})
    return done


def _write(
    out: Path, every: Rows, rows: range, embedded: Mapping[int, _Embedded], done: Mapping[str, int]
) -> dict[str, int]:
    """The ``embedded`` ones of ``rows``, which follow on what is ``done``; returns what is done then."""
    size = np.load(out / "video.npy", mmap_mode="r").shape[1]
    nothing = np.zeros(size, np.float32)
    video, text, lines = [], [], []
    for row in rows:
        count, found = every.entry(row).captions, embedded.get(row)
        if found is None:
            found = _Embedded(row, nothing, ("",) * count, np.zeros((count, size), np.float32))
        if len(found.texts) != count:
            raise DataError(f"{_name(every.entry(row))} has {len(found.texts)} captions, {count} when it was indexed")
        video.append(found.video)
        text.append(found.text)
        lines += [json.dumps([row, words], ensure_ascii=False) + "\n" for words in found.texts]
    _put(out / "video.npy", rows.start, np.stack(video))
    _put(out / "text.npy", done["texts"], np.concatenate(text))
    with (out / "texts.jsonl").open("r+b") as file:
        file.truncate(done["texts_bytes"])  # what a run wrote that did not live to say so
        file.seek(done["texts_bytes"])
        file.write("".join(lines).encode("utf-8"))
        end = file.tell()
        file.flush()
        os.fsync(file.fileno())
    now = {"clips": rows.stop, "texts": done["texts"] + len(lines), "texts_bytes": end}
    _write_json(out / "progress.json", now)
    return now


def _put(path: Path, row: int, values: NDArray[np.float32]) -> None:
    """Writes through the file: pages of a map would count as memory of this process."""
    start = np.load(path, mmap_mode="r").offset
    with path.open("r+b") as file:
        file.seek(start + row * values[0].nbytes if len(values) else start)
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_manifest(out: Path) -> dict[str, Any]:
    """What ``out`` holds. Raises ConfigError when it is no folder of embeddings."""
    try:
        return json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out} holds no embeddings: {error}") from error


def search(path: Path, queries: NDArray[np.float32], k: int, block: int = _ROWS) -> list[list[tuple[int, float]]]:
    """The ``k`` best rows of an array of unit vectors (C, P) for each of ``queries`` (Q, P): (row, cosine), best first.

    Every row is compared, ``block`` of them at a time; of equal ones the lower row comes first. Rows of zeros are
    passed over, so there may be fewer than ``k``.
    """
    array = np.load(path, mmap_mode="r")
    rows, size = array.shape
    best = np.full((len(queries), 0), -np.inf, np.float32)
    places = np.zeros((len(queries), 0), np.int64)
    for start in range(0, rows, block):
        count = min(block, rows - start)
        offset = array.offset + start * size * array.itemsize
        piece = np.fromfile(path, array.dtype, count * size, offset=offset).reshape(count, size)
        scores = queries @ piece.T
        scores[:, ~piece.any(axis=1)] = -np.inf
        every = np.concatenate([best, scores], axis=1)
        ids = np.concatenate([places, np.broadcast_to(np.arange(start, start + count), scores.shape)], axis=1)
        order = np.argsort(-every, axis=1, kind="stable")[:, :k]
        best, places = np.take_along_axis(every, order, axis=1), np.take_along_axis(ids, order, axis=1)
    return [
        [(int(row), float(score)) for row, score in zip(own, scores, strict=True) if np.isfinite(score)]
        for own, scores in zip(places, best, strict=True)
    ]


def keys_of(out: Path, rows: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Shard and key of some ``rows``."""
    wanted = set(rows)
    with (out / "keys.jsonl").open(encoding="utf-8") as file:
        return {row: tuple(json.loads(line)) for row, line in enumerate(file) if row in wanted}


def _name(entry: Entry) -> str:
    return f"{entry.shard}/{entry.key}"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
