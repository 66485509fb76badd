"""Fine-tuning: what comes from the checkpoint it starts from, what is refused, and real runs of each task."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smaug_ds import evaluate, finetune
from smaug_ds.config import ConfigError, parse, to_dict
from smaug_ds.engine import checkpoint
from smaug_ds.engine.finetuning import FinetuneConfig, FinetunedRetrieval
from smaug_ds.evaluation.benchmarks import read_predictions
from smaug_ds.exchange.export import export
from smaug_ds.model.positions import fit_positions
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.text import Tokenizer
from tests.launching import assert_equal_runs, finish, launch, settings, signals_kept
from tests.models import small_config, small_model
from tests.standin import CPU_JSON, ROOT

EXPERIMENTS = sorted((ROOT / "jobs" / "experiments").glob("finetune_*.yaml"))


@pytest.fixture(scope="module")
def start(toy_media: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the settings of ``tests/launching.py``, with random weights."""
    from smaug_ds.engine.train import PretrainConfig

    folder = tmp_path_factory.mktemp("start") / "run"
    vocab = Tokenizer(toy_media / "vocab.txt").vocab_size
    arguments = [*settings(toy_shards, toy_media, folder), "model.frames=3", "model.frames_kept=2"]
    config = parse(PretrainConfig, None, [*arguments, f"model.text.vocab_size={vocab}"])
    step = folder / "checkpoints" / "step_5"
    step.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(SmaugModel(config.model).state_dict(), step / checkpoint.WEIGHTS)
    (step / checkpoint.ARCHITECTURE).write_text(json.dumps(to_dict(config.model)))
    (step / checkpoint.STATE).write_text(json.dumps({"step": 5, "config": to_dict(config)}))
    (folder / "checkpoints" / checkpoint.LATEST).write_text("step_5\n")
    return folder


def arguments(start: Path, shards: Path, media: Path, folder: Path, task: str) -> list[str]:
    """A short run of ``task`` from ``start``."""
    own = [
        f"task={task}", f"run.folder={folder}", f"run.init_from={start}", f"run.deepspeed={CPU_JSON}",
        "run.max_steps=6", "run.log_every=1", "run.save_every=2", "run.timeout_seconds=60", "batch.global_size=16",
        "batch.micro_size=4", f"data.train=[{shards / 'train'}]", f"data.test=[{shards / 'test'}]", "data.workers=0",
        "optim.warmup_steps=2", "optim.lr=1e-3", "evaluation.rerank_depth=4",
    ]  # fmt: skip
    if task == "multiple_choice":
        own += [f"questions.{part}=[{media / f'mc_{part}.json'}]" for part in ("train", "test")]
    if task == "question_answering":
        own += [f"questions.{part}=[{media / f'qa_{part}.json'}]" for part in ("train", "test")]
        own.append("questions.shortlist=5")
    return own


# ---- settings


def test_model_and_tokenizer_come_from_the_start(start: Path, toy_media: Path) -> None:
    config = parse(FinetuneConfig, None, [f"run.init_from={start}"], finetune.defaults)
    assert (config.model.frames, config.model.frames_kept, config.model.text.width) == (3, 2, 32)
    assert config.data.tokenizer == str(toy_media / "vocab.txt")
    assert config.model.vision.mask_ratio == 0 and (config.loss.mlm, config.loss.mvm) == (0, 0)
    assert (config.loss.vtc, config.loss.vtm, config.optim.lr, config.model.answer_layers) == (1, 1, 1e-5, 0)

    given = [f"run.init_from={start}", "task=question_answering", "model.frames=5", "model.vision.mask_ratio=0.5"]
    config = parse(FinetuneConfig, None, [*given, "loss.mvm=1", "optim.lr=1e-6"], finetune.defaults)
    assert (config.model.frames, config.model.frames_kept, config.model.answer_layers) == (5, 2, 1)
    assert (config.model.vision.mask_ratio, config.loss.mvm, config.optim.lr) == (0.5, 1, 1e-6)


