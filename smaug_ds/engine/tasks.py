"""What a run trains and how it is measured; ``engine/run.py`` does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from torch import Tensor, nn

from smaug_ds import distributed
from smaug_ds.data.loader import EvalLoader
from smaug_ds.data.mixture import Mixture, open_mixture
from smaug_ds.data.quarantine import Ledger
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.evaluation.held_out import open_held_out
from smaug_ds.evaluation.retrieval import RetrievalResult, evaluate
from smaug_ds.model.positions import fit_positions
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer


class Task(Protocol):
    """Made out of a config on every rank; a ConfigError says what the user can mend."""

    name: str  # of its result in summary.json and TensorBoard
    mixture: Mixture  # what is trained on
    without_evaluation: str  # why there is none; empty if there is
    metrics: list[str]  # names of the figures that the evaluation yields

    @staticmethod
    def start(config: PretrainConfig, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights of ``run.init_from``, made to fit; also of headers alone, see ``checkpoint.load_headers``."""

    def objective(self, model: SmaugModel) -> nn.Module:
        """Maps a batch to its losses by name."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to carry for the evaluation, JSON-able."""

    def evaluate(self, model: SmaugModel, checkpoint: str) -> tuple[str, dict[str, Any]]:
        """A few lines for the terminal, and the report. All ranks call it."""


def figures_of(result: type) -> list[str]:
    """Names of the numbers in an evaluation's result."""
    return [name for name, kind in get_type_hints(result).items() if kind in (int, float)]


class RetrievalTask:
    """The objectives of pre-training, measured by retrieval on the held-out clips."""

    name = "retrieval"
    metrics = figures_of(RetrievalResult)

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.mixture = open_mixture(config.data)
        self.held_out = held_out(config, tokenizer)
        self.without_evaluation = "" if self.held_out is not None else "neither data.test nor data.holdout is set"

    @staticmethod
    def start(config: PretrainConfig, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return fit_positions(weights, config.model.vision.patches, config.model.frames)

    def objective(self, model: SmaugModel) -> nn.Module:
        return Pretraining(model, self.config.loss)

    def state(self) -> dict[str, Any]:
        return {}

    def evaluate(self, model: SmaugModel, checkpoint: str) -> tuple[str, dict[str, Any]]:
        assert self.held_out is not None, "see without_evaluation"
        result = evaluate(model, self.held_out, self.tokenizer, self.config.evaluation, checkpoint)
        return result.table(), result.report()


def held_out(config: PretrainConfig, tokenizer: Tokenizer) -> EvalLoader | None:
    """This rank's share of the clips to be measured on, if there are any."""
    if not (config.evaluation.split == "train" or config.data.test or config.data.holdout):
        return None
    aside = Ledger(Path(config.run.folder) / "evaluation", distributed.rank())
    return open_held_out(config.model, config.data, config.evaluation, tokenizer, distributed.device(), aside)
