"""What the subcommands share of their command line: settings, checks, and mistakes told in one line."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from smaug_ds.config import ConfigError, to_dict

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
    A ConfigError ends the process with code 2, told in one line.
    """
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=settings)
    args = parser.parse_intermixed_args(arguments)
    try:
        _check(args, least or {})
        return measure(args), args
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


def _check(args: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Raises ConfigError for an impossible number or a file that could not be written, before anything is measured."""
    for name, value in least.items():
        if getattr(args, name) < value:
            raise ConfigError(f"--{name} is {getattr(args, name)}: it must be at least {value}")
    for name in ("json", "png", "trace"):
        path = getattr(args, name, None)
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise ConfigError(f"--{name} {path} is a folder: name a file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"--{name} {path} cannot be written")
    folder = getattr(args, "tensorboard", None)
    if folder is not None and folder.is_file():
        raise ConfigError(f"--tensorboard {folder} is a file: name a folder")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
