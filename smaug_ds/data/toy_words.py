"""What is written about the scenes of the built-in corpus: captions, questions, choices and their vocabulary."""

from __future__ import annotations

import dataclasses
import re
import string
from dataclasses import dataclass
from typing import Any

import numpy as np

from smaug_ds.data.toy_scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PLACES,
    RADII,
    SHAPES,
    Scene,
    Split,
    ToyConfig,
    draw_scene,
    scene_generator,
)

# For each of MOTIONS, what the main object does in words; the first wording is also the answer to "what does it do".
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
OPPOSITES = {
    **{"left": "right", "up": "down", "left then right": "right then left", "up then down": "down then up"},
    **{"grow": "shrink", "appear": "disappear"},
}
OPPOSITES |= {opposite: motion for motion, opposite in OPPOSITES.items()}

VIDEO_TEMPLATES = (
    "{main} {action} while {second} stays at the {place}",
    "{second} stays at the {place} while {main} {action}",
    "{main} {action} and there is a still {second_bare} at the {place}",
    "at the {place} there is a still {second_bare} and {main} {action}",
)
IMAGE_TEMPLATES = ("{main} at the {place}", "at the {place} there is {main}", "there is {main} at the {place}")


def describe(scene: Scene, template: int, wording: int) -> str:
    """A caption that states the whole combination, so that different combinations never share a caption."""
    templates = IMAGE_TEMPLATES if scene.motion is None else VIDEO_TEMPLATES
    return f"{templates[template]} on {scene.background}".format(
        main=_with_article(scene.name()),
        second=_with_article(scene.name2()) if scene.shape2 else "",
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


def write_words(config: ToyConfig, split: Split, number: int) -> Words:
    """Captions, two questions and a multiple choice for clip or image ``number`` of a split."""
    scene = draw_scene(config, split, number)
    rng = scene_generator(config.seed, split, number, purpose=2)
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
