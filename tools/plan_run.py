"""What a run will need and how long it will take, before anything is started.

    python tools/plan_run.py [--config FILE] [--profile FILE] [--run FOLDER] [--write FILE] [--json FILE] key=value ...
    python tools/plan_run.py host [--json FILE] [--config FILE] key=value ...

Takes the settings of ``smaug_ds.pretrain`` and, beside them, ``cluster.*`` and ``media.*``: what the run may use, and
what its media are like. Without ``--profile`` or ``--run`` speeds are a share of what a data sheet says, marked as assumed.
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

from smaug_ds.config import ConfigError, naming, parse, to_dict
from smaug_ds.data.mixture import Manifest, open_mixture
from smaug_ds.data.sample import MEDIA, Medium
from smaug_ds.engine.optim import Schedule
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.planner.calibration import Measured, Speed, rows, speed
from smaug_ds.planner.cluster import ClusterConfig, Machine
from smaug_ds.planner.media import MediaConfig, epoch_draws
from smaug_ds.planner.memory import Precision
from smaug_ds.planner.prediction import Work, predict, require_fit, scaling
from smaug_ds.text import Tokenizer
from tools.plan_report import Plan, Recipe, as_json, report
from tools.plan_write import LAUNCHERS, write_script

RECIPES = {"5M": "jobs/experiments/corpus_5m.yaml", "17M": "jobs/experiments/corpus_17m.yaml"}
BERT_VOCABULARY = 30522


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """A pre-training run, and what it may use."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    media: MediaConfig = field(default_factory=MediaConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["host"]:
        from tools.plan_host import main as measure_host  # needs a model, which a plan does not

        return measure_host(arguments[1:], "plan_run.py host")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file, as smaug_ds.pretrain takes it")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="FILE", help="measured steps; may be repeated"
    )
    parser.add_argument("--run", action="append", default=[], metavar="FOLDER", help="run that tells its own speed")
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
            command = ["tools/plan_run.py", *arguments]
            options.json.write_text(json.dumps(as_json(plan, to_dict(config), command), indent=1) + "\n")
        if options.write:
            own = [text for text in options.overrides if not text.startswith(("cluster.", "media."))]
            write_script(options.write, options.launcher, plan, options.config, own, config.run.folder)
            print(f"wrote {options.write}: bash {options.write}")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_plan(config: PlanConfig, profiles: Sequence[str], runs: Sequence[str]) -> Plan:
    """Everything that the report tells. Raises ConfigError for a setting that is wrong or a run that cannot fit."""
    config = with_vocabulary(config)
    recipes = find_recipes(config)
    recipe = recipes[0]
    deepspeed = read_deepspeed(config.run.deepspeed)
    precision = Precision.of(deepspeed)
    measured: list[Measured] = []
    for path in profiles:
        with naming(f"--profile {path}"):
            measured += rows(json.loads(Path(path).read_text(encoding="utf-8")), f"--profile {path}")
    for folder in runs:
        with naming(f"--run {folder}"):
            measured.append(row_of_run(Path(folder), config.media))
    machine = Machine.of(config.cluster, calibrated=bool(measured))
    work = work_of(config, precision, recipe.mix)
    accumulation = config.batch.accumulation(config.cluster.ranks)
    fast = speed(measured, machine, config.model.size, config.model.frames, work.parameters, precision.mixed)
    fit = require_fit(work, machine)
    step = predict(work, machine, fast, accumulation=accumulation)
    times = []
    for each in recipes:
        found = predict(dataclasses.replace(work, mix=each.mix), machine, fast, accumulation=accumulation)
        times.append((each, run_steps(config, each.draws) * found.seconds))
    return Plan(
        work=work,
        machine=machine,
        speed=fast,
        fit=fit,
        step=step,
        times=times,
        scaling=scaling(work, config.cluster, fast, bool(measured)),
        checks=checks(work, config, fast, measured),
    )


def with_vocabulary(config: PlanConfig) -> PlanConfig:
    """The config with ``model.text.vocab_size`` set: the tokenizer's, or BERT's where none is named."""
    text = config.model.text
    if not text.vocab_size:
        with naming("data.tokenizer"):
            known = Tokenizer(config.data.tokenizer).vocab_size if config.data.tokenizer else BERT_VOCABULARY
        text = dataclasses.replace(text, vocab_size=known)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))


