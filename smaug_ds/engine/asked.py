"""Evaluates a checkpoint on a file of questions or of multiple choices."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from smaug_ds import distributed
from smaug_ds.config import ConfigError, naming, to_dict
from smaug_ds.data.quarantine import Ledger
from smaug_ds.engine import checkpoint
from smaug_ds.engine.trained import AskedConfig, describe, identify, load_model, run_folder, trained_with
from smaug_ds.evaluation import multiple_choice, question_answering
from smaug_ds.evaluation.asking import answers_to_choose_from, open_asked
from smaug_ds.evaluation.benchmarks import read_benchmark
from smaug_ds.evaluation.multiple_choice import ChoiceResult
from smaug_ds.evaluation.question_answering import AnswerResult
from smaug_ds.evaluation.results import write_result

TASKS = ("retrieval", "multiple_choice", "question_answering")


def task_of(path: str) -> str:
    """What the checkpoint that ``path`` means was fine-tuned for; retrieval if it was not.

    Raises ConfigError when there is none.
    """
    try:
        state = checkpoint.find(path) / checkpoint.STATE
        return json.loads(state.read_text(encoding="utf-8"))["config"].get("task", "retrieval")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"checkpoint {path}: {error}") from error


def run_asked(
    folder: Path,
    config: AskedConfig,
    task: str,
    benchmark: Path | None = None,
    media: Path | None = None,
    allowed_missing: int = 0,
    out: Path | None = None,
    command: str = "",
) -> AnswerResult | ChoiceResult:
    """Evaluates the checkpoint ``folder`` on all ranks; the main one writes the result and prints a table.

    Predicted answers go beside the result, into a file as ActivityNet-QA's evaluation tool reads it.

    Args:
        task: "multiple_choice" or "question_answering".
        benchmark: None: the run's own ``questions.test``.
        media: folder of its videos; None: the shards of ``data.test``.
        out: file to write; None: a file in the folder ``evaluation`` of the run.
        command: for the record.

    Raises ConfigError when checkpoint, tokenizer, shards or benchmark cannot be used, DataError when a data worker
    dies.
    """
    results = run_folder(folder) / "evaluation"
    with distributed.agreeing(ConfigError):
        file, kind = _file(config, benchmark), task.replace("_", " ")
        with naming(str(file)):
            records = read_benchmark(file)
            if records.task != kind:
                raise ConfigError(f"{file} is a {records.task} file, {kind} is wanted (--task)")
        model, tokenizer = load_model(folder, config)
        if task == "question_answering" and not config.model.answer_layers:
            raise ConfigError(f"{folder} has no answer decoder: fine-tune it with task=question_answering first")
        ledger = Ledger(out.parent / "evaluation" if out else results, distributed.rank())
        size, device = config.evaluation.batch_size, distributed.device()
        with naming(str(file)):
            loader, asked = open_asked(
                records, config.model, config.data, size, tokenizer, device, ledger, media, allowed_missing
            )
        answers = _answers(folder, config) if task == "question_answering" else []
    identity, name = identify(folder), describe(folder)
    result: AnswerResult | ChoiceResult
    if task == "question_answering":
        result = question_answering.evaluate(
            model, loader, asked, answers, tokenizer, config.questions, config.evaluation, name
        )
    else:
        result = multiple_choice.evaluate(model, loader, asked, tokenizer, config.evaluation, name)
    if distributed.is_main():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        told: dict[str, Any] = {**trained_with(folder), "file_sha256": digest}
        if answers:
            told["answers_sha256"] = hashlib.sha256(json.dumps(answers).encode()).hexdigest()
        report = {
            **result.report(),
            "protocol": result.protocol | told,
            "checkpoint": identity,
            "command": command,
            "config": to_dict(config),
        }
        path = write_result(report, results, f"{task}-{file.stem}", out)
        print(result.table(), f"{result.unanswered} questions lost with their clips; written to {path}", sep="\n")
        if isinstance(result, AnswerResult):
            result.write_predictions(path.with_suffix(".predictions.json"))
    return result


def _file(config: AskedConfig, benchmark: Path | None) -> Path:
    if benchmark is not None:
        return benchmark
    if len(config.questions.test) != 1:
        raise ConfigError("name a file of questions: --benchmark FILE with --data or --media, or questions.test=[FILE]")
    return Path(config.questions.test[0])


def _answers(folder: Path, config: AskedConfig) -> list[str]:
    """``questions.answer_list``, or the list that the run has used."""
    saved = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8")).get("answers", [])
    return answers_to_choose_from(config.questions, saved)
