"""Cleaning, WordPiece, packing and MLM masking, against transformers and slow loops."""

from __future__ import annotations

import json
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertTokenizer

from smaug_ds.text import IGNORED, TextIds, Tokenizer, clean, mask_tokens, train_vocabulary
from tests import reference

CAPTIONS = ["a red ball rolls left", "a blue ball rolls right", "the red cube waits"]


@pytest.fixture(scope="module")
def real_vocabulary(shared_data: Path) -> Path:
    return shared_data / "tokenizer" / "bert_base_uncased_vocab.txt"


@pytest.fixture(scope="module")
def real_captions(shared_data: Path) -> list[str]:
    """Captions of clips and images, and the web's own: CC3M's are tokenised, ActivityNet's have stray blanks."""
    annotations = shared_data / "annotations"
    lines = (shared_data / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    captions += [row["caption"] for row in json.loads((annotations / "msrvtt/msrvtt_ret_test1k.json").read_text())]
    captions += [
        line.split("\t")[0]
        for line in (annotations / "cc3m/Validation_GCC_head1000.tsv").read_text(encoding="utf-8").splitlines()
    ]
    for video in list(json.loads((annotations / "activitynet_captions/val_1.json").read_text()).values())[:300]:
        captions += video["sentences"]
    assert len(captions) > 3000
    return captions


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    train_vocabulary(CAPTIONS, 200, tmp_path / "vocab.txt")
    return Tokenizer(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A man, in a T-shirt, WALKS!", "a man in a t shirt walks"),
        ('<PERSON> eats fish/chips ; "slowly" (it\'s #1: *)~?', "person eats fish chips slowly its 1"),
        ("  several   blanks\tand\nlines \n", "several blanks and lines"),
        ("...", ""),
    ],
)
def test_clean(caption: str, cleaned: str) -> None:
    assert clean(caption) == cleaned
    assert clean(cleaned) == cleaned


def test_clean_cuts_words() -> None:
    assert clean("One, two - three four", max_words=3) == "one two three"


def test_clean_equals_steps_of_singularity(real_captions: list[str]) -> None:
    for caption in real_captions:
        text = caption.lower()
        for mark in ",.'!?\"()*#:;~":
            text = text.replace(mark, "")
        text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
        assert clean(caption) == re.sub(r"\s+", " ", text).strip()


HARD = [
    "",
    "naïve café 東京 tower",
    "[MASK] [CLS] x" + "y" * 200,
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "a\x00b \x07bell\x1besc \ufffd \ue000",
    "İstanbul'da GÜNEŞ, straße ẞ, ﬁne ﬂag, Ⅷ ㎏ x²",
    "e\u0301te\u0301 \u0301 alone",
    "한국어 노래 ไทย שלום مرحبا हिन्दी",
    "👨\u200d👩\u200d👧 family 🎉🎉",
    "\ufeff\u200bzero\u200bwidth\u00a0no\u2003break\u3000space",
    "$5.00 €3 50% @home a_b <b> http://x.y/z?q=1&r=2",
    "\uff11\uff12\uff13 \uff21\uff22\uff23 don\u2019t \u201cquote\u201d \u2014 dash \u2013 \u2026 \u00b7",
    "a " * 31 + "b",
    "日本" * 30,
    "word" * 60,
]


@pytest.mark.parametrize("max_length", [32, 8])
def test_encode_equals_transformers(real_vocabulary: Path, real_captions: list[str], max_length: int) -> None:
    captions = real_captions + HARD + random_texts(1000)
    ours = Tokenizer(real_vocabulary)
    ids = ours.encode(captions, max_length)
    theirs = BertTokenizer(vocab=str(real_vocabulary), do_lower_case=True)
    expected = theirs(
        # "[MASK]" in a caption is plain text to us; theirs would take the upper-case form for the special token.
        [clean(caption) for caption in captions],
        max_length=max_length,
        truncation=True,
    )["input_ids"]
    assert ours.vocab_size == 30522
    assert ids.lengths == [len(row) for row in expected]
    for row, caption, own in zip(expected, captions, ids.input_ids.split(ids.lengths), strict=True):
        assert own.tolist() == row, caption


