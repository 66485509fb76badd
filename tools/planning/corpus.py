"""What a plan trains on: the vocabulary, and the draws of an epoch, indexed or on paper."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from smaug_ds.config import naming, parse
from smaug_ds.data.mixture import Manifest, open_mixture
from smaug_ds.data.sample import MEDIA, Medium
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.planner.media import MediaConfig, epoch_draws
from smaug_ds.text import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"5M": "jobs/experiments/corpus_5m.yaml", "17M": "jobs/experiments/corpus_17m.yaml"}
BERT_VOCABULARY = 30522
C = TypeVar("C", bound=PretrainConfig)


@dataclass(frozen=True)
class Recipe:
    """A corpus and the samples of each medium that one epoch of it draws."""

    name: str
    draws: dict[Medium, float]

    @property
    def mix(self) -> dict[Medium, float]:
        """Shares of the draws."""
        total = sum(self.draws.values())
        return {medium: count / total for medium, count in self.draws.items()}


def with_vocabulary(config: C) -> C:
    """The config with ``model.text.vocab_size`` set: the tokenizer's, or BERT's where none is named."""
    text = config.model.text
    if not text.vocab_size:
        with naming("data.tokenizer"):
            known = Tokenizer(config.data.tokenizer).vocab_size if config.data.tokenizer else BERT_VOCABULARY
        text = dataclasses.replace(text, vocab_size=known)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))


def find_recipes(config: PretrainConfig, media: MediaConfig) -> list[Recipe]:
    """The corpus of the config as it is indexed, or as its manifest says; without one, the two recipes of the paper.

    Raises ConfigError for ``data.train`` that is not indexed, or a manifest that cannot be read or gives no sizes.
    """
    if config.data.train:
        return [Recipe(", ".join(config.data.train), indexed_draws(config))]
    if config.data.corpus:
        with naming("data.corpus"):
            manifest = parse(Manifest, config.data.corpus)
        root = Path(config.data.corpus_root or manifest.root)
        if any((root / folder).exists() for part in manifest.sets for folder in part.shards):
            return [Recipe(config.data.corpus, indexed_draws(config))]
        return [Recipe(f"{config.data.corpus} as published", epoch_draws(manifest, media))]
    return [paper_recipe(name, media) for name in RECIPES]


def paper_recipe(name: str, media: MediaConfig) -> Recipe:
    """The recipe called ``name``, every set as large as published."""
    return Recipe(name, epoch_draws(parse(Manifest, ROOT / RECIPES[name]), media))


def indexed_draws(config: PretrainConfig) -> dict[Medium, float]:
    """Draws of an epoch of the indexed shards that the config names."""
    order = open_mixture(config.data).order(config.batch.global_size, config.run.seed, config.data.shuffle_group)
    return {medium: float(order.draws(medium)) for medium in MEDIA}
