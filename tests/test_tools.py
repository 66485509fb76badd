"""The small tools on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_model_profile_counts_what_the_docs_say(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/profile_throughput.py",
        "model",
        "--size",
        "base",
        "--json",
        str(tmp_path / "f.json"),
    ]
    done = subprocess.run([*command, "model.frames=4", "model.frames_kept=2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "99 -> 81 -> 66 -> 54" in done.stdout
    figures = json.loads((tmp_path / "f.json").read_text())
    documented = (ROOT / "docs" / "model.md").read_text()
    assert f"{sum(figures['parameters'].values()):,}" in documented
    assert f"{sum(figures['forward_flops'].values()) / 1e9:.3f}" in documented
