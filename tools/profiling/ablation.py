"""What masking, token sparsification and frame selection save: the rows of the paper's ablations as ratios.

    python tools/profile_throughput.py ablation [--tables masking,keep,frames,parts] [--turns 3] [batch=8 ...]

Each row is timed in turns with the dense model of the same number of frames (no mask, every token kept, every frame
fused, no pixels to predict): a process each, so that a slow minute of the machine hits both. The ratio is dense seconds
to the row's seconds, turn by turn: how many times as fast. ``batch`` is that of one frame; clips of T frames come in
batches of batch * 2 / T, so that memory stays alike. ``--steps 0`` times nothing and counts the forward FLOPs of a
sample, its caption at full length, in seconds on any machine.

Beside it stands the ratio of the paper (arXiv 2211.11446) where it is known: 83.4 GPU hours of Singularity to 50.4 for
one frame, and 144.5 of its own dense baseline to 77.8 for four frames of which two are kept. Its other rows were not to
be had, and say so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smaug_ds.config import ConfigError, parse, to_dict
from tools.profiling.command import keys_of, new_parser, run
from tools.profiling.machine import announce
from tools.profiling.model import ProfileConfig, count_flops, peak_of, record
from tools.profiling.report import Bar, Report, add_files, plain, table, write
from tools.profiling.step import StepConfig
from tools.profiling.turns import Facts, Runner, Spread, take_turns


@dataclass(frozen=True)
class Row:
    """One variant of the model. Tables are the paper's: 4 masking, 5 keep rate, 6 frames, 10 the parts one by one."""

    table: str
    name: str
    frames: int = 1
    frames_kept: int = 1
    mask_ratio: float = 0.5
    keep_rate: float = 0.8  # 1 keeps every token
    paper: float | None = None  # times as fast as dense, as the paper tells it

    def of(self, config: StepConfig) -> StepConfig:
        """``config`` turned into this row."""
        vision = dataclasses.replace(config.model.vision, mask_ratio=self.mask_ratio, keep_rate=self.keep_rate)
        if self.keep_rate == 1:
            vision = dataclasses.replace(vision, sparsify_layers=())
        model = dataclasses.replace(config.model, vision=vision, frames=self.frames, frames_kept=self.frames_kept)
        loss = config.loss if self.mask_ratio else dataclasses.replace(config.loss, mvm=0.0)  # nothing to predict
        batch = config.batch if self.frames == 1 else max(2, config.batch * 2 // self.frames)
        return dataclasses.replace(config, model=model, loss=loss, batch=batch)

    @property
    def paper_told(self) -> str:
        return "not known" if self.paper is None else f"{self.paper:.2f}"

    @property
    def dense(self) -> Row:
        """What the row is held against."""
        return Row(self.table, "dense", self.frames, self.frames, mask_ratio=0.0, keep_rate=1.0)


SINGLE_FRAME, FOUR_TO_TWO = 83.4 / 50.4, 144.5 / 77.8  # GPU hours of the paper, dense to SMAUG
ROWS = [
    *(
        Row("masking", f"masking {ratio:.0%}", mask_ratio=ratio, paper=SINGLE_FRAME if ratio == 0.5 else None)
        for ratio in (0.0, 0.1, 0.25, 0.5, 0.65)
    ),
    *(
        Row("keep", f"keep rate {rate}", keep_rate=rate, paper=SINGLE_FRAME if rate == 0.8 else None)
        for rate in (0.6, 0.7, 0.8, 0.9)
    ),
    Row("frames", "1 frame", paper=SINGLE_FRAME),
    Row("frames", "4 frames, 1 kept", 4, 1),
    Row("frames", "4 frames, 2 kept", 4, 2, paper=FOUR_TO_TWO),
    Row("frames", "4 frames, 3 kept", 4, 3),
    Row("frames", "4 frames, all kept", 4, 4),
    Row("frames", "8 frames, 4 kept", 8, 4),
    Row("parts", "4 frames, masking (MAE)", 4, 4, keep_rate=1.0),
    Row("parts", "+ token sparsification (VTS)", 4, 4),
    Row("parts", "+ frame selection (FS), 2 kept", 4, 2, paper=FOUR_TO_TWO),
]
MARK = "the paper's ratio, where known"
TABLES = tuple(dict.fromkeys(row.table for row in ROWS))


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``ablation``, with what follows it on the command line."""
    parser = new_parser(program, __doc__)
    parser.add_argument("--tables", default=",".join(TABLES), metavar="NAMES", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of each row and of dense beside it")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="of a turn; 0: count only")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="steps that do not count")
    add_files(parser)
    settings = keys_of(StepConfig(), "model.size=tiny")
    write(*run(parser, arguments, settings, _report, {"turns": 1, "steps": 0, "warmup": 0}))


def _report(args: argparse.Namespace) -> Report:
    names = args.tables.split(",")
    for name in names:
        if name not in TABLES:
            raise ConfigError(f"--tables names {name!r}: known are {', '.join(TABLES)}")
    config = parse(StepConfig, None, args.overrides)
    rows = [row for row in ROWS if row.table in names]
    for row in rows:  # a row that the settings do not allow is told before any other is measured
        row.of(config), row.dense.of(config)
    told = announce(to_dict(config))
    return ablate(config, rows, args, told) if args.steps else count(config, rows, told)


def count(config: StepConfig, rows: Sequence[Row], told: dict[str, Any]) -> Report:
    """Counts the rows and prints the table."""
    shown, bars, counted = [["", "forward GFLOPs", "dense", "dense to row", "the paper's"]], [], []
    for row in rows:
        own, dense = (forward_flops(step) for step in (row.of(config), row.dense.of(config)))
        ratio = dense / own
        shown.append([row.name, f"{own / 1e9:.1f}", f"{dense / 1e9:.1f}", f"{ratio:.2f}", row.paper_told])
        bars.append(Bar(row.name, ratio, f"{ratio:.2f}", row.paper))
        counted.append({**plain(row), "forward_flops": own, "dense_forward_flops": dense})
    print(table(shown))
    return Report(told, "ablation", "forward FLOPs, dense to row", MARK, bars, further={"counted": counted})


@functools.cache
def forward_flops(config: StepConfig) -> int:
    """Of one sample, its caption at full length."""
    return sum(count_flops(ProfileConfig(config.whole_model, config.loss.mlm_probability)).values())


@dataclass(frozen=True)
class Result:
    """A row as measured."""

    row: Row
    config: StepConfig
    ratio: Spread  # times as fast as dense
    flops: float  # of dense to the row's, sample by sample: what the ratio would be if arithmetic were all
    memory: float  # of the row to dense
    measured: dict[str, Any]


def ablate(config: StepConfig, rows: Sequence[Row], args: argparse.Namespace, told: dict[str, Any]) -> Report:
    """Times the rows and prints the table. The dense model of a number of frames stays open for all its rows; a row
    that stands in two tables is timed once."""
    peak, known = peak_of(config), dict[StepConfig, Result]()
    for frames in dict.fromkeys(row.frames for row in rows):
        group = [row for row in rows if row.frames == frames]
        with Runner("dense", group[0].dense.of(config), args.warmup) as dense:
            for row in group:
                step = row.of(config)
                if step not in known:
                    known[step] = _against(dense, row, step, args, peak)
    results = [dataclasses.replace(known[row.of(config)], row=row) for row in rows]
    print(_table(results))
    bars = [
        Bar(f"{result.row.name}", result.ratio.median, f"{result.ratio.median:.2f}", result.row.paper)
        for result in results
    ]
    further = {
        "rows": [
            {**plain(result.row), "ratio": plain(result.ratio), "flops_ratio": result.flops, "memory": result.memory}
            for result in results
        ]
    }
    measured = [result.measured for result in results]
    return Report(told, "ablation", "times as fast as the dense model", MARK, bars, measured, further)


def _against(dense: Runner, row: Row, config: StepConfig, args: argparse.Namespace, peak: float) -> Result:
    with Runner(row.name, config, args.warmup) as runner:
        times = take_turns([dense, runner], args.turns, args.steps)
        facts, dense_facts = runner.facts(), dense.facts()
    ratio = Spread.of([slow / fast for slow, fast in times])
    print(f"{row.name}: {ratio.text(2)}", flush=True)
    measured = record(config, runner.timing, facts, peak)
    return Result(row, config, ratio, dense_facts.flops / facts.flops, _share(facts, dense_facts), measured)


def _share(facts: Facts, dense: Facts) -> float:
    return facts.peak_bytes / dense.peak_bytes


def _table(results: Sequence[Result]) -> str:
    rows = [["", "batch", "s a step", "times dense", "the paper's", "in FLOPs", "memory"]]
    for result in results:
        seconds = result.measured["seconds_per_step"]["median"]
        rows.append(
            [
                result.row.name,
                str(result.config.batch),
                f"{seconds:.3f}",
                result.ratio.text(2),
                result.row.paper_told,
                f"{result.flops:.2f}",
                f"{result.memory:.0%}",
            ]
        )
    return table(rows)
