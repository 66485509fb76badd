"""Fine-tunes a pre-trained SMAUG for retrieval, multiple choice or question answering.

    deepspeed --module smaug_ds.finetune --config FILE run.init_from=RUN key=value ...

Architecture and tokenizer come from ``run.init_from`` (a run folder, a checkpoint, an imported or exported folder);
the file and key=value win over them. A run in ``run.folder`` that was broken off goes on from its last checkpoint.
Exit codes are those of ``smaug_ds.pretrain``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smaug_ds import distributed
from smaug_ds.config import add_arguments, naming, parse
from smaug_ds.data.config import DataConfig
from smaug_ds.engine import checkpoint
from smaug_ds.engine.finetuning import FinetuneConfig, open_task
from smaug_ds.engine.optim import OptimConfig
from smaug_ds.engine.run import REPORTED, exit_code, run
from smaug_ds.engine.watchdog import Watchdog
from smaug_ds.losses import LossConfig
from smaug_ds.model.pretrained import ARCHITECTURE, read_architecture
from smaug_ds.model.smaug import ModelConfig


@dataclass(frozen=True)
class _Start:
    """What a run's settings say of the model that it left."""

    model: ModelConfig = field(default_factory=ModelConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can mend is one line on standard error."""
    parser = argparse.ArgumentParser(prog="smaug_ds.finetune", description="Fine-tunes SMAUG.")
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    try:
        config = parse(FinetuneConfig, options.config, options.overrides, defaults)
        with Watchdog(Path(config.run.folder) / "logs", config.run.hang_seconds, quiet=REPORTED) as watchdog:
            return run(config, watchdog, open_task)
    except REPORTED as error:
        distributed.print_error(error)  # all ranks raise it, see distributed.agreeing
        return exit_code(error)
    finally:
        distributed.shutdown()


def defaults(values: Mapping[str, Any]) -> FinetuneConfig:
    """What the file and the command line, ``values``, leave open: the model and tokenizer that the run starts from, no
    mask, only contrastive and matching loss, a low learning rate.

    Raises ConfigError when ``run.init_from`` cannot be read.
    """
    model, tokenizer = ModelConfig(), ""
    source = values.get("run", {}).get("init_from")
    if source:
        with naming("run.init_from"):
            model, tokenizer = read_start(source)
    if values.get("task") == "question_answering" and not model.answer_layers:
        model = dataclasses.replace(model, answer_layers=model.text.fusion_layers)
    return FinetuneConfig(
        model=dataclasses.replace(model, vision=dataclasses.replace(model.vision, mask_ratio=0.0)),
        data=DataConfig(tokenizer=tokenizer),
        loss=LossConfig(mlm=0.0, mvm=0.0),
        optim=OptimConfig(lr=1e-5, min_lr=1e-6),
    )


def read_start(source: str) -> tuple[ModelConfig, str]:
    """Architecture, and tokenizer file if it is known, of what a run starts from.

    Raises ValueError when there are no weights, or their architecture cannot be read.
    """
    folder = checkpoint.find(source)
    if (folder / checkpoint.STATE).is_file():
        settings = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))["config"]
        start = parse(_Start, None, [f"model={json.dumps(settings['model'])}"])
        return start.model, settings["data"]["tokenizer"]
    model = read_architecture(ModelConfig, folder / ARCHITECTURE)
    found = [str(folder / name) for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()]
    return model, found[0] if found else ""


if __name__ == "__main__":
    sys.exit(main())
