"""Retrieval over one and several ranks against a slow loop over single pairs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.sample import Batch
from smaug_ds.evaluation.encoding import encode_clips, encode_texts
from smaug_ds.evaluation.metrics import dual_softmax, top_k
from smaug_ds.evaluation.retrieval import RetrievalConfig, RetrievalResult, evaluate
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer, train_vocabulary
from tests.models import VOCABULARY, random_batch, small_config, small_model
from tests.ranks import run_ranks

WORDS = ["ab", "ba", "abb", "bab", "bba", "aab", "abab", "baba"]
CONFIG = RetrievalConfig(rerank_depth=4, pair_batch_size=5)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path)


def make_tokenizer(folder: Path) -> Tokenizer:
    train_vocabulary(WORDS, VOCABULARY, folder / "vocab.txt")
    return Tokenizer(folder / "vocab.txt")


def make_loader(frames: int, sizes: tuple[int, ...] = (4, 4, 3), rank: int = 0, world_size: int = 1) -> list[Batch]:
    """Batches of clips, dealt out to the ranks in turn; every third clip has two captions."""
    config = small_config(frames, 1)
    draw = np.random.default_rng(3)
    loader, first = [], 0
    for number, size in enumerate(sizes):
        ids = range(first, first + size)
        captions = [tuple(" ".join(draw.choice(WORDS, 3 + i % 4)) for _ in range(1 + (i % 3 == 0))) for i in ids]
        batch = dataclasses.replace(
            random_batch(config, size, seed=number),
            media_ids=torch.tensor([100 + i for i in ids]),
            keys=[f"shard/{(7 * i) % 11:02d}" for i in ids],  # their order is not that of the loader
            all_captions=captions,
        )
        first += size
        if number % world_size == rank:
            loader.append(batch)
    return loader


def slow_scores(model: SmaugModel, loader: list[Batch], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and match logit of every text with every clip, one pair at a time, in the order of the keys."""
    model.eval()
    clips = {key: batch.frames[i : i + 1] for batch in loader for i, key in enumerate(batch.keys)}
    captions = {key: batch.all_captions[i] for batch in loader for i, key in enumerate(batch.keys)}
    cosine, match = [], []
    for key in sorted(clips):
        for caption in captions[key]:
            text = model.encode_text(*tokenizer.encode([caption], model.config.text.max_length))
            visuals = [model.encode_frames(clips[other], None) for other in sorted(clips)]
            cosine.append([float(text.embedding[0] @ visual.embedding[0]) for visual in visuals])
            match.append([float(model.match(visual, text)) for visual in visuals])
    return np.array(cosine), np.array(match)


def slow_order(cosine: np.ndarray, match: np.ndarray, depth: int) -> list[int]:
    by_cosine = sorted(range(len(cosine)), key=lambda c: -cosine[c])
    return sorted(by_cosine[:depth], key=lambda c: -match[c]) + by_cosine[depth:]


