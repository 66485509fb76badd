"""Evaluates a checkpoint on held-out clips or on a benchmark, zero-shot or after fine-tuning: text-video retrieval, or
questions and multiple choices (``--task``).

    deepspeed --module smaug_ds.evaluate --checkpoint FOLDER [--data FOLDER] key=value ...
    python -m smaug_ds.evaluate --checkpoint FOLDER ...                                     (one rank)
    python -m smaug_ds.evaluate --checkpoint FOLDER --benchmark FILE (--media FOLDER | --data FOLDER) ...
    python -m smaug_ds.evaluate --checkpoint FOLDER --task question_answering --benchmark FILE --data FOLDER ...
    python -m smaug_ds.evaluate --compare A.json B.json ...

Model, data and protocol come from the checkpoint (a run folder means its latest); ``--data`` names a folder of indexed
shards to search instead of the run's own test split. key=value changes settings under ``data`` and ``evaluation``, and
of ``model`` what training does not fix: ``evaluation.rerank_depth=0``, ``model.frames=12``.
Exit codes: 0 done, 2 a setting is wrong, 1 anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smaug_ds import distributed
from smaug_ds.config import ConfigError, naming, to_dict
from smaug_ds.data.loader import EvalLoader
from smaug_ds.data.quarantine import DataError, Ledger
from smaug_ds.engine.asked import TASKS, run_asked, task_of
from smaug_ds.engine.trained import (
    AskedConfig,
    EvaluateConfig,
    describe,
    identify,
    load_model,
    read_config,
    run_folder,
    trained_with,
)
from smaug_ds.evaluation.benchmarks import Benchmark, read_benchmark
from smaug_ds.evaluation.held_out import open_clips, open_held_out
from smaug_ds.evaluation.results import compare, write_result
from smaug_ds.evaluation.retrieval import RetrievalResult, evaluate
from smaug_ds.text import Tokenizer

TIMEOUT_SECONDS = 1800.0  # a rank that waits longer for the others gives up


@dataclass(frozen=True)
class Searched:
    """A benchmark file, and where its videos are."""

    benchmark: Path
    ids: Path | None = None  # list of the videos to keep
    media: Path | None = None  # folder of video files; None: the shards of data.test
    allowed_missing: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can mend is one line on standard error."""
    options = read_arguments(arguments)
    try:
        if options.compare:
            print(compare([Path(path) for path in options.compare]))
            return 0
        task = options.task or task_of(options.checkpoint)
        distributed.init(TIMEOUT_SECONDS)
        searched = Searched(options.benchmark, options.ids, options.media, options.allow_missing)
        command = shlex.join(["python", "-m", "smaug_ds.evaluate", *(sys.argv[1:] if arguments is None else arguments)])
        if task == "retrieval":
            folder, config = read_config(options.checkpoint, options.data, options.overrides, EvaluateConfig)
            run(folder, config, options.out, searched if options.benchmark else None, command)
        else:
            folder, questions = read_config(options.checkpoint, options.data, options.overrides, AskedConfig)
            run_asked(
                folder,
                questions,
                task,
                options.benchmark,
                options.media,
                options.allow_missing,
                options.out,
                command,
            )
    except (ConfigError, DataError) as error:
        distributed.print_error(error)  # all ranks raise it, see distributed.agreeing
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        distributed.shutdown()
    return 0


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; leaves with code 2 where options do not go together."""
    parser = argparse.ArgumentParser(prog="smaug_ds.evaluate", description="Evaluates a checkpoint.")
    parser.add_argument("--checkpoint", help="run folder (its latest checkpoint), checkpoint or exported folder")
    parser.add_argument("--data", metavar="FOLDER", help="folder of indexed shards to search instead of the run's own")
    parser.add_argument("--task", choices=TASKS, help="default: what the checkpoint was fine-tuned for, or retrieval")
    parser.add_argument("--benchmark", metavar="FILE", type=Path, help="annotation file: its texts and videos only")
    parser.add_argument("--ids", metavar="FILE", type=Path, help="of --benchmark: list of the videos to keep")
    parser.add_argument("--media", metavar="FOLDER", type=Path, help="of --benchmark: its video files; else --data")
    parser.add_argument("--allow-missing", metavar="N", type=int, default=0, help="videos of --benchmark at most")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="JSON to write; default: RUN/evaluation/retrieval-DATA-MARK.json"
    )
    parser.add_argument("--compare", nargs="+", metavar="FILE", help="print results side by side, nothing else")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the checkpoint's")
    options = parser.parse_intermixed_args(arguments)
    if bool(options.compare) == bool(options.checkpoint):
        parser.error("give --checkpoint, or results to --compare")
    if not options.benchmark and (options.media or options.ids or options.allow_missing):
        parser.error("--media, --ids and --allow-missing belong to --benchmark FILE")
    if options.benchmark and bool(options.media) == bool(options.data):
        parser.error("--benchmark needs to know where its videos are: --media FOLDER or --data FOLDER of shards")
    return options


def run(
    folder: Path,
    config: EvaluateConfig,
    out: Path | None = None,
    searched: Searched | None = None,
    command: str = "",
) -> RetrievalResult:
    """Evaluates the checkpoint ``folder`` on all ranks; the main one writes the result and prints a table.

    Args:
        out: file to write; None: a file in the folder ``evaluation`` of the run.
        searched: a benchmark in place of the split ``evaluation.split``.
        command: for the record.

    Raises ConfigError when checkpoint, tokenizer, shards or benchmark cannot be used, DataError when a data worker
    dies.
    """
    results = run_folder(folder) / "evaluation"
    benchmark: Benchmark | None = None
    missing: dict[str, int] = {}
    with distributed.agreeing(ConfigError):
        model, tokenizer = load_model(folder, config)
        ledger = Ledger(out.parent / "evaluation" if out else results, distributed.rank())
        if searched is None:
            loader = open_held_out(
                config.model, config.data, config.evaluation, tokenizer, distributed.device(), ledger
            )
        else:
            benchmark, loader, missing = _open_benchmark(searched, config, tokenizer, ledger)
            joined = config.evaluation.join_captions or benchmark.task == "paragraph retrieval"
            asked = dataclasses.replace(config.evaluation, split="test", join_captions=joined)
            config = dataclasses.replace(config, evaluation=asked)
    identity = identify(folder)
    result = evaluate(model, loader, tokenizer, config.evaluation, describe(folder))
    left_out = sum(distributed.gather_objects(loader.failed))
    if distributed.is_main():
        told = {**trained_with(folder), **_data(config, benchmark, missing, left_out)}
        report = {
            **result.report(),
            "protocol": result.protocol | told,
            "left_out": left_out,
            "checkpoint": identity,
            "command": command,
            "config": to_dict(config),
        }
        path = write_result(report, results, f"retrieval-{told['data']['name']}", out)
        print(
            *_summary(result, loader, ledger, benchmark, told["data"], left_out),
            f"written to {path}",
            sep="\n",
            flush=True,
        )
    return result


def _open_benchmark(
    searched: Searched, config: EvaluateConfig, tokenizer: Tokenizer, ledger: Ledger
) -> tuple[Benchmark, EvalLoader, dict[str, int]]:
    with naming("--benchmark"):
        paragraph = config.evaluation.join_captions
        benchmark = read_benchmark(searched.benchmark, ids=searched.ids, paragraph=paragraph)
        texts = {record.video: record.texts for record in benchmark.texts}
        loader, _, missing = open_clips(
            config.model,
            config.data,
            config.evaluation.batch_size,
            tokenizer,
            distributed.device(),
            ledger,
            benchmark,
            texts,
            searched.media,
            searched.allowed_missing,
        )
    return benchmark, loader, missing


def _data(
    config: EvaluateConfig, benchmark: Benchmark | None, missing: dict[str, int], left_out: int
) -> dict[str, Any]:
    """What was searched, for the protocol; the whole paths are in the config."""
    if benchmark is None:
        own = config.evaluation.split == "test" and bool(config.data.test)
        folders = [Path(folder).name for folder in (config.data.test if own else config.data.train)]
        name = "+".join(folders) if own else config.evaluation.split
        return {"data": {"name": name, "holdout": 1.0 if own else config.data.holdout, "unreadable": left_out}}
    asked = len(benchmark.videos)
    told = {
        "name": Path(benchmark.files[0]).stem,
        "benchmark": benchmark.name,
        "file_sha256": hashlib.sha256(Path(benchmark.files[0]).read_bytes()).hexdigest(),
        "videos": f"{asked - len(missing) - left_out} of {asked}",
        "missing": list(missing),
        "unreadable": left_out,
        "notes": list(benchmark.notes),
    }
    return {"data": told}


def _summary(
    result: RetrievalResult,
    loader: EvalLoader,
    ledger: Ledger,
    benchmark: Benchmark | None,
    data: dict[str, Any],
    left_out: int,
) -> list[str]:
    lines = [result.table()]
    if benchmark is not None:
        lines.append(f"{benchmark.name}: {data['videos']} videos, {len(data['missing'])} missing")
        lines += benchmark.notes
    lines.append(f"{left_out} clips left out, see {ledger.path.parent}" if left_out else "no clip left out")
    return [*lines, f"decoder {loader.decoder}"]


if __name__ == "__main__":
    sys.exit(main())
