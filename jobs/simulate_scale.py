"""A pre-training run without the computing: when to save, and what share of the time is useful, on many GPUs.

    python jobs/simulate_scale.py [--config FILE] [--gpus 8,64,512] [--mtbf-days D] [--restart-minutes M] [--elastic]
        [--save-seconds S] [--runs N] [--seed N] [--json FILE] key=value ...

Step time and checkpoint size come from the plan of ``tools/plan_run.py``, whose settings it takes, over the corpus of
the config or the paper's 17M recipe; failures from a seeded generator. For each number of GPUs it looks for the best
interval between checkpoints, simulates runs with it, and compares with the closed form. Then it follows one broken run
through the real order of the data, step by step and rank by rank: no sample may be lost or come twice. Exit codes: 0,
or 2 for a setting that is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault(
    "DS_ACCELERATOR", "cpu"
)  # nothing is computed, but DeepSpeed looks for a device when it is imported

from smaug_ds.config import ConfigError, parse
from smaug_ds.data.mixture import Manifest, open_mixture
from smaug_ds.data.order import Order, SetShards
from smaug_ds.data.sample import Medium
from smaug_ds.engine.deepspeed import load_json
from smaug_ds.engine.optim import Schedule
from smaug_ds.planner.calibration import speed
from smaug_ds.planner.cluster import Machine
from smaug_ds.planner.failures import (
    Trouble,
    best_interval,
    check_samples,
    committed,
    daly,
    expected_seconds,
    simulate,
    young,
)
from smaug_ds.planner.media import MediaConfig
from smaug_ds.planner.memory import Precision, checkpoint_bytes
from smaug_ds.planner.prediction import Work, predict
from tools.plan_run import PlanConfig, has_corpus
from tools.planning.corpus import RECIPES, ROOT, find_recipes, paper_recipe, with_vocabulary
from tools.planning.measured import read_measured

DAY, MINUTE = 86400.0, 60.0
# A node of eight GPUs fails about once in 150 days: 6.5 failures in 1000 node-days (Kokolis et al. 2024, "Revisiting
# Reliability in Large-Scale Machine Learning Research Clusters", section 3). A shared cluster may be far worse.
MTBF_DAYS = 150.0
CHECKED_STEPS = 400  # at most, of the run that is followed through the order of the data
SHARD = 256  # samples of a shard of the index that it is followed through


@dataclass(frozen=True)
class Row:
    """What came of one number of GPUs."""

    gpus: int
    nodes: int
    steps: int
    step_seconds: float
    save_seconds: float
    every: int  # steps between checkpoints, the best
    seconds_between: float
    young_seconds: float
    daly_seconds: float
    useful_expected: float  # share of the time, closed form
    useful: float  # share of the time, mean of the simulated runs
    useful_low: float  # in one run of twenty it is less
    useful_by_default: float  # closed form, with run.save_every
    failures: float  # of a run, mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file, as tools/plan_run.py takes it")
    parser.add_argument("--profile", action="append", default=[], metavar="FILE", help="measured steps")
    parser.add_argument("--gpus", default="8,64,512", help="numbers of GPUs (8,64,512)")
    parser.add_argument("--mtbf-days", type=float, default=MTBF_DAYS, metavar="D", help="of one node (150)")
    parser.add_argument("--restart-minutes", type=float, default=5.0, metavar="M", help="from a failure to a step (5)")
    parser.add_argument("--repair-minutes", type=float, default=0.0, metavar="M", help="until a node is replaced (0)")
    parser.add_argument("--save-seconds", type=float, metavar="S", help="that a checkpoint blocks (from its size)")
    parser.add_argument("--elastic", action="store_true", help="go on with fewer nodes while one is repaired")
    parser.add_argument("--runs", type=int, default=200, help="simulated for each number of GPUs (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = with_vocabulary(parse(PlanConfig, options.config, options.overrides))
        if options.runs < 1:
            raise ConfigError(f"--runs is {options.runs}: it must be at least 1")
        rows = [simulate_scale(config, gpus, options) for gpus in gpu_numbers(options.gpus)]
        print(table(rows, options))
        print(follow(config, options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        told = {"arguments": vars(options) | {"json": str(options.json)}, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


def gpu_numbers(text: str) -> list[int]:
    """``8,64`` -> [8, 64]. Raises ConfigError for anything else."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--gpus is {text!r}: give numbers such as 8,64,512")
    return numbers


