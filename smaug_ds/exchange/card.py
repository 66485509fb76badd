"""The model card of an exported folder: what it is, how it came about, how it was evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smaug_ds.model.smaug import ModelConfig


def model_card(state: Mapping[str, Any], config: ModelConfig, weights: int, checkpoint: Path) -> str:
    """Markdown with Hugging Face's front matter.

    Args:
        state: of the checkpoint, with the run's settings.
        weights: numbers in all tensors.
        checkpoint: its folder, beside whose run the evaluation is looked for.
    """
    sections = [_FRONT, _architecture(config, weights), _training(state), _evaluation(checkpoint), _USE]
    return "\n".join(sections)


_FRONT = """---
library_name: smaug-ds
tags: [video-text-retrieval, masked-autoencoder]
---

# SMAUG

Video-language model (sparse masked autoencoder, arXiv 2211.11446), trained with SMAUG-DS. No licence has been chosen
for these weights yet: state one here before they are handed on.
"""
_USE = """## Use

    from smaug_ds.encoders import SmaugEncoders
    encoders = SmaugEncoders.from_pretrained("FOLDER")
    scores = encoders.encode_text(["a red ball rolls"]) @ encoders.encode_video(["clip.mp4"]).T

The whole model, with the multi-modal encoder: `SmaugModel.from_pretrained("FOLDER")`.
"""


def _architecture(config: ModelConfig, weights: int) -> str:
    vision, text = config.vision, config.text
    sparse = f"keep rate {vision.keep_rate} in layers {list(vision.sparsify_layers)}"
    rows = {
        "weights": f"{weights:,}, fp32",
        "frames": f"{config.frames}, of which the multi-modal encoder sees {config.frames_kept}",
        "pictures": f"{vision.image_size} x {vision.image_size}, patches of {vision.patch_size}",
        "vision encoder": f"{vision.depth} layers, {vision.width} wide, mask ratio {vision.mask_ratio}, {sparse}"
        + ("" if vision.sparsify_at_inference else " (training only)"),
        "text encoder": f"{text.text_layers} layers, {text.width} wide, {text.vocab_size} words",
        "multi-modal encoder": f"{text.fusion_layers} layers",
        "embeddings": f"{config.projection} numbers of unit length",
    }
    return "## Architecture\n\n" + _table(rows)


def _training(state: Mapping[str, Any]) -> str:
    settings = state["config"]
    data, optim, batch = settings.get("data", {}), settings.get("optim", {}), settings.get("batch", {})
    rows = {
        "steps": state["step"],
        "pairs a step": batch.get("global_size"),
        "ranks": state.get("world_size"),
        "data": data.get("corpus") or ", ".join(data.get("train", ())),
        "started from": settings.get("run", {}).get("init_from") or "random weights",
        "learning rate": f"{optim.get('lr')} to {optim.get('min_lr')}, weight decay {optim.get('weight_decay')}",
        "losses": ", ".join(f"{name} {value}" for name, value in settings.get("loss", {}).items()),
        "code": f"smaug-ds {state.get('version')} ({state.get('commit')}), torch {state.get('torch')}",
    }
    return "## Training\n\n" + _table(rows)


def _evaluation(checkpoint: Path) -> str:
    """The last result that lies in the run's folder, with its protocol: a figure without it says nothing."""
    found = _last_result(checkpoint.parent.parent)
    if not found:
        return "## Evaluation\n\nNone was found in the run's folder.\n"
    figures = {key: value for key, value in found.items() if isinstance(value, (int, float))}
    protocol = {f"protocol: {key}": value for key, value in found["protocol"].items()}
    return "## Evaluation\n\nText-video retrieval; recalls in percent, ranks from 1.\n\n" + _table(figures | protocol)


def _last_result(run: Path) -> dict[str, Any] | None:
    files = [path for path in (run / "summary.json", *run.glob("evaluation/retrieval-*.json")) if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        content = json.loads(path.read_text(encoding="utf-8"))
        result = content.get("retrieval", {}) if path.name == "summary.json" else content
        if "protocol" in result:
            return result
    return None


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())]) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
