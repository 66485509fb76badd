"""Result files: where they go, and what may be said of several of them side by side."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smaug_ds.config import ConfigError

_NOT_PROTOCOL = ("checkpoint",)  # what two results are compared in spite of
_METRICS = (  # of the table, in this order, before whatever else a task reports
    *("t2v_r1", "t2v_r5", "t2v_r10", "median_rank", "mean_rank"),
    *("v2t_r1", "v2t_r5", "v2t_r10", "v2t_median_rank", "v2t_mean_rank"),
)
_COUNTS = ("n", "n_texts", "n_videos", "left_out")


def write_result(report: Mapping[str, Any], folder: Path, name: str, out: Path | None = None) -> Path:
    """Writes ``report`` as JSON, whole or not at all, to ``out`` or to ``folder/NAME-MARK.json``.

    MARK is a hash of protocol and weights, so a result of other conditions never takes the place of this one, and the
    same evaluation done again does.

    Args:
        report: with the ``protocol`` and the ``checkpoint``, see ``smaug_ds.evaluate.identity``.
    """
    path = out or folder / f"{_file_name(name)}-{_mark(report)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(f"{path}.{os.getpid()}.part")
    aside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    return path


def compare(paths: Sequence[Path]) -> str:
    """A table of the results in ``paths``, and in words what their protocols differ in.

    Raises ConfigError for a file that is no result.
    """
    results = [_read(path) for path in paths]
    names = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(results))]
    lines = [
        f"{name}  {path}\n   {_checkpoint(result)}" for name, path, result in zip(names, paths, results, strict=True)
    ]
    return "\n".join([*lines, "", *_table(names, results), "", *_differences(names, results)])


def protocol_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of a result as one flat dict of dotted names."""
    return {name: value for name, value in _flat(result["protocol"]).items() if name not in _NOT_PROTOCOL}


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:100]


def _mark(report: Mapping[str, Any]) -> str:
    marked = [protocol_of(report), report["checkpoint"]["weights_sha256"]]
    return hashlib.sha256(json.dumps(marked, sort_keys=True).encode()).hexdigest()[:8]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--compare {path}: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("retrieval"), dict):  # the summary of a run
        content = content["retrieval"]
    if not isinstance(content, dict) or not isinstance(content.get("protocol"), dict):
        raise ConfigError(f"--compare {path}: it holds no protocol, so it is no result of smaug_ds.evaluate")
    return content


def _checkpoint(result: Mapping[str, Any]) -> str:
    identity = result.get("checkpoint")
    if not isinstance(identity, dict):
        return f"{result['protocol'].get('checkpoint', 'an unnamed checkpoint')}; its weights are not on record"
    return f"{identity['run']}, step {identity['step']}, weights {identity['weights_sha256'][:12]}"


def _weights(result: Mapping[str, Any]) -> str | None:
    identity = result.get("checkpoint")
    return identity["weights_sha256"] if isinstance(identity, dict) else None


def _table(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [_figures(result) for result in results]
    every = list(dict.fromkeys(key for row in rows for key in row))
    ordered = [key for key in _METRICS if key in every] + [key for key in every if key not in (*_METRICS, *_COUNTS)]
    ordered += [key for key in _COUNTS if key in every]
    width = max((len(key) for key in ordered), default=0)
    lines = [" " * width + "".join(f"{name:>11}" for name in names)]
    for key in ordered:
        lines.append(f"{key:{width}}" + "".join(f"{_number(row.get(key)):>11}" for row in rows))
    return lines


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a result, those of its sections with dotted names; settings and conditions are none."""
    shown = {key: value for key, value in result.items() if key not in ("protocol", "checkpoint", "config")}
    return {
        key: value
        for key, value in _flat(shown).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _differences(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[str]:
    protocols = [protocol_of(result) for result in results]
    every = list(dict.fromkeys(key for protocol in protocols for key in protocol))
    lines = []
    for key in every:
        told = ["not stated" if key not in protocol else str(protocol[key]) for protocol in protocols]
        if len(set(told)) > 1:
            lines.append(f"  {key}: " + ", ".join(f"{name} {value}" for name, value in zip(names, told, strict=True)))
    weights = {_weights(result) for result in results}
    same = ["The weights are the same."] if len(weights) == 1 and None not in weights else []
    if not lines:
        return ["The protocols are the same.", *same]
    return ["The protocols differ, so the figures do not measure the same thing:", *lines, *same]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves
