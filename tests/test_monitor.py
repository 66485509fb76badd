"""The lines of metrics.jsonl: always JSON, and none twice or lost when a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from smaug_ds.engine.monitor import Monitor, truncate_lines


def test_a_figure_that_is_not_finite_is_null(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, torch.device("cpu"), total_steps=2, global_batch=1)
    for step, loss in enumerate((float("nan"), 2.0), start=1):
        monitor.meters.add("video", {"loss": torch.tensor(loss)})
        monitor.log(step, {"lr": 0.1, "gradient_norm": float("inf")})
    monitor.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(text, parse_constant=refuse) for text in texts)
    assert (first["loss/video"], first["gradient_norm"], second["loss/video"]) == (None, None, 2.0)
    assert monitor.summary()["losses_first"] == {}
    again = Monitor(tmp_path, torch.device("cpu"), total_steps=2, global_batch=1, first_step=2)
    again.close()
    assert again.summary()["losses_last"] == {"loss": 2.0}


def test_lines_beyond_a_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert truncate_lines(path, 3) == [] and not path.exists()
    path.write_text('{"step": 1}\n{"step": 3, "é": "ü"}\n{"step": 4}\n{"step": 2}\n')
    assert truncate_lines(path, 3) == [{"step": 1}, {"step": 3, "é": "ü"}]
    assert path.read_text() == '{"step": 1}\n{"step": 3, "é": "ü"}\n'
    path.write_text('{"step": 1}\n{"step": 2, "lo')  # killed while writing
    assert truncate_lines(path, 3) == [{"step": 1}]
    assert path.read_text() == '{"step": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("half", [b'{"step": 2, "lo', '{"step": 2, "é'.encode()[:-1], b"\0\0\0\0"])
def test_half_a_line_drops_nothing_else(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    first, later = '{"step": 1, "text": "a\u2028b\u0085c"}\n'.encode(), b'{"step": 3}\n'
    path.write_bytes(first + half + b"\n" + later + half)
    assert truncate_lines(path, 3) == [{"step": 1, "text": "a\u2028b\u0085c"}, {"step": 3}]
    assert path.read_bytes() == first + later


def test_a_run_killed_while_it_drops_lines_has_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 4}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        truncate_lines(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'
