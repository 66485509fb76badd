"""The look before a run at what it starts from: its tokenizer and the weights of ``run.init_from``; and how to ask."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smaug_ds import evaluate, finetune, preflight, pretrain
from smaug_ds.config import parse
from smaug_ds.engine import checkpoint
from smaug_ds.engine.inspection import Facts, Inspection
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer
from tests.launching import settings

OPTION = re.compile(r"--[a-z][a-z_-]+")


@pytest.fixture
def own(toy_shards: Path, toy_media: Path, tmp_path: Path) -> list[str]:
    return settings(toy_shards, toy_media, tmp_path / "run")


@pytest.fixture
def start(own: list[str], tmp_path: Path) -> Path:
    """A folder with weights of the very model of ``own``."""
    config = parse(PretrainConfig, None, own)
    text = dataclasses.replace(config.model.text, vocab_size=Tokenizer(config.data.tokenizer).vocab_size)
    SmaugModel(dataclasses.replace(config.model, text=text)).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def look(own: list[str], task: str = "pretrain") -> Facts:
    inspected = Inspection(0, 0, preflight.READERS[task](own))
    with inspected.seal() as seal:
        return inspected.facts(0.0, seal)


def test_the_help_names_all_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for command in (preflight.main, pretrain.main, finetune.main, evaluate.main):
        with pytest.raises(SystemExit) as ended:
            command(["--help"])
        assert ended.value.code == 0
        told.append(capsys.readouterr().out)
    own, *others = told
    taken = {option for text in others for option in OPTION.findall(text)} - {"--compare", "--module"}
    assert {"--config", "--benchmark", "--allow-missing"} < taken
    assert taken - set(OPTION.findall(own)) == set()
    for words in ("{pretrain,finetune,evaluate}", "key=value", "batch.micro_size=8", "Exit codes: 0", "2 something"):
        assert words in own


def test_results_to_compare_are_none_of_its_business(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        preflight.main(["--for", "evaluate", "--compare", "a.json"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: preflight: --compare ")


def test_a_tokenizer_that_is_not_named_is_told_with_its_setting(
    own: list[str], toy_media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unnamed = [setting for setting in own if not setting.startswith("data.tokenizer=")]
    told = (
        "data.tokenizer: no tokenizer is named: data.tokenizer must name a vocab.txt, a tokenizer.json or a folder "
        "that holds one, as in data.tokenizer=/data/bert-base-uncased/vocab.txt"
    )
    assert look(unnamed).problems["config"] == [told]
    assert preflight.main(unnamed) == 2
    assert re.fullmatch(rf"error: preflight: \S+: {re.escape(told)}\n", capsys.readouterr().err)
    for command in (pretrain.main, finetune.main):
        assert command(unnamed) == 2
        assert capsys.readouterr().err == f"error: {told}\n"
    assert look([*unnamed, f"data.tokenizer={toy_media}"]).problems == {}  # the folder of the file


@pytest.mark.parametrize(("value", "told"), [("", "is empty: name a file"), ("/tmp", "/tmp is a folder: name a file")])
def test_a_folder_in_place_of_a_file_is_told(own: list[str], value: str, told: str) -> None:
    assert look([*own, f"run.deepspeed={value}"]).problems == {"config": [f"run.deepspeed: {told}"]}


def test_weights_that_fit_are_told_without_reading_them(
    own: list[str], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(checkpoint, "load_file")
    own = [*own, f"run.init_from={start}"]
    count = len(checkpoint.load_headers(start))
    found = look(own)
    assert found.problems == {}
    assert found.notes == [f"run.init_from {start}: {count} weights taken, missing: none, unused: none"]
    assert found.marks["config"][f"{start / 'config.json'} (run.init_from)"].startswith("version ")
    more = look([*own, "model.frames=4", "model.vision.image_size=128"])  # positions are interpolated
    assert more.problems == {}
    assert re.fullmatch(rf".*: {count} weights taken, missing: \d+ \(selector, temporal\), unused: none", more.notes[0])
    asked = look([*own, "task=question_answering", "model.answer_layers=1"], "finetune")  # as the last fusion layer
    assert re.fullmatch(r".*: \d+ weights taken, missing: none, unused: none", asked.notes[0]), asked.problems
    (tmp_path / "run" / "checkpoints" / "step_3").mkdir(parents=True)  # the run goes on from it
    assert look([*own, "model.projection=48"]).notes == []
    shutil.rmtree(start)  # and has no need of these any more
    found = look(own)
    assert not any("init_from" in problem for problems in found.problems.values() for problem in problems)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.vision.layout=beit", "is of a model with model.vision.layout = clip, but this one has beit: set"),
        ("model.projection=48", r"text_projection\.\S+ has shape \[128.*\], but the model needs \[48.*\]"),
        ("model.text.mlp_width=96", r"has shape \[64.*\], but the model needs \[96.*\]"),
    ],
)
def test_weights_that_do_not_fit_are_told(own: list[str], start: Path, override: str, told: str) -> None:
    problems = look([*own, f"run.init_from={start}", override]).problems
    assert list(problems) == ["config"] and len(problems["config"]) == 1
    assert re.match(rf"run\.init_from: .*{told}", problems["config"][0]), problems


def test_weights_that_are_damaged_or_of_something_else_are_told(own: list[str], start: Path) -> None:
    own = [*own, f"run.init_from={start}"]
    file = start / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert re.match(r"run.init_from: \S+/model.safetensors cannot be read: ", look(own).problems["config"][0])
    save_file({"encoder.weight": torch.zeros(3)}, file)
    told = "run.init_from: none of the 1 weights has a place in the model: ['encoder.weight'] ..."
    assert look(own).problems["config"] == [told]
