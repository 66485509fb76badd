"""Config files and overrides: types, precedence, presets, and one-line errors that name the key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from smaug_ds.config import ConfigError, dump, parse, to_dict


@dataclass(frozen=True)
class Eyes:
    layers: tuple[int, ...] = (4, 7, 10)
    rate: float = 0.5
    width: int = 768
    range: tuple[float, float] = (0.5, 1.0)


@dataclass(frozen=True)
class Body:
    size: str = "base"
    frames: int = 1
    eyes: Eyes = field(default_factory=Eyes)

    @classmethod
    def of_size(cls, size: str) -> Body:
        if size not in ("base", "tiny"):
            raise ValueError(f"body.size is {size!r}: it must be base or tiny")
        return cls(size="tiny", frames=2, eyes=Eyes(width=32)) if size == "tiny" else cls()

    def __post_init__(self) -> None:
        if self.frames > 8:
            raise ValueError(f"body.frames is {self.frames}: at most 8")


@dataclass(frozen=True)
class Run:
    folder: str = "runs"
    start: str | None = None
    resume: bool = True
    kind: Literal["infonce", "sigmoid"] = "infonce"


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    body: Body = field(default_factory=Body)
    corpora: tuple[str, ...] = ()


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_which_wins_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {folder: from_file, resume: false}\nbody:\n  eyes: {rate: 0.25, layers: [1, 2]}\n")
    config = parse(Config, path, ["run.folder=mine", "body.eyes.layers=[3]", "corpora=[a, b]"])
    assert config.run == Run(folder="mine", resume=False)
    assert config.body.eyes == Eyes(layers=(3,), rate=0.25)
    assert config.corpora == ("a", "b")


def test_no_file_and_no_overrides_are_the_defaults() -> None:
    assert parse(Config, None) == Config()


def test_an_empty_section_is_the_defaults(tmp_path: Path) -> None:
    assert parse(Config, write(tmp_path, "run:\nbody:\n  eyes:\n")) == Config()
    assert parse(Config, write(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize("text", ["1e-4", "0.0001", "1.0e-4", "'1e-4'"])
def test_every_spelling_of_a_float_is_one(tmp_path: Path, text: str) -> None:
    assert parse(Config, write(tmp_path, f"body: {{eyes: {{rate: {text}}}}}")).body.eyes.rate == 1e-4
    assert parse(Config, None, [f"body.eyes.rate={text}"]).body.eyes.rate == 1e-4


def test_a_whole_number_may_be_a_float_and_numbers_may_be_names() -> None:
    config = parse(Config, None, ["body.eyes.rate=1", "run.folder=2026", "run.start=a: b #c=d"])
    assert config.body.eyes.rate == 1.0 and isinstance(config.body.eyes.rate, float)
    assert config.run.folder == "2026"
    assert config.run.start == "a: b #c=d"
    assert parse(Config, None, ["run.start=x", "run.start=null"]).run.start is None


def test_a_preset_fills_what_is_not_given(tmp_path: Path) -> None:
    path = write(tmp_path, "body: {size: tiny, eyes: {rate: 0.1}}")
    assert parse(Config, path).body == Body(size="tiny", frames=2, eyes=Eyes(rate=0.1, width=32))
    assert parse(Config, path, ["body.size=base"]).body == Body(eyes=Eyes(rate=0.1))


def test_a_dumped_config_is_read_back_equal(tmp_path: Path) -> None:
    overrides = ["body.size=tiny", "body.eyes.rate=3e-7", "run.start=true", "corpora=['1', 'a b']", "run.folder="]
    config = parse(Config, None, overrides)
    dump(config, tmp_path / "dumped.yaml")
    assert parse(Config, tmp_path / "dumped.yaml") == config
    assert to_dict(config)["body"]["eyes"]["layers"] == [4, 7, 10]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("body.eyes.wdith=3", ["body.eyes.wdith", "did you mean body.eyes.width?"]),
        ("widht=3", ["unknown key widht", "known here: run, body, corpora"]),
        ("width=3", ["unknown key width", "did you mean body.eyes.width?"]),
        ("bdoy.frames=3", ["unknown key bdoy", "did you mean body?"]),
        ("body.frames.x=3", ["body.frames", "expected a whole number", "a section"]),
        ("body=3", ["body", "expected a section of keys", "'3'"]),
        ("body.frames=many", ["body.frames", "expected a whole number", "'many'"]),
        ("body.frames=2.5", ["body.frames", "expected a whole number", "'2.5'"]),
        ("body.frames=true", ["body.frames", "expected a whole number", "'true'"]),
        ("body.frames=[1]", ["body.frames", "expected a whole number", "a list ['1']"]),
        ("body.frames=", ["body.frames", "expected a whole number", "''"]),
        ("body.eyes.rate=fast", ["body.eyes.rate", "expected a number", "'fast'"]),
        ("body.eyes.rate=nan", ["body.eyes.rate", "expected a number", "'nan'"]),
        ("body.eyes.layers=4", ["body.eyes.layers", "expected a list", "'4'"]),
        ("body.eyes.layers=[1,x]", ["body.eyes.layers[1]", "expected a whole number", "'x'"]),
        ("body.eyes.range=[1]", ["body.eyes.range", "a list of 2 values"]),
        ("run.resume=1", ["run.resume", "expected true or false", "'1'"]),
        ("run.kind=sigmiod", ["run.kind", "one of infonce, sigmoid", "sigmoid?", "'sigmiod'"]),
        ("run.folder=[a]", ["run.folder", "expected a text"]),
        ("body.frames=9", ["body.frames is 9"]),
        ("body.size=huge", ["body.size is 'huge'"]),
        ("corpora=[a", ["corpora", "not valid YAML"]),
        ("frames", ["expected key=value", "'frames'"]),
        ("=3", ["expected key=value"]),
    ],
)
def test_what_is_wrong_is_told_in_one_line(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Config, None, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("body: {frames: 3\n", ["config.yaml", "not valid YAML", "line 2"]),
        ("body: {frames: 3}\nbody: {frames: 4}\n", ["line 2", "'body' is given twice"]),
        ("- a\n- b\n", ["config.yaml", "expected a section of keys"]),
        ("body: {frames: three}\n", ["config.yaml", "body.frames", "'three'"]),
        ("body: {[1]: 3}\n", ["config.yaml", "keys must be plain names"]),
        ("body: {frames: \x01}\n", ["config.yaml", "not valid YAML"]),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Config, write(tmp_path, text))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        parse(Config, tmp_path / "nowhere.yaml")


def test_a_key_without_default_must_be_given() -> None:
    @dataclass(frozen=True)
    class Inner:
        needed: int

    outer = dataclasses.make_dataclass("Outer", [("inner", Inner)], frozen=True)
    with pytest.raises(ConfigError, match=r"inner\.needed has no default"):
        parse(outer, None)
    assert parse(outer, None, ["inner.needed=3"]).inner == Inner(3)


def test_programming_errors_are_not_config_errors() -> None:
    @dataclass(frozen=True)
    class Broken:
        number: int = 1

        def __post_init__(self) -> None:
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        parse(Broken, None)
