"""The built-in corpus: the same bytes from the same settings, and two splits that share no appearance."""

from __future__ import annotations

from pathlib import Path

import pytest

from smaug_ds.config import ConfigError
from smaug_ds.data import toy, toy_scene
from smaug_ds.data.toy import render_corpus
from smaug_ds.data.toy_scene import ToyConfig, draw_scene
from smaug_ds.data.toy_words import describe, write_words
from tests.toys import read_caption, read_list


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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


def test_train_and_test_share_no_appearance_and_cover_all() -> None:
    train, test = (set(toy_scene.appearances(split)) for split in ("video_train", "video_test"))
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
        combinations = len({f[1:-1] for claims in facts for f in claims})
        assert combinations == (8 * 6 * 4 if split == "image_train" else 1500)  # of clips none twice
        several = sum(len(set(captions)) > 1 for captions in words)
        assert several == 0 if split == "video_test" else 350 < several < 550
    assert not seen["video_test"] & seen["video_train"]


def test_every_combination_is_used_before_one_comes_again() -> None:
    config = ToyConfig(seed=5)
    everything = len(toy_scene.appearances("video_test")) * len(toy_scene.MOTIONS)
    captions = [describe(draw_scene(config, "video_test", number), 0, 0) for number in range(everything)]
    assert len(set(captions)) == everything
