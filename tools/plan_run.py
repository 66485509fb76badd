"""What a run will need and how long it will take, before anything is started.

    python tools/plan_run.py [--config FILE] [--profile FILE] [--run FOLDER] [--write FILE] [--json FILE] key=value ...
    python tools/plan_run.py host [--json FILE] [--config FILE] key=value ...

Takes the settings of ``smaug_ds.pretrain`` and, beside them, ``cluster.*`` and ``media.*``: what the run may use, and
what its media are like. Without ``--profile`` or ``--run`` speeds are a share of what a data sheet says, as it tells.
``host`` measures what a plan for this machine's cores needs. Exit codes: 0 planned, 2 it cannot work as set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a plan needs no device, for which DeepSpeed looks when it is imported

from smaug_ds.config import ConfigError, parse, to_dict
from smaug_ds.engine.deepspeed import load_json
from smaug_ds.engine.optim import Schedule
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.planner.calibration import Measured, Speed, of_device, speed
from smaug_ds.planner.cluster import ClusterConfig, Machine
from smaug_ds.planner.media import MediaConfig
from smaug_ds.planner.memory import Precision
from smaug_ds.planner.prediction import Work, predict, require_fit, scaling
from tools.planning.corpus import find_recipes, with_vocabulary
from tools.planning.measured import read_measured
from tools.planning.report import Plan, as_json, report
from tools.planning.script import LAUNCHERS, write_script


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """A pre-training run, and what it may use."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    media: MediaConfig = field(default_factory=MediaConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["host"]:
        from tools.planning.host import main as measure_host  # its processes import this file, too

        return measure_host(arguments[1:], "plan_run.py host")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file, as smaug_ds.pretrain takes it")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="FILE", help="measured steps; may be repeated"
    )
    parser.add_argument("--run", action="append", default=[], metavar="FOLDER", help="finished run; may be repeated")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a script that starts the run")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="slurm", help="that the script is for (slurm)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan here, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = parse(PlanConfig, options.config, options.overrides)
        plan = make_plan(config, options.profile, options.run)
        print(report(plan))
        if options.json:
            told = as_json(plan, to_dict(config), ["tools/plan_run.py", *arguments])
            options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        if options.write:
            own = [text for text in options.overrides if not text.startswith(("cluster.", "media.", "run.folder="))]
            write_script(options.write, options.launcher, plan, options.config, own, config.run.folder)
            if not config.data.tokenizer or not has_corpus(config):
                print(f"WARNING: {options.write} cannot start yet: set data.tokenizer, and data.train or data.corpus")
            print(f"\nwrote {options.write}: bash {options.write}")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def has_corpus(config: PlanConfig) -> bool:
    """Whether the config names what to train on."""
    return bool(config.data.train or config.data.corpus)


def make_plan(config: PlanConfig, profiles: Sequence[str] = (), runs: Sequence[str] = ()) -> Plan:
    """Everything that the report tells. Raises ConfigError for a setting that is wrong or a run that cannot fit."""
    config = with_vocabulary(config)
    recipes = find_recipes(config, config.media)
    precision = Precision.of(load_json(config.run.deepspeed))
    batch, cluster = config.batch, config.cluster
    work = Work(config.model, config.loss, config.media, precision, recipes[0].mix, batch.global_size, batch.micro_size)
    measured = read_measured(profiles, runs, config.media)
    machine = Machine.of(cluster, calibrated=bool(measured))
    accumulation = batch.accumulation(cluster.ranks)
    fast = speed(measured, machine, config.model.size, config.model.frames, work.parameters, precision)
    fit = require_fit(work, machine)
    times = []
    for recipe in recipes:
        step = predict(dataclasses.replace(work, mix=recipe.mix), machine, fast, accumulation=accumulation)
        per_epoch = -(-int(sum(recipe.draws.values())) // batch.global_size)
        steps = Schedule.of(config.optim, per_epoch, config.run.max_steps).total_steps
        times.append((recipe, steps * step.seconds))
    return Plan(
        work=work,
        machine=machine,
        speed=fast,
        fit=fit,
        step=predict(work, machine, fast, accumulation=accumulation),
        times=times,
        scaling=scaling(work, cluster, fast, bool(measured)),
        checks=checks(work, cluster, fast, measured),
    )


def checks(
    work: Work, cluster: ClusterConfig, fast: Speed, measured: Sequence[Measured]
) -> list[tuple[Measured, float]]:
    """Measured steps of this model, and the seconds that the plan would have predicted for each."""
    found = []
    wanted = (work.model.size, work.model.frames, work.model.frames_kept)
    for row in measured:
        same = (row.size, row.frames, row.frames_kept) == wanted and of_device(row, cluster.device)
        if same and row.world_size <= cluster.devices:
            machine = Machine.of(cluster.with_ranks(row.world_size), calibrated=True)
            found.append((row, predict(work, machine, fast, micro_batch=row.batch).seconds))
    return found


if __name__ == "__main__":
    sys.exit(main())