def find_recipes(config: PlanConfig) -> list[Recipe]:
    """The corpus of the config, indexed or on paper, or else the two recipes of the paper."""
    if config.data.train:
        return [Recipe(", ".join(config.data.train), indexed_draws(config))]
    if config.data.corpus:
        with naming("data.corpus"):
            manifest = parse(Manifest, config.data.corpus)
        try:
            return [Recipe(config.data.corpus, indexed_draws(config))]
        except ConfigError:
            return [Recipe(f"{config.data.corpus} as published", epoch_draws(manifest, config.media))]
    root = Path(__file__).resolve().parent.parent
    return [Recipe(name, epoch_draws(parse(Manifest, root / path), config.media)) for name, path in RECIPES.items()]


def indexed_draws(config: PlanConfig) -> dict[Medium, float]:
    """Draws of an epoch of the indexed shards that the config names."""
    order = open_mixture(config.data).order(config.batch.global_size, config.run.seed, config.data.shuffle_group)
    return {medium: float(order.draws(medium)) for medium in MEDIA}


def work_of(config: PlanConfig, precision: Precision, mix: dict[Medium, float]) -> Work:
    """What the planner calculates with."""
    batch = config.batch
    return Work(config.model, config.loss, config.media, precision, mix, batch.global_size, batch.micro_size)


def run_steps(config: PlanConfig, draws: dict[Medium, float]) -> int:
    """Optimizer steps of the whole run over a corpus of so many draws an epoch."""
    per_epoch = -(-int(sum(draws.values())) // config.batch.global_size)
    return Schedule.of(config.optim, per_epoch, config.run.max_steps).total_steps


def read_deepspeed(path: str) -> dict:
    """The DeepSpeed JSON, checked as the run itself does."""
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # a plan needs no device; DeepSpeed looks for one when it is imported
    from smaug_ds.engine.deepspeed import load_json  # takes seconds

    return load_json(path)


def row_of_run(folder: Path, media: MediaConfig) -> Measured:
    """The steps that a run logged, but for the first fifth, which warms up. Raises ConfigError where there are none."""
    from statistics import median

    from smaug_ds.planner.flops import step_flops

    config = parse(PretrainConfig, folder / "config.yaml")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = lines[len(lines) // 5 :]
    if not lines:
        raise ConfigError("metrics.jsonl holds no logged step: let the run log one (run.log_every)")
    prefix = "seconds_per_step/"
    names = [name for name in lines[-1] if name.startswith(prefix)]
    phases = {name.removeprefix(prefix): median(line[name] for line in lines) for name in names}
    world = summary["world_size"]
    precision = Precision.of(read_deepspeed(config.run.deepspeed))
    shares = {m: float(sum(f"loss/{m}" in line for line in lines)) / len(lines) for m in MEDIA}
    total = sum(shares.values())
    work = Work(
        config.model,
        config.loss,
        media,
        precision,
        {medium: share / total for medium, share in shares.items()},
        config.batch.global_size,
        config.batch.micro_size,
    )
    flops = sum(
        share * sum(part.total for part in step_flops(work.model, work.loss, step).values())
        for share, step in work.steps(world)
    )
    accumulation = config.batch.accumulation(world)
    return Measured(
        what="train",
        size=config.model.size,
        frames=config.model.frames,
        frames_kept=config.model.frames_kept,
        batch=config.batch.micro_size,
        dtype="bf16" if precision.activation_bytes == 2 else "fp32",
        device=summary["accelerator"],
        world_size=world,
        seconds=config.batch.global_size / median(line["samples_per_second"] for line in lines),
        flops=flops * accumulation,
        parameters=work.parameters,
        phases=phases,
    )


def checks(work: Work, config: PlanConfig, fast: Speed, measured: Sequence[Measured]) -> list[tuple[Measured, float]]:
    """Measured steps of this model, and what the plan would have predicted for each, in seconds."""
    found = []
    wanted = (config.model.size, config.model.frames, config.model.frames_kept)
    for row in measured:
        if (row.size, row.frames, row.frames_kept) == wanted and row.world_size <= config.cluster.devices:
            machine = Machine.of(config.cluster.with_ranks(row.world_size), calibrated=True)
            found.append((row, predict(work, machine, fast, micro_batch=row.batch).seconds))
    return found


if __name__ == "__main__":
    sys.exit(main())
