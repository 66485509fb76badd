"""Looks, on all ranks, at what a run or an evaluation needs before it starts, and says which host lacks what.

    deepspeed ... --module smaug_ds.preflight --config FILE key=value ...
    deepspeed ... --module smaug_ds.preflight --for finetune --config FILE run.init_from=RUN key=value ...
    deepspeed ... --module smaug_ds.preflight --for evaluate --checkpoint RUN [--data FOLDER] key=value ...
    python -m smaug_ds.preflight --config FILE key=value ...                                   (this machine alone)

Beside its own options it takes the arguments of what it is for, and the place of its ranks for some seconds.

of smaug_ds.pretrain and smaug_ds.finetune:
  --config FILE         YAML file with the settings that differ from the defaults
  key=value ...         settings that win over the file, by their full names: batch.micro_size=8 run.folder=runs/a
                        data.train=[/data/a,/data/b]; all of them, with their values, stand in a run's RUN/config.yaml

of smaug_ds.evaluate:
  --checkpoint FOLDER   run folder (its latest checkpoint), checkpoint or exported folder
  --data FOLDER         folder of indexed shards to search instead of the run's own
  --task TASK           retrieval, multiple_choice or question_answering, if not what it was fine-tuned for
  --benchmark FILE      annotation file, with --media FOLDER of its videos or --data; --ids FILE, --allow-missing N
  --out FILE            where the result is going to be written
  key=value ...         settings that win over the checkpoint's: those of data and evaluation, and of model what
                        training does not fix, such as model.frames=12

--local_rank, which the launcher may add, is taken by all of them and not looked at.

Exit codes: 0 all well (warnings included), 2 something is wrong or missing: a line "error: preflight: HOST: ..." each,
on standard error. The code is the same on all ranks that could be reached. docs/clusters.md says what is looked at.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from smaug_ds import distributed, evaluate, finetune
from smaug_ds.config import ConfigError, add_arguments, parse
from smaug_ds.data.mixture import training_folders
from smaug_ds.engine.asked import task_of
from smaug_ds.engine.finetuning import FinetuneConfig
from smaug_ds.engine.inspection import Needs, marks_of
from smaug_ds.engine.preflight import Meeting, join
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.engine.trained import AskedConfig, EvaluateConfig, read_config, run_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can mend is a line on standard error."""
    parser = argparse.ArgumentParser(
        prog="smaug_ds.preflight",
        usage="%(prog)s [-h] [--for TASK] [--join_seconds S] [--hosts A,B,...] ARGUMENT ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--for",
        choices=list(READERS),
        default="pretrain",
        dest="task",
        help="what is to run, and whose arguments follow (default pretrain)",
    )
    parser.add_argument(
        "--join_seconds", type=float, default=300.0, metavar="S", help="to wait for a rank to come (default 300)"
    )
    parser.add_argument(
        "--hosts", default="", metavar="A,B,...", help="names of the hosts in the order of their ranks, for messages"
    )
    options, rest = parser.parse_known_args(arguments)
    needs = READERS[options.task](rest)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    names = [name for name in options.hosts.split(",") if name]
    try:
        store = join(rank, world_size, options.join_seconds)
        return Meeting(store, rank, world_size, options.join_seconds, names).hold(needs)
    except ConfigError as error:
        print(f"error: preflight: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        distributed.shutdown()


def of_pretraining(arguments: Sequence[str]) -> Callable[[], Needs]:
    """Reads the command line of ``smaug_ds.pretrain``; leaves with code 2 where its form is wrong."""
    options = _settings(arguments)
    return lambda: Needs.of_run(parse(PretrainConfig, options.config, options.overrides))


def of_finetuning(arguments: Sequence[str]) -> Callable[[], Needs]:
    """Reads the command line of ``smaug_ds.finetune``; leaves with code 2 where its form is wrong."""
    options = _settings(arguments)
    return lambda: Needs.of_run(parse(FinetuneConfig, options.config, options.overrides, finetune.defaults))


def of_evaluation(arguments: Sequence[str]) -> Callable[[], Needs]:
    """Reads the command line of ``smaug_ds.evaluate``; leaves with code 2 where its form is wrong."""
    options = evaluate.read_arguments(arguments)
    if options.compare:
        print("error: preflight: --compare reads results alone and needs no look at the hosts", file=sys.stderr)
        raise SystemExit(2)
    return lambda: _needs_of_evaluation(options)


READERS = {"pretrain": of_pretraining, "finetune": of_finetuning, "evaluate": of_evaluation}


def _settings(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="smaug_ds.preflight", description="Checks all hosts before a run.")
    add_arguments(parser)
    return parser.parse_intermixed_args(arguments)


def _needs_of_evaluation(options: argparse.Namespace) -> Needs:
    task = options.task or task_of(options.checkpoint)
    kind = EvaluateConfig if task == "retrieval" else AskedConfig
    folder, config = read_config(options.checkpoint, options.data, options.overrides, kind)
    files = [("data.tokenizer", config.data.tokenizer)]
    files += [("--checkpoint", path) for path in marks_of(folder)]
    files += [(f"--{name}", str(path)) for name in ("benchmark", "ids") if (path := getattr(options, name))]
    if isinstance(config, AskedConfig) and not options.benchmark:
        files += [("questions.test", path) for path in config.questions.test]

    def searched() -> list[str]:
        if options.media:
            if not options.media.is_dir():
                raise ConfigError(f"--media {options.media} is not a folder")
            return []
        own = config.evaluation.split == "test" and config.data.test
        return list(config.data.test) if own or options.benchmark else training_folders(config.data)

    return Needs(
        settings=config,
        data=config.data,
        model=config.model,
        files=tuple(files),
        shards=searched,
        folder=options.out.parent if options.out else run_folder(folder) / "evaluation",
        folder_key="--out" if options.out else "--checkpoint",
    )


if __name__ == "__main__":
    sys.exit(main())
