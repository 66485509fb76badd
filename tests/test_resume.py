"""What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.config import ConfigError, parse, to_dict
from smaug_ds.engine.resume import check_resumable, fingerprints, flat
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.text import Tokenizer

VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nball\n"
PATHS = ["data.train=[shards]", "data.tokenizer=vocab.txt"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text(VOCABULARY)
    return path


def settings(*overrides: str) -> dict[str, Any]:
    return to_dict(parse(PretrainConfig, None, [*PATHS, *overrides]))


def check(vocabulary: Path, *overrides: str, corpus: str = "as it was") -> None:
    """Goes on with ``overrides``, ``vocabulary`` and ``corpus`` from a checkpoint of the defaults."""
    original = vocabulary.with_name("original.txt")
    original.write_text(VOCABULARY)
    state = {"config": settings(), "world_size": 1, "fingerprints": fingerprints("as it was", Tokenizer(original))}
    now = settings(*overrides)
    check_resumable(state, now, fingerprints(corpus, Tokenizer(vocabulary)), Path("run/checkpoints/step_4"))


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1", "batch.micro_size=16", "batch.global_size=512", "model.frames=2", "model.vision.keep_rate=0.7",
        "loss.mvm=0.5", "loss.contrastive=sigmoid", "loss.mlm_probability=0.3", "data.holdout=0.1",
        "data.shuffle_group=4", "data.crop_scale=[0.4, 1]", "data.crop_ratio=[1, 1]", "data.flip=0", "optim.lr=1e-3",
        "optim.betas=[0.9, 0.98]", "optim.eps=1e-6", "optim.weight_decay=0.1", "optim.gradient_clip=2",
    ],
)  # fmt: skip
def test_what_would_make_it_another_run_is_refused(vocabulary: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}(\[\d\])? is .*, but run/checkpoints/step_4 was made with"):
        check(vocabulary, override)


@pytest.mark.parametrize(
    "override",
    [
        "optim.epochs=20", "run.max_steps=9", "run.log_every=1", "data.workers=5", "data.decoder=pyav",
        "model.vision.checkpoint_every=1", "model.text.checkpoint_every=2", "evaluation.rerank_depth=3",
        "data.train=[elsewhere]", "data.tokenizer=elsewhere.txt",
    ],
)  # fmt: skip
def test_what_does_not_change_the_run_may_change(vocabulary: Path, override: str) -> None:
    check(vocabulary, override)


def test_files_are_known_by_what_they_hold(vocabulary: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copy(vocabulary, tmp_path / "elsewhere"))
    check(moved, f"data.tokenizer={moved}")
    with pytest.raises(ConfigError, match=r"data\.train is \['shards'\], which holds other shards or weights"):
        check(vocabulary, corpus="another")
    with pytest.raises(ConfigError, match=r"data\.corpus is all\.yaml, which holds other shards or weights"):
        check(vocabulary, "data.train=[]", "data.corpus=all.yaml", corpus="another")
    vocabulary.write_text(VOCABULARY.replace("ball", "bell"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer is vocab\.txt, which holds another vocabulary"):
        check(vocabulary)


def test_flat_joins_names() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
