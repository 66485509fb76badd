"""What measurements of whole steps write: a table, JSON, the chart as PNG, TensorBoard."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

from smaug_ds.engine.pictures import BACKGROUND, FAINT, GREEN, INK, LINE, MARGIN, WIDTH
from tools.profiling.command import write_json

_NAMES, _FIGURES = 380, 250  # pixels for a bar's name and for the text after it
_THIN, _MARK = 2, (207, 34, 46)
_TITLE, _TEXT, _SMALL = (ImageFont.load_default(size) for size in (22, 18, 14))


@dataclass(frozen=True)
class Bar:
    """One line of a chart."""

    name: str
    value: float
    text: str  # beside the bar
    mark: float | None = None  # drawn as a line across the bar: what another source says


@dataclass
class Report:
    """The figures of one command, ready to be written."""

    conditions: Mapping[str, Any]
    title: str
    unit: str  # of the bars
    mark: str = ""  # what the marks are
    bars: list[Bar] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)
    further: dict[str, Any] = field(default_factory=dict)  # more keys of the JSON


def add_files(parser: argparse.ArgumentParser) -> None:
    """``--json``, ``--png`` and ``--tensorboard``: what ``write`` writes."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, hardware, versions, config, command")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the chart")
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write figures and chart for TensorBoard")


def write(report: Report, args: argparse.Namespace) -> None:
    """Writes what the command line asks for."""
    if args.json:
        write_json(args.json, {"conditions": report.conditions, "measured": report.measured, **report.further})
    if args.png:
        draw(report).save(args.png)
    if args.tensorboard:
        with SummaryWriter(str(args.tensorboard)) as writer:
            writer.add_text("conditions", f"```\n{json.dumps(report.conditions, indent=1)}\n```")
            for bar in report.bars:
                writer.add_scalar(f"{report.title}/{bar.name}".replace(" ", "_"), bar.value)
            writer.add_image(report.title, np.asarray(draw(report)), dataformats="HWC")


def draw(report: Report) -> Image.Image:
    """Horizontal bars from zero, names at the left, figures at the right; machine and load below."""
    lines = [*_conditions(report.conditions), *([f"red line: {report.mark}"] if report.mark else [])]
    height = 2 * MARGIN + LINE * (len(report.bars) + len(lines) + 2)
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN), f"{report.title}: {report.unit}", INK, _TITLE)
    width = WIDTH - 2 * MARGIN - _NAMES - _FIGURES
    largest = max((max(bar.value, bar.mark or 0.0) for bar in report.bars), default=0.0) or 1.0
    left = MARGIN + _NAMES
    for number, bar in enumerate(report.bars):
        top = MARGIN + LINE * (number + 1) + LINE // 2
        pen.text((MARGIN, top + 4), bar.name, INK, _TEXT)
        end = left + width * bar.value / largest
        pen.rectangle((left, top + 3, max(end, left + _THIN), top + LINE - 5), GREEN)
        if bar.mark is not None:
            place = left + width * bar.mark / largest
            pen.rectangle((place - _THIN, top, place + _THIN, top + LINE - 2), _MARK)
        pen.text(
            (max(end, left + width * (bar.mark or 0.0) / largest) + 10, top + 4),
            bar.text,
            INK,
            _TEXT,
        )
    for number, line in enumerate(lines):
        pen.text((MARGIN, height - MARGIN - LINE * (len(lines) - number) + 8), line, FAINT, _SMALL)
    return image


def _conditions(told: Mapping[str, Any]) -> list[str]:
    hardware = told["hardware"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {told['versions'][name]}" for name in ("python", "torch"))
    return [f"{hardware['cores']} cores of {hardware['processor']}, {gpus}, load {hardware['load']:.1f}; {versions}"]


def plain(value: Any) -> Any:
    """A dataclass as JSON takes it."""
    return dataclasses.asdict(value)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        lines.append("  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]))
    return "\n".join(line.rstrip() for line in lines)
