"""Published layouts -> a start for a run: equal outputs, everything unused named, nothing run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, CLIPVisionConfig, CLIPVisionModel

from smaug_ds import convert
from smaug_ds.engine import checkpoint
from smaug_ds.model.positions import resize_space, resize_time
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.model.vision import VisionConfig, VisionEncoder, normalise_pixels, patchify
from tests import published
from tests.models import small_config
from tools.convert_checkpoint import import_weights, main, read_weights

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5


def shaken(model: nn.Module) -> Any:
    """No weight is left at a value, such as 0 or 1, that would hide it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def hugging_face_clip() -> Any:
    vision = small_config().vision
    return shaken(
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=vision.width,
                intermediate_size=vision.mlp_width,
                num_hidden_layers=vision.depth,
                num_attention_heads=vision.heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
            )
        )
    )


def hugging_face_bert() -> Any:
    text = small_config().text
    return shaken(
        BertForMaskedLM(
            BertConfig(
                vocab_size=77,
                hidden_size=text.width,
                num_hidden_layers=text.text_layers + text.fusion_layers,
                num_attention_heads=text.heads,
                intermediate_size=text.mlp_width,
                max_position_embeddings=text.max_positions,
            )
        )
    )


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """CLIP and BERT as Hugging Face writes them; BERT with the oldest names of norms."""
    hugging_face_clip().save_pretrained(tmp_path / "clip")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.clone()
        for key, value in hugging_face_bert().state_dict().items()
        if key != "cls.predictions.decoder.weight"
    }
    (tmp_path / "bert").mkdir()
    save_file(old, tmp_path / "bert" / "model.safetensors")
    return tmp_path / "clip", tmp_path / "bert"


