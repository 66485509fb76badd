"""The built-in corpus: rendered clips of two shapes, true captions, questions and choices; nothing to download.

A *scene* holds one main object, which moves (or grows, appears, turns back ...), and one second object, which stays in
a corner. Colours, shapes, corner and background show in any single frame; direction, order and appearing need several.
About half of the clips hide a quarter of their frames behind grey *distractors*, so that it matters which frames are
chosen.

Train and test share no *appearance*, the tuple (colour, shape, second colour, second shape, place): every appearance
belongs to one of the two by a stable hash, for clips and for images. A *combination* is an appearance and a motion, so
the splits share no combination either, and every combination is used once before any is used again. Size and background
are drawn freely.

Every random number of clip ``i`` comes from Philox generators keyed by (seed, split, i): a clip is the same bit for
bit whatever the size of the corpus and the number of workers.

    python -m smaug_ds.data.toy --out DIR [--clips N] [--images N] [--test-clips N] [--seed N] ... [--workers N]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import string
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from smaug_ds.config import ConfigError

Split = Literal["video_train", "image_train", "video_test"]
SPLITS: tuple[Split, ...] = ("video_train", "image_train", "video_test")
FORMAT = 1  # of the rendered folder; raised whenever the same config renders other bytes

COLOURS = {
    "red": (225, 25, 25),
    "orange": (255, 140, 0),
    "yellow": (250, 235, 40),
    "green": (20, 150, 40),
    "cyan": (40, 220, 230),
    "blue": (30, 50, 235),
    "pink": (245, 70, 205),
    "white": (252, 252, 252),
}
BACKGROUNDS = {"black": (22, 22, 22), "grey": (150, 150, 150), "brown": (105, 65, 35), "navy": (25, 25, 85)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = {"top left": (26, 26), "top right": (70, 26), "bottom left": (26, 70), "bottom right": (70, 70)}
RADII = {"small": 13.0, "large": 20.0}  # of the main object; lengths are in 1/96 of the picture's side
SECOND_RADIUS = 17.0
GROWTH = (10.0, 20.0)  # radius of a growing object at its start and end
NEAR, FAR = 26.0, 70.0  # centres stay this far from the border: no mild crop cuts an object off
JITTER = 2.0
EVENT = 0.35  # share of the clip before an object appears, or after it has disappeared
DISTRACTOR_LENGTH = 0.25  # share of the frames

# What the main object does, in words; the first wording is also the answer to "what does it do".
WORDINGS = {
    "left": ("moves left", "slides to the left"),
    "right": ("moves right", "slides to the right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "falls"),
    "left then right": ("first moves left and then right", "moves right after moving left"),
    "right then left": ("first moves right and then left", "moves left after moving right"),
    "up then down": ("first moves up and then down", "moves down after moving up"),
    "down then up": ("first moves down and then up", "moves up after moving down"),
    "grow": ("grows", "gets larger"),
    "shrink": ("shrinks", "gets smaller"),
    "appear": ("appears", "comes into view"),
    "disappear": ("disappears", "vanishes"),
}
MOTIONS = tuple(WORDINGS)
OPPOSITES = {
    **{"left": "right", "up": "down", "left then right": "right then left", "up then down": "down then up"},
    **{"grow": "shrink", "appear": "disappear"},
}
OPPOSITES |= {opposite: motion for motion, opposite in OPPOSITES.items()}
DIRECTIONS = ("left", "right", "up", "down")

VIDEO_TEMPLATES = (
    "{main} {action} while {second} stays at the {place}",
    "{second} stays at the {place} while {main} {action}",
    "{main} {action} and there is a still {second_bare} at the {place}",
    "at the {place} there is a still {second_bare} and {main} {action}",
)
IMAGE_TEMPLATES = (
    "{main} and at the {place} {second}",
    "{second} at the {place} and {main}",
    "there is {main} and at the {place} there is {second}",
)

X264 = {"preset": "veryfast", "crf": "23", "x264-params": "mbtree=0"}  # its macroblock tree varies from run to run
VP9 = {"deadline": "realtime", "cpu-used": "6", "crf": "22", "b": "0"}
GOP = 12  # frames from one key frame to the next at most
PER_FOLDER = 1000
CHUNK = 50  # clips that a worker renders at a time


@dataclass(frozen=True)
class ToyConfig:
    """What decides the bytes of a built-in corpus."""

    clips: int = 2000  # training clips
    images: int = 1000  # training images
    test_clips: int = 128  # held-out clips, on top of the training clips
    seed: int = 0
    size: int = 96  # height and width of the pictures, pixels, even
    frames: int = 24  # of each clip
    fps: int = 12  # frames per second
    webm_share: float = 0.1  # share of the clips in WebM/VP9; the others are MP4/H.264
    distractor_share: float = 0.5  # share of the clips with distractor frames
    second_caption_share: float = 0.3  # share of the training clips and images with two captions

    def __post_init__(self) -> None:
        bounds = {"clips": 1, "images": 0, "test_clips": 1, "seed": 0, "size": 32, "frames": 8, "fps": 1}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise ConfigError(f"toy.{name} is {getattr(self, name)}, but must be at least {least}")
        if self.size % 2:
            raise ConfigError(f"toy.size is {self.size}, but H.264 in yuv420p needs an even number of pixels")
        for name in ("webm_share", "distractor_share", "second_caption_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"toy.{name} is {getattr(self, name)}, but a share lies between 0 and 1")
        if self.test_clips > (most := len(appearances("video_test")) * len(MOTIONS)):
            raise ConfigError(f"toy.test_clips is {self.test_clips}, but only {most} combinations are held out")


@dataclass(frozen=True)
class Scene:
    """Everything that a caption or a picture of one clip or image can tell."""

    colour: str
    shape: str
    colour2: str  # the second object; its colour and its shape always differ from the main object's
    shape2: str
    place: str  # corner of the second object; the main object stays in the opposite half
    motion: str | None  # None in an image
    size: str | None  # of the main object; None where it grows or shrinks
    background: str
    centre: tuple[float, float]  # x, y of the main object where it does not move, in 1/96 of the side
    centre2: tuple[float, float]  # x, y of the second object
    distractors: range  # frames that show something unrelated

    def name(self) -> str:
        """The main object as a noun phrase without article: 'small red circle'."""
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)

    def name2(self) -> str:
        return f"{self.colour2} {self.shape2}"


def appearances(split: Split) -> tuple[tuple[str, str, str, str, str], ...]:
    """All (colour, shape, second colour, second shape, place) of a split; one in eight, by hash, is for test."""
    return _appearances(split == "video_test")


@lru_cache
def _appearances(test: bool) -> tuple[tuple[str, str, str, str, str], ...]:
    every = itertools.product(COLOURS, SHAPES, COLOURS, SHAPES, PLACES)
    return tuple(a for a in every if a[0] != a[2] and a[1] != a[3] and (_stable_hash(a) % 8 == 0) == test)


def _stable_hash(words: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=8).digest(), "little")


def _generator(seed: int, split: Split, number: int, purpose: int) -> np.random.Generator:
    key = [seed, purpose << 56 | SPLITS.index(split) << 48 | number]
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


@lru_cache
def _shuffled(seed: int, split: Split) -> np.ndarray:
    """The order in which the combinations (for images: the appearances) of a split are used."""
    kinds = len(appearances(split)) * (1 if split == "image_train" else len(MOTIONS))
    return _generator(seed, split, 0, purpose=0).permutation(kinds)


# ---------------------------------------------------------------------------------------------------------- scene


def draw_scene(config: ToyConfig, split: Split, number: int) -> Scene:
    """The scene of clip or image ``number`` of a split."""
    rng = _generator(config.seed, split, number, purpose=1)
    order = _shuffled(config.seed, split)
    index, motion_index = divmod(int(order[number % len(order)]), 1 if split == "image_train" else len(MOTIONS))
    motion = None if split == "image_train" else MOTIONS[motion_index]
    colour, shape, colour2, shape2, place = appearances(split)[index]
    size, background = str(rng.choice(list(RADII))), str(rng.choice(list(BACKGROUNDS)))

    corner = np.array(PLACES[place], dtype=np.float64)
    opposite = NEAR + FAR - corner
    axis = int(rng.integers(2))  # the main object lies, or moves, in the row (0) or the column (1) free of the second
    if motion is not None and motion.startswith(DIRECTIONS):
        axis = int(motion.startswith(("up", "down")))
    centre = opposite + rng.uniform(-JITTER, JITTER, size=2)
    centre[axis] = rng.uniform(NEAR, FAR)
    corner += rng.uniform(-JITTER, JITTER, size=2)

    length = round(config.frames * DISTRACTOR_LENGTH)
    stretches = [range(start, start + length) for start in range(config.frames - length + 1)]
    stretches = [stretch for stretch in stretches if _truth_survives(motion, config.frames, stretch)]
    stretch = stretches[rng.integers(len(stretches))]
    hidden = motion is not None and rng.random() < config.distractor_share
    return Scene(
        *(colour, shape, colour2, shape2, place, motion),
        size=None if motion in ("grow", "shrink") else size,
        background=background,
        centre=(float(centre[0]), float(centre[1])),
        centre2=(float(corner[0]), float(corner[1])),
        distractors=stretch if hidden else range(0),
    )


def phases(motion: str | None, frames: int) -> list[range]:
    """The stretches of a clip between which the main object changes what it does, as ranges of frames."""
    cut = {"appear": EVENT, "disappear": 1 - EVENT}.get(motion or "", 0.5 if motion and "then" in motion else 1.0)
    boundary = round(frames * cut)
    return [phase for phase in (range(boundary), range(boundary, frames)) if phase]


def _truth_survives(motion: str | None, frames: int, hidden: range) -> bool:
    """Whether distractors there leave at least half of each phase to see."""
    return all(2 * sum(frame in hidden for frame in phase) <= len(phase) for phase in phases(motion, frames))


def main_object(scene: Scene, frame: int, frames: int) -> tuple[float, float, float]:
    """(x, y, radius) of the main object in a frame, in 1/96 of the side; radius 0 where it is not there."""
    x, y = scene.centre
    radius = RADII[scene.size] if scene.size else 0.0
    time = frame / max(frames - 1, 1)
    if scene.motion in ("grow", "shrink"):
        small, large = GROWTH
        radius = small + (large - small) * (time if scene.motion == "grow" else 1 - time)
    elif scene.motion in ("appear", "disappear"):
        before, after = phases(scene.motion, frames)
        radius = radius if frame in (after if scene.motion == "appear" else before) else 0.0
    elif scene.motion is not None:
        first = scene.motion.split()[0]
        travelled = 1 - abs(1 - 2 * time) if "then" in scene.motion else time
        along = NEAR + (FAR - NEAR) * (travelled if first in ("right", "down") else 1 - travelled)
        x, y = (along, y) if first in ("left", "right") else (x, along)
    return x, y, radius


# ---------------------------------------------------------------------------------------------------------- words


def describe(scene: Scene, template: int, wording: int) -> str:
    """A caption that states the whole combination, so that different combinations never share a caption."""
    templates = IMAGE_TEMPLATES if scene.motion is None else VIDEO_TEMPLATES
    return f"{templates[template]} on {scene.background}".format(
        main=_with_article(scene.name()),
        second=_with_article(scene.name2()),
        second_bare=scene.name2(),
        place=scene.place,
        action=WORDINGS[scene.motion][wording] if scene.motion else "",
    )


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Every (question, answer) that the clip of ``scene`` settles."""
    assert scene.motion is not None
    pairs = [
        (f"what colour is the {scene.shape}?", scene.colour),
        (f"what colour is the {scene.shape2}?", scene.colour2),
        (f"what shape is the {scene.colour} object?", scene.shape),
        (f"what shape is the {scene.colour2} object?", scene.shape2),
        (f"where is the {scene.name2()}?", scene.place),
        ("what colour is the background?", scene.background),
        (f"what does the {scene.colour} {scene.shape} do?", WORDINGS[scene.motion][0]),
    ]
    if scene.size:
        pairs.append((f"how large is the {scene.colour} {scene.shape}?", scene.size))
    if scene.motion.startswith(DIRECTIONS):
        pairs.append(("which shape stays still?", scene.shape2))
    if "then" in scene.motion:
        first, _, last = scene.motion.split()
        pairs.append((f"which way does the {scene.shape} move first?", first))
        pairs.append((f"which way does the {scene.shape} move last?", last))
    return pairs


