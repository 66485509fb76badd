"""The built-in corpus: what its captions, questions and choices say is read back from the words and from the pixels."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
from PIL import Image

from smaug_ds.config import ConfigError
from smaug_ds.data import toy, toy_scene
from smaug_ds.data.toy import render_corpus
from smaug_ds.data.toy_scene import ToyConfig, draw_scene
from smaug_ds.data.toy_words import describe, write_words
from smaug_ds.text import Tokenizer

MEANINGS = {
    "moves left": "left",
    "slides to the left": "left",
    "moves right": "right",
    "slides to the right": "right",
    "moves up": "up",
    "rises": "up",
    "moves down": "down",
    "falls": "down",
    "first moves left and then right": "left then right",
    "moves right after moving left": "left then right",
    "first moves right and then left": "right then left",
    "moves left after moving right": "right then left",
    "first moves up and then down": "up then down",
    "moves down after moving up": "up then down",
    "first moves down and then up": "down then up",
    "moves up after moving down": "down then up",
    "grows": "grow",
    "gets larger": "grow",
    "shrinks": "shrink",
    "gets smaller": "shrink",
    "appears": "appear",
    "comes into view": "appear",
    "disappears": "disappear",
    "vanishes": "disappear",
}
OBJECT = rf"(?:(small|large) )?({'|'.join(toy_scene.COLOURS)}) ({'|'.join(toy_scene.SHAPES)})"


class Facts(NamedTuple):
    """What a caption claims, or what can be seen."""

    size: str | None
    colour: str
    shape: str
    motion: str | None
    colour2: str
    shape2: str
    place: str
    background: str


def read_caption(caption: str) -> Facts:
    """The claims of a caption, from its words alone."""
    actions = "|".join(sorted(MEANINGS, key=len, reverse=True))
    place = re.search("at the ((?:top|bottom) (?:left|right))", caption)
    background = re.search(rf" on ({'|'.join(toy_scene.BACKGROUNDS)})$", caption)
    assert place and background, caption
    if acting := re.search(rf"{OBJECT} ({actions})\b", caption):
        *main, action = acting.groups()
        rest = caption.replace(acting.group(), "")
        second = re.search(OBJECT, rest)
        assert second and ("still" in rest or "stays" in rest), caption
        assert re.findall(rf"\b(?:{actions})\b", rest) == [], caption
    else:
        action = None
        second = re.search(rf"at the \w+ \w+ (?:there is )?an? {OBJECT}|{OBJECT} at the", caption)
        assert second
        found = re.search(OBJECT, caption.replace(second.group(), ""))
        assert found
        main = list(found.groups())
    colour2, shape2 = [word for word in second.groups() if word][-2:]
    return Facts(*main, MEANINGS[action] if action else None, colour2, shape2, place[1], background[1])


class Blob(NamedTuple):
    """The pixels of one colour in one frame."""

    x: float
    y: float
    area: int
    width: int
    shape: str


def find_blob(frame: np.ndarray, colour: str, others: list[tuple[int, int, int]]) -> Blob | None:
    """Where and how large the object of that colour is in a (96, 96, 3) frame, and its shape; ``others`` lie near."""
    distances = np.stack(
        [np.linalg.norm(frame - np.array(rgb), axis=-1) for rgb in (toy_scene.COLOURS[colour], *others)]
    )
    near = (distances.argmin(axis=0) == 0) & (distances[0] < 75)
    if near.sum() < 30:
        return None
    rows, columns = np.indices(near.shape)
    near &= np.abs(rows - np.median(rows[near])) < 24  # mixed colours at the other object's edge can look alike
    near &= np.abs(columns - np.median(columns[near])) < 24
    ys, xs = near.nonzero()
    box = near[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    height, width = box.shape
    fill, fall = box.mean(), (ys.mean() - ys.min()) / (height - 1)
    if not box[height // 2 - 1 :, width // 2 - 1 :][:3, :3].all():
        shape = "ring"
    elif fill > 0.7:
        shape = "square" if fill > 0.9 else "circle"
    elif fall > 0.59:
        shape = "triangle"
    else:  # a star stands on two legs, a cross on one
        shape = "star" if np.ptp(box[-3:].nonzero()[1]) > 0.5 * width else "cross"
    return Blob(xs.mean(), ys.mean(), int(near.sum()), width, shape)


def see_motion(blobs: list[Blob | None]) -> str:
    """What the object does over the frames that show the scene."""
    if None in blobs:
        assert blobs[0] is None or blobs[-1] is None
        return "appear" if blobs[0] is None else "disappear"
    track = np.array([blob[:2] for blob in blobs if blob])
    reach = np.ptp(track, axis=0)
    if reach.max() < 10:
        growth = blobs[-1].area / blobs[0].area
        assert max(growth, 1 / growth) > 1.8
        return "grow" if growth > 1 else "shrink"
    axis = int(reach.argmax())
    assert reach[1 - axis] < 5
    names, path = (("left", "right"), ("up", "down"))[axis], track[:, axis]
    if abs(path[-1] - path[0]) > 0.8 * np.abs(np.diff(path)).sum():
        return names[int(path[-1] > path[0])]
    turn = np.argmax(np.abs(path - path[0]) + np.abs(path - path[-1]))
    return f"{names[int(path[turn] > path[0])]} then {names[int(path[-1] > path[turn])]}"


def see_shape(blobs: list[Blob | None]) -> str:
    """The shape in nearly all frames; compression can blur a small star in one of them."""
    shapes = Counter(blob.shape for blob in blobs if blob)
    shape, count = shapes.most_common(1)[0]
    assert count >= 0.7 * shapes.total(), shapes
    return shape


def look(frames: np.ndarray, claimed: Facts, moving: bool) -> Facts:
    """What the frames show of the two colours that the caption names."""
    border = np.concatenate([frames[:, :3].reshape(-1, 3), frames[:, -3:].reshape(-1, 3)]).mean(axis=0)
    background = min(
        toy_scene.BACKGROUNDS, key=lambda name: float(np.linalg.norm(border - toy_scene.BACKGROUNDS[name]))
    )
    rgb, rgb2, behind = (
        toy_scene.COLOURS[claimed.colour],
        toy_scene.COLOURS[claimed.colour2],
        toy_scene.BACKGROUNDS[background],
    )
    mains = [find_blob(frame, claimed.colour, [rgb2, behind]) for frame in frames]
    seconds = [find_blob(frame, claimed.colour2, [rgb, behind]) for frame in frames]
    second = seconds[0]
    assert second and all(seconds), claimed
    motion = see_motion(mains) if moving else None
    width = next(blob.width for blob in mains if blob)
    place = f"{'top' if second.y < 48 else 'bottom'} {'left' if second.x < 48 else 'right'}"
    size = None if motion in ("grow", "shrink") else "small" if width < 31 else "large"
    return Facts(size, claimed.colour, see_shape(mains), motion, claimed.colour2, see_shape(seconds), place, background)


def decode(path: Path) -> tuple[np.ndarray, str, str]:
    """All frames (T, H, W, 3), codec and container of a clip."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.codec_context.codec.canonical_name, container.format.name


