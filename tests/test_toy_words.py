"""Captions, questions, answers and choices of the built-in corpus follow from one another."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from smaug_ds.data import toy_scene
from smaug_ds.data.toy_scene import ToyConfig
from smaug_ds.data.toy_words import write_words
from smaug_ds.text import Tokenizer
from tests.toys import MEANINGS, Facts, captions_of, config_of, read_caption, read_list


@pytest.fixture(scope="module")
def config(toy_media: Path) -> ToyConfig:
    return config_of(toy_media)


def test_vocabulary_spells_every_caption_question_and_answer(toy_media: Path) -> None:
    pieces = (toy_media / "vocab.txt").read_text().splitlines()
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(pieces)) == len(pieces) < 256
    captions = [
        c for split in toy_scene.SPLITS for row in read_list(toy_media, f"{split}.json") for c in captions_of(row)
    ]
    captions += [c for row in read_list(toy_media, "mc_test.json") for c in row["caption"]]
    asked = [row for part in ("train", "test") for row in read_list(toy_media, f"qa_{part}.json")]
    texts = captions + [row["question"] for row in asked] + [row["answer"] for row in asked]
    assert {word for text in texts for word in text.replace("?", " ?").split()} <= set(pieces)
    tokenizer = Tokenizer(toy_media / "vocab.txt")
    ids = tokenizer.encode([*texts, "Unheard-of words: 4th zebra"], max_length=64)
    assert not (ids.input_ids == tokenizer.unk_id).any()
    assert max(ids.lengths[: len(captions)]) <= 26


def test_images_have_no_words_of_time(toy_media: Path) -> None:
    captions = [caption for row in read_list(toy_media, "image_train.json") for caption in captions_of(row)]
    still = {word for caption in captions for word in caption.split()}
    words = {"a", "an", "at", "on", "the", "there", "is", "top", "bottom", "left", "right"}
    assert still <= {*toy_scene.COLOURS, *toy_scene.SHAPES, *toy_scene.RADII, *toy_scene.BACKGROUNDS, *words}


def answer(question: str, facts: Facts) -> str | None:
    """The answer that follows from a caption's claims."""
    of_shape = {facts.shape: facts.colour, facts.shape2: facts.colour2}
    of_colour = {facts.colour: facts.shape, facts.colour2: facts.shape2}
    main = f"{facts.colour} {facts.shape}"
    if match := re.fullmatch(rf"what colour is the ({'|'.join(toy_scene.SHAPES)})\?", question):
        return of_shape[match[1]]
    if match := re.fullmatch(r"what shape is the (\w+) object\?", question):
        return of_colour[match[1]]
    assert facts.motion
    ways = facts.motion.split(" then ")
    return {
        f"where is the {facts.colour2} {facts.shape2}?": facts.place,
        f"what does the {main} do?": next(words for words, motion in MEANINGS.items() if motion == facts.motion),
        f"how large is the {main}?": facts.size,
        "what colour is the background?": facts.background,
        "which shape stays still?": facts.shape2,
        f"which way does the {facts.shape} move first?": ways[0] if len(ways) == 2 else None,
        f"which way does the {facts.shape} move last?": ways[1] if len(ways) == 2 else None,
    }[question]


@pytest.mark.parametrize("part", ["train", "test"])
def test_answers_follow_from_the_captions(toy_media: Path, part: str) -> None:
    facts = {row["video"]: read_caption(captions_of(row)[0]) for row in read_list(toy_media, f"video_{part}.json")}
    rows = read_list(toy_media, f"qa_{part}.json")
    assert len({row["question_id"] for row in rows}) == len(rows) == 2 * len(facts)
    assert {row["video"] for row in rows} == set(facts)
    for row in rows:
        assert row["answer"] == answer(row["question"], facts[row["video"]]), row


def test_every_kind_of_question_is_asked(config: ToyConfig) -> None:
    asked = {q for n in range(400) for q, _ in write_words(config, "video_train", n).questions}
    kinds = {re.sub("|".join([*toy_scene.COLOURS, *toy_scene.SHAPES]), "_", question) for question in asked}
    assert len(kinds) == 9


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_choice_is_true_and_the_words_alone_do_not_tell_which(toy_media: Path, part: str) -> None:
    clips = read_list(toy_media, f"video_{part}.json")
    captions = {row["video"]: row["caption"] for row in clips}
    facts = {video: read_caption(text if isinstance(text, str) else text[0]) for video, text in captions.items()}
    rows = read_list(toy_media, f"mc_{part}.json")
    assert [row["video"] for row in rows] == list(facts)
    assert {row["answer"] for row in rows} == set(range(5))
    changed = Counter()
    for row in rows:
        truth = facts[row["video"]]
        claims = [read_caption(caption) for caption in row["caption"]]
        assert len(set(claims)) == 5 and claims[row["answer"]] == truth
        false = [frozenset(n for n in Facts._fields if getattr(c, n) != getattr(truth, n)) for c in claims]
        (second,) = (n for n in {*Facts._fields} - {"motion"} if {frozenset({n}), frozenset({n, "motion"})} <= {*false})
        corners = [frozenset(), frozenset({"motion"}), frozenset({second}), frozenset({"motion", second})]
        (odd,) = set(false) - set(corners)
        (third,) = odd - {"motion", second}
        assert odd - {third} in corners
        changed.update([second, third])
    assert set(changed) == {"colour", "shape2", "place"}