def false_scenes(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """Four scenes that contradict ``scene``, for the wrong choices.

    With the true one, three of them form a square: two attributes, each true or false. The fourth changes a third
    attribute of a random corner. So no choice stands out as the one that the others were made from, and the words
    alone do not tell the answer.
    """
    assert scene.motion is not None
    others = {
        "colour": [colour for colour in COLOURS if colour not in (scene.colour, scene.colour2)],
        "shape2": [shape for shape in SHAPES if shape not in (scene.shape, scene.shape2)],
        "place": [place for place in PLACES if place != scene.place],
    }
    names = [str(name) for name in rng.permutation(list(others))[:2]]
    changes: list[dict[str, Any]] = [{name: str(rng.choice(others[name]))} for name in names]
    second, third = changes
    moved = dataclasses.replace(scene, motion=OPPOSITES[scene.motion])
    square = [scene, moved, *(dataclasses.replace(corner, **second) for corner in (scene, moved))]
    return [*square[1:], dataclasses.replace(square[rng.integers(4)], **third)]


@dataclass(frozen=True)
class Words:
    """What is written about one clip or image; images have captions only."""

    captions: tuple[str, ...]
    questions: tuple[tuple[str, str], ...] = ()  # (question, answer)
    choices: tuple[str, ...] = ()  # five captions, one of them true
    answer: int = -1  # index of the true choice


Done = list[tuple[str, Words]]  # paths and words of rendered files


def write_words(config: ToyConfig, split: Split, number: int) -> Words:
    """Captions, two questions and a multiple choice for clip or image ``number`` of a split."""
    scene = draw_scene(config, split, number)
    rng = _generator(config.seed, split, number, purpose=2)
    count = 2 if split != "video_test" and rng.random() < config.second_caption_share else 1
    templates = rng.permutation(len(IMAGE_TEMPLATES if scene.motion is None else VIDEO_TEMPLATES))[:count]
    captions = tuple(describe(scene, int(template), int(rng.integers(2))) for template in templates)
    if scene.motion is None:
        return Words(captions)
    pairs = questions(scene)
    asked = tuple(pairs[i] for i in rng.permutation(len(pairs))[:2])
    template, wording = int(rng.integers(len(VIDEO_TEMPLATES))), int(rng.integers(2))
    choices = [describe(s, template, wording) for s in (scene, *false_scenes(scene, rng))]
    order = rng.permutation(len(choices)).tolist()
    return Words(captions, asked, tuple(choices[i] for i in order), order.index(0))


def vocabulary() -> list[str]:
    """WordPiece entries: specials, every word of the grammar, then the pieces that spell any other ASCII word."""
    texts = [*COLOURS, *SHAPES, *PLACES, *RADII, *BACKGROUNDS, "a an"]
    still = Scene("red", "circle", "blue", "square", "top left", None, "small", "grey", (0, 0), (0, 0), range(0))
    texts += [describe(still, template, 0) for template in range(len(IMAGE_TEMPLATES))]
    for motion, wordings in WORDINGS.items():
        moving = dataclasses.replace(still, motion=motion)
        texts += [describe(moving, t, w) for t in range(len(VIDEO_TEMPLATES)) for w in range(len(wordings))]
        texts += [text for pair in questions(moving) for text in pair]
    words = sorted({word for text in texts for word in re.findall("[a-z]+", text)})
    characters = list(string.ascii_lowercase + string.digits)
    pieces = [*characters, *(f"##{c}" for c in characters), *string.punctuation]
    return list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *pieces]))


