"""The training corpus as a mixture of sets: which folders, how often each sample comes, how many there should be.

A manifest (``data.corpus``) is a YAML file::

    root: /data                   # where relative folders start; data.corpus_root goes before it
    sets:
      - name: webvid
        shards: [webvid]          # folders of indexed shards
        weight: 1                 # times that each sample comes per epoch
        expected: 2500000         # samples (or captions, see unit) of the whole set
        allowed_shortfall: 0.1    # share of them that may be missing; 1: the set may be absent

Without one, the folders of ``data.train`` are one set of weight 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smaug_ds.config import ConfigError, naming, parse
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus, ShardIndex
from smaug_ds.data.order import Order, SetShards
from smaug_ds.data.sample import MEDIA, Medium
from smaug_ds.data.shard import ShardError


@dataclass(frozen=True)
class SetConfig:
    """One set of a manifest."""

    name: str
    shards: tuple[str, ...]  # folders of indexed shards, relative to the manifest's root
    weight: float = 1.0  # times that each sample comes per epoch
    expected: int = 0  # how many the whole set has; 0: not known, nothing is checked
    unit: Literal["samples", "captions"] = "samples"  # of ``expected``; a sample may have several captions
    allowed_shortfall: float = 0.0  # share of ``expected`` that may be missing, 0 to 1; 1: the set may be absent

    def __post_init__(self) -> None:
        if not self.shards:
            raise ConfigError(f"set {self.name}: shards is empty: name at least one folder")
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"set {self.name}: weight is {self.weight}: give a number above 0, or take the set out")
        if self.expected < 0 or not 0 <= self.allowed_shortfall <= 1:
            raise ConfigError(
                f"set {self.name}: expected is {self.expected} and allowed_shortfall {self.allowed_shortfall}: "
                "give a count and a share from 0 to 1"
            )


@dataclass(frozen=True)
class Manifest:
    """A corpus of several sets."""

    root: str = ""  # folder where relative ``shards`` start; empty: the working directory
    sets: tuple[SetConfig, ...] = ()

    def __post_init__(self) -> None:
        names = [part.name for part in self.sets]
        if not names:
            raise ConfigError("sets is empty: name at least one set")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"set {min(twice)} occurs {names.count(min(twice))} times: give each set once")


@dataclass(frozen=True)
class Stock:
    """What lies on disk of one set."""

    wanted: SetConfig
    found: int  # in the unit of ``wanted``, hold-out included
    shards: int  # 0: the set is absent

    def __str__(self) -> str:
        wanted = self.wanted
        unit = wanted.unit if self.shards else "absent"
        line = f"{wanted.name:12} {wanted.expected or '':>13,} {self.found:>13,} {unit:8} {wanted.weight:>7g}"
        short = wanted.expected - self.found
        if short > 0:
            line += f"  {short / wanted.expected:.1%} short, {wanted.allowed_shortfall:.0%} allowed"
        return line


@dataclass(frozen=True)
class Mixture:
    """The training split of all sets, and how they are mixed."""

    corpus: Corpus
    sets: tuple[SetShards, ...]
    stocks: tuple[Stock, ...]  # empty without a manifest

    def order(self, global_batch: int, seed: int, group: int) -> Order:
        """The order of training over this mixture; see ``Order``."""
        return Order(self.sizes(), global_batch, seed, group, self.sets)

    def sizes(self) -> dict[Medium, list[int]]:
        """Training samples of each medium in each shard."""
        counts = self.corpus.sizes()
        return {medium: counts[medium].tolist() for medium in MEDIA}

    def fingerprint(self) -> str:
        """Equal for the same shards, split and weights, wherever the folders lie."""
        shards = [shard for index in self.corpus.indexes for shard in index.manifest["shards"]]
        named = [(shard["name"], shard["bytes"]) for shard in shards]
        sets = [(part.first, part.end, part.weight) for part in self.sets]
        return hashlib.sha256(json.dumps([named, self.sizes(), sets], sort_keys=True).encode()).hexdigest()

    def table(self) -> str:
        """Expected against found, one line per set of the manifest."""
        head = f"{'set':12} {'expected':>13} {'found':>13} {'unit':8} {'weight':>7}"
        return "\n".join([head, *map(str, self.stocks)])


def training_folders(config: DataConfig) -> list[str]:
    """The folders of indexed shards that ``config`` trains on and that exist.

    Raises ConfigError where the manifest cannot be read, or a set that may not be absent is.
    """
    if not config.corpus:
        return list(config.train)
    return [folder for _, folders in _sets_on_disk(config) for folder in folders]


def open_mixture(config: DataConfig) -> Mixture:
    """Opens the shards of ``data.corpus`` (or ``data.train``) and compares what lies there with what should.

    Raises:
        ConfigError: a manifest that cannot be read, folders that cannot be used, or more missing than is allowed.
    """
    if not config.corpus:
        with naming("data.train"):
            corpus = Corpus.open(config.train, config.holdout, "train")
        return Mixture(corpus, (SetShards(0, sum(len(index.shards) for index in corpus.indexes)),), ())
    stocks: list[Stock] = []
    parts: list[SetShards] = []
    indexes: list[ShardIndex] = []
    end = 0
    with naming(f"data.corpus {config.corpus}"):
        for wanted, folders in _sets_on_disk(config):
            own = [ShardIndex.open(folder) for folder in folders]
            stock = Stock(wanted, sum(index.totals[wanted.unit] for index in own), sum(len(i.shards) for i in own))
            _require_stock(stock)
            stocks.append(stock)
            indexes += own
            if own:
                parts.append(SetShards(end, end + stock.shards, wanted.weight))
                end += stock.shards
        if not indexes:
            raise ShardError("not one of its sets is on disk")
        corpus = Corpus(indexes, config.holdout, "train")
    return Mixture(corpus, tuple(parts), tuple(stocks))


def _sets_on_disk(config: DataConfig) -> list[tuple[SetConfig, list[str]]]:
    """Each set of the manifest with its folders; none for a set that is absent and may be."""
    if not Path(config.corpus).is_file():
        raise ConfigError(f"data.corpus: {config.corpus} does not exist or is no file")
    try:
        manifest = parse(Manifest, config.corpus, named_by="the manifest")
    except ConfigError as error:
        raise ConfigError(f"data.corpus: {error}") from error
    root = Path(config.corpus_root or manifest.root)
    found = []
    for wanted in manifest.sets:
        folders = [root / folder for folder in wanted.shards]
        if missing := [folder for folder in folders if not any(folder.glob("*.tar"))]:
            if wanted.allowed_shortfall < 1:
                lack = "holds no .tar file" if missing[0].is_dir() else "does not exist"
                raise ConfigError(
                    f"data.corpus {config.corpus}: set {wanted.name}: folder {missing[0]} {lack}; bring it, "
                    "set root or data.corpus_root to where the sets lie, or let the set be absent with "
                    "allowed_shortfall: 1"
                )
            folders = [folder for folder in folders if folder not in missing]
        found.append((wanted, list(map(str, folders))))
    return found


def _require_stock(stock: Stock) -> None:
    wanted = stock.wanted
    short = wanted.expected - stock.found
    if short > wanted.allowed_shortfall * wanted.expected:
        raise ShardError(
            f"set {wanted.name} has {stock.found} of {wanted.expected} expected {wanted.unit}: "
            f"{short / wanted.expected:.1%} are missing, allowed_shortfall is {wanted.allowed_shortfall:.1%}; bring "
            "the rest, or raise allowed_shortfall"
        )
