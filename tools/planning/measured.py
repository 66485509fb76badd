"""Measured steps that a plan goes by: files of the profiler, and folders of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from smaug_ds.config import ConfigError, naming, parse
from smaug_ds.data.sample import MEDIA
from smaug_ds.engine.deepspeed import load_json
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.planner.calibration import Measured, rows
from smaug_ds.planner.media import MediaConfig
from smaug_ds.planner.memory import Precision
from smaug_ds.planner.prediction import Work
from tools.planning.corpus import with_vocabulary

PREFIX = "seconds_per_step/"


def read_measured(profiles: Sequence[str], runs: Sequence[str], media: MediaConfig) -> list[Measured]:
    """All rows of files that ``tools/profile_throughput.py`` wrote and of run folders. ConfigError names a bad one."""
    found: list[Measured] = []
    for path in profiles:
        with naming(f"--profile {path}"):
            profile = json.loads(Path(path).read_text(encoding="utf-8"))
        found += rows(profile, f"--profile {path}")
    for folder in runs:
        try:
            found.append(row_of_run(Path(folder), media))
        except (ValueError, OSError) as error:
            raise ConfigError(f"--run {folder}: {error}") from error
    return found


def row_of_run(folder: Path, media: MediaConfig) -> Measured:
    """The steps that a finished run logged, but for the first fifth, which warms up.

    media: whose caption lengths are taken for the run's. Raises ValueError or OSError for what is no finished run.
    """
    summary = _parsed((folder / "summary.json").read_text(encoding="utf-8"), "summary.json")
    ranks, device = summary.get("world_size"), summary.get("accelerator")
    if not (type(ranks) is int and ranks >= 1 and isinstance(device, str)):
        raise ValueError(f"summary.json tells world_size {ranks} and accelerator {device}: it is damaged")
    config = parse(PretrainConfig, folder / "config.yaml")
    lines = [
        _parsed(line, f"line {number} of metrics.jsonl")
        for number, line in enumerate((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(), 1)
    ]
    skipped = len(lines) // 5
    lines = lines[skipped:]
    if not lines:
        raise ValueError("metrics.jsonl holds no logged step: let the run log one (run.log_every)")
    names = [name for name in lines[-1] if name.startswith(PREFIX)]
    for number, line in enumerate(lines, skipped + 1):
        for name in ("samples_per_second", *names):
            value = line.get(name)
            least = 1e-9 if name == "samples_per_second" else 0.0
            if type(value) not in (int, float) or not least <= value < math.inf:
                raise ValueError(f"line {number} of metrics.jsonl tells {name} {value}: it is damaged")
    work = work_of_run(config, lines, media)
    return Measured(
        what="train",
        size=config.model.size,
        frames=config.model.frames,
        frames_kept=config.model.frames_kept,
        batch=config.batch.micro_size,
        dtype="bf16" if work.precision.activation_bytes == 2 else "fp32",
        device=device,
        world_size=ranks,
        seconds=config.batch.global_size / median(line["samples_per_second"] for line in lines),
        flops=step_flops_of(work, ranks),
        parameters=work.parameters,
        phases={name.removeprefix(PREFIX): median(line[name] for line in lines) for name in names},
    )


def _parsed(text: str, what: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError that begins with ``what`` for anything else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is damaged: it holds a {type(found).__name__} where an object is due")
    return found


def work_of_run(config: PretrainConfig, lines: Sequence[dict[str, Any]], media: MediaConfig) -> Work:
    """What a run trained: its config, and of each medium the share of the logged steps.

    lines: of its metrics.jsonl. Raises ConfigError for a tokenizer or a DeepSpeed JSON that cannot be read, and where
    no line tells a loss.
    """
    config = with_vocabulary(config)
    seen = {medium: sum(f"loss/{medium}" in line for line in lines) for medium in MEDIA}
    if not any(seen.values()):
        raise ConfigError(f"metrics.jsonl: none of {len(lines)} lines has loss/image or loss/video: log a step")
    mix = {medium: count / sum(seen.values()) for medium, count in seen.items()}
    precision, batch = Precision.of(load_json(config.run.deepspeed)), config.batch
    return Work(config.model, config.loss, media, precision, mix, batch.global_size, batch.micro_size)


def step_flops_of(work: Work, ranks: int) -> float:
    """Operations of an optimizer step on one of so many ranks, all its micro steps together."""
    return work.sample_flops(ranks) * work.global_batch / ranks