def random_texts(count: int) -> list[str]:
    """Texts of any characters, most of them odd ones."""
    draw = random.Random(0)
    planes = [(0x20, 0x7F), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000), (0x20, 0x21)]
    return ["".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randrange(60))) for _ in range(count)]


def test_no_padding_travels(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["a ball", "a red ball"], max_length=32)
    assert ids.lengths == [4, 5] and ids.input_ids.shape == (9,)
    assert tokenizer.pad_id not in ids.input_ids
    assert ids.input_ids[[0, 4]].tolist() == [tokenizer.cls_id] * 2
    assert ids.input_ids[[3, 8]].tolist() == [tokenizer.sep_id] * 2
    assert tokenizer.encode(["a red ball rolls left"], max_length=4).lengths == [4]
    nothing = tokenizer.encode([], max_length=4)
    assert nothing.input_ids.shape == (0,) and nothing.input_ids.dtype == torch.int64 and nothing.lengths == []


def test_special_tokens_cannot_come_from_captions(tokenizer: Tokenizer) -> None:
    inner = tokenizer.encode(["[SEP] [mask] <s>"], max_length=32).input_ids[1:-1].tolist()
    assert not {tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id} & set(inner)


def test_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["A red BALL, waits.", "the"], max_length=32)
    first, second = ids.input_ids.split(ids.lengths)
    assert tokenizer.decode(first.tolist()) == "a red ball waits"
    assert tokenizer.decode(second) == "the"


def test_pickled_tokenizer_is_the_same(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy.encode(CAPTIONS, 32).input_ids, tokenizer.encode(CAPTIONS, 32).input_ids)


def test_tokenizer_json_and_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = BertTokenizer(vocab=str(tokenizer.path), do_lower_case=True)
    folder = tmp_path / "saved"
    theirs.save_pretrained(folder)
    ours = Tokenizer(folder)
    assert ours.path.name == "tokenizer.json"
    assert ours.special_ids == tokenizer.special_ids
    assert torch.equal(ours.encode(CAPTIONS, 6).input_ids, tokenizer.encode(CAPTIONS, 6).input_ids)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.txt.*data\.tokenizer"):
        Tokenizer(tmp_path / "missing.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nball\n")
    with pytest.raises(ValueError, match=r"vocab\.txt.*\[MASK\]"):
        Tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\nball\nball\n")
    with pytest.raises(ValueError, match="3 tokens, 2 of them different"):
        Tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_train_vocabulary(tmp_path: Path) -> None:
    train_vocabulary(CAPTIONS, 200, tmp_path / "a.txt")
    train_vocabulary(reversed(CAPTIONS), 200, tmp_path / "b.txt")
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]
    tokenizer = Tokenizer(tmp_path / "a.txt")
    whole = tokenizer.encode(CAPTIONS, 32)
    assert whole.lengths == [7, 7, 6]  # every word is one token
    spelt = tokenizer.encode(["wasted"], 32).input_ids  # a new word, made of known letters
    assert tokenizer.unk_id not in spelt and tokenizer.decode(spelt) == "wasted"