def read_list(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / name).read_text())


def captions_of(row: dict[str, Any]) -> list[str]:
    return row["caption"] if isinstance(row["caption"], list) else [row["caption"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def config(toy_media: Path) -> ToyConfig:
    record = json.loads((toy_media / "toy.json").read_text())
    assert record.pop("format") == toy.FORMAT
    return ToyConfig(**record)


# ------------------------------------------------------------------------------------------------- the same bytes

SMALL = ToyConfig(clips=24, images=5, test_clips=8, seed=3, size=64, frames=12, webm_share=0.3)


def test_the_bytes_do_not_depend_on_workers_or_size_of_the_corpus(tmp_path: Path) -> None:
    render_corpus(SMALL, tmp_path / "one", workers=1)
    render_corpus(SMALL, tmp_path / "three", workers=3)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "three")
    assert {Path(name).suffix for name in one} == {".mp4", ".webm", ".jpg", ".json", ".txt"}
    larger = ToyConfig(**{**vars(SMALL), "clips": 30, "images": 9, "test_clips": 11})
    render_corpus(larger, tmp_path / "larger")
    grown = contents(tmp_path / "larger")
    assert all(grown[name] == content for name, content in one.items() if name.startswith("media/"))
    for name in ("video_train", "image_train", "video_test", "qa_train", "qa_test", "mc_train", "mc_test"):
        rows = read_list(tmp_path / "one", f"{name}.json")
        assert rows == read_list(tmp_path / "larger", f"{name}.json")[: len(rows)]


def test_another_seed_gives_another_corpus() -> None:
    other = ToyConfig(**{**vars(SMALL), "seed": 4})
    same = sum(write_words(SMALL, "video_train", i) == write_words(other, "video_train", i) for i in range(20))
    assert same == 0


def test_a_finished_folder_is_left_alone_and_an_unfinished_one_is_finished(tmp_path: Path) -> None:
    render_corpus(SMALL, tmp_path)
    whole = contents(tmp_path)
    victim = sorted(tmp_path.glob("media/video_train/000/*"))[5]
    victim.unlink()
    render_corpus(SMALL, tmp_path)
    assert not victim.exists()
    (tmp_path / "toy.json").rename(tmp_path / "toy.json.started")  # as a kill in mid-run leaves it
    render_corpus(SMALL, tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("record", ["toy.json", "toy.json.started"])
def test_a_folder_of_another_config_is_refused_naming_both(tmp_path: Path, record: str) -> None:
    render_corpus(SMALL, tmp_path)
    (tmp_path / "toy.json").rename(tmp_path / record)
    with pytest.raises(ValueError, match=r"'seed': 3.*'seed': 5"):
        render_corpus(ToyConfig(**{**vars(SMALL), "seed": 5}), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clips", 0),
        ("images", -1),
        ("size", 65),
        ("size", 16),
        ("frames", 4),
        ("webm_share", 1.5),
        ("test_clips", 10**6),
    ],
)
def test_a_bad_setting_is_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"toy\.{key} is {value}"):
        ToyConfig(**{key: value})


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--clips", "2", "--images", "0", "--test-clips", "2", "--size", "48"]
    toy.main([*arguments, "--workers", "1"])
    assert len(read_list(tmp_path, "video_train.json")) == 2
    assert read_list(tmp_path, "image_train.json") == []
    with pytest.raises(SystemExit) as stop:
        toy.main([*arguments, "--seed", "9"])
    assert stop.value.code == 2
    assert "another config" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- the two splits


