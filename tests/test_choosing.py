"""Multiple choice as a training task: its loss against one pair after the other, over ranks, and its samples."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smaug_ds import distributed, losses
from smaug_ds.config import ConfigError
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.mixture import open_mixture
from smaug_ds.data.order import stable_hash
from smaug_ds.data.questions import QuestionCorpus, TextChoice, of_questions
from smaug_ds.data.reader import TrainReader
from smaug_ds.data.sample import Batch, BatchShape
from smaug_ds.engine.choosing import MultipleChoice, right_first
from smaug_ds.engine.finetuning import _by_clip, _choices, _require_choices
from smaug_ds.evaluation.asking import Asked, ask
from smaug_ds.text import Tokenizer
from tests.models import VOCABULARY, random_batch, share, small_config, small_model
from tests.ranks import run_ranks

COUNTS = [4, 1, 2, 4, 1, 4, 3, 1]  # wrong texts of each clip


def batch_of_choices() -> Batch:
    batch = random_batch(small_config(3, 2))
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 12, (sum(COUNTS),), generator=generator).tolist()
    ids = torch.randint(5, VOCABULARY, (sum(lengths),), generator=generator)
    return dataclasses.replace(batch, wrong_counts=COUNTS, wrong_lengths=lengths, wrong_ids=ids)


def own_share(batch: Batch, rank: int, world_size: int) -> Batch:
    """``share`` with the wrong texts of its clips."""
    size = len(batch) // world_size
    before, own = sum(COUNTS[: rank * size]), COUNTS[rank * size : (rank + 1) * size]
    lengths = batch.wrong_lengths[before : before + sum(own)]
    start = sum(batch.wrong_lengths[:before])
    ids = batch.wrong_ids[start : start + sum(lengths)]
    bare = dataclasses.replace(batch, wrong_counts=[], wrong_lengths=[])
    return dataclasses.replace(share(bare, rank, world_size), wrong_counts=own, wrong_lengths=lengths, wrong_ids=ids)


def slow_loss(module: MultipleChoice, batch: Batch) -> tuple[Tensor, float]:
    """One clip and one text at a time."""
    model = module.model
    rights, wrongs = batch.input_ids.split(batch.lengths), list(batch.wrong_ids.split(batch.wrong_lengths))
    total, right = torch.zeros(()), 0
    for clip, count in enumerate(batch.wrong_counts):
        visual = model.encode_frames(batch.frames[clip : clip + 1], batch.patch_noise[clip : clip + 1])
        scores = []
        for ids in (rights[clip], *(wrongs.pop(0) for _ in range(count))):
            text = model.encode_text(ids, [len(ids)])
            seen = model.look_at(visual.tokens, text.sentence, batch.frame_noise[clip : clip + 1])
            logits = model.match_logits(model.fuse(text.states, text.packing, seen), text.packing)[0]
            scores.append(logits[1] - logits[0])
        total = total - torch.stack(scores).log_softmax(dim=0)[0]
        right += all(scores[0] > other for other in scores[1:])
    return total / len(batch), right / len(batch)


def test_loss_equals_one_pair_after_the_other() -> None:
    batch = batch_of_choices()
    gradients = []
    modules = [MultipleChoice(small_model(small_config(3, 2))) for _ in range(2)]
    results = modules[0](batch)
    slow, right = slow_loss(modules[1], batch)
    assert results["choice_accuracy"] == right and results["loss"] is results["choice"]
    torch.testing.assert_close(results["loss"], slow, atol=1e-5, rtol=1e-5)
    for module, loss in zip(modules, (results["loss"], slow), strict=True):
        loss.backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradients[1][name] is not None, f"{name} should be frozen or trained"
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)


def of_rank() -> tuple[float, dict[str, list[float]]]:
    module = MultipleChoice(small_model(small_config(3, 2)))
    batch = own_share(batch_of_choices(), distributed.rank(), distributed.world_size())
    loss = module(batch)["loss"]
    loss.backward()
    names = ("match_head.weight", "vision.class_token", "selector.score.weight", "text.embedding.norm.bias")
    own = dict(module.model.named_parameters())
    picked = [name for name in names if name in own]
    assert len(picked) >= 3
    return loss.item(), {name: own[name].grad.flatten().tolist() for name in picked}  # type: ignore[union-attr]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_equal_one(world_size: int) -> None:
    loss, gradients = of_rank()
    shares = run_ranks(of_rank, world_size)
    assert sum(own for own, _ in shares) / world_size == pytest.approx(loss, rel=1e-5)
    for name, whole in gradients.items():
        mean = torch.tensor([own[name] for _, own in shares]).mean(dim=0)
        torch.testing.assert_close(mean, torch.tensor(whole), atol=1e-6, rtol=1e-4)


def test_right_texts_come_before_their_wrong_ones() -> None:
    assert right_first([3, 1, 2]) == [0, 3, 4, 1, 2, 5]
    scores = torch.tensor([2.0, 1.0, 0.0, 5.0])
    expected = (scores[:3].logsumexp(0) - 2) / 2
    torch.testing.assert_close(losses.choice(scores, [3, 1]), expected)


# ---- choices as training samples


@pytest.fixture(scope="module")
def toy(toy_media: Path, toy_shards: Path) -> tuple[Corpus, Asked]:
    corpus = Corpus.open([toy_shards / "train"], 0.0, "train")
    return corpus, ask([str(toy_media / "mc_train.json")], corpus, 0)[0]


def test_every_choice_is_a_sample_with_its_video(toy: tuple[Corpus, Asked], toy_media: Path, toy_shards: Path) -> None:
    corpus, asked = toy
    by_clip = _by_clip([asked], _choices)
    choices = pickle.loads(pickle.dumps(QuestionCorpus(corpus, by_clip)))
    rows = {row["video"]: row for row in json.loads((toy_media / "mc_train.json").read_text())}
    assert len(choices) == len(rows) == choices.count("video")
    for number in range(len(rows)):
        sample = choices.read_sample(choices.nth("video", number))
        row = rows.pop(sample.media_id)
        assert sample.captions == (row["caption"][row["answer"]],) and sample.answer is None
        assert list(sample.wrong) == [text for i, text in enumerate(row["caption"]) if i != row["answer"]]
    assert not rows

    mixture = open_mixture(DataConfig(train=(str(toy_shards / "train"),)))
    first, marks = next(iter(by_clip)), []
    for wrong in (("a", "b"), ("a", "b"), ("a", "c")):
        marks.append(of_questions(mixture, {**by_clip, first: [TextChoice("x", wrong)]}).fingerprint())
    assert marks[0] == marks[1] != marks[2]


def test_batches_hold_the_wrong_texts_of_each_clip(
    toy: tuple[Corpus, Asked], toy_media: Path, toy_shards: Path
) -> None:
    _, asked = toy
    mixture = of_questions(open_mixture(DataConfig(train=(str(toy_shards / "train"),))), _by_clip([asked], _choices))
    tokenizer, shape = Tokenizer(toy_media / "vocab.txt"), BatchShape(2, 32, 16, 32, 0.15)
    order = mixture.order(4, 1, 1)
    reader = TrainReader(mixture.corpus, order, tokenizer, DataConfig(), shape, 1, 4, 1, 0, 1, frozenset())
    batch = reader[0].batch
    assert batch is not None and batch.wrong_counts == [4] * 4 and not batch.answer_lengths
    rows = {stable_hash(row["video"]): row for row in json.loads((toy_media / "mc_train.json").read_text())}
    texts = [tokenizer.decode(ids) for ids in batch.wrong_ids.split(batch.wrong_lengths)]
    for clip, media in enumerate(batch.media_ids.tolist()):
        row = rows[media]
        assert batch.captions[clip] == row["caption"][row["answer"]]
        assert texts[4 * clip : 4 * clip + 4] == [t for i, t in enumerate(row["caption"]) if i != row["answer"]]


def test_a_choice_of_one_text_is_named(toy: tuple[Corpus, Asked], toy_media: Path, tmp_path: Path) -> None:
    rows = json.loads((toy_media / "mc_train.json").read_text())[:3]
    rows[1] |= {"caption": rows[1]["caption"][:1], "answer": 0}
    (tmp_path / "mc.json").write_text(json.dumps(rows))
    asked = ask([str(tmp_path / "mc.json")], toy[0], 0)[0]
    with pytest.raises(ConfigError, match=r"questions\.train: .*mc\.json, row 1 has 1 text: a choice needs at least 2"):
        _require_choices(asked)
