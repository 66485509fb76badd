"""The answer decoder and its loss against slow references, the ranker against enumeration, evaluation over ranks."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from smaug_ds import losses
from smaug_ds.data.config import DataConfig
from smaug_ds.data.index import Corpus
from smaug_ds.data.mixture import open_mixture
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.questions import QuestionAnswer, QuestionCorpus, of_questions
from smaug_ds.data.sample import Batch
from smaug_ds.engine.answering import QuestionAnswering
from smaug_ds.evaluation.asking import Asked, QuestionConfig, answers_to_choose_from, ask, open_asked
from smaug_ds.evaluation.benchmarks import read_benchmark, read_predictions
from smaug_ds.evaluation.question_answering import AnswerResult, evaluate, generate, log_likelihood, rank
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.answers import AnswerDecoder, next_words, with_answer_decoder
from smaug_ds.model.language import TextConfig
from smaug_ds.model.packing import Packing
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.text import TextIds, Tokenizer
from tests.models import random_batch, share, small_config, small_model
from tests.ranks import run_ranks

CLS, SEP = 2, 3
QUESTIONS = [5, 9, 3, 7]  # tokens of each
ANSWERS = [[8], [8, 11], [8, 11, 12], [9], [10, 9], [8], [13, 8, 9, 10], [11, 8]]  # words; the sixth repeats the first


def answering_config(frames: int = 1, frames_kept: int = 1) -> ModelConfig:
    config = small_config(frames, frames_kept)
    text = dataclasses.replace(config.text, fusion_layers=2)
    return dataclasses.replace(config, text=text, answer_layers=2)


@pytest.fixture(scope="module")
def model() -> SmaugModel:
    return small_model(answering_config()).eval()


def packed(answers: list[list[int]]) -> TextIds:
    rows = [[CLS, *words, SEP] for words in answers]
    return TextIds(torch.tensor([i for row in rows for i in row]), [len(row) for row in rows])


def questions() -> tuple[torch.Tensor, Packing]:
    torch.manual_seed(4)
    return torch.randn(sum(QUESTIONS), 32), Packing.of(QUESTIONS, "cpu")


# ---- the decoder


def test_decoder_equals_bert_as_a_decoder() -> None:
    config = TextConfig(vocab_size=30, width=32, heads=4, mlp_width=64, text_layers=1, fusion_layers=2, dropout=0.0)
    sizes = {"vocab_size": 30, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    theirs = BertConfig(**sizes, num_hidden_layers=2, is_decoder=True, add_cross_attention=True, use_cache=False)
    torch.manual_seed(0)
    bert = BertModel(theirs, add_pooling_layer=False).eval()
    ours = AnswerDecoder(config, 2).eval()
    pairs = {
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "cross_attention.query": "crossattention.self.query",
        "cross_attention.out": "crossattention.output.dense",
        "cross_attention_norm": "crossattention.output.LayerNorm",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    joined = {
        "attention.qkv": [f"attention.self.{name}" for name in ("query", "key", "value")],
        "cross_attention.key_value": [f"crossattention.self.{name}" for name in ("key", "value")],
    }
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    source, target = bert.encoder.layer.state_dict(), {}
    for layer in range(2):
        for kind in ("weight", "bias"):
            for name, other in pairs.items():
                target[f"layers.{layer}.{name}.{kind}"] = source[f"{layer}.{other}.{kind}"]
            for name, others in joined.items():
                target[f"layers.{layer}.{name}.{kind}"] = torch.cat([source[f"{layer}.{o}.{kind}"] for o in others])
    ours.load_state_dict(target)

    lengths, asked = [4, 2, 6, 3], QUESTIONS
    is_token = torch.arange(6) < torch.tensor(lengths)[:, None]
    is_asked = torch.arange(max(asked)) < torch.tensor(asked)[:, None]
    ids, states = torch.randint(5, 30, (4, 6)), torch.randn(4, max(asked), 32)
    embedded = bert.embeddings(input_ids=ids)
    expected = bert(
        input_ids=ids,
        attention_mask=is_token.long(),
        encoder_hidden_states=states,
        encoder_attention_mask=is_asked.long(),
    ).last_hidden_state
    found = ours(embedded[is_token], Packing.of(lengths, "cpu"), states[is_asked], Packing.of(asked, "cpu"))
    torch.testing.assert_close(found, expected[is_token], atol=1e-5, rtol=0)


def test_no_token_sees_what_comes_after_it(model: SmaugModel) -> None:
    states, packing = questions()
    ids, lengths = packed([[8, 9, 10], [8], [9, 9], [12, 7, 8, 6]])
    before = model.answer(ids, lengths, states, packing)
    ends = np.cumsum(lengths)
    for row, end in enumerate(ends):
        changed = ids.clone()
        changed[end - 1] = 20
        after = model.answer(changed, lengths, states, packing)
        assert (after[end - 1] - before[end - 1]).abs().max() > 1e-3
        others = torch.arange(len(ids)) != end - 1
        assert torch.equal(after[others], before[others]), f"answer {row}"


def test_packed_answers_equal_each_one_alone(model: SmaugModel) -> None:
    states, packing = questions()
    ids, lengths = packed([[8, 9, 10], [8], [9, 9], [12, 7, 8, 6]])
    together = model.answer(ids, lengths, states, packing).split(lengths)
    for answer, length, question, expected in zip(
        ids.split(lengths), lengths, states.split(QUESTIONS), together, strict=True
    ):
        alone = model.answer(answer, [length], question, Packing.of([len(question)], "cpu"))
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)


def test_next_words() -> None:
    rows, next_rows = next_words([3, 2, 4], "cpu")
    assert rows.tolist() == [0, 1, 3, 5, 6, 7] and next_rows.tolist() == [1, 2, 4, 6, 7, 8]


def test_the_decoder_starts_from_the_last_fusion_layers() -> None:
    plain = dataclasses.replace(answering_config(), answer_layers=0)
    weights = small_model(plain).state_dict()
    for layers, first in [(2, 0), (1, 1)]:
        started = with_answer_decoder(weights, layers)
        model = SmaugModel(dataclasses.replace(plain, answer_layers=layers))
        model.load_state_dict(started)
        for layer in range(layers):
            own, theirs = model.answers.layers[layer].state_dict(), model.fusion.layers[first + layer].state_dict()
            assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    assert with_answer_decoder(started, 1).keys() == started.keys()
    assert with_answer_decoder(weights, 0).keys() == weights.keys()
    trained = {**started, "answers.layers.0.mlp_norm.bias": torch.full((32,), 7.0)}
    assert with_answer_decoder(trained, 1)["answers.layers.0.mlp_norm.bias"][0] == 7, "a trained decoder stays"


def test_too_many_answer_layers_are_named() -> None:
    with pytest.raises(ValueError, match=r"model\.answer_layers is 2: it must be from 0 to model\.text\.fusion_layers"):
        dataclasses.replace(small_config(), answer_layers=2)


# ---- the loss


def answered(config: ModelConfig, size: int = 8) -> Batch:
    batch = random_batch(config, size)
    ids, lengths = packed(ANSWERS[:size])
    return dataclasses.replace(batch, answer_ids=ids, answer_lengths=lengths)


def test_loss_equals_a_loop_over_answers_and_words() -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 2]
    logits, words = torch.randn(6, 11, requires_grad=True), torch.randint(0, 11, (6,))
    found = losses.answer(logits, words, lengths)
    total, row = torch.zeros(()), 0
    for length in lengths:
        for _ in range(length):
            total = total - (logits[row].exp() / logits[row].exp().sum())[words[row]].log()
            row += 1
    torch.testing.assert_close(found, total / 3)
    ours, theirs = torch.autograd.grad(found, logits)[0], torch.autograd.grad(total / 3, logits)[0]
    torch.testing.assert_close(ours, theirs)


def loss_of_rank(rank_of: int | None = None) -> tuple[float, list[float]]:
    """Loss and gradient of the whole batch, or the averages over the ranks of their shares."""
    from smaug_ds import distributed

    config = dataclasses.replace(answering_config(3, 2), text=answering_config().text)
    module = QuestionAnswering(small_model(config))
    batch = answered(config)
    if distributed.world_size() > 1:
        own, world = distributed.rank(), distributed.world_size()
        size = len(batch) // world
        rows = slice(own * size, (own + 1) * size)
        ids, lengths = packed(ANSWERS[rows])
        batch = dataclasses.replace(
            share(dataclasses.replace(batch, answer_ids=torch.empty(0), answer_lengths=[]), own, world),
            answer_ids=ids,
            answer_lengths=lengths,
        )
    loss = module(batch)["loss"]
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([loss.detach()[None], *(g.flatten() for g in gradients)])
    mean = distributed.all_reduce_sum(flat) / distributed.world_size()
    return float(mean[0]), mean[1::97].tolist()


def test_loss_and_gradient_do_not_depend_on_the_number_of_ranks() -> None:
    loss, gradient = loss_of_rank()
    for other, its_gradient in run_ranks(loss_of_rank, 2):
        assert other == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(its_gradient, gradient, atol=1e-5)


def test_every_part_that_answers_learns_and_no_other() -> None:
    config = answering_config(3, 2)
    module = QuestionAnswering(small_model(config))
    results = module(answered(config))
    results["loss"].backward()
    assert results["loss"] is results["answer"] and 0 <= results["answer_accuracy"] <= 1
    learning = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"vision", "temporal", "selector", "text", "fusion", "answers", "word_head"}
    frozen = {name.split(".")[1] for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {
        *("pixel_decoder", "vision_projection", "text_projection", "match_head", "logit_scale", "logit_bias")
    }


# ---- ranking and generation


def brute_force(model: SmaugModel, question: torch.Tensor, words: list[int]) -> list[float]:
    """Log-probability of each token of one answer after ``[CLS]``, by a softmax over a run with the tokens before."""
    packing = Packing.of([len(question)], "cpu")
    ids = [CLS, *words, SEP]
    found = []
    for end in range(1, len(ids)):
        states = model.answer(torch.tensor(ids[:end]), [end], question, packing)
        found.append(float(model.word_logits(states)[-1].log_softmax(dim=0)[ids[end]]))
    return found


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [3, 1000])
def test_ranking_with_the_whole_list_is_enumeration(model: SmaugModel, batch_size: int) -> None:
    states, packing = questions()
    scores = rank(model, states, packing, packed(ANSWERS), len(ANSWERS), batch_size)
    every = [[sum(brute_force(model, own, words)) for words in ANSWERS] for own in states.split(QUESTIONS)]
    np.testing.assert_allclose(scores, every, atol=1e-4)
    assert scores.argmax(axis=1).tolist() == np.argmax(every, axis=1).tolist()


@torch.no_grad()
def test_a_shortlist_is_of_the_likeliest_first_tokens_and_counts_each_token_once(model: SmaugModel) -> None:
    states, packing = questions()
    for shortlist in (1, 3, 6):
        scores = rank(model, states, packing, packed(ANSWERS), shortlist, 5)
        for row, own in enumerate(states.split(QUESTIONS)):
            tokens = [brute_force(model, own, words) for words in ANSWERS]
            # stable: of equal first tokens the first ones of the list
            chosen = sorted(range(len(ANSWERS)), key=lambda i: -round(tokens[i][0], 4))[:shortlist]
            expected = np.full(len(ANSWERS), -np.inf)
            expected[chosen] = [sum(tokens[i]) for i in chosen]
            np.testing.assert_allclose(scores[row], expected, atol=1e-4)


@torch.no_grad()
def test_log_likelihood_is_of_one_answer_to_each_question(model: SmaugModel) -> None:
    states, packing = questions()
    own = ANSWERS[2:6]
    found = log_likelihood(model, states, packing, packed(own))
    expected = [
        sum(brute_force(model, question, words)) for question, words in zip(states.split(QUESTIONS), own, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@torch.no_grad()
def test_generation_takes_the_likeliest_word_until_the_end(model: SmaugModel) -> None:
    states, packing = questions()
    ends = []
    for end in range(5, 50):  # some of them are written after some words
        found = generate(model, states, packing, CLS, end, 4)
        for question, words in zip(states.split(QUESTIONS), found, strict=True):
            ids = [CLS]
            while len(ids) < 5:
                own = model.answer(torch.tensor(ids), [len(ids)], question, Packing.of([len(question)], "cpu"))
                ids.append(int(model.word_logits(own)[-1].argmax()))
                if ids[-1] == end:
                    break
            expected = ids[1:-1] if ids[-1] == end else ids[1:]
            assert words == expected
            ends.append(len(words))
    assert len(set(ends)) > 1, "some answers have to end early"


# ---- questions as training samples


@pytest.fixture(scope="module")
def toy(toy_media: Path, toy_shards: Path) -> tuple[Corpus, Asked]:
    corpus = Corpus.open([toy_shards / "train"], 0.0, "train")
    return corpus, ask([str(toy_media / "qa_train.json")], corpus, 0)[0]


def pairs_of(asked: Asked) -> dict[str, list[QuestionAnswer]]:
    records = asked.benchmark.questions
    return {
        name: [QuestionAnswer(records[row].question, records[row].answer) for row in rows]
        for name, rows in asked.rows.items()
    }


def test_every_question_is_a_sample_with_its_video_and_answer(
    toy: tuple[Corpus, Asked], toy_media: Path, toy_shards: Path
) -> None:
    corpus, asked = toy
    questions = pickle.loads(pickle.dumps(QuestionCorpus(corpus, pairs_of(asked))))
    rows = json.loads((toy_media / "qa_train.json").read_text())
    expected = sorted((row["video"], row["question"], row["answer"]) for row in rows)
    samples = [
        questions.read_sample(questions.entry("video", shard, row))
        for shard, count in enumerate(questions.sizes()["video"])
        for row in range(count)
    ]
    assert sorted((s.media_id, s.captions[0], s.answer) for s in samples) == expected
    assert all(len(sample.captions) == 1 for sample in samples)
    assert all(sample.media == (toy_media / sample.media_id).read_bytes() for sample in samples[::7])
    assert len(questions) == len(rows) == questions.count("video") and questions.count("image") == 0
    assert questions.read_sample(questions.nth("video", 5)) == samples[5]

    mixture = open_mixture(DataConfig(train=(str(toy_shards / "train"),)))
    marks = []
    for answer in ("red", "red", "blue"):
        changed = pairs_of(asked)
        first = next(iter(changed))
        changed[first] = [QuestionAnswer("which?", answer)]
        marks.append(of_questions(mixture, changed).fingerprint())
    assert marks[0] == marks[1] != marks[2]


def test_videos_without_questions_are_left_out(toy: tuple[Corpus, Asked]) -> None:
    corpus, asked = toy
    some = dict(list(pairs_of(asked).items())[:3])
    assert QuestionCorpus(corpus, some).count("video") == sum(map(len, some.values()))


# ---- evaluation


class Lossy:
    """A loader that loses one clip."""

    def __init__(self, batches: list[Batch], lost: str) -> None:
        self.batches, self.lost = batches, lost

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield dataclasses.replace(batch, keys=["lost" if key == self.lost else key for key in batch.keys])


def answer_test(media: Path, shards: Path, method: str = "rank", lose: bool = False) -> AnswerResult:
    tokenizer = Tokenizer(media / "vocab.txt")
    config = answering_config(3, 2)
    text = dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size)
    model = small_model(dataclasses.replace(config, text=text))
    data = DataConfig(test=(str(shards / "test"),), workers=0)
    sizes = RetrievalConfig(batch_size=8, pair_batch_size=50)
    ledger = Ledger(shards / "ledger", 0)
    benchmark = read_benchmark(media / "qa_test.json")
    loader, asked = open_asked(benchmark, model.config, data, 8, tokenizer, torch.device("cpu"), ledger)
    answers = sorted({question.answer for question in benchmark.questions})
    batches: Lossy | list[Batch] = list(loader)
    if lose:
        batches = Lossy(list(loader), next(iter(asked.rows)))
    questions = QuestionConfig(method="rank" if method == "rank" else "generate", shortlist=5)
    return evaluate(model, batches, asked, answers, tokenizer, questions, sizes, "weights")


def predictions_of_rank(media: Path, shards: Path) -> tuple[float, dict[str, str]]:
    result = answer_test(media, shards)
    return result.accuracy, result.predictions


def test_evaluation_answers_every_question_whatever_the_ranks(
    toy_media: Path, toy_shards: Path, tmp_path: Path
) -> None:
    result = answer_test(toy_media, toy_shards)
    rows = {row["question_id"]: row["answer"] for row in json.loads((toy_media / "qa_test.json").read_text())}
    assert result.predictions.keys() == rows.keys() and result.unanswered == 0
    right = sum(rows[name] == answer for name, answer in result.predictions.items())
    assert result.accuracy == pytest.approx(100 * right / len(rows)) and result.coverage == 100
    assert result.n_questions == 64 and result.accuracies == {}
    assert result.protocol["shortlist"] == 5 and result.protocol["checkpoint"] == "weights"
    assert "predictions" not in result.report() and json.dumps(result.report())
    result.write_predictions(tmp_path / "predictions.json")
    assert read_predictions(tmp_path / "predictions.json") == result.predictions
    assert run_ranks(predictions_of_rank, 2, toy_media, toy_shards) == [(result.accuracy, result.predictions)] * 2


def test_a_question_whose_clip_is_lost_is_wrong(toy_media: Path, toy_shards: Path) -> None:
    whole, lossy = answer_test(toy_media, toy_shards), answer_test(toy_media, toy_shards, lose=True)
    assert lossy.unanswered == 2 and len(lossy.predictions) == 62 and lossy.n_questions == 64
    assert lossy.accuracy <= whole.accuracy


def test_generated_answers_are_text(toy_media: Path, toy_shards: Path) -> None:
    result = answer_test(toy_media, toy_shards, "generate")
    assert all(isinstance(answer, str) for answer in result.predictions.values()) and result.unanswered == 0
    assert result.protocol["match"] == "letter by letter after cleaning" and result.protocol["answers"] is None


def test_an_answer_list_shorter_than_the_shortlist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text('["red", "blue", "red"]')
    config = QuestionConfig(answer_list=str(path), shortlist=3)
    with pytest.raises(ValueError, match=r"questions\.shortlist is 3: the answer list has 2 different answers, 3 are"):
        answers_to_choose_from(config, [])
    assert answers_to_choose_from(dataclasses.replace(config, shortlist=2), []) == ["red", "blue"]
    assert answers_to_choose_from(QuestionConfig(shortlist=2), ["b", "a", "b"]) == ["b", "a"]


def test_activitynet_qa_is_told_as_its_own_tool_does() -> None:
    accuracies = {"Motion": 50.0, "Yes/No": 25.0, "Free": 25.0, "All": 40.0}
    result = AnswerResult(40.0, accuracies, 20.0, 90.0, 10, 0, {"method": "rank", "shortlist": 2}, {})
    assert "\tMotion: 0.5000" in result.table() and "\tAll: 0.4000" in result.table()
