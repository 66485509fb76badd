"""Multiple choice by match score against one pair after the other, over ranks, and with clips that are lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from smaug_ds.data.config import DataConfig
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.sample import Batch
from smaug_ds.evaluation.asking import Asked, open_asked
from smaug_ds.evaluation.benchmarks import BenchmarkError, read_benchmark
from smaug_ds.evaluation.multiple_choice import ChoiceResult, evaluate
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer
from tests.models import small_config, small_model
from tests.ranks import run_ranks

SIZES = RetrievalConfig(batch_size=8, pair_batch_size=7)  # a question's choices are not all scored at once


def opened(media: Path, shards: Path, file: Path) -> tuple[SmaugModel, list[Batch], Asked, Tokenizer]:
    tokenizer = Tokenizer(media / "vocab.txt")
    config = small_config(3, 2)
    text = dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size, max_length=32)
    model = small_model(dataclasses.replace(config, text=text))
    data, ledger = DataConfig(test=(str(shards / "test"),), workers=0), Ledger(shards / "ledger", 0)
    benchmark, device = read_benchmark(file), torch.device("cpu")
    loader, asked = open_asked(benchmark, model.config, data, 8, tokenizer, device, ledger)
    return model, list(loader), asked, tokenizer


def choose(media: Path, shards: Path) -> ChoiceResult:
    model, batches, asked, tokenizer = opened(media, shards, media / "mc_test.json")
    return evaluate(model, batches, asked, tokenizer, SIZES, "weights")


def scores_of_rank(media: Path, shards: Path) -> tuple[float, np.ndarray]:
    result = choose(media, shards)
    return result.accuracy, result.scores


def test_scores_are_match_logits_of_one_pair_after_the_other(toy_media: Path, toy_shards: Path) -> None:
    result = choose(toy_media, toy_shards)
    model, batches, asked, tokenizer = opened(toy_media, toy_shards, toy_media / "mc_test.json")
    rows = json.loads((toy_media / "mc_test.json").read_text())
    assert [record.choices for record in asked.benchmark.choices] == [tuple(row["caption"]) for row in rows]
    expected = np.zeros((len(rows), 5))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            for clip, key in enumerate(batch.keys):
                visual = model.encode_frames(batch.frames[clip : clip + 1])
                for row in asked.rows[key]:
                    for number, text in enumerate(rows[row]["caption"]):
                        ids, lengths = tokenizer.encode([text], 32)
                        expected[row, number] = float(model.match(visual, model.encode_text(ids, lengths)))
    np.testing.assert_allclose(result.scores, expected, atol=1e-5)
    right = [int(values.argmax()) == row["answer"] for values, row in zip(expected, rows, strict=True)]
    assert result.accuracy == pytest.approx(100 * np.mean(right)) and result.chance == pytest.approx(20)
    assert result.n_questions == 32 and result.unanswered == 0
    assert result.protocol["score"] == "match logit" and result.protocol["checkpoint"] == "weights"
    assert "scores" not in result.report() and json.dumps(result.report())
    assert "chance 20.00; 32 questions" in result.table()


def test_two_ranks_equal_one(toy_media: Path, toy_shards: Path) -> None:
    alone = choose(toy_media, toy_shards)
    for accuracy, scores in run_ranks(scores_of_rank, 2, toy_media, toy_shards):
        assert accuracy == alone.accuracy
        np.testing.assert_allclose(scores, alone.scores, atol=1e-5)


def test_fewer_choices_and_lost_clips(toy_media: Path, toy_shards: Path, tmp_path: Path) -> None:
    rows = json.loads((toy_media / "mc_test.json").read_text())[:4]
    rows[0] |= {"caption": rows[0]["caption"][:2], "answer": 1}
    rows.append({**rows[1], "caption": rows[1]["caption"][:1], "answer": 0})  # a second question on one clip
    file = tmp_path / "mc.json"
    file.write_text(json.dumps(rows))
    model, batches, asked, tokenizer = opened(toy_media, toy_shards, file)
    result = evaluate(model, batches, asked, tokenizer, SIZES)
    assert np.isfinite(result.scores).sum(axis=1).tolist() == [2, 5, 5, 5, 1]
    assert result.chance == pytest.approx(100 * (0.5 + 3 * 0.2 + 1) / 5)
    lost = next(key for key, own in asked.rows.items() if own == [2])
    renamed = [
        dataclasses.replace(batch, keys=["?" if key == lost else key for key in batch.keys]) for batch in batches
    ]
    without = evaluate(model, renamed, asked, tokenizer, SIZES)
    assert without.unanswered == 1 and np.isneginf(without.scores[2]).all()
    assert without.accuracy <= result.accuracy


def test_a_missing_video_is_named_or_left_out(toy_media: Path, toy_shards: Path, tmp_path: Path) -> None:
    rows = json.loads((toy_media / "mc_test.json").read_text())[:3]
    rows[1]["video"] = "nowhere/to/be/found.mp4"
    file = tmp_path / "mc.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(BenchmarkError, match=r"1 of 3 videos are missing in .*nowhere/to/be/found\.mp4 \(row 1\)"):
        opened(toy_media, toy_shards, file)
    data, ledger = DataConfig(test=(str(toy_shards / "test"),), workers=0), Ledger(tmp_path, 0)
    tokenizer, config = Tokenizer(toy_media / "vocab.txt"), small_config()
    _, asked = open_asked(
        read_benchmark(file), config, data, 8, tokenizer, torch.device("cpu"), ledger, allowed_missing=1
    )
    assert len(asked.benchmark) == 2 and asked.missing == ("nowhere/to/be/found.mp4",)
    assert sorted(row for own in asked.rows.values() for row in own) == [0, 1]