# -------------------------------------------------------------------------------------------------------- pictures


@lru_cache(maxsize=4096)
def _mask(shape: str, half_pixels: int) -> np.ndarray:
    """Coverage (2 h + 1, 2 h + 1, 1) float32 in [0, 1] of a shape with a radius of ``half_pixels`` / 2, centred."""
    radius, fine = half_pixels / 2, 8
    side = 2 * int(np.ceil(1.1 * radius)) + 1
    image = Image.new("L", (side * fine, side * fine))
    draw = ImageDraw.Draw(image)
    middle, r = side * fine / 2, radius * fine

    def box(width: float, height: float) -> tuple[float, float, float, float]:
        return middle - width, middle - height, middle + width, middle + height

    def points(angles: np.ndarray, radii: np.ndarray | float) -> list[tuple[float, float]]:
        xy = np.stack([middle + radii * np.sin(angles), middle - radii * np.cos(angles)], axis=1)
        return [(float(x), float(y)) for x, y in xy]

    if shape in ("circle", "ring"):
        draw.ellipse(box(r, r), fill=255)
    if shape == "ring":
        draw.ellipse(box(0.55 * r, 0.55 * r), fill=0)
    elif shape == "square":
        draw.rectangle(box(0.88 * r, 0.88 * r), fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y + 0.2 * r) for x, y in points(np.arange(3) * 2 * np.pi / 3, 1.15 * r)], fill=255)
    elif shape == "star":
        draw.polygon(points(np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.45, 1.1) * r), fill=255)
    elif shape == "cross":
        draw.rectangle(box(r, 0.33 * r), fill=255)
        draw.rectangle(box(0.33 * r, r), fill=255)
    return (np.asarray(image.reduce(fine), dtype=np.float32) / 255)[..., None]


