"""What the subcommands share of their command line: settings, checks, and mistakes told in one line."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from smaug_ds.config import ConfigError, naming, to_dict

Result = TypeVar("Result")


def new_parser(program: str, about: str | None) -> argparse.ArgumentParser:
    """Of a subcommand; ``about`` is told as it is written."""
    return argparse.ArgumentParser(program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def keys_of(config: Any, example: str) -> str:
    """Help for ``key=value`` settings of a config."""
    return f"of {', '.join(to_dict(config))} (as {example})"


def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    settings: str | None,
    measure: Callable[[argparse.Namespace], Result],
    least: Mapping[str, int] | None = None,
) -> tuple[Result, argparse.Namespace]:
    """Reads the command line and measures; returns what ``measure`` did, and the arguments.

    settings: help for the ``key=value`` that end the command line. least: of each option that counts something.
    A ValueError, which ConfigError is, ends the process with code 2, told in one line.
    """
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=settings)
    args = parser.parse_intermixed_args(arguments)
    try:
        _check(args, least or {})
        return measure(args), args
    except ValueError as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")


def _check(args: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Before anything is measured: raises ConfigError for an impossible number or a file that could not be written, and
    makes the folder for TensorBoard."""
    for name, value in least.items():
        if getattr(args, name) < value:
            raise ConfigError(f"--{name} is {getattr(args, name)}: it must be at least {value}")
    for name in ("json", "png", "trace"):
        if (path := getattr(args, name, None)) is not None:
            require_writable(f"--{name} {path}", path)
    if (chart := getattr(args, "png", None)) is not None:
        _require_format(chart)
    if (folder := getattr(args, "tensorboard", None)) is not None:
        if folder.is_file():
            raise ConfigError(f"--tensorboard {folder} is a file: name a folder")
        with naming(f"--tensorboard {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"--tensorboard {folder} cannot be written")


def require_writable(named: str, path: Path) -> None:
    """Raises ConfigError, which begins with ``named``, for a file that could not be written."""
    with naming(named):
        if not path.parent.is_dir():
            raise ConfigError(f"{named}: there is no folder {path.parent}")
        if path.is_dir():
            raise ConfigError(f"{named} is a folder: name a file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{named} cannot be written")


def _require_format(chart: Path) -> None:
    """Raises ConfigError where PIL cannot write a chart into a file of that name."""
    known = Image.registered_extensions()
    try:
        Image.new("RGB", (64, 64)).save(io.BytesIO(), known[chart.suffix.lower()])
    except (KeyError, OSError, ValueError):  # no suffix, no writer, or one that takes no colours or is not installed
        raise ConfigError(
            f"--png {chart}: a chart cannot be written as {chart.suffix or 'a file without suffix'}: name it .png"
        ) from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
