"""Fixtures shared by all tests: small corpora made once a run, and the optional folder of real media."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from smaug_ds.data.index import Corpus
    from smaug_ds.text import Tokenizer
    from tests.forked import Forks

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real clips, images and annotation files that lie beside the checkout; tests that need them fail without."""
    folder = ROOT.parent / "shared" / "data"
    assert folder.is_dir(), f"{folder} is missing: real media for these tests lie beside the checkout"
    return folder


@pytest.fixture(scope="session")
def toy_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small built-in corpus: media, Singularity-style lists and vocab.txt."""
    from smaug_ds.data.toy import ToyConfig, render_corpus

    folder = tmp_path_factory.mktemp("toy_media")
    render_corpus(ToyConfig(clips=64, images=32, test_clips=32, seed=7), folder, workers=2)
    return folder


@pytest.fixture(scope="session")
def toy_shards(toy_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus as indexed shards: folders train and test."""
    from tools.build_shards import build

    folder = tmp_path_factory.mktemp("toy_shards")
    for split, names in {"train": ["video_train.json", "image_train.json"], "test": ["video_test.json"]}.items():
        lists = [toy_media / name for name in names]
        build(lists=lists, media_root=toy_media, out=folder / split, samples_per_shard=16, workers=2)
    return folder


@pytest.fixture(scope="module")
def tokenizer(toy_media: Path) -> Tokenizer:
    """Of the small corpus."""
    from smaug_ds.text import Tokenizer

    return Tokenizer(toy_media / "vocab.txt")


@pytest.fixture(scope="module")
def corpus(toy_shards: Path) -> Corpus:
    """All training samples of the small corpus."""
    from smaug_ds.data.index import Corpus

    return Corpus.open([toy_shards / "train"], holdout=0.0, split="train")


@pytest.fixture(scope="session")
def whole_run(toy_shards: Path, toy_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run of two ranks on this host, which broken ones are compared with."""
    from tests.cluster.runs import arguments, finish, launch_local

    folder = tmp_path_factory.mktemp("whole_run") / "run"
    finish(launch_local(folder, arguments(toy_shards, toy_media, folder), PREFLIGHT="0"), folder)
    return folder


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Starts ranks of real runs in a moment."""
    from tests.forked import Forks

    with Forks() as forks:
        yield forks
