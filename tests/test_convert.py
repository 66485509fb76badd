"""Published layouts -> a checkpoint to start from, through the tool."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, CLIPVisionConfig, CLIPVisionModel

from smaug_ds.engine import checkpoint
from smaug_ds.model.smaug import SmaugModel
from tests.models import small_config
from tools.convert_checkpoint import import_weights

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path]:
    """Folders as Hugging Face writes them, of the sizes of ``small_config``; BERT with the oldest names of norms."""
    vision, text = small_config().vision, small_config().text
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.depth,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=77,
            hidden_size=text.width,
            num_hidden_layers=text.text_layers + text.fusion_layers,
            num_attention_heads=text.heads,
            intermediate_size=text.mlp_width,
            max_position_embeddings=text.max_positions,
        )
    )
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.clone()
        for key, value in bert.state_dict().items()
    }
    (tmp_path / "bert").mkdir()
    save_file(old, tmp_path / "bert" / "model.safetensors")
    return tmp_path / "clip", tmp_path / "bert"


def test_imported_weights_initialise_a_model(published: tuple[Path, Path], tmp_path: Path) -> None:
    clip, bert = published
    weights, config = import_weights(clip, bert, dataclasses.replace(small_config()))
    assert config.text.vocab_size == 77
    model = SmaugModel(config)
    told = checkpoint.initialise(model, weights)
    assert "unused: none" in told
    own = model.state_dict()
    source = load_file(bert / "model.safetensors")
    key = "bert.encoder.layer.2.output.LayerNorm.gamma"
    assert torch.equal(own["fusion.layers.0.mlp_norm.weight"], source[key])
    missing = {name.rsplit(".", 1)[0] for name in own.keys() - weights.keys()}
    assert not any(name.startswith(("vision.", "text.")) for name in missing)
    assert all("cross_attention" in name for name in missing if name.startswith("fusion."))


def test_tool_lists_what_it_does_not_use(published: tuple[Path, Path], tmp_path: Path) -> None:
    clip, _ = published
    vision = (
        "vision={image_size: 32, patch_size: 8, width: 32, depth: 3, heads: 4, mlp_width: 64, sparsify_layers: [1]}"
    )
    arguments = ["import", "--clip", str(clip), "--out", str(tmp_path / "out"), f"model.{vision}"]
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert "not used: none" in done.stdout
    assert checkpoint.load_weights(tmp_path / "out").keys() == import_weights(clip, None, small_config())[0].keys()
    wrong = subprocess.run(
        [*command, "import", "--clip", str(clip), "--out", str(tmp_path / "no")], capture_output=True, text=True
    )
    assert wrong.returncode != 0 and "has shape" in wrong.stderr and "Traceback" not in wrong.stderr


def test_unused_weights_are_named(published: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    import_weights(None, published[1], small_config())
    assert "cls.predictions.transform.dense.weight" in capsys.readouterr().out
