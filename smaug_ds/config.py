"""Frozen config trees of nested dataclasses: defaults < YAML file < ``key=value``; unknown keys and types are fatal.

The type of a field decides how its text is read, so ``1e-4``, ``0.0001`` and ``"0.0001"`` are the same float, and
``run.folder=2026`` is a folder name. Every error is one line that names the full dotted key and where it came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that the user has to change; the message is one line and names the key."""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Turns what is wrong with a file or folder within into a ConfigError that names the setting it came from."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key}: {error}") from error


def parse(
    cls: type[T],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    base: Callable[[dict[str, Any]], T] | None = None,
    named_by: str = "--config",
) -> T:
    """Builds ``cls`` from its defaults, then the YAML file at ``path``, then ``key=value`` overrides, in that order.

    Overrides take dotted keys and YAML scalars or flow lists: ``model.vision.sparsify_layers=[2,3]``.
    ``named_by`` says in errors what ``path`` is.
    ``base`` makes what stands in place of the class's defaults, out of the values that were given, as nested dicts.
    A nested dataclass with a classmethod ``of_size(name)`` takes its defaults from there when ``size`` is set.

    Raises:
        ConfigError: unknown key (with near misses), wrong type, bad value, unreadable file, missing required key.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_section(cls, _load_file(Path(path), named_by), "", str(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"command line: expected key=value, found {override!r}")
        tree: Any = _load_override(key, text)
        for part in reversed(key.split(".")):
            tree = {part: tree}
        values = _merge(values, _read_section(cls, tree, "", "command line"))
    return _build(cls, values, "", None if base is None else base(values))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every entry point takes: ``--config FILE``, ``key=value ...`` and the launcher's ``--local_rank``."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with the settings that differ from the defaults")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, ready for YAML or JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def dump(config: Any, path: str | Path) -> None:
    """Writes the whole config as YAML; ``parse`` reads it back to an equal config."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False, width=120), encoding="utf-8")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


class _TextLoader(yaml.BaseLoader):
    """YAML whose scalars all stay text, and that refuses a key given twice, which YAML loaders let pass."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain names", key.start_mark)
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep=True)


def _load_file(path: Path, named_by: str) -> Any:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{named_by} {path}: {error.strerror}") from error
    return _load_yaml(text, f"{named_by} {path}")


def _load_override(key: str, text: str) -> Any:
    # Only what looks like a list, a mapping or a quoted text is YAML: paths and captions may hold ": " or " #".
    return _load_yaml(text, f"command line: {key}") if text[:1] in ("[", "{", '"', "'") else text


def _load_yaml(text: str | bytes, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_TextLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{source}: not valid YAML: {line}{problem}") from error


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(low.get(key), dict)
        merged[key] = _merge(low[key], value) if both else value
    return merged


def _read_section(cls: Any, tree: Any, prefix: str, source: str) -> dict[str, Any]:
    """Converts a tree of texts to the types of ``cls``; sections stay dicts, so that sources can be merged."""
    if tree is None or tree == "":  # a section whose lines are all commented out
        return {}
    if not isinstance(tree, dict):
        name = prefix.rstrip(".") or "the file"
        raise ConfigError(f"{source}: {name}: expected a section of keys, found {_found(tree)}")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        if name not in hints:
            raise ConfigError(f"{source}: unknown key {key}; {_near_misses(cls, prefix, name)}")
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _read_section(hints[name], value, key + ".", source)
        else:
            values[name] = _read_value(hints[name], value, key, source)
    return values


def _near_misses(cls: Any, prefix: str, name: str) -> str:
    siblings = [field.name for field in dataclasses.fields(cls)]
    close = [prefix + match for match in difflib.get_close_matches(name, siblings, n=3)]
    if not close and not prefix:  # a setting whose section was left out
        close = [key for key in _all_keys(cls, "") if key.rpartition(".")[2] == name]
    return f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(siblings)}"


def _all_keys(cls: Any, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def _read_value(hint: Any, value: Any, key: str, source: str) -> Any:
    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{source}: {key}: expected {expected}, found {_found(value)}")

    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value in ("null", "~", "", None):
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _read_value(hint, value, key, source)
    if origin is Literal:
        options = {str(option): option for option in arguments}
        if isinstance(value, str) and value in options:
            return options[value]
        close = difflib.get_close_matches(str(value), options, n=1)
        raise wrong(f"one of {', '.join(options)}" + (f" ({close[0]}?)" if close else ""))
    if origin is tuple:
        if not isinstance(value, list):
            raise wrong("a list such as [a, b]")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise wrong(f"a list of {len(arguments)} values")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if dataclasses.is_dataclass(kinds[0] if kinds else None):
            sections = [(f"{key}[{i}].", item) for i, item in enumerate(value)]
            return tuple(_build(kinds[0], _read_section(kinds[0], s, k, source), k, None) for k, s in sections)
        items = enumerate(zip(kinds, value, strict=True))
        return tuple(_read_value(kind, item, f"{key}[{i}]", source) for i, (kind, item) in items)
    if not isinstance(value, str):
        raise wrong(_EXPECTED[hint])
    if hint is str:
        return value
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise wrong(_EXPECTED[bool])
        return value.lower() == "true"
    try:
        number = hint(value)
    except ValueError:
        raise wrong(_EXPECTED[hint]) from None
    if not math.isfinite(number):
        raise wrong(_EXPECTED[hint])
    return number


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _found(value: Any) -> str:
    kind = "a section " if isinstance(value, dict) else "a list " if isinstance(value, list) else ""
    return f"{kind}{value!r}"


def _build(cls: Any, values: dict[str, Any], prefix: str, base: Any) -> Any:
    """An instance of ``cls`` with ``values``, the rest taken from ``base`` or the class's defaults."""
    try:
        if "size" in values and hasattr(cls, "of_size"):
            base = cls.of_size(values["size"])
        hints = get_type_hints(cls)
        arguments: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]):
                section = values.get(field.name, {})
                default = None if base is None else getattr(base, field.name)
                arguments[field.name] = _build(hints[field.name], section, f"{prefix}{field.name}.", default)
            elif field.name in values:
                arguments[field.name] = values[field.name]
            elif base is not None:
                arguments[field.name] = getattr(base, field.name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{prefix}{field.name} has no default: set it in the file or on the command line")
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:  # what a section's own checks raise names its key already
        raise ConfigError(str(error)) from error
