"""How the look before a run is asked for."""

from __future__ import annotations

import re

import pytest

from smaug_ds import evaluate, finetune, preflight, pretrain

OPTION = re.compile(r"--[a-z][a-z_-]+")


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