def test_an_exported_folder_is_a_start(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    assert finetune.read_start(str(tmp_path)) == (model.config, str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_can_be_read(path: Path) -> None:
    config = parse(FinetuneConfig, path, [], finetune.defaults)
    paper = not path.stem.endswith("toy")
    assert config.optim.lr == 1e-5 if paper else config.optim.lr > 1e-5
    assert config.model.vision.mask_ratio == 0 and config.task in path.stem.replace("_qa_", "_question_answering_")


def test_position_tables_are_interpolated() -> None:
    few, many = small_config(3, 3), small_config(6, 6, image_size=48)
    weights = small_model(few).state_dict()
    changed = fit_positions(weights, many.vision.patches, many.frames)
    assert changed["temporal.position_embedding"].shape == (6, 32)
    assert changed["vision.position_embedding"].shape == (37, 32)
    SmaugModel(many).load_state_dict(changed)
    same = fit_positions(weights, few.vision.patches, few.frames)
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_what_no_loss_depends_on_stays_as_it_is(start: Path, toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    given = arguments(start, toy_shards, toy_media, tmp_path, "retrieval")
    config = parse(FinetuneConfig, None, given, finetune.defaults)
    module = FinetunedRetrieval(config, Tokenizer(config.data.tokenizer)).objective(SmaugModel(config.model))
    frozen = {name.split(".")[1] for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pixel_decoder", "word_head"}


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("retrieval", ["run.init_from=nowhere"], "run.init_from: nowhere does not exist"),
        ("retrieval", ["task=retreival"], "task: expected one of retrieval"),
        ("question_answering", ["questions.train=[]"], "questions.train is empty"),
        ("question_answering", ["questions.train=[nowhere.json]"], "questions.train: nowhere.json"),
        ("question_answering", ["questions.shortlist=500"], "questions.shortlist is 500: the answer list has "),
        ("question_answering", ["model.answer_layers=0"], "model.answer_layers is 0, but question answering needs"),
        ("question_answering", ["model.answer_layers=2"], "model.answer_layers is 2: it must be from 0 to"),
        ("question_answering", ["data.test=[]"], "data.test []: question answering is evaluated on one file"),
        ("multiple_choice", ["questions.test=[]"], "questions.test is []"),
        ("multiple_choice", ["questions.train=[nowhere.json]"], "questions.train: nowhere.json"),
    ],
)
def test_mistakes_are_one_line(
    start: Path, toy_shards: Path, toy_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    task: str, changed: list[str], message: str,
) -> None:  # fmt: skip
    given = arguments(start, toy_shards, toy_media, tmp_path / "run", task)
    with signals_kept():
        assert finetune.main([*given, *changed]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


def test_a_file_of_the_wrong_kind_and_a_missing_video_are_named(
    start: Path, toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    from smaug_ds.engine.finetuning import open_task

    given = arguments(start, toy_shards, toy_media, tmp_path, "question_answering")
    tokenizer = Tokenizer(toy_media / "vocab.txt")
    wrong = [*given, f"questions.test=[{toy_media / 'mc_test.json'}]"]
    with pytest.raises(ConfigError, match=r"mc_test\.json is a multiple choice file, question answering is wanted"):
        open_task(parse(FinetuneConfig, None, wrong, finetune.defaults), tokenizer)
    wrong = [*given, f"questions.train=[{toy_media / 'mc_train.json'}]"]
    with pytest.raises(ConfigError, match=r"mc_train\.json is a multiple choice file, question answering is wanted"):
        open_task(parse(FinetuneConfig, None, wrong, finetune.defaults), tokenizer)
    missing = [*given, f"questions.train=[{toy_media / 'qa_test.json'}]"]
    with pytest.raises(ConfigError, match=r"questions\.train: .*32 of 32 videos are missing in .*train"):
        open_task(parse(FinetuneConfig, None, missing, finetune.defaults), tokenizer)


# ---- real runs


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "question_answering"])
def test_a_run_killed_in_the_middle_goes_on_bit_for_bit(
    start: Path, toy_shards: Path, toy_media: Path, tmp_path: Path, task: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(launch(arguments(start, toy_shards, toy_media, whole, task), module="smaug_ds.finetune"))
    process = launch(arguments(start, toy_shards, toy_media, killed, task), module="smaug_ds.finetune")
    pointer, deadline = killed / "checkpoints" / "latest", time.monotonic() + 120
    while not pointer.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run should have saved by now"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert pointer.read_text().strip() != "step_6", "killed before its end"
    output = finish(launch(arguments(start, toy_shards, toy_media, killed, task), module="smaug_ds.finetune"))
    assert "resumed from" in output
    assert_equal_runs(whole, killed)


@pytest.mark.slow
def test_each_task_trains_and_is_evaluated_from_its_checkpoint_alone(
    start: Path, toy_shards: Path, toy_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = checkpoint.load_weights(start)
    for task, count in [("retrieval", "n_videos"), ("multiple_choice", "n_questions"), ("question_answering", "")]:
        folder = tmp_path / task
        finish(launch(arguments(start, toy_shards, toy_media, folder, task), 1, module="smaug_ds.finetune"))
        result = json.loads((folder / "summary.json").read_text())[task]
        assert result[count or "n_questions"] == (32 if count else 64)
        weights = checkpoint.load_weights(folder)
        changed = {
            name.partition(".")[0] for name, value in weights.items() if not torch.equal(value, begun.get(name, value))
        }
        assert {"vision", "text", "fusion"} <= changed and "pixel_decoder" not in changed
        assert evaluate.main(["--checkpoint", str(folder), "--out", str(tmp_path / f"{task}.json")]) == 0
        again = json.loads((tmp_path / f"{task}.json").read_text())
        metric = "t2v_r1" if task == "retrieval" else "accuracy"
        assert again[metric] == pytest.approx(result[metric])
        assert again["checkpoint"]["step"] == 6 and len(again["checkpoint"]["weights_sha256"]) == 64
    predictions = read_predictions(tmp_path / "question_answering.predictions.json")
    assert len(predictions) == 64

    export(tmp_path / "question_answering", tmp_path / "exported")
    out = tmp_path / "of_the_exported.json"
    assert evaluate.main(["--checkpoint", str(tmp_path / "exported"), "--out", str(out)]) == 0
    own = json.loads((tmp_path / "question_answering.json").read_text())
    assert json.loads(out.read_text())["accuracy"] == own["accuracy"]
    assert read_predictions(tmp_path / "of_the_exported.predictions.json") == predictions

    file, capsys_out = str(toy_media / "mc_test.json"), tmp_path / "zero_shot.json"
    folder = tmp_path / "question_answering"
    choosing = ["--task", "multiple_choice", "--benchmark", file, "--media", str(toy_media), "--out", str(capsys_out)]
    assert evaluate.main(["--checkpoint", str(folder), *choosing]) == 0
    assert json.loads(capsys_out.read_text())["n_questions"] == 32
    capsys.readouterr()
    answering = ["--task", "question_answering", "--benchmark", str(toy_media / "qa_test.json"), "--media"]
    assert evaluate.main(["--checkpoint", str(tmp_path / "retrieval"), *answering, str(toy_media)]) == 2
    assert "has no answer decoder" in capsys.readouterr().err


def test_answer_layers_are_part_of_the_architecture() -> None:
    assert ModelConfig().answer_layers == 0
