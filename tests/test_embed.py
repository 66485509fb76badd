"""Embeddings of a set of shards on disk: what is written, how it goes on when broken off, and what a query finds."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from smaug_ds import distributed
from smaug_ds.config import to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.indexing import build_index
from smaug_ds.data.quarantine import DataError, Ledger
from smaug_ds.data.reader import EvalReader
from smaug_ds.data.sample import Batch
from smaug_ds.engine.trained import load_model, read_config
from smaug_ds.evaluation import embeddings
from smaug_ds.evaluation.embeddings import Rows, search
from smaug_ds.evaluation.encoding import encode_clips, encode_texts
from smaug_ds.evaluation.held_out import batch_shape, open_held_out
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer, train_vocabulary
from tests.models import small_config
from tests.ranks import run_ranks
from tests.shards import crawled, make_clip, make_image, write_tar
from tools import embed

CAPTIONS = [f"clip number {word}" for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips, one of which is cut short, and two images, in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate(([0, 1, 2, 7], [3, 4, 5, 6, 8])):
        members = []
        for number in numbers:
            media, suffix = (make_image(20 * number), "jpg") if number > 6 else (make_clip(25 * number), "mp4")
            several = {"captions": [CAPTIONS[number], f"again {number}"]} if number % 3 == 0 else {}
            members += crawled(f"{number:05d}", media, suffix, CAPTIONS[number], **several)
        write_tar(folder / f"{shard:05d}.tar", members)
    build_index(folder, workers=1)
    data = bytearray((folder / "00001.tar").read_bytes())
    start = data.index(b"mdat", data.index(b"00004.mp4")) + 4
    data[start : start + 300] = bytes(300)  # the clip was whole when it was indexed
    (folder / "00001.tar").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def run_folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_vocabulary(CAPTIONS, 60, folder / "vocab.txt")
    tokenizer = Tokenizer(folder / "vocab.txt")
    small = small_config(2, 1)
    model = dataclasses.replace(small, text=dataclasses.replace(small.text, vocab_size=tokenizer.vocab_size))
    checkpoint = folder / "checkpoints" / "step_3"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(SmaugModel(model).state_dict(), checkpoint / "model.safetensors")
    settings = {
        "model": to_dict(model),
        "data": to_dict(DataConfig(test=(str(shards),), tokenizer=str(tokenizer.path), workers=0)),
        "evaluation": to_dict(RetrievalConfig(batch_size=2)),
    }
    (checkpoint / "state.json").write_text(json.dumps({"step": 3, "config": settings}))
    (folder / "checkpoints" / "latest").write_text("step_3\n")
    return folder


@pytest.fixture(scope="module")
def written(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "out"
    assert embed.main(["--local_rank=0", "write", "--checkpoint", str(run_folder), "--out", str(out)]) == 0
    return out


def names(out: Path) -> list[str]:
    return ["/".join(json.loads(line)) for line in (out / "keys.jsonl").read_text().splitlines()]


def test_equals_the_evaluation(run_folder: Path, written: Path, tmp_path: Path) -> None:
    folder, config = read_config(str(run_folder), None)
    model, tokenizer = load_model(folder, config)
    ledger = Ledger(tmp_path, 0)
    loader = open_held_out(config.model, config.data, config.evaluation, tokenizer, torch.device("cpu"), ledger)
    video, text, keys = np.load(written / "video.npy", mmap_mode="r"), np.load(written / "text.npy"), names(written)
    lines = [json.loads(line) for line in (written / "texts.jsonl").read_text().splitlines()]
    assert [Path(key).name for key in keys] == [f"{n:05d}" for n in (0, 1, 2, 3, 4, 5, 6, 7, 8)]
    assert (video.shape, text.shape, len(lines)) == ((9, 16), (12, 16), 12)
    with torch.no_grad():
        clips = encode_clips(model, loader)
        seen = {key: i for batch in clips for i, key in enumerate(batch.keys)}
        assert len(seen) == 8
        for batch in clips:
            for key, expected, captions in zip(batch.keys, batch.embedding, batch.captions, strict=True):
                row = keys.index(key)
                assert np.array_equal(video[row], expected)
                own = [i for i, (clip, _) in enumerate(lines) if clip == row]
                assert [lines[i][1] for i in own] == list(captions)
                assert np.allclose(text[own], encode_texts(model, list(captions), tokenizer, 9).embedding, atol=1e-6)
    assert not video[4].any() and lines[[clip for clip, _ in lines].index(4)][1] == ""  # could not be decoded
    assert "00004" in (written / "quarantine.0.jsonl").read_text()


def test_written_twice_changes_nothing(run_folder: Path, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in written.iterdir() if path.is_file()}
    assert embed.main(["write", "--checkpoint", str(run_folder), "--out", str(written)]) == 0
    assert {path.name: path.read_bytes() for path in written.iterdir() if path.is_file()} == before
    other = ["write", "--checkpoint", str(run_folder), "--out", str(written), "model.frames=3"]
    assert embed.main(other) == 2
    assert "name another --out" in capsys.readouterr().err
    assert embed.main(["write", "--checkpoint", str(run_folder), "--out", f"{__file__}/below"]) == 2
    assert "below cannot be made (Not a directory): name another --out" in capsys.readouterr().err


@pytest.mark.parametrize("lived", [1, 3])
def test_goes_on_where_it_was_broken_off(
    run_folder: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lived: int
) -> None:
    """It dies after so many writes, in the middle of the next one."""
    monkeypatch.setattr(embeddings, "_BATCHES", 1)
    put, seen = embeddings._put, []

    def die(path: Path, row: int, values: np.ndarray) -> None:
        put(path, row, values)
        seen.append(row)
        if len(seen) == 2 * lived + 1:
            with (tmp_path / "out" / "texts.jsonl").open("ab") as file:
                file.write(b"half a li" * 1000)
            raise DataError("killed")

    monkeypatch.setattr(embeddings, "_put", die)
    command = ["write", "--checkpoint", str(run_folder), "--out", str(tmp_path / "out")]
    assert embed.main(command) == 1
    monkeypatch.setattr(embeddings, "_put", put)
    embedded: list[str] = []
    one = embeddings._embed

    def count(model: SmaugModel, tokenizer: Tokenizer, rows: dict[str, int], batch: Batch | None) -> Iterator:
        embedded.extend(rows)
        return one(model, tokenizer, rows, batch)

    monkeypatch.setattr(embeddings, "_embed", count)
    assert embed.main(command) == 0
    assert len(embedded) == 9 - 2 * lived  # nothing is done again
    for name in ("keys.jsonl", "texts.jsonl", "progress.json"):
        assert (tmp_path / "out" / name).read_bytes() == (written / name).read_bytes()
    for name in ("video.npy", "text.npy"):
        assert np.allclose(np.load(tmp_path / "out" / name), np.load(written / name), atol=1e-6)


def test_a_batch_of_which_nothing_can_be_decoded(run_folder: Path, written: Path, tmp_path: Path) -> None:
    embed.write(str(run_folder), None, ["evaluation.batch_size=1"], tmp_path / "out")
    assert (tmp_path / "out" / "texts.jsonl").read_bytes() == (written / "texts.jsonl").read_bytes()
    assert np.allclose(np.load(tmp_path / "out" / "video.npy"), np.load(written / "video.npy"), atol=1e-5)


def write_on_rank(run_folder: Path, out: Path) -> None:
    embeddings._BATCHES = 1
    embed.write(str(run_folder), None, [], out)


def test_two_ranks_equal_one(run_folder: Path, written: Path, tmp_path: Path) -> None:
    run_ranks(write_on_rank, 2, run_folder, tmp_path / "out")
    for name in ("keys.jsonl", "texts.jsonl", "progress.json"):
        assert (tmp_path / "out" / name).read_bytes() == (written / name).read_bytes()
    for name in ("video.npy", "text.npy"):
        assert np.array_equal(np.load(tmp_path / "out" / name), np.load(written / name))


def test_rows_are_those_of_the_reader(run_folder: Path, shards: Path) -> None:
    _, config = read_config(str(run_folder), None)
    tokenizer = Tokenizer(run_folder / "vocab.txt")
    corpus = Corpus.open([shards], 1.0, "test")
    for first in range(10):
        rest = Rows(corpus, first)
        assert rest.count("video") + rest.count("image") == 9 - first
        for size in (1, 2, 4):
            reader = EvalReader(rest, tokenizer, batch_shape(config.model), size, 0, 1, frozenset())  # type: ignore[arg-type]
            expected = [[rest.nth(medium, number).key for number in numbers] for medium, numbers in reader.batches]
            assert [[rest.entry(row).key for row in rows] for rows in rest.batches(size)] == expected
    with pytest.raises(IndexError):
        Rows(corpus).entry(9)


@pytest.mark.parametrize("block", [1, 7, 40, 1000])
def test_search_equals_brute_force(tmp_path: Path, block: int) -> None:
    draw = np.random.default_rng(0)
    array = draw.integers(-2, 3, (100, 4)).astype(np.float32)  # many equal scores, all exact
    array[draw.choice(100, 10, replace=False)] = 0
    queries = draw.integers(-2, 3, (5, 4)).astype(np.float32)
    np.save(tmp_path / "video.npy", array)
    found = search(tmp_path / "video.npy", queries, 13, block)
    for query, best in zip(queries, found, strict=True):
        scored = [(row, float(query @ vector)) for row, vector in enumerate(array) if vector.any()]
        assert best == sorted(scored, key=lambda hit: (-hit[1], hit[0]))[:13]
    assert len(search(tmp_path / "video.npy", queries, 1000, block)[0]) == np.count_nonzero(array.any(axis=1))


def test_search_holds_a_block_in_memory(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(40_000, 32)).astype(np.float32)
    np.save(tmp_path / "video.npy", array)
    queries = array[:2].copy()
    tracemalloc.start()
    search(tmp_path / "video.npy", queries, 10, block=500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < array.nbytes / 10


def test_query(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["clip number three", "<b>number</b> seven"]
    assert embed.main(["query", str(written), *texts, "--top", "6", "--out", str(tmp_path / "found")]) == 0
    printed = capsys.readouterr().out
    hits = [line for line in printed.splitlines() if "/0000" in line]
    assert len(hits) == 12 and printed.count("“") == 2
    scores = [float(line.split()[1]) for line in hits]
    assert scores[:6] == sorted(scores[:6], reverse=True)
    document = (tmp_path / "found" / "clips.html").read_text()
    assert document.count("data:image/jpeg;base64,") == 12 and "&lt;b&gt;number&lt;/b&gt; seven" in document
    assert "http" not in document and "<b>number" not in document
    with Image.open(tmp_path / "found" / "clips.png") as picture:
        assert picture.width == 1200 and picture.height > 800
    assert embed.main(["query", str(written), "clip"]) == 0
    assert (written / "queries" / "clip" / "clips.png").is_file()


def test_query_of_something_else(
    run_folder: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed.main(["query", str(tmp_path), "clip"]) == 2
    assert "holds no embeddings" in capsys.readouterr().err
    shutil.copytree(written, tmp_path / "out", ignore=shutil.ignore_patterns("queries"))
    lines = (tmp_path / "out" / "keys.jsonl").read_text().splitlines()
    (tmp_path / "out" / "keys.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    assert embed.main(["query", str(tmp_path / "out"), "clip"]) == 2
    assert "is not what was embedded" in capsys.readouterr().err
    manifest = json.loads((written / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"weights_sha256": "0"}))
    assert embed.main(["query", str(tmp_path / "out"), "clip"]) == 2
    assert "has other weights" in capsys.readouterr().err
    assert distributed.world_size() == 1
