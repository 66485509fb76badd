"""Evaluates a checkpoint: text-video retrieval on held-out clips.

    deepspeed --module smaug_ds.evaluate --checkpoint FOLDER [--data FOLDER] [--out FILE] key=value ...
    python -m smaug_ds.evaluate --checkpoint FOLDER ...                                     (one rank)

Model, data and protocol come from the checkpoint (a run folder means its latest); ``--data`` names a folder of indexed
shards to search instead of the run's own test split, and key=value changes any setting under ``model``, ``data`` and
``evaluation``: ``evaluation.rerank_depth=0``, ``model.vision.sparsify_at_inference=false``.
Exit codes: 0 done, 2 a setting is wrong, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smaug_ds import distributed
from smaug_ds.config import ConfigError, naming, parse, to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.data.quarantine import DataError, Ledger
from smaug_ds.engine import checkpoint
from smaug_ds.evaluation.held_out import open_held_out
from smaug_ds.evaluation.retrieval import RetrievalConfig, RetrievalResult, evaluate
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.text import Tokenizer

TIMEOUT_SECONDS = 1800.0  # a rank that waits longer for the others gives up


@dataclass(frozen=True)
class EvaluateConfig:
    """The part of a run's settings that its evaluation needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: RetrievalConfig = field(default_factory=RetrievalConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can mend is one line on standard error."""
    parser = argparse.ArgumentParser(prog="smaug_ds.evaluate", description="Evaluates a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="run folder (its latest checkpoint) or checkpoint folder")
    parser.add_argument("--data", metavar="FOLDER", help="folder of indexed shards to search instead of the run's own")
    parser.add_argument("--out", metavar="FILE", help="JSON to write; default: retrieval.json in --checkpoint's folder")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the checkpoint's")
    options = parser.parse_intermixed_args(arguments)
    try:
        folder, config = read_config(options.checkpoint, options.data, options.overrides)
        distributed.init(TIMEOUT_SECONDS)
        run(folder, config, Path(options.out) if options.out else Path(options.checkpoint) / "retrieval.json")
    except (ConfigError, DataError) as error:
        distributed.print_error(error)  # all ranks raise it, see distributed.agreeing
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        distributed.shutdown()
    return 0


def read_config(path: str, data: str | None, overrides: Sequence[str] = ()) -> tuple[Path, EvaluateConfig]:
    """The checkpoint folder that ``path`` means, and the settings of the run that wrote it, changed by ``overrides``
    (``key=value``) and ``data`` (a folder of shards that becomes the test split).

    Raises ConfigError when there is no checkpoint, its settings cannot be read or an override is wrong.
    """
    try:
        folder = checkpoint.find(path)
        settings = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))["config"]
        saved = [f"{key}={json.dumps(settings[key])}" for key in ("model", "data", "evaluation")]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--checkpoint {path}: {error}") from error
    searched = [f"data.test={json.dumps([data])}", "evaluation.split=test"] if data else []
    return folder, parse(EvaluateConfig, None, [*saved, *searched, *overrides])


def run(folder: Path, config: EvaluateConfig, out: Path) -> RetrievalResult:
    """Evaluates the checkpoint ``folder`` on all ranks; the main one writes ``out`` and prints a table.

    Raises ConfigError when checkpoint, tokenizer or shards cannot be used, DataError when a data worker dies.
    """
    with distributed.agreeing(ConfigError):
        model, tokenizer = load_model(folder, config)
        ledger = Ledger(out.parent / "evaluation", distributed.rank())
        loader = open_held_out(config.model, config.data, config.evaluation, tokenizer, distributed.device(), ledger)
    result = evaluate(model, loader, tokenizer, config.evaluation, describe(folder))
    left_out = sum(distributed.gather_objects(loader.failed))
    if distributed.is_main():
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {**result.report(), "left_out": left_out, "config": to_dict(config)}
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        lost = f"{left_out} clips left out, see {ledger.path.parent}" if left_out else "no clip left out"
        print(result.table(), lost, f"decoder {loader.decoder}; written to {out}", sep="\n", flush=True)
    return result


def load_model(folder: Path, config: EvaluateConfig) -> tuple[SmaugModel, Tokenizer]:
    """The checkpoint's model on this rank's device, and its tokenizer.

    Raises ConfigError when weights, architecture and vocabulary do not fit together.
    """
    with naming("data.tokenizer"):
        tokenizer = Tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size != config.model.text.vocab_size:
        raise ConfigError(
            f"data.tokenizer: {tokenizer.path} has {tokenizer.vocab_size} entries, but the checkpoint's "
            f"model.text.vocab_size is {config.model.text.vocab_size}"
        )
    model = SmaugModel(config.model)
    try:
        model.load_state_dict(checkpoint.load_weights(folder))
    except (ValueError, RuntimeError) as error:  # load_state_dict raises RuntimeError with all keys and shapes
        raise ConfigError(f"--checkpoint {folder}: {error}") from error
    return model.to(distributed.device()).eval(), tokenizer


def describe(folder: Path) -> str:
    """The checkpoint's identity for the protocol: its place and the steps that it has seen."""
    state = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))
    return f"{folder} ({state['step']} steps)"


if __name__ == "__main__":
    sys.exit(main())