def simulate_scale(config: PlanConfig, gpus: int, options: argparse.Namespace) -> Row:
    """The best interval and what it yields on so many GPUs; the global batch is the config's."""
    cluster = config.cluster.with_ranks(gpus)
    recipe = find_recipes(config, config.media)[0] if has_corpus(config) else paper_recipe("17M", config.media)
    precision = Precision.of(load_json(config.run.deepspeed))
    batch = config.batch
    work = Work(config.model, config.loss, config.media, precision, recipe.mix, batch.global_size, batch.micro_size)
    measured = read_measured(options.profile, [], config.media)
    fast = speed(
        measured,
        Machine.of(cluster, bool(measured)),
        config.model.size,
        config.model.frames,
        work.parameters,
        precision,
    )

    def step_seconds(nodes: int) -> float:
        machine = Machine.of(config.cluster.with_ranks(nodes * cluster.devices), bool(measured))
        micro, accumulation = share_of_rank(batch.global_size, machine.cluster.ranks, batch.micro_size)
        return predict(work, machine, fast, micro, accumulation).seconds

    seconds = {cluster.nodes: step_seconds(cluster.nodes)}
    smaller = allowed_nodes(batch.global_size, cluster.devices, cluster.nodes - 1) if options.elastic else []
    seconds |= {nodes: step_seconds(nodes) for nodes in smaller}
    save = options.save_seconds
    if save is None:
        save = checkpoint_bytes(work.parameters, precision) / (cluster.checkpoint_gb_s * 1e9)
    trouble = Trouble(options.mtbf_days * DAY, options.restart_minutes * MINUTE, save, options.repair_minutes * MINUTE)
    per_epoch = -(-int(sum(recipe.draws.values())) // batch.global_size)
    steps = Schedule.of(config.optim, per_epoch, config.run.max_steps).total_steps
    step, nodes = seconds[cluster.nodes], cluster.nodes
    waiting = dataclasses.replace(trouble, repair=0.0) if smaller else trouble  # of the closed form
    every = best_interval(steps, step, waiting, nodes)
    generator = np.random.Generator(np.random.Philox(key=[options.seed, gpus]))
    outcomes = [
        simulate(steps, every, seconds.__getitem__, trouble, nodes, generator, smaller) for _ in range(options.runs)
    ]
    shares = np.array([steps * step / outcome.seconds for outcome in outcomes])
    default = min(steps, config.run.save_every or steps)
    return Row(
        gpus=gpus,
        nodes=nodes,
        steps=steps,
        step_seconds=step,
        save_seconds=save,
        every=every,
        seconds_between=every * step,
        young_seconds=young(save, trouble.node_mtbf / nodes),
        daly_seconds=daly(save, trouble.node_mtbf / nodes),
        useful_expected=steps * step / expected_seconds(steps, step, every, waiting, nodes),
        useful=float(steps * step / np.mean([outcome.seconds for outcome in outcomes])),
        useful_low=float(np.quantile(shares, 0.05)),
        useful_by_default=steps * step / expected_seconds(steps, step, default, waiting, nodes),
        failures=float(np.mean([outcome.failures for outcome in outcomes])),
    )


def share_of_rank(global_batch: int, ranks: int, micro_batch: int) -> tuple[int, int]:
    """Micro batch and accumulation of a rank; the micro batch is made smaller until it divides the rank's share.

    Raises ConfigError when the ranks do not divide the global batch.
    """
    own, rest = divmod(global_batch, ranks)
    if rest or not own:
        raise ConfigError(
            f"batch.global_size is {global_batch}, which {ranks} ranks do not divide: change --gpus or it"
        )
    micro = max(size for size in range(1, min(own, micro_batch) + 1) if own % size == 0)
    return micro, own // micro


def allowed_nodes(global_batch: int, devices: int, most: int) -> list[int]:
    """Numbers of nodes up to ``most`` whose ranks divide the global batch."""
    return [nodes for nodes in range(1, most + 1) if global_batch % (nodes * devices) == 0]


def table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The rows, for people."""
    lines = [
        f"a node fails once in {options.mtbf_days:g} days, a restart takes {options.restart_minutes:g} min"
        + (f", a repair {options.repair_minutes:g} min" if options.repair_minutes else ""),
        f"{'GPUs':>5} {'step':>9} {'save':>7} {'best interval':>22} {'Young':>9} {'Daly':>9} "
        f"{'failures':>8} {'useful':>8} {'1 in 20 below':>13} {'closed form':>11} {'as configured':>13}",
    ]
    for row in rows:
        between = f"{row.every} steps, {row.seconds_between:.0f} s"
        lines.append(
            f"{row.gpus:5} {row.step_seconds * 1e3:6.1f} ms {row.save_seconds:5.1f} s {between:>22} "
            f"{row.young_seconds:7.0f} s {row.daly_seconds:7.0f} s {row.failures:8.2f} {row.useful:8.2%} "
            f"{row.useful_low:13.2%} {row.useful_expected:11.2%} {row.useful_by_default:13.2%}"
        )
    return "\n".join(lines)


def follow(config: PlanConfig, options: argparse.Namespace) -> str:
    """Breaks a short run often, on changing numbers of nodes, and checks every sample that its kept steps drew."""
    batch, devices = config.batch, min(config.cluster.devices, config.batch.global_size)
    nodes = max(allowed_nodes(batch.global_size, devices, 8), default=0)
    if not nodes:
        raise ConfigError(
            f"batch.global_size is {batch.global_size}, which cluster.devices = {devices} does not divide"
        )
    order = (
        indexed_order(config)
        if has_corpus(config) and config.data.train
        else paper_order(batch.global_size, config.media)
    )
    steps = min(CHECKED_STEPS, 2 * order.steps_per_epoch)
    trouble = Trouble(node_mtbf=nodes * steps / 12, restart=2.0, save=0.5, repair=steps / 8)
    generator = np.random.Generator(np.random.Philox(key=[options.seed, 0]))
    smaller = allowed_nodes(batch.global_size, devices, nodes - 1)
    outcome = simulate(steps, 7, lambda count: nodes / count, trouble, nodes, generator, smaller)
    counts = check_samples(order, committed(outcome.attempts, steps), devices, batch.micro_size, steps)
    worlds = sorted({attempt.nodes * devices for attempt in outcome.attempts})
    again = sum(attempt.reached - attempt.saved for attempt in outcome.attempts)
    return (
        f"order of the data: {steps} steps of {batch.global_size} broken {outcome.failures} times, on "
        f"{', '.join(map(str, worlds))} ranks, {again} steps done again: {counts['image']:,} images and "
        f"{counts['video']:,} clips drawn, none lost, none twice, all where an uninterrupted run has them"
    )


def indexed_order(config: PlanConfig) -> Order:
    """The order of the indexed shards of the config."""
    return open_mixture(config.data).order(config.batch.global_size, config.run.seed, config.data.shuffle_group)


def paper_order(global_batch: int, media: MediaConfig) -> Order:
    """The order of an index like that of the 17M recipe, with a hundredth of its samples."""
    sizes: dict[Medium, list[int]] = {"image": [], "video": []}
    parts: list[SetShards] = []
    for part in parse(Manifest, ROOT / RECIPES["17M"]).sets:
        samples = part.expected / (part.weight if part.unit == "captions" else 1.0)
        count = max(1, round(samples / 100))
        full, rest = divmod(count, SHARD)
        own = [SHARD] * full + ([rest] if rest else [])
        first = len(sizes["image"])
        holds_clips = part.name in media.video_sets
        sizes["video"] += own if holds_clips else [0] * len(own)
        sizes["image"] += [0] * len(own) if holds_clips else own
        parts.append(SetShards(first, first + len(own), part.weight))
    return Order(sizes, global_batch, seed=0, sets=parts)


if __name__ == "__main__":
    sys.exit(main())