@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_equals_slow_loop(tokenizer: Tokenizer, frames: int) -> None:
    model, loader = small_model(small_config(frames, 1)), make_loader(frames)
    result = evaluate(model, loader, tokenizer, CONFIG)
    cosine, match = slow_scores(model, loader, tokenizer)
    details = result.details
    assert details.t2v_scores.shape == cosine.shape == (15, 11)
    for text in range(15):
        order = slow_order(cosine[text], match[text], CONFIG.rerank_depth)
        assert np.argsort(-details.t2v_scores[text]).tolist() == order
        best = details.t2v_scores[text, order[: CONFIG.rerank_depth]]
        assert np.allclose(best, match[text, order[: CONFIG.rerank_depth]], atol=1e-5)
    for clip in range(11):
        order = slow_order(cosine[:, clip], match[:, clip], CONFIG.rerank_depth)
        assert np.argsort(-details.v2t_scores[:, clip]).tolist() == order
    first = [int(np.flatnonzero(details.relevant[row])[0]) for row in range(15)]
    ranks = [1 + slow_order(cosine[row], match[row], 4).index(first[row]) for row in range(15)]
    assert result.t2v_r1 == pytest.approx(100 * np.mean([rank <= 1 for rank in ranks]))
    assert result.t2v_r5 == pytest.approx(100 * np.mean([rank <= 5 for rank in ranks]))
    assert result.median_rank == np.median(ranks)
    ranks = [1 + int((cosine[row] > cosine[row, first[row]]).sum()) for row in range(15)]
    assert result.dual_encoder.mean_rank == pytest.approx(np.mean(ranks))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cosine_only(tokenizer: Tokenizer, precision: str) -> None:
    model, loader = small_model(), make_loader(1)
    config = dataclasses.replace(CONFIG, rerank_depth=0, precision=precision)
    result = evaluate(model, loader, tokenizer, config)
    assert result.details.t2v_scores is result.details.v2t_scores
    assert result.t2v_r5 == result.dual_encoder.t2v_r5
    with torch.no_grad():
        cosine, _ = slow_scores(model, loader, tokenizer)
    assert result.details.t2v_scores.dtype == np.float32
    assert np.allclose(result.details.t2v_scores, cosine, atol=1e-5 if precision == "fp32" else 0.05)


def test_deep_reranking_matches_every_pair(tokenizer: Tokenizer) -> None:
    model, loader = small_model(), make_loader(1)
    result = evaluate(model, loader, tokenizer, dataclasses.replace(CONFIG, rerank_depth=1000))
    with torch.no_grad():
        _, match = slow_scores(model, loader, tokenizer)
    assert np.allclose(result.details.t2v_scores, match, atol=1e-5)
    assert np.allclose(result.details.v2t_scores, match, atol=1e-5)


def test_joined_captions(tokenizer: Tokenizer) -> None:
    loader = make_loader(1)
    result = evaluate(small_model(), loader, tokenizer, dataclasses.replace(CONFIG, join_captions=True))
    assert (result.n_texts, result.n_videos) == (11, 11)
    assert result.protocol["captions"] == "joined"
    first = next(
        caption
        for batch in loader
        for key, caption in zip(batch.keys, batch.all_captions, strict=True)
        if key == "shard/00"
    )
    assert len(first) == 2 and result.details.texts[0] == " ".join(first)


def slow_pooled(model: SmaugModel, loader: list[Batch], tokenizer: Tokenizer, pooling: str, match: bool) -> np.ndarray:
    """Scores (texts, clips) of frames that are each a clip of their own after the temporal encoder, pooled."""
    model.eval()
    clips = {key: batch.frames[i : i + 1] for batch in loader for i, key in enumerate(batch.keys)}
    captions = {key: batch.all_captions[i] for batch in loader for i, key in enumerate(batch.keys)}
    temperature = 1.0 if match else float(torch.exp(-model.logit_scale))
    table = []
    for key in sorted(clips):
        for caption in captions[key]:
            text = model.encode_text(*tokenizer.encode([caption], model.config.text.max_length))
            row = []
            for other in sorted(clips):
                tokens = model.encode_frames(clips[other], None).tokens
                frames = []
                for t in range(tokens.shape[1]):
                    if match:
                        logits = model.match_logits(model.fuse(text.states, text.packing, tokens[:, t]), text.packing)
                        frames.append(float(logits[0, 1] - logits[0, 0]))
                    else:
                        alone = torch.nn.functional.normalize(model.vision_projection(tokens[0, t, 0]), dim=0)
                        frames.append(float(text.embedding[0] @ alone))
                mean = sum(math.exp(score / temperature) for score in frames) / len(frames)
                row.append({"mean": np.mean(frames), "max": max(frames), "lse": temperature * math.log(mean)}[pooling])
            table.append(row)
    return np.array(table)