def test_train_and_test_share_no_appearance_and_cover_all() -> None:
    train, test = (set(toy_scene.appearances(split)) for split in ("video_train", "video_test"))
    assert set(toy_scene.appearances("image_train")) == train
    assert not train & test
    assert len(train | test) == 8 * 6 * 7 * 5 * 4
    assert 0.1 < len(test) / len(train | test) < 0.15


@pytest.mark.parametrize("seed", [0, 1])
def test_captions_keep_to_their_split_and_test_captions_are_all_different(seed: int) -> None:
    config = ToyConfig(seed=seed)
    seen: dict[str, set[tuple[str | None, ...]]] = {}
    for split in toy_scene.SPLITS:
        words = [write_words(config, split, number).captions for number in range(1500)]
        facts = [{read_caption(caption) for caption in captions} for captions in words]
        assert all(len(claims) == 1 for claims in facts)  # several captions of a clip say the same
        seen[split] = {(f.colour, f.shape, f.colour2, f.shape2, f.place) for claims in facts for f in claims}
        assert len({f[1:-1] for claims in facts for f in claims}) == 1500  # no combination twice
        several = sum(len(set(captions)) > 1 for captions in words)
        assert several == 0 if split == "video_test" else 350 < several < 550
    assert not seen["video_test"] & (seen["video_train"] | seen["image_train"])


