"""Who may import whom, read from the imports themselves, and what ``import smaug_ds`` may not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smaug_ds"
ENTRY_POINTS = {"pretrain", "finetune", "evaluate", "preflight"}  # which reads the command lines of the others
# Part -> parts it may import. config is a leaf that everything but the model may import.
ALLOWED = {
    "entry": {"engine", "evaluation", "data", "convert", "planner", "config", "text", "model", "losses", "distributed"},
    "engine": {"model", "losses", "data", "evaluation", "distributed", "config", "text", "exchange"},
    "evaluation": {"model", "data", "text", "distributed", "config"},
    "data": {"text", "distributed", "config", "progress"},
    "losses": {"distributed", "config"},
    "model": set(),
    "text": {"config"},
    "distributed": {"config"},
    "convert": {"model", "config"},
    "exchange": {"engine", "model", "config", "text"},
    "encoders": {"model", "data", "text"},
    "planner": {"model", "losses", "data", "config"},
    "config": set(),
    "progress": set(),
}
MODEL_PACKAGES = {"torch", "einops", "timm", "transformers", "safetensors", "huggingface_hub"}
ONLY_IN = {"nvidia": "data/dali.py", "deepspeed": "engine/deepspeed.py", "huggingface_hub": "model/pretrained.py"}


def imports(path: Path) -> set[str]:
    """Dotted names of everything that ``path`` imports, at whatever depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    name = inside.parts[0].removesuffix(".py")
    return "entry" if name in ENTRY_POINTS else name


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_walls_hold(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{path.name} belongs to no part of the house"
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "smaug_ds" and rest:
            other = "entry" if rest[0] in ENTRY_POINTS else rest[0]
            assert other == part or other in ALLOWED[part], f"{part} must not import {name}"
        elif part == "model":
            assert package in MODEL_PACKAGES or package in sys.stdlib_module_names, f"the model must not import {name}"
        if package in ONLY_IN:
            assert path == PACKAGE / ONLY_IN[package], f"only {ONLY_IN[package]} may import {name}"


def test_package_imports_without_decoder_engine_and_gpu() -> None:
    """The parts that users import on a laptop load with DALI and DeepSpeed absent."""
    script = (
        "import sys\n"
        "sys.modules.update({'nvidia.dali': None, 'deepspeed': None})\n"
        "import smaug_ds, smaug_ds.model.smaug, smaug_ds.losses, smaug_ds.text, smaug_ds.convert\n"
        "import smaug_ds.encoders, smaug_ds.exchange.export\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
