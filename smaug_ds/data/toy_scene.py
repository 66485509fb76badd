"""What a clip or image of the built-in corpus shows, before any word or pixel: scenes, drawn by seed, split and number.

``toy`` says what a scene, an appearance, a combination and a distractor are, and what the two splits share.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from smaug_ds.config import ConfigError

Split = Literal["video_train", "image_train", "video_test"]
SPLITS: tuple[Split, ...] = ("video_train", "image_train", "video_test")

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

MOTIONS = (
    *("left", "right", "up", "down"),
    *("left then right", "right then left", "up then down", "down then up"),
    *("grow", "shrink", "appear", "disappear"),
)
DIRECTIONS = ("left", "right", "up", "down")


@dataclass(frozen=True)
class ToyConfig:
    """What decides the bytes of a built-in corpus."""

    clips: int = 2000  # training clips
    images: int = 1000  # training images, of one object each
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
    colour2: str  # the second object, which always differs in colour and shape; both empty in an image, which has none
    shape2: str
    place: str  # corner of the second object, the main object staying in the opposite half; in an image of the main one
    motion: str | None  # None in an image
    size: str | None  # of the main object; None where it grows or shrinks
    background: str
    centre: tuple[float, float]  # x, y of the main object where it does not move, in 1/96 of the side
    centre2: tuple[float, float]  # x, y of the second object, where there is one
    distractors: range  # frames that show something unrelated

    def name(self) -> str:
        """The main object as a noun phrase without article: 'small red circle'."""
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)

    def name2(self) -> str:
        return f"{self.colour2} {self.shape2}"


def appearances(split: Split) -> tuple[tuple[str, str, str, str, str], ...]:
    """All (colour, shape, second colour, second shape, place) of a split; one in eight, by hash, is for test.

    An image shows one object: its second colour and shape are empty, and none of its appearances is for test.
    """
    if split == "image_train":
        return tuple(
            (colour, shape, "", "", place) for colour, shape, place in itertools.product(COLOURS, SHAPES, PLACES)
        )
    return _appearances(split == "video_test")


@lru_cache
def _appearances(test: bool) -> tuple[tuple[str, str, str, str, str], ...]:
    every = itertools.product(COLOURS, SHAPES, COLOURS, SHAPES, PLACES)
    return tuple(a for a in every if a[0] != a[2] and a[1] != a[3] and (_stable_hash(a) % 8 == 0) == test)


def _stable_hash(words: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=8).digest(), "little")


def scene_generator(seed: int, split: Split, number: int, purpose: int) -> np.random.Generator:
    """The random numbers of clip or image ``number`` of a split, a stream of its own for each purpose.

    Purposes: 0 order of the combinations, 1 scene, 2 words, 3 pictures, 4 file format.
    """
    key = [seed, purpose << 56 | SPLITS.index(split) << 48 | number]
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


@lru_cache
def _shuffled(seed: int, split: Split) -> np.ndarray:
    """The order in which the combinations (for images: the appearances) of a split are used."""
    kinds = len(appearances(split)) * (1 if split == "image_train" else len(MOTIONS))
    return scene_generator(seed, split, 0, purpose=0).permutation(kinds)


def draw_scene(config: ToyConfig, split: Split, number: int) -> Scene:
    """The scene of clip or image ``number`` of a split."""
    rng = scene_generator(config.seed, split, number, purpose=1)
    order = _shuffled(config.seed, split)
    index, motion_index = divmod(int(order[number % len(order)]), 1 if split == "image_train" else len(MOTIONS))
    motion = None if split == "image_train" else MOTIONS[motion_index]
    colour, shape, colour2, shape2, place = appearances(split)[index]
    size, background = str(rng.choice(list(RADII))), str(rng.choice(list(BACKGROUNDS)))

    corner = np.array(PLACES[place], dtype=np.float64)
    if motion is None:
        x, y = corner + rng.uniform(-JITTER, JITTER, size=2)
        alone = (float(x), float(y))
        return Scene(colour, shape, colour2, shape2, place, motion, size, background, alone, alone, range(0))
    opposite = NEAR + FAR - corner
    axis = int(rng.integers(2))  # the main object lies, or moves, in the row (0) or the column (1) free of the second
    if motion.startswith(DIRECTIONS):
        axis = int(motion.startswith(("up", "down")))
    centre = opposite + rng.uniform(-JITTER, JITTER, size=2)
    centre[axis] = rng.uniform(NEAR, FAR)
    corner += rng.uniform(-JITTER, JITTER, size=2)

    length = round(config.frames * DISTRACTOR_LENGTH)
    stretches = [range(start, start + length) for start in range(config.frames - length + 1)]
    stretches = [stretch for stretch in stretches if _truth_survives(motion, config.frames, stretch)]
    stretch = stretches[rng.integers(len(stretches))]
    hidden = rng.random() < config.distractor_share
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
