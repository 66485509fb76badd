"""Lists and captions of the built-in corpus, read back for tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from smaug_ds.data import toy, toy_scene
from smaug_ds.data.toy_scene import ToyConfig

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
        colour2, shape2 = [word for word in second.groups() if word][-2:]
        return Facts(*main, MEANINGS[action], colour2, shape2, place[1], background[1])
    (main,) = re.findall(OBJECT, caption)
    return Facts(*main, None, "", "", place[1], background[1])


def read_list(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / name).read_text())


def captions_of(row: dict[str, Any]) -> list[str]:
    return row["caption"] if isinstance(row["caption"], list) else [row["caption"]]


def config_of(media: Path) -> ToyConfig:
    """The settings that a folder of the corpus was rendered with."""
    record = json.loads((media / "toy.json").read_text())
    assert record.pop("format") == toy.FORMAT
    return ToyConfig(**record)
