"""The built-in corpus: rendered clips of two shapes, true captions, questions and choices; nothing to download.

The *scene* of a clip holds one main object, which moves (or grows, appears, turns back ...), and one second object,
which stays in a corner. Colours, shapes, corner and background show in any single frame; direction, order and appearing
need several. An image shows one object in a corner: what words mean is learnt there sooner than where two objects share
them.
About half of the clips hide a quarter of their frames behind grey *distractors*, so that it matters which frames are
chosen.

Train and test clips share no *appearance*, the tuple (colour, shape, second colour, second shape, place): every
appearance belongs to one of the two by a stable hash. A *combination* is an appearance and a motion, so the splits
share no combination either, and every combination is used once before any is used again. Size and background are drawn
freely.

Every random number of clip ``i`` comes from Philox generators keyed by (seed, split, i): a clip is the same bit for
bit whatever the size of the corpus and the number of workers.

    python -m smaug_ds.data.toy --out DIR [--clips N] [--images N] [--test-clips N] [--seed N] ... [--workers N]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from smaug_ds.data.toy_pictures import encode_media, render_frames
from smaug_ds.data.toy_scene import SPLITS, Split, ToyConfig, scene_generator
from smaug_ds.data.toy_words import Words, vocabulary, write_words
from smaug_ds.progress import bar

FORMAT = 3  # of the rendered folder; raised whenever the same config renders other bytes
PER_FOLDER = 1000
CHUNK = 50  # clips that a worker renders at a time

Done = list[tuple[str, Words]]  # paths and words of rendered files


def media_path(config: ToyConfig, split: Split, number: int) -> str:
    """Where clip or image ``number`` lies, relative to the corpus folder; the ending says the format."""
    suffix = "jpg"
    if split != "image_train":
        rng = scene_generator(config.seed, split, number, purpose=4)
        suffix = "webm" if rng.random() < config.webm_share else "mp4"
    return f"media/{split}/{number // PER_FOLDER:03d}/{number:06d}.{suffix}"


def _render_chunk(config: ToyConfig, folder: Path, split: Split, numbers: range) -> Done:
    """Renders the files that are not there yet, each whole or not at all; returns their paths and words."""
    done = []
    for number in numbers:
        name = media_path(config, split, number)
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, encode_media(render_frames(config, split, number), path.suffix[1:], config.fps))
        done.append((name, write_words(config, split, number)))
    return done


def _write(path: Path, content: bytes) -> None:
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_bytes(content)
    os.replace(partial_path, path)


def _write_lists(folder: Path, done: dict[Split, Done]) -> None:
    """The annotation files and ``vocab.txt``; media paths are relative to ``folder``."""
    asked = [f"{task}_{part}" for task in ("qa", "mc") for part in ("train", "test")]
    lists: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SPLITS, *asked)}
    for split, files in done.items():
        medium, part = split.split("_")
        for number, (path, words) in enumerate(files):
            several = len(words.captions) > 1
            lists[split].append({medium: path, "caption": list(words.captions) if several else words.captions[0]})
            for k, (question, answer) in enumerate(words.questions):
                name = f"{part}_{number:06d}_{k}"
                row = {"question_id": name, "video": path, "question": question, "answer": answer}
                lists[f"qa_{part}"].append(row)
            if words.choices:
                choice = {"video": path, "caption": list(words.choices), "answer": words.answer}
                lists[f"mc_{part}"].append(choice)
    for name, rows in lists.items():
        _write(folder / f"{name}.json", json.dumps(rows, indent=0).encode())
    _write(folder / "vocab.txt", "".join(f"{piece}\n" for piece in vocabulary()).encode())


def render_corpus(config: ToyConfig, folder: Path | str, workers: int = 1) -> None:
    """Renders the corpus into ``folder``, on ``workers`` processes; does nothing where it is finished already.

    Writes ``media/``, the lists ``video_train.json``, ``image_train.json``, ``video_test.json``, ``qa_train.json``,
    ``qa_test.json``, ``mc_train.json`` and ``mc_test.json`` in the layouts of Singularity, ``vocab.txt`` and, last,
    ``toy.json`` with the config. A run that was ended early goes on where it stopped.

    Raises:
        ValueError: ``folder`` holds a corpus, or a part of one, of another config.
    """
    folder = Path(folder)
    record, started = folder / "toy.json", folder / "toy.json.started"
    wanted = {"format": FORMAT, **dataclasses.asdict(config)}
    for path in (record, started):
        if path.exists() and (found := json.loads(path.read_text())) != wanted:
            raise ValueError(
                f"{folder} holds a built-in corpus of another config: found {found}, asked for {wanted}; "
                "choose another folder or remove that one"
            )
    if record.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(started, json.dumps(wanted, indent=2).encode())
    counts: dict[Split, int] = {
        "video_train": config.clips,
        "image_train": config.images,
        "video_test": config.test_clips,
    }
    jobs = [(s, range(k, min(k + CHUNK, count))) for s, count in counts.items() for k in range(0, count, CHUNK)]
    done: dict[Split, Done] = {split: [] for split in SPLITS}
    with bar(range(0), sum(counts.values()), "render", "files") as work:
        results = _run(partial(_render_chunk, config, folder), jobs, workers)
        for (split, numbers), files in zip(jobs, results, strict=True):
            done[split] += files
            work.update(len(numbers))
    _write_lists(folder, done)
    os.replace(started, record)


def _run(render: partial[Done], jobs: list[tuple[Split, range]], workers: int) -> Iterator[Done]:
    """Yields each job's result, in the order of the jobs."""
    if workers <= 1:
        yield from itertools.starmap(render, jobs)
        return
    # Spawned, not forked: the caller may hold threads of torch or of a decoder.
    with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(render, *zip(*jobs, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the renderer: one option for each field of ``ToyConfig``."""
    parser = argparse.ArgumentParser(description="Render the built-in corpus of moving shapes.")
    parser.add_argument("--out", required=True, type=Path, help="folder of the corpus")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    for field in dataclasses.fields(ToyConfig):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help=f"default: {field.default}")
    options = vars(parser.parse_args(arguments))
    folder, workers = options.pop("out"), options.pop("workers")
    try:
        render_corpus(ToyConfig(**options), folder, workers)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{options['clips']} + {options['test_clips']} clips and {options['images']} images in {folder}")


if __name__ == "__main__":
    main()
