"""The entry point of the evaluation and the pictures of a run, from a checkpoint's files to theirs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from smaug_ds import distributed, evaluate
from smaug_ds.config import to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.data.quarantine import DataError
from smaug_ds.data.sample import Batch
from smaug_ds.evaluation import retrieval
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.text import Tokenizer
from tests.models import small_config
from tests.ranks import run_ranks
from tools import visualise


@pytest.fixture(scope="module")
def run_folder(toy_media: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves behind that evaluation needs, with random weights."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer(toy_media / "vocab.txt")
    small = small_config(3, 2)
    model = dataclasses.replace(small, text=dataclasses.replace(small.text, vocab_size=tokenizer.vocab_size))
    data = DataConfig(
        train=(str(toy_shards / "train"),), test=(str(toy_shards / "test"),), tokenizer=str(tokenizer.path), workers=0
    )
    evaluation = RetrievalConfig(rerank_depth=4, batch_size=8)
    checkpoint = folder / "checkpoints" / "step_7"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(SmaugModel(model).state_dict(), checkpoint / "model.safetensors")
    settings = {"run": {"seed": 0}, "model": to_dict(model), "data": to_dict(data), "evaluation": to_dict(evaluation)}
    (checkpoint / "state.json").write_text(json.dumps({"step": 7, "config": settings}))
    (folder / "checkpoints" / "latest").write_text("step_7\n")
    return folder


def test_read_config_is_what_was_saved(run_folder: Path) -> None:
    folder, config = evaluate.read_config(str(run_folder), None)
    assert folder == run_folder / "checkpoints" / "step_7"
    saved = json.loads((folder / "state.json").read_text())["config"]
    assert json.loads(json.dumps(to_dict(config))) == {key: saved[key] for key in ("model", "data", "evaluation")}
    _, changed = evaluate.read_config(str(folder), "elsewhere", ["evaluation.rerank_depth=0", "data.workers=3"])
    assert changed.data.test == ("elsewhere",) and changed.data.workers == 3
    assert changed.evaluation.rerank_depth == 0 and changed.evaluation.batch_size == 8
    assert changed.model == config.model and isinstance(config.model, ModelConfig)


def test_writes_report_and_table(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--local_rank=0", "--checkpoint", str(run_folder)]) == 0
    report = json.loads((run_folder / "retrieval.json").read_text())
    assert report["n"] == report["n_texts"] == 32 and report["left_out"] == 0
    assert report["chance_r1"] == pytest.approx(100 / 32)
    assert report["protocol"]["checkpoint"] == f"{run_folder / 'checkpoints' / 'step_7'} (7 steps)"
    assert (report["protocol"]["frames"], report["protocol"]["frames_kept"]) == (3, 2)
    printed = capsys.readouterr().out
    assert "32 texts, 32 clips" in printed and "no clip left out" in printed and "retrieval.json" in printed


def evaluate_on_rank(run_folder: Path, out: Path) -> float:
    folder, config = evaluate.read_config(str(run_folder), None, ["evaluation.rerank_depth=5"])
    return evaluate.run(folder, config, out).mean_rank


def test_two_ranks_equal_one(run_folder: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    mean_rank = evaluate_on_rank(run_folder, alone)
    assert run_ranks(evaluate_on_rank, 2, run_folder, together) == [mean_rank] * 2
    assert json.loads(alone.read_text()) == json.loads(together.read_text())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["evaluation.rerank_dept=3"], "unknown key evaluation.rerank_dept"),
        (["data.test=[nowhere]"], "data.test: "),
        (["data.tokenizer=nowhere.txt"], "data.tokenizer: nowhere.txt"),
        (["model.projection=17"], "--checkpoint"),
        (["model.frames_kept=4"], "model.frames_kept is 4"),
        (["--checkpoint", "nowhere"], "nowhere is neither"),
    ],
)
def test_mistakes_are_one_line(
    run_folder: Path, changed: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--checkpoint", str(run_folder), *changed]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ") and message in printed and "\n" not in printed


def test_data_that_fail_are_one_line(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise DataError("rank 1: data worker 7 died")

    monkeypatch.setattr(evaluate, "run", fail)
    assert evaluate.main(["--checkpoint", str(run_folder)]) == 1
    assert capsys.readouterr().err == "error: rank 1: data worker 7 died\n"


def lose_clips_on_rank_1(run_folder: Path) -> str | None:
    def clips() -> Iterator[Batch]:
        if distributed.rank() == 1:
            raise DataError("data worker 7 died")
        yield from ()

    folder, config = evaluate.read_config(str(run_folder), None)
    model, tokenizer = evaluate.load_model(folder, config)
    try:
        retrieval.evaluate(model, clips(), tokenizer, config.evaluation)
    except DataError as error:
        return str(error)
    return None


def test_data_that_fail_on_one_rank_end_the_evaluation_on_all(run_folder: Path) -> None:
    assert run_ranks(lose_clips_on_rank_1, 2, run_folder) == ["rank 1: data worker 7 died"] * 2


def test_vocabulary_of_another_size(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nball\n")
    assert evaluate.main(["--checkpoint", str(run_folder), f"data.tokenizer={tmp_path / 'vocab.txt'}"]) == 2
    assert "has 6 entries, but the checkpoint's model.text.vocab_size is " in capsys.readouterr().err


def test_visualise(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visualise.main([str(run_folder), "--out", str(tmp_path / "pictures"), "--samples", "3"]) == 0
    names = {"reconstruction", "kept_tokens", "chosen_frames", "retrieval"}
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == names
    assert len(capsys.readouterr().out.splitlines()) == 4
    for name in names:
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            assert picture.width >= 1000
    assert visualise.main([str(tmp_path)]) == 2
