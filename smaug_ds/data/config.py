"""The settings of the data path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from smaug_ds.config import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and what happens to them on the way to a batch."""

    train: tuple[str, ...] = ()  # folders of indexed shards
    corpus: str = ""  # manifest of weighted sets (YAML, see data/mixture.py), in place of ``train``
    corpus_root: str = ""  # where the folders of ``corpus`` lie, in place of the manifest's ``root``
    test: tuple[str, ...] = ()  # folders held out whole; empty: the share ``holdout`` of ``train`` is the test split
    holdout: float = 0.0  # share of the training media kept for testing, 0 to 1
    tokenizer: str = ""  # vocab.txt or tokenizer.json
    workers: int = 2  # processes per rank that read and decode; 0: a thread of the rank does
    prefetch: int = 2  # micro batches that each worker has ready, and as many again on the device
    dali_threads: int = 2  # threads of the DALI graph per rank; on a GPU also its NVDEC sessions at a time
    decoder: Literal["auto", "pyav", "nvdec"] = "auto"  # of videos; auto: NVDEC where it works
    crop_scale: tuple[float, float] = (0.5, 1.0)  # share of the frame's area that a training crop shows
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height of a training crop
    flip: float = 0.5  # probability; 0 where captions tell left from right
    shuffle_group: int = 8  # shards shuffled together
    max_consecutive_failures: int = 10  # candidates for one place of a batch that may fail before the run stops
    max_failed_share: float = 0.2  # of the latest ``failure_window`` samples that may fail before the run stops
    failure_window: int = 1000  # samples of a rank
    sample_seconds: float = 60.0  # that reading and decoding one sample may take; needs ``workers``, which it ends

    def __post_init__(self) -> None:
        if self.corpus and self.train:
            raise ConfigError(f"data.corpus is {self.corpus} and data.train {list(self.train)}: give one of them")
        limits: list[tuple[str, float, float]] = [
            ("holdout", 0, 1),
            ("flip", 0, 1),
            ("max_failed_share", 0, 1),
            ("workers", 0, math.inf),
            ("prefetch", 1, math.inf),
            ("dali_threads", 1, math.inf),
            ("shuffle_group", 1, math.inf),
            ("max_consecutive_failures", 1, math.inf),
            ("failure_window", 1, math.inf),
            ("sample_seconds", 0.1, math.inf),
        ]
        for name, least, most in limits:
            value = getattr(self, name)
            if not least <= value <= most:
                allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise ConfigError(f"data.{name} is {value}: it must be {allowed}")
        pairs: list[tuple[str, tuple[float, float], float]] = [
            ("crop_scale", self.crop_scale, 1.0),
            ("crop_ratio", self.crop_ratio, math.inf),
        ]
        for name, (low, high), most in pairs:
            if not 0 < low <= high <= most:
                raise ConfigError(f"data.{name} is [{low}, {high}]: both must lie above 0 and up to {most}, in order")