@pytest.mark.parametrize("pooling", ["mean", "max", "lse"])
@torch.no_grad()
def test_pooled_frames_equal_slow_loop(tokenizer: Tokenizer, pooling: str) -> None:
    model, loader = small_model(small_config(3, 1)), make_loader(3, (3, 2))
    pooled = dataclasses.replace(CONFIG, frame_scores=pooling)
    cosine = evaluate(model, loader, tokenizer, dataclasses.replace(pooled, rerank_depth=0))
    assert cosine.protocol["frame_scores"] == pooling and cosine.protocol["frames_kept"] == 3
    expected = slow_pooled(model, loader, tokenizer, pooling, match=False)
    assert np.allclose(cosine.details.t2v_scores, expected, atol=1e-5)
    matched = evaluate(model, loader, tokenizer, dataclasses.replace(pooled, rerank_depth=100))
    expected = slow_pooled(model, loader, tokenizer, pooling, match=True)
    assert np.allclose(matched.details.t2v_scores, expected, atol=1e-5)


def test_pooled_frames_of_images_and_videos(tokenizer: Tokenizer) -> None:
    """An image is one frame, whatever the clips beside it have."""
    model, (videos, images) = small_model(small_config(3, 1)), make_loader(3, (3, 2))
    images = dataclasses.replace(images, frames=images.frames[:, :1], medium="image")
    for depth in (0, 100):
        scores = {}
        for frame_scores in ("joined", "lse"):
            config = dataclasses.replace(CONFIG, frame_scores=frame_scores, rerank_depth=depth)
            result = evaluate(model, [videos, images], tokenizer, config)
            columns = [result.details.keys.index(key) for key in images.keys]
            scores[frame_scores] = result.details.t2v_scores[:, columns]
        assert np.allclose(scores["joined"], scores["lse"], atol=1e-5)


def test_dual_softmax_of_cosines_and_of_match_logits(tokenizer: Tokenizer) -> None:
    model, loader = small_model(), make_loader(1)
    with torch.no_grad():
        cosine, match = slow_scores(model, loader, tokenizer)
    config = dataclasses.replace(CONFIG, dual_softmax=True, rerank_depth=0)
    result = evaluate(model, loader, tokenizer, config)
    first = dual_softmax(cosine * float(model.logit_scale.detach().exp()))
    assert np.allclose(result.details.t2v_scores, first, atol=1e-4) and result.protocol["dual_softmax"]
    assert "dual softmax" in result.table()
    result = evaluate(model, loader, tokenizer, dataclasses.replace(config, rerank_depth=4))
    chosen = top_k(first, 4), top_k(first.T, 4).T
    second = dual_softmax(match, chosen[0] | chosen[1])
    for found, expected, mask in [
        (result.details.t2v_scores, second, chosen[0]),
        (result.details.v2t_scores, second, chosen[1]),
    ]:
        assert np.allclose(found[mask], expected[mask], atol=1e-4)
    assert (
        np.argsort(-result.details.t2v_scores[0])[:4].tolist()
        == np.argsort(-np.where(chosen[0], second, -np.inf)[0])[:4].tolist()
    )


def test_longer_texts(tokenizer: Tokenizer) -> None:
    """As many tokens as the position table has places."""
    short = small_config()
    long = dataclasses.replace(short, text=dataclasses.replace(short.text, max_length=64))
    words = " ".join(WORDS * 12)
    lengths = []
    for config in (short, long):
        loader = [dataclasses.replace(batch, all_captions=[(words,)] * len(batch)) for batch in make_loader(1)]
        model = small_model(config)
        with torch.no_grad():
            lengths.append(encode_texts(model, [words], tokenizer, 5).packing.lengths)
        assert evaluate(model, loader, tokenizer, CONFIG).protocol["max_text_tokens"] == config.text.max_length
    assert lengths == [[12], [64]]


