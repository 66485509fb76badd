"""The tasks of fine-tuning: retrieval, multiple choice and question answering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from smaug_ds import distributed
from smaug_ds.config import ConfigError, naming
from smaug_ds.data.loader import EvalLoader
from smaug_ds.data.mixture import Mixture, open_mixture
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.questions import Asked as AskedText
from smaug_ds.data.questions import QuestionAnswer, TextChoice, of_questions
from smaug_ds.engine.answering import QuestionAnswering
from smaug_ds.engine.choosing import MultipleChoice
from smaug_ds.engine.tasks import RetrievalTask, Task, figures_of
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.evaluation import multiple_choice, question_answering
from smaug_ds.evaluation.asking import Asked, QuestionConfig, answers_to_choose_from, ask, open_asked
from smaug_ds.evaluation.benchmarks import read_benchmark
from smaug_ds.model.answers import with_answer_decoder
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer


@dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """All settings of fine-tuning: those of pre-training, the task, and its questions."""

    task: Literal["retrieval", "multiple_choice", "question_answering"] = "retrieval"
    questions: QuestionConfig = field(default_factory=QuestionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "question_answering" and not self.model.answer_layers:
            raise ConfigError(
                "model.answer_layers is 0, but question answering needs the answer decoder: set it, to "
                f"model.text.fusion_layers = {self.model.text.fusion_layers} as in the paper"
            )


def open_task(config: FinetuneConfig, tokenizer: Tokenizer) -> Task:
    """The task that ``config.task`` names."""
    return TASKS[config.task](config, tokenizer)


class FinetunedRetrieval(RetrievalTask):
    """Contrastive and matching loss, measured by retrieval."""

    config: FinetuneConfig

    def objective(self, model: SmaugModel) -> nn.Module:
        # what no loss depends on: weight decay would shrink it
        model.pixel_decoder.requires_grad_(self.config.loss.mvm > 0)
        model.word_head.requires_grad_(self.config.loss.mlm > 0)
        return super().objective(model)


class ChoiceTask(FinetunedRetrieval):
    """Trained on the multiple choices of ``questions.train``, or as retrieval where there are none (MSRVTT-MC has
    none); measured by multiple choice."""

    name = "multiple_choice"
    metrics = figures_of(multiple_choice.ChoiceResult)

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        if config.questions.train:
            asked = _ask_training(config, self.mixture)
            self.mixture = of_questions(self.mixture, _by_clip(asked, _choices))
        self.held_out, self.asked = _open_test(config, tokenizer, "multiple choice")
        self.without_evaluation = ""

    def objective(self, model: SmaugModel) -> nn.Module:
        return MultipleChoice(model) if self.config.questions.train else super().objective(model)

    def evaluate(self, model: SmaugModel, checkpoint: str) -> tuple[str, dict[str, Any]]:
        assert self.held_out is not None, "checked in __init__"
        config = self.config.evaluation
        result = multiple_choice.evaluate(model, self.held_out, self.asked, self.tokenizer, config, checkpoint)
        return result.table(), result.report()


class QuestionTask:
    """Answers to questions on the training clips, measured by exact match on those of the test clips."""

    name = "question_answering"
    metrics = figures_of(question_answering.AnswerResult)

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        questions = config.questions
        if not questions.train:
            raise ConfigError("questions.train is empty: name the files of questions on the videos of data.train")
        mixture = open_mixture(config.data)
        asked = _ask_training(config, mixture)
        self.mixture: Mixture = of_questions(mixture, _by_clip(asked, _questions))
        answers = [question.answer for one in asked for question in one.benchmark.questions]
        self.answers = answers_to_choose_from(questions, answers)
        self.without_evaluation = "" if questions.test else "questions.test is empty"
        if questions.test:
            self.held_out, self.asked = _open_test(config, tokenizer, "question answering")

    @staticmethod
    def start(config: PretrainConfig, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return with_answer_decoder(RetrievalTask.start(config, weights), config.model.answer_layers)

    def objective(self, model: SmaugModel) -> nn.Module:
        return QuestionAnswering(model)

    def state(self) -> dict[str, Any]:
        return {"answers": self.answers}

    def evaluate(self, model: SmaugModel, checkpoint: str) -> tuple[str, dict[str, Any]]:
        config = self.config
        result = question_answering.evaluate(
            model,
            self.held_out,
            self.asked,
            self.answers,
            self.tokenizer,
            config.questions,
            config.evaluation,
            checkpoint,
        )
        return result.table(), result.report()


TASKS: dict[str, type[FinetunedRetrieval] | type[QuestionTask]] = {
    "retrieval": FinetunedRetrieval,
    "multiple_choice": ChoiceTask,
    "question_answering": QuestionTask,
}


def _ask_training(config: FinetuneConfig, mixture: Mixture) -> list[Asked]:
    """What ``questions.train`` asks about the clips of ``mixture``, all of the kind of the task."""
    questions, kind = config.questions, config.task.replace("_", " ")
    with naming("questions.train"):
        asked = ask(questions.train, mixture.corpus, questions.allowed_missing)
        for file, one in zip(questions.train, asked, strict=True):
            if one.benchmark.task != kind:
                raise ConfigError(f"questions.train: {file} is a {one.benchmark.task} file, {kind} is wanted")
            if kind == "multiple choice":
                _require_choices(one)
    return asked


def _require_choices(asked: Asked) -> None:
    for choice in asked.benchmark.choices:
        if len(choice.choices) < 2:
            file = asked.benchmark.files[0]
            raise ConfigError(f"questions.train: {file}, row {choice.row} has 1 text: a choice needs at least 2")


def _by_clip(asked: list[Asked], texts: Callable[[Asked], Sequence[AskedText]]) -> dict[str, list[AskedText]]:
    """What is asked about each clip, by ``shard/key``."""
    found: dict[str, list[AskedText]] = {}
    for one in asked:
        own = texts(one)
        for name, rows in one.rows.items():
            found.setdefault(name, []).extend(own[row] for row in rows)
    return found


def _questions(asked: Asked) -> list[QuestionAnswer]:
    return [QuestionAnswer(record.question, record.answer) for record in asked.benchmark.questions]


def _choices(asked: Asked) -> list[TextChoice]:
    return [
        TextChoice(record.choices[record.answer], record.choices[: record.answer] + record.choices[record.answer + 1 :])
        for record in asked.benchmark.choices
    ]


def _open_test(config: FinetuneConfig, tokenizer: Tokenizer, kind: str) -> tuple[EvalLoader, Asked]:
    """The clips that ``questions.test`` asks about, and what it asks, which must be of this ``kind``."""
    files = config.questions.test
    if len(files) != 1 or not config.data.test:
        raise ConfigError(
            f"questions.test is {list(files)} and data.test {list(config.data.test)}: {kind} is evaluated on one file, "
            "and needs the shards of its videos"
        )
    ledger = Ledger(Path(config.run.folder) / "evaluation", distributed.rank())
    device, allowed = distributed.device(), config.questions.allowed_missing
    with naming("questions.test"):
        benchmark = read_benchmark(files[0])
        if benchmark.task != kind:
            raise ConfigError(f"questions.test: {files[0]} is a {benchmark.task} file, {kind} is wanted")
        size = config.evaluation.batch_size
        return open_asked(
            benchmark, config.model, config.data, size, tokenizer, device, ledger, allowed_missing=allowed
        )