def test_train_vocabulary_keeps_the_frequent_words(tmp_path: Path) -> None:
    letters = 5 + 2 * len(set("".join(CAPTIONS).replace(" ", "")))
    train_vocabulary(CAPTIONS, letters + 2, tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text().splitlines()[letters:] == ["ball", "red"]
    with pytest.raises(ValueError, match=f"10 entries .* {letters}"):
        train_vocabulary(CAPTIONS, 10, tmp_path / "vocab.txt")


def slow_mask_tokens(text: TextIds, noise: Tensor, probability: float, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    ids = text.input_ids
    masked, labels = ids.clone(), torch.full_like(ids, IGNORED)
    words = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    start = 0
    for length in text.lengths:
        places = [at for at in range(start, start + length) if int(ids[at]) not in tokenizer.special_ids]
        hidden = [at for at in places if noise[at, 0] < probability]
        if places and not hidden:
            hidden = [min(places, key=lambda at: float(noise[at, 0]))]
        for at in hidden:
            labels[at] = ids[at]
            if noise[at, 1] < 0.8:
                masked[at] = tokenizer.mask_id
            elif noise[at, 1] < 0.9:
                masked[at] = words[int(noise[at, 2] * len(words))]
        start += length
    return masked, labels


@pytest.mark.parametrize("probability", [0.0, 0.15, 0.6, 1.0])
def test_mask_tokens_equals_slow_loop(tokenizer: Tokenizer, probability: float) -> None:
    captions = [*CAPTIONS * 10, "", "ball"]
    text = tokenizer.encode(captions, 32)
    noise = torch.rand(len(text.input_ids), 3, generator=torch.Generator().manual_seed(0))
    masked, labels = mask_tokens(text, noise, probability, tokenizer)
    slow_masked, slow_labels = slow_mask_tokens(text, noise, probability, tokenizer)
    assert torch.equal(masked, slow_masked) and torch.equal(labels, slow_labels)
    hidden_words = [int((caption != IGNORED).sum()) for caption in labels.split(text.lengths)]
    assert hidden_words[-2] == 0 and min(hidden_words[:-2]) >= 1 and hidden_words[-1] == 1


@pytest.mark.parametrize("probability", [0.0, 0.15, 1.0])
def test_mask_tokens_equals_padded_reference(
    real_vocabulary: Path, real_captions: list[str], probability: float
) -> None:
    """Noise drawn for each caption at full length, then cut: to the caption here, to the longest one there."""
    tokenizer = Tokenizer(real_vocabulary)
    text = tokenizer.encode(["", *real_captions[:300]], 32)
    noise = torch.rand(301, 32, 3, generator=torch.Generator().manual_seed(0))
    noise[:100] = noise[:100].mul(4).floor() / 4  # ties
    mask = reference.token_mask(text.lengths)
    masked, labels = mask_tokens(text, noise[:, : max(text.lengths)][mask], probability, tokenizer)
    padded_ids = reference.pad_captions(text.input_ids, text.lengths, tokenizer.pad_id)
    expected_masked, expected_labels = reference.mask_padded_tokens(
        padded_ids, noise[:, : max(text.lengths)], probability, tokenizer
    )
    assert torch.equal(masked, expected_masked[mask]) and torch.equal(labels, expected_labels[mask])
    assert (expected_labels[~mask] == IGNORED).all()


def test_mask_tokens_shares(real_vocabulary: Path, real_captions: list[str]) -> None:
    tokenizer = Tokenizer(real_vocabulary)
    text = tokenizer.encode(real_captions, 32)
    ids = text.input_ids
    noise = torch.rand(len(ids), 3, generator=torch.Generator().manual_seed(0))
    masked, labels = mask_tokens(text, noise, 0.15, tokenizer)
    hidden = labels != IGNORED
    is_word = ~torch.isin(ids, torch.tensor(sorted(tokenizer.special_ids)))
    assert 0.145 < hidden.sum() / is_word.sum() < 0.18  # a little above: short captions lose one word at least
    to_mask, unchanged = (masked[hidden] == tokenizer.mask_id), (masked[hidden] == ids[hidden])
    assert abs(float(to_mask.float().mean()) - 0.8) < 0.01
    assert abs(float(unchanged.float().mean()) - 0.1) < 0.01
    assert torch.equal(masked[~hidden], ids[~hidden])


def test_mask_tokens_of_a_caption_do_not_depend_on_the_others(tokenizer: Tokenizer) -> None:
    noise = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    short, both = tokenizer.encode(["a ball"], 32), tokenizer.encode(["a ball", CAPTIONS[0]], 32)
    alone = mask_tokens(short, noise[: len(short.input_ids)], 0.5, tokenizer)
    beside = mask_tokens(both, noise[: len(both.input_ids)], 0.5, tokenizer)
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one, other[: len(one)])
