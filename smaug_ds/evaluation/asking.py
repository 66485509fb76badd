"""Questions and choices of benchmark files joined to their clips, as evaluation and fine-tuning ask them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import EvalLoader
from smaug_ds.data.quarantine import DataError, Ledger
from smaug_ds.data.shard import Entry
from smaug_ds.evaluation.benchmarks import Benchmark, find_in_shards, read_answer_list, read_benchmark, require_answers
from smaug_ds.evaluation.held_out import open_clips
from smaug_ds.evaluation.retrieval import RetrievalConfig, in_precision
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.text import Tokenizer

V = TypeVar("V")


@dataclass(frozen=True)
class QuestionConfig:
    """Which questions are asked, and how answers are found. Files: any layout that docs/benchmarks.md names."""

    train: tuple[str, ...] = ()  # files of questions, or of multiple choices, on the videos of data.train
    test: tuple[str, ...] = ()  # files of questions, or of multiple choices, on the videos of data.test
    answer_list: str = ""  # JSON list of the answers to choose from; empty: the different ones of ``train``
    method: Literal["rank", "generate"] = "rank"  # choose from the answer list, or write word by word
    shortlist: int = 128  # answers of the list that the first token leaves for the full likelihood
    max_tokens: int = 10  # of a generated answer
    allowed_missing: int = 0  # videos of a file that may be missing in the shards

    def __post_init__(self) -> None:
        for name in ("shortlist", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"questions.{name} is {getattr(self, name)}: it must be at least 1")
        if self.allowed_missing < 0:
            raise ConfigError(f"questions.allowed_missing is {self.allowed_missing}: it must be 0 or more")


@dataclass(frozen=True)
class Asked:
    """The records of a benchmark, and on which clip each is."""

    benchmark: Benchmark  # without the records of missing videos
    rows: dict[str, list[int]] = field(repr=False)  # records on each clip, by ``shard/key`` as ``Batch.keys`` has it
    missing: tuple[str, ...] = ()  # videos that were not found

    @classmethod
    def of(cls, benchmark: Benchmark, places: Mapping[str, Entry], missing: Sequence[str]) -> Asked:
        """The records whose videos are at ``places``."""
        benchmark = benchmark.without(missing)
        rows: dict[str, list[int]] = {}
        for row, record in enumerate(benchmark.records):
            entry = places[record.video]
            rows.setdefault(f"{entry.shard}/{entry.key}", []).append(row)
        return cls(benchmark, rows, tuple(missing))


def ask(files: Sequence[str], corpus: Corpus, allowed_missing: int) -> list[Asked]:
    """Reads benchmark files and finds their videos in the shards of ``corpus``.

    Raises BenchmarkError for a file that cannot be used or more videos missing than allowed, ShardError for a shard
    that cannot be read.
    """
    asked = []
    for file in files:
        benchmark = read_benchmark(file)
        found = find_in_shards(benchmark, corpus.indexes)
        found.require(allowed_missing)
        asked.append(Asked.of(benchmark, found.places, list(found.missing)))
    return asked


def open_asked(
    benchmark: Benchmark,
    model: ModelConfig,
    data: DataConfig,
    batch_size: int,
    tokenizer: Tokenizer,
    device: torch.device,
    ledger: Ledger,
    media: Path | None = None,
    allowed_missing: int = 0,
) -> tuple[EvalLoader, Asked]:
    """This rank's share of the clips that a benchmark asks about, and what it asks.

    They are looked for in the folder ``media``, or else in the shards of ``data.test``. Raises as ``find_clips`` does.
    """
    texts = {video: ("",) for video in benchmark.videos}  # what is asked goes another way
    loader, clips, missing = open_clips(
        model, data, batch_size, tokenizer, device, ledger, benchmark, texts, media, allowed_missing
    )
    places = {clip.video: clips.nth("video", number) for number, clip in enumerate(clips.clips)}
    return loader, Asked.of(benchmark, places, list(missing))


def on_all_ranks(model: SmaugModel, evaluation: RetrievalConfig, own: Callable[[], dict[int, V]]) -> dict[int, V]:
    """What ``own`` finds on the clips of this rank, by the record's row, and what it finds on the other ranks.

    It runs in evaluation mode and in the precision of ``evaluation``. Every rank calls it. Raises DataError, on all
    ranks, when a loader's worker dies on one of them.
    """
    was_training = model.training
    model.eval()
    try:
        with in_precision(model, evaluation), distributed.agreeing(DataError):
            found = own()
    finally:
        model.train(was_training)
    every: dict[int, V] = {}
    for share in distributed.gather_objects(found):
        assert every.keys().isdisjoint(share), "a clip was on two ranks"
        every |= share
    return every


def protocol(model: SmaugModel, asked: Asked, evaluation: RetrievalConfig, checkpoint: str) -> dict[str, Any]:
    """The conditions of every result on ``asked``, whatever its task."""
    return {
        "task": asked.benchmark.task,
        "benchmark": asked.benchmark.name,
        "files": list(asked.benchmark.files),
        "notes": list(asked.benchmark.notes),
        "missing_videos": len(asked.missing),
        "frames": model.config.frames,
        "frames_kept": model.config.frames_kept,
        "image_size": model.config.vision.image_size,
        "sparsified": model.config.vision.sparsify_at_inference and model.config.vision.keep_rate < 1,
        "cleaning": "Singularity's pre_text",
        "max_text_tokens": model.config.text.max_length,
        "precision": f"{evaluation.precision} forward pass, fp32 scores",
        "checkpoint": checkpoint,
    }


def answers_to_choose_from(config: QuestionConfig, training: Sequence[str]) -> list[str]:
    """``config.answer_list``, or the different ones of ``training`` in their order.

    Raises ConfigError where the list cannot be read or is shorter than the shortlist.
    """
    try:
        answers = read_answer_list(config.answer_list) if config.answer_list else list(dict.fromkeys(training))
        if config.method == "rank":
            require_answers(answers, config.shortlist)
    except ValueError as error:
        raise ConfigError(f"questions.shortlist is {config.shortlist}: {error}") from error
    return answers
