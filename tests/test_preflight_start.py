"""The look before a run at what it starts from: its tokenizer; and how to ask."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smaug_ds import evaluate, finetune, preflight, pretrain
from smaug_ds.engine.inspection import Facts, Inspection
from tests.launching import settings

OPTION = re.compile(r"--[a-z][a-z_-]+")


@pytest.fixture
def own(toy_shards: Path, toy_media: Path, tmp_path: Path) -> list[str]:
    return settings(toy_shards, toy_media, tmp_path / "run")


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
