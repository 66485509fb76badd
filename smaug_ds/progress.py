"""Progress of long work: a bar on a terminal, now and then a line in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0  # in a log file
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} ({percentage:.0f}%), {rate_fmt}, {remaining} left\n"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit}, {rate_fmt}\n"


def bar(items: Iterable[Item], total: int | None, name: str, unit: str, shown: bool = True) -> tqdm[Item]:
    """``items`` as they are, counted as they pass; ``total`` of them are expected (None: unknown). ``shown=False``
    stays silent.

    Update by hand what does not pass one by one: ``with bar(range(0), total, ...) as work: work.update(50)``.
    """
    if sys.stderr.isatty():
        return tqdm(items, total=total, desc=name, unit=unit, disable=not shown)
    return tqdm(
        items,
        total=total,
        desc=name,
        unit=unit,
        disable=not shown,
        mininterval=SECONDS_BETWEEN_LINES,
        bar_format=_LINE if total is not None else _LINE_WITHOUT_TOTAL,
        ascii=True,
    )
