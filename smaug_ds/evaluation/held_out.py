"""The clips that a model is evaluated on, as batches of the shape that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch

from smaug_ds.config import naming
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import EvalLoader
from smaug_ds.data.mixture import training_folders
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.sample import BatchShape
from smaug_ds.evaluation.benchmarks import Benchmark
from smaug_ds.evaluation.clips import BenchmarkClips, find_clips
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.text import Tokenizer


def batch_shape(model: ModelConfig, mlm_probability: float = 0.0) -> BatchShape:
    """The sizes that ``model`` fixes and the data path has to meet; ``mlm_probability`` is that of training."""
    return BatchShape(
        frames=model.frames,
        image_size=model.vision.image_size,
        patches=model.vision.patches,
        max_text_length=model.text.max_length,
        mlm_probability=mlm_probability,
    )


def open_corpus(data: DataConfig, split: Literal["test", "train"]) -> Corpus:
    """A split: ``data.test`` whole, or the held-out or the other part of what the run trains on.

    Raises ConfigError naming the setting whose folders cannot be used.
    """
    whole = split == "test" and bool(data.test)  # a folder named data.test is a test set as it is
    with naming("data.test" if whole else "data.corpus" if data.corpus else "data.train"):
        folders = data.test if whole else training_folders(data)
        return Corpus.open(folders, 1.0 if whole else data.holdout, split)


def open_held_out(
    model: ModelConfig,
    data: DataConfig,
    evaluation: RetrievalConfig,
    tokenizer: Tokenizer,
    device: torch.device,
    ledger: Ledger,
) -> EvalLoader:
    """This rank's share of the split ``evaluation.split``, see ``open_corpus``, which raises ConfigError."""
    corpus = open_corpus(data, evaluation.split)
    return EvalLoader(corpus, tokenizer, data, batch_shape(model), evaluation.batch_size, device, ledger)


def open_clips(
    model: ModelConfig,
    data: DataConfig,
    batch_size: int,
    tokenizer: Tokenizer,
    device: torch.device,
    ledger: Ledger,
    benchmark: Benchmark,
    texts: Mapping[str, Sequence[str]],
    media: Path | None = None,
    allowed_missing: int = 0,
) -> tuple[EvalLoader, BenchmarkClips, dict[str, int]]:
    """This rank's share of a benchmark's videos with its ``texts`` of each as captions, the videos that were found on
    all ranks, and those that are missing, with their rows.

    They are looked for in the folder ``media``, where PyAV decodes them, or else in the shards of ``data.test``.

    Raises as ``find_clips`` does.
    """
    clips, missing = find_clips(benchmark, texts, media, data.test, allowed_missing)
    # Of a corpus EvalLoader uses no more than ``count``, ``nth`` and ``read_sample``.
    loader = EvalLoader(cast(Corpus, clips), tokenizer, data, batch_shape(model), batch_size, device, ledger)
    return loader, clips, missing
