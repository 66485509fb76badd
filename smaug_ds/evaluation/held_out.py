"""The clips that a model is evaluated on, as batches of the shape that it needs."""

from __future__ import annotations

import torch

from smaug_ds.config import naming
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.loader import EvalLoader
from smaug_ds.data.mixture import training_folders
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.sample import BatchShape
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


def open_held_out(
    model: ModelConfig,
    data: DataConfig,
    evaluation: RetrievalConfig,
    tokenizer: Tokenizer,
    device: torch.device,
    ledger: Ledger,
) -> EvalLoader:
    """This rank's share of the split ``evaluation.split``: ``data.test`` whole, or a part of what it trains on.

    Raises ConfigError naming the setting whose folders cannot be used.
    """
    split = evaluation.split
    whole = split == "test" and bool(data.test)  # a folder named data.test is a test set as it is
    with naming("data.test" if whole else "data.corpus" if data.corpus else "data.train"):
        folders = data.test if whole else training_folders(data)
        corpus = Corpus.open(folders, 1.0 if whole else data.holdout, split)
    return EvalLoader(corpus, tokenizer, data, batch_shape(model), evaluation.batch_size, device, ledger)