def _stamp(canvas: np.ndarray, shape: str, colour: np.ndarray, x: float, y: float, radius: float) -> None:
    """Blends a shape into ``canvas`` (S, S, 3) float32 in place; coordinates in 1/96 of the side."""
    scale = canvas.shape[0] / 96
    mask = _mask(shape, round(2 * radius * scale))
    side = mask.shape[0]
    left, top = (round(centre * scale) - side // 2 for centre in (x, y))
    patch = canvas[top : top + side, left : left + side]
    patch += mask * (colour - patch)


def _background(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """(S, S, 3) float32: a background colour, a little off, with a faint slope; far from every colour of an object."""
    slope = rng.uniform(-8, 8, size=2)
    across, down = np.meshgrid(*[np.linspace(-1, 1, size)] * 2)
    light = slope[0] * across + slope[1] * down
    return (light[..., None] + BACKGROUNDS[name] + rng.uniform(-6, 6, size=3)).astype(np.float32)


def _distractors(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(count, S, S, 1) grey pictures that show nothing a caption names: blocks, stripes or blurred blobs, drifting."""
    kind = rng.choice(["blocks", "stripes", "blobs"])
    if kind == "stripes":
        across, down = np.meshgrid(*[np.linspace(0, 2 * np.pi, size, endpoint=False)] * 2)
        waves = np.array([-1, 1])[rng.integers(2, size=2)] * rng.integers(2, 6, size=2)
        picture = 110 + 60 * np.sin(waves[0] * across + waves[1] * down)
    else:
        cells = rng.integers(40, 190, size=(12, 12) if kind == "blocks" else (5, 5)).astype(np.uint8)
        sampling = Image.Resampling.NEAREST if kind == "blocks" else Image.Resampling.BICUBIC
        picture = np.asarray(Image.fromarray(cells).resize((size, size), sampling))
    drift = rng.integers(-2, 3, size=2)
    return np.stack([np.roll(picture, tuple(drift * frame), axis=(0, 1)) for frame in range(count)])[..., None]


def render_frames(config: ToyConfig, split: Split, number: int) -> np.ndarray:
    """(T, S, S, 3) uint8 RGB; T = 1 for an image."""
    scene = draw_scene(config, split, number)
    rng = _generator(config.seed, split, number, purpose=3)
    still = _background(scene.background, config.size, rng)
    colour, colour2 = (np.add(COLOURS[name], rng.uniform(-10, 10, 3)) for name in (scene.colour, scene.colour2))
    _stamp(still, scene.shape2, colour2, *scene.centre2, SECOND_RADIUS)
    count = 1 if scene.motion is None else config.frames
    frames = np.repeat(still[None], count, axis=0)
    for index, frame in enumerate(frames):
        x, y, radius = main_object(scene, index, count)
        if radius:
            _stamp(frame, scene.shape, colour, x, y, radius)
    if hidden := scene.distractors:
        frames[hidden.start : hidden.stop] = _distractors(len(hidden), config.size, rng)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------- files


def media_path(config: ToyConfig, split: Split, number: int) -> str:
    """Where clip or image ``number`` lies, relative to the corpus folder; the ending says the format."""
    suffix = "jpg"
    if split != "image_train":
        suffix = "webm" if _generator(config.seed, split, number, purpose=4).random() < config.webm_share else "mp4"
    return f"media/{split}/{number // PER_FOLDER:03d}/{number:06d}.{suffix}"


def encode_media(frames: np.ndarray, suffix: str, fps: int) -> bytes:
    """The file of (T, S, S, 3) uint8 frames as ``mp4`` (H.264), ``webm`` (VP9) or ``jpg``; same frames, same bytes."""
    buffer = io.BytesIO()
    if suffix == "jpg":
        Image.fromarray(frames[0]).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()
    # Bit-exact keeps random identifiers out of the WebM header; one thread keeps the rate control reproducible.
    with av.open(buffer, "w", format=suffix, options={"fflags": "+bitexact"}) as container:
        codec, options = ("libx264", X264) if suffix == "mp4" else ("libvpx-vp9", VP9)
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size, stream.thread_count = "yuv420p", GOP, 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _render_chunk(config: ToyConfig, folder: Path, split: Split, numbers: range) -> Done:
    """Renders the files that are not there yet, each whole or not at all; returns their paths and words."""
    done = []
    for number in numbers:
        name = media_path(config, split, number)
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, encode_media(render_frames(config, split, number), path.suffix[1:], config.fps))
        done.append((name, write_words(config, split, number)))
    return done


def _write(path: Path, content: bytes) -> None:
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_bytes(content)
    os.replace(partial_path, path)


def _write_lists(folder: Path, done: dict[Split, Done]) -> None:
    """The annotation files and ``vocab.txt``; media paths are relative to ``folder``."""
    lists: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SPLITS, "qa_train", "qa_test", "mc_test")}
    for split, files in done.items():
        medium, part = split.split("_")
        for number, (path, words) in enumerate(files):
            several = len(words.captions) > 1
            lists[split].append({medium: path, "caption": list(words.captions) if several else words.captions[0]})
            for k, (question, answer) in enumerate(words.questions):
                name = f"{part}_{number:06d}_{k}"
                row = {"question_id": name, "video": path, "question": question, "answer": answer}
                lists[f"qa_{part}"].append(row)
            if split == "video_test":
                lists["mc_test"].append({"video": path, "caption": list(words.choices), "answer": words.answer})
    for name, rows in lists.items():
        _write(folder / f"{name}.json", json.dumps(rows, indent=0).encode())
    _write(folder / "vocab.txt", "".join(f"{piece}\n" for piece in vocabulary()).encode())


def render_corpus(config: ToyConfig, folder: Path | str, workers: int = 1) -> None:
    """Renders the corpus into ``folder``, on ``workers`` processes; does nothing where it is finished already.

    Writes ``media/``, the lists ``video_train.json``, ``image_train.json``, ``video_test.json``, ``qa_train.json``,
    ``qa_test.json`` and ``mc_test.json`` in the layouts of Singularity, ``vocab.txt`` and, last, ``toy.json`` with the
    config. A run that was ended early goes on where it stopped.

    Raises:
        ValueError: ``folder`` holds a corpus, or a part of one, of another config.
    """
    folder = Path(folder)
    record, started = folder / "toy.json", folder / "toy.json.started"
    wanted = {"format": FORMAT, **dataclasses.asdict(config)}
    for path in (record, started):
        if path.exists() and (found := json.loads(path.read_text())) != wanted:
            raise ValueError(
                f"{folder} holds a built-in corpus of another config: found {found}, asked for {wanted}; "
                "choose another folder or remove that one"
            )
    if record.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(started, json.dumps(wanted, indent=2).encode())
    counts: dict[Split, int] = {
        "video_train": config.clips,
        "image_train": config.images,
        "video_test": config.test_clips,
    }
    jobs = [(s, range(k, min(k + CHUNK, count))) for s, count in counts.items() for k in range(0, count, CHUNK)]
    done: dict[Split, Done] = {split: [] for split in SPLITS}
    with tqdm(total=sum(counts.values()), desc="rendering", unit="file", smoothing=0.05) as bar:
        results = _run(partial(_render_chunk, config, folder), jobs, workers)
        for (split, numbers), files in zip(jobs, results, strict=True):
            done[split] += files
            bar.update(len(numbers))
    _write_lists(folder, done)
    os.replace(started, record)


def _run(render: partial[Done], jobs: list[tuple[Split, range]], workers: int) -> Iterator[Done]:
    """Yields each job's result, in the order of the jobs."""
    if workers <= 1:
        yield from itertools.starmap(render, jobs)
        return
    # Spawned, not forked: the caller may hold threads of torch or of a decoder.
    with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(render, *zip(*jobs, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the renderer: one option for each field of ``ToyConfig``."""
    parser = argparse.ArgumentParser(description="Render the built-in corpus of moving shapes.")
    parser.add_argument("--out", required=True, type=Path, help="folder of the corpus")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    for field in dataclasses.fields(ToyConfig):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help=f"default: {field.default}")
    options = vars(parser.parse_args(arguments))
    folder, workers = options.pop("out"), options.pop("workers")
    try:
        render_corpus(ToyConfig(**options), folder, workers)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{options['clips']} + {options['test_clips']} clips and {options['images']} images in {folder}")


if __name__ == "__main__":
    main()