def test_tokens_are_kept_for_reranking_only(tokenizer: Tokenizer) -> None:
    model, loader = small_model(small_config(3, 1)), make_loader(3)
    with torch.no_grad():
        assert all(batch.visual.tokens.numel() > 0 for batch in encode_clips(model, loader))
        assert all(batch.visual.tokens.numel() == 0 for batch in encode_clips(model, loader, with_tokens=False))


@torch.no_grad()
def test_tokens_kept_in_bf16_change_nothing(tokenizer: Tokenizer) -> None:
    model, loader = small_model(small_config(3, 1)).eval(), make_loader(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = encode_clips(model, loader)[0]
        whole = model.encode_frames(loader[0].frames)
        texts = encode_texts(model, WORDS[:4], tokenizer, 4)
        assert (kept.visual.tokens.dtype, whole.tokens.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(model.match(kept.visual, texts), model.match(whole, texts))


def test_model_is_left_as_it_was(tokenizer: Tokenizer) -> None:
    model = small_model().train()
    evaluate(model, make_loader(1), tokenizer, CONFIG)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_report_says_its_conditions(tokenizer: Tokenizer) -> None:
    result = evaluate(small_model(small_config(3, 1)), make_loader(3), tokenizer, CONFIG, checkpoint="runs/a step 7")
    report = json.loads(json.dumps(result.report()))
    assert report["n_texts"] == 15 and report["n_videos"] == report["n"] == 11 and report["split"] == "test"
    assert report["chance_r1"] == pytest.approx(100 / 11)
    assert report["t2v_r1"] == result.t2v_r1 and report["dual_encoder"]["t2v_r1"] == result.dual_encoder.t2v_r1
    assert report["protocol"] == {
        "split": "test",
        "media": {"video": 11},
        "frames": 3,
        "frames_kept": 1,
        "frame_scores": "joined",
        "image_size": 32,
        "sparsified": True,
        "captions": "each a query",
        "cleaning": "Singularity's pre_text",
        "max_text_tokens": 12,
        "rerank_depth": 4,
        "score": "match logit among the reranked, cosine below them",
        "dual_softmax": False,
        "ties": "pessimistic",
        "precision": "float32 weights, fp32 forward pass, fp32 scores",
        "checkpoint": "runs/a step 7",
    }
    table = result.table()
    assert "15 texts, 11 clips" in table and "top 4 reranked" in table


def test_empty_split_and_bad_config(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"test split has no clips.*data\.test"):
        evaluate(small_model(), [], tokenizer, CONFIG)
    with pytest.raises(ConfigError, match=r"evaluation\.rerank_depth is -1"):
        RetrievalConfig(rerank_depth=-1)
    with pytest.raises(ConfigError, match=r"evaluation\.pair_batch_size is 0"):
        RetrievalConfig(pair_batch_size=0)


def evaluate_on_rank(folder: Path, sizes: tuple[int, ...], config: RetrievalConfig) -> RetrievalResult:
    own = folder / str(distributed.rank())
    own.mkdir(exist_ok=True)
    loader = make_loader(3, sizes, distributed.rank(), distributed.world_size())
    return evaluate(small_model(small_config(3, 1)), loader, make_tokenizer(own), config)


POOLED = dataclasses.replace(CONFIG, frame_scores="lse", dual_softmax=True)


@pytest.mark.parametrize(
    ("sizes", "config"), [((4, 4, 3), CONFIG), ((11,), CONFIG), ((4, 4, 3), POOLED)]
)  # of (11,) the second rank has nothing
def test_two_ranks_equal_one(tmp_path: Path, sizes: tuple[int, ...], config: RetrievalConfig) -> None:
    alone = evaluate_on_rank(tmp_path, sizes, config)
    for result in run_ranks(evaluate_on_rank, 2, tmp_path, sizes, config):
        assert result.report() == alone.report()
        assert result.details.keys == alone.details.keys and result.details.texts == alone.details.texts
        assert np.array_equal(result.details.t2v_scores, alone.details.t2v_scores)
        assert np.array_equal(result.details.v2t_scores, alone.details.v2t_scores)