def test_imported_weights_initialise_a_model(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    clip, bert = folders
    weights, config = import_weights({"clip": clip, "bert": bert}, small_config())
    assert config.text.vocab_size == 77
    model = SmaugModel(config)
    assert "unused: none" in checkpoint.initialise(model, weights)
    own, source = model.state_dict(), load_file(bert / "model.safetensors")
    assert torch.equal(own["fusion.layers.0.mlp_norm.weight"], source["bert.encoder.layer.2.output.LayerNorm.gamma"])
    assert torch.equal(own["word_head.transform.weight"], source["cls.predictions.transform.dense.weight"])
    missing = own.keys() - weights.keys()
    assert not any(name.startswith(("vision.", "text.", "word_head.")) for name in missing)
    assert all("cross_attention" in name for name in missing if name.startswith("fusion."))
    told = capsys.readouterr().out
    assert all(name in told.partition("starts at random: ")[2].split("\n")[0].split(", ") for name in missing)


def encode(
    weights: dict[str, Tensor], config: VisionConfig, pixels: Tensor, encoder: VisionEncoder | None = None
) -> Tensor:
    encoder = encoder or VisionEncoder(config)
    encoder.load_state_dict(weights)
    return encoder.eval()(patchify(pixels[:, None], config.patch_size), None).tokens[:, 0]


@pytest.fixture
def dense() -> VisionConfig:
    """The small encoder without sparsification, so that it computes what the published ones do."""
    return dataclasses.replace(small_config().vision, keep_rate=1.0, mask_ratio=0.0)


@pytest.fixture
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return normalise_pixels(torch.randint(0, 256, (2, 3, 32, 32), generator=generator).to(torch.uint8))


@torch.no_grad()
@pytest.mark.parametrize("wrapper", ["bare", "jit-less training checkpoint"])
def test_openai_and_open_clip_layout(dense: VisionConfig, pixels: Tensor, tmp_path: Path, wrapper: str) -> None:
    clip = hugging_face_clip()
    state: Any = published.openai_clip(clip.state_dict())
    if wrapper != "bare":
        state = {"epoch": 3, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(state, tmp_path / "clip.pt")
    weights, unused = convert.clip_vision(read_weights(tmp_path / "clip.pt"))
    assert unused == ["logit_scale", "token_embedding.weight", "visual.proj"]
    expected = clip.post_layernorm(clip(pixels).last_hidden_state)
    assert (encode(weights, dense, pixels) - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_timm_layout(dense: VisionConfig, pixels: Tensor) -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": dense.width, "depth": dense.depth, "num_heads": dense.heads}
    model = shaken(timm.create_model("vit_base_patch16_clip_quickgelu_224", mlp_ratio=2, **small))
    weights, unused = convert.clip_vision(model.state_dict())
    assert unused == ["head.bias", "head.weight"]
    assert (encode(weights, dense, pixels) - model.forward_features(pixels)).abs().max() < TOLERANCE


def tiny_singularity(make: published.Make = torch.randn, **changes: int) -> dict[str, Tensor]:
    """A Singularity checkpoint of the sizes of ``small_config(4, 2)``."""
    sizes = {
        "width": 32, "mlp": 64, "heads": 4, "vision_layers": 3, "text_layers": 2, "fusion_layers": 1, "words": 77,
        "positions": 64, "side": 4, "patch": 8, "projection": 16,
    }  # fmt: skip
    return published.singularity(make, **{**sizes, **changes})


def test_published_singularity_shapes_fill_the_base_model() -> None:
    """Full size, without memory: everything has a place, or is named."""
    source = published.singularity(lambda shape: torch.empty(shape, device="meta"))
    base = ModelConfig(frames=4, frames_kept=4)
    weights, pooling, unused = convert.singularity(source, base.text.text_layers, base.frames, base.vision.heads)
    vision = dataclasses.replace(base.vision, layout="beit", pooling=pooling)
    text = dataclasses.replace(base.text, vocab_size=30522)
    with torch.device("meta"):
        own = SmaugModel(dataclasses.replace(base, vision=vision, text=text)).state_dict()
    assert all(own[key].shape == value.shape for key, value in weights.items())
    missing = {key.partition(".")[0] for key in own.keys() - weights.keys()}
    assert missing == {"pixel_decoder", "temporal", "logit_bias"}
    known = ("relative_position_index", "position_ids", "temporal_vision_encoder.")
    assert all(any(name in key for name in known) for key in unused)
    assert len(unused) == 12 + 1 + 2 * 16


def test_singularity_file_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = types.ModuleType("omegaconf.dictconfig")

    class DictConfig:
        def __init__(self) -> None:
            self.content = {"epochs": 10}

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    settings.DictConfig = DictConfig  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, "omegaconf.dictconfig", settings)
        source = tiny_singularity()
        saved = {"model": source, "optimizer": {"state": {}}, "config": DictConfig(), "epoch": 9}
        torch.save(saved, tmp_path / "ckpt_09.pth")
    weights, config = import_weights({"singularity": tmp_path / "ckpt_09.pth"}, small_config(6, 2))
    told = capsys.readouterr().out
    assert "temporal_vision_encoder.layer.0.attention.self.query.weight" in told
    assert "temporal.position_embedding: 4 places interpolated to 6" in told
    assert torch.equal(weights["match_head.weight"], source["itm_head.weight"])
    assert torch.allclose(weights["logit_scale"].exp(), 1 / source["temp"])
    cross = source["text_encoder.bert.encoder.layer.2.crossattention.self.value.weight"]
    assert torch.equal(weights["fusion.layers.0.cross_attention.key_value.weight"][32:], cross)
    assert "unused: none" in checkpoint.initialise(SmaugModel(config), weights)


def test_one_frame_leaves_temporal_embeddings_out() -> None:
    weights, _, unused = convert.singularity(tiny_singularity(), 2, frames=1, heads=4)
    assert "temporal_embeddings" in unused and "temporal.position_embedding" not in weights


def test_an_untied_word_head_is_named() -> None:
    source = tiny_singularity()
    source["text_encoder.cls.predictions.decoder.weight"] = torch.randn(77, 32)
    assert "text_encoder.cls.predictions.decoder.weight" in convert.singularity(source, 2, 1, 4)[2]


def test_retrieval_checkpoints_of_singularity_lack_the_word_head() -> None:
    source = {key.replace("bert.", ""): value for key, value in tiny_singularity().items() if ".cls." not in key}
    weights, _, _ = convert.singularity(source, 2, 1, 4)
    assert "fusion.layers.0.cross_attention.query.weight" in weights and "word_head.bias" not in weights


def test_positions_are_resized_in_space_and_time() -> None:
    grid = torch.randn(1 + 9, 5)
    assert torch.equal(resize_space(grid, 9), grid)
    larger = resize_space(grid, 36)
    assert larger.shape == (37, 5) and torch.equal(larger[0], grid[0])
    picture = grid[1:].T.reshape(1, 5, 3, 3)
    expected = F.interpolate(picture, size=(6, 6), mode="bicubic").reshape(5, 36).T
    assert torch.allclose(larger[1:], expected)
    ramp = torch.arange(4.0)[:, None].expand(4, 2)
    assert resize_time(ramp, 8)[:, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert torch.equal(resize_time(ramp[:1], 3), ramp[:1].expand(3, 2))
    with pytest.raises(ValueError, match="8 patches make no square"):
        resize_space(grid[:9], 9)


def test_import_interpolates_to_another_picture_size(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config()
    larger = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=64))
    weights, _ = import_weights({"clip": folders[0]}, larger)
    assert weights["vision.position_embedding"].shape == (65, 32)
    assert "17 places interpolated to 65" in capsys.readouterr().out


VISION = (
    "model.vision={image_size: 32, patch_size: 8, width: 32, depth: 3, heads: 4, mlp_width: 64, sparsify_layers: [1]}"
)


def test_tool_writes_a_start_and_refuses_what_does_not_fit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    clip, _ = folders
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "import", "--clip", str(clip), "--out"]
    done = subprocess.run([*command, str(tmp_path / "out"), VISION], capture_output=True, text=True, check=True)
    assert "not used: none" in done.stdout and "starts at random: logit_scale, " in done.stdout
    assert checkpoint.load_weights(tmp_path / "out").keys() == import_weights({"clip": clip}, small_config())[0].keys()
    wrong = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert "vision.class_token has shape [32], but the model needs [768]" in wrong.stderr
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".writing-*"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def truncated(path: Path) -> None:
    torch.save(published.openai_clip(hugging_face_clip().state_dict()), path)
    path.write_bytes(path.read_bytes()[:-1000])


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


BAD: dict[str, tuple[Any, str]] = {
    "code": (
        lambda path: torch.save({"state_dict": Evil()}, path),
        r"asks for (os|posix)\.system .* nothing of it was run",
    ),
    "other class": (lambda path: torch.save({"a": json.JSONEncoder()}, path), r"asks for json\.encoder\.JSONEncoder"),
    "truncated": (truncated, "cannot be read"),
    "script": (scripted, r"is a TorchScript archive, which holds code.*torch\.jit\.load"),
    "no weights": (lambda path: torch.save([1, 2], path), "holds no state dict"),
    "other model": (lambda path: torch.save({"fc.weight": torch.ones(2)}, path), "not weights of a CLIP vision"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bad_files_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = BAD[case]
    make(tmp_path / "bad.pt")
    with pytest.raises(SystemExit, match="2"):
        main(["import", "--clip", "bad.pt", "--out", "out"])
    assert re.search(f"(?s)^error: .*{message}", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def test_mistakes_are_told(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "nothing to import: give --clip, --beit, --bert, --singularity"),
        (["--clip", "nowhere"], "nowhere is no file and holds none of model.safetensors, pytorch_model.bin"),
        (["--bert", str(folders[0])], "the weights have no embeddings.LayerNorm.weight"),
        (["--clip", str(folders[0]), "model.vision.dept=3"], "unknown key model.vision.dept"),
        (
            ["--clip", str(folders[0]), VISION.replace("depth: 3", "depth: 2")],
            "the model has no place for vision.layers.2",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["import", "--out", str(tmp_path / "out"), *arguments])
        assert re.search(f"error: .*{message}", capsys.readouterr().err)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["import", "--clip", str(folders[0]), "--out", str(tmp_path / "out"), VISION])
    assert "exists already" in capsys.readouterr().err