def test_every_combination_is_used_before_one_comes_again() -> None:
    config = ToyConfig(seed=5)
    everything = len(toy_scene.appearances("video_test")) * len(toy_scene.MOTIONS)
    captions = [describe(draw_scene(config, "video_test", number), 0, 0) for number in range(everything)]
    assert len(set(captions)) == everything


# -------------------------------------------------------------------------------------------------------- words


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
    words = {"a", "an", "and", "at", "on", "the", "there", "is", "top", "bottom", "left", "right"}
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


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("split", ["video_train", "video_test"])
def test_clips_show_what_their_captions_say(toy_media: Path, config: ToyConfig, split: toy_scene.Split) -> None:
    rows = read_list(toy_media, f"{split}.json")
    codecs = set()
    for number, row in enumerate(rows):
        frames, codec, container = decode(toy_media / row["video"])
        assert (Path(row["video"]).suffix, codec) in ((".mp4", "h264"), (".webm", "vp9"))
        assert Path(row["video"]).suffix[1:] in container
        codecs.add(codec)
        assert frames.shape == (config.frames, config.size, config.size, 3)
        hidden = draw_scene(config, split, number).distractors
        shown = np.array([frame for index, frame in enumerate(frames) if index not in hidden])
        for caption in captions_of(row):
            claimed = read_caption(caption)
            assert look(shown, claimed, moving=True) == claimed, (row, hidden)
            for index in hidden:
                coloured = [c for c in (claimed.colour, claimed.colour2) if find_blob(frames[index], c, [])]
                assert not coloured, (row, index)
    assert codecs == {"h264", "vp9"}


def test_images_show_what_their_captions_say(toy_media: Path) -> None:
    for row in read_list(toy_media, "image_train.json"):
        with Image.open(toy_media / row["image"]) as image:
            assert image.format == "JPEG"
            frames = np.asarray(image)[None]
        claims = {read_caption(caption) for caption in captions_of(row)}
        assert claims == {look(frames, next(iter(claims)), moving=False)}, row


def test_half_of_the_clips_hide_a_quarter_and_never_the_event(config: ToyConfig) -> None:
    scenes = [draw_scene(config, "video_train", number) for number in range(1000)]
    hiding = [scene for scene in scenes if scene.distractors]
    assert 450 < len(hiding) < 550
    for scene in hiding:
        assert len(scene.distractors) == config.frames // 4
        assert 0 <= scene.distractors.start < scene.distractors.stop <= config.frames
        visible = [main for f in range(config.frames) if f not in scene.distractors for main in [scene_at(scene, f)]]
        if scene.motion in ("appear", "disappear"):
            assert 4 <= sum(visible) <= len(visible) - 4
        else:
            assert all(visible)
    assert len({scene.distractors.start for scene in hiding}) > config.frames // 2


def scene_at(scene: toy_scene.Scene, frame: int) -> bool:
    """Whether the main object is to be seen in that frame of 24."""
    return toy_scene.main_object(scene, frame, 24)[2] > 0


def test_objects_keep_from_the_border_and_from_each_other(config: ToyConfig) -> None:
    for number in range(300):
        for split in ("video_train", "image_train"):
            scene = draw_scene(config, split, number)
            for frame in range(24):
                x, y, radius = toy_scene.main_object(scene, frame, 24)
                assert min(x, y) - radius > 3.9 and max(x, y) + radius < 92.1
                gap = np.hypot(x - scene.centre2[0], y - scene.centre2[1]) - radius - toy_scene.SECOND_RADIUS
                assert gap > 2 or not radius, scene


def test_files_lie_in_folders_of_a_thousand(config: ToyConfig) -> None:
    assert toy.media_path(config, "image_train", 0) == "media/image_train/000/000000.jpg"
    assert toy.media_path(config, "image_train", 99_999) == "media/image_train/099/099999.jpg"
    suffixes = [Path(toy.media_path(config, "video_train", number)).suffix for number in range(2000)]
    assert 140 < suffixes.count(".webm") < 260 and suffixes.count(".webm") + suffixes.count(".mp4") == 2000
