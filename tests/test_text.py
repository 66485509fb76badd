"""Cleaning, WordPiece, padding and MLM masking, against transformers and slow loops."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertTokenizer

from smaug_ds.text import IGNORED, Tokenizer, clean, mask_tokens, train_vocabulary

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


@pytest.mark.parametrize("max_length", [32, 8])
def test_encode_equals_transformers(real_vocabulary: Path, real_captions: list[str], max_length: int) -> None:
    odd = [
        "",
        "naïve café 東京 tower",
        "[MASK] [CLS] x" + "y" * 200,
        "pneumonoultramicroscopicsilicovolcanoconiosis",
        "a\x00b",
    ]
    captions = real_captions + odd
    ours = Tokenizer(real_vocabulary)
    ids = ours.encode(captions, max_length)
    theirs = BertTokenizer(vocab=str(real_vocabulary), do_lower_case=True)
    expected = theirs(
        # "[MASK]" in a caption is plain text to us; theirs would take the upper-case form for the special token.
        [clean(caption) for caption in captions],
        max_length=max_length,
        truncation=True,
        padding="longest",
        return_tensors="pt",
    )
    assert ours.vocab_size == 30522
    assert torch.equal(ids.input_ids, expected["input_ids"])
    assert torch.equal(ids.attention_mask, expected["attention_mask"].bool())


def test_encode_pads_to_the_longest_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["a ball", "a red ball"], max_length=32)
    assert ids.input_ids.shape == (2, 5)
    assert ids.attention_mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert ids.input_ids[0, -1] == tokenizer.pad_id
    assert tokenizer.encode(["a red ball rolls left"], max_length=4).input_ids.shape == (1, 4)
    assert tokenizer.encode([], max_length=4).input_ids.shape == (0, 0)


def test_special_tokens_cannot_come_from_captions(tokenizer: Tokenizer) -> None:
    inner = tokenizer.encode(["[SEP] [mask] <s>"], max_length=32).input_ids[0, 1:-1].tolist()
    assert not {tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id} & set(inner)


def test_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["A red BALL, waits.", "the"], max_length=32).input_ids
    assert tokenizer.decode(ids[0].tolist()) == "a red ball waits"
    assert tokenizer.decode(ids[1]) == "the"


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
    assert whole.attention_mask.sum(1).tolist() == [7, 7, 6]  # every word is one token
    spelt = tokenizer.encode(["wasted"], 32).input_ids[0]  # a new word, made of known letters
    assert tokenizer.unk_id not in spelt and tokenizer.decode(spelt) == "wasted"


def test_train_vocabulary_keeps_the_frequent_words(tmp_path: Path) -> None:
    letters = 5 + 2 * len(set("".join(CAPTIONS).replace(" ", "")))
    train_vocabulary(CAPTIONS, letters + 2, tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text().splitlines()[letters:] == ["ball", "red"]
    with pytest.raises(ValueError, match=f"10 entries .* {letters}"):
        train_vocabulary(CAPTIONS, 10, tmp_path / "vocab.txt")


def slow_mask_tokens(ids: Tensor, noise: Tensor, probability: float, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    masked, labels = ids.clone(), torch.full_like(ids, IGNORED)
    words = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    for b in range(ids.shape[0]):
        places = [at for at in range(ids.shape[1]) if int(ids[b, at]) not in tokenizer.special_ids]
        hidden = [at for at in places if noise[b, at, 0] < probability]
        if places and not hidden:
            hidden = [min(places, key=lambda at: float(noise[b, at, 0]))]
        for at in hidden:
            labels[b, at] = ids[b, at]
            if noise[b, at, 1] < 0.8:
                masked[b, at] = tokenizer.mask_id
            elif noise[b, at, 1] < 0.9:
                masked[b, at] = words[int(noise[b, at, 2] * len(words))]
    return masked, labels


@pytest.mark.parametrize("probability", [0.0, 0.15, 0.6, 1.0])
def test_mask_tokens_equals_slow_loop(tokenizer: Tokenizer, probability: float) -> None:
    captions = [*CAPTIONS * 10, "", "ball"]
    ids = tokenizer.encode(captions, 32).input_ids
    noise = torch.rand(*ids.shape, 3, generator=torch.Generator().manual_seed(0))
    masked, labels = mask_tokens(ids, noise, probability, tokenizer)
    slow_masked, slow_labels = slow_mask_tokens(ids, noise, probability, tokenizer)
    assert torch.equal(masked, slow_masked) and torch.equal(labels, slow_labels)
    hidden_words = (labels != IGNORED).sum(1)
    assert hidden_words[-2] == 0 and (hidden_words[:-2] >= 1).all() and hidden_words[-1] == 1


def test_mask_tokens_shares(real_vocabulary: Path, real_captions: list[str]) -> None:
    tokenizer = Tokenizer(real_vocabulary)
    ids = tokenizer.encode(real_captions, 32).input_ids
    noise = torch.rand(*ids.shape, 3, generator=torch.Generator().manual_seed(0))
    masked, labels = mask_tokens(ids, noise, 0.15, tokenizer)
    hidden = labels != IGNORED
    is_word = ~torch.isin(ids, torch.tensor(sorted(tokenizer.special_ids)))
    assert 0.145 < hidden.sum() / is_word.sum() < 0.18  # a little above: short captions lose one word at least
    to_mask, unchanged = (masked[hidden] == tokenizer.mask_id), (masked[hidden] == ids[hidden])
    assert abs(float(to_mask.float().mean()) - 0.8) < 0.01
    assert abs(float(unchanged.float().mean()) - 0.1) < 0.01
    assert torch.equal(masked[~hidden], ids[~hidden])


def test_mask_tokens_does_not_depend_on_padding(tokenizer: Tokenizer) -> None:
    noise = torch.rand(1, 32, 3, generator=torch.Generator().manual_seed(1))
    short = tokenizer.encode(["a ball"], 32).input_ids
    padded = tokenizer.encode(["a ball", CAPTIONS[0]], 32).input_ids[:1]
    alone = mask_tokens(short, noise[:, : short.shape[1]], 0.5, tokenizer)
    beside = mask_tokens(padded, noise[:, : padded.shape[1]], 0.5, tokenizer)
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one, other[:, : short.shape[1]])
