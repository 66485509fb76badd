"""BEiT, ViT and DeiT as the vision encoder: whole, and equal to a slow version of what masks and fused tokens add."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BeitConfig, BeitModel, ViTConfig, ViTModel

from smaug_ds.engine import checkpoint
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.engine.optim import parameter_groups
from smaug_ds.engine.trained import require_vision
from smaug_ds.losses import LossConfig
from smaug_ds.model.beit import BeitAttention, BeitEncoder, relative_index, relative_places
from smaug_ds.model.positions import resize_bias
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.model.vision import VisionConfig, normalise_pixels, patchify
from tests.models import random_batch, small_config, small_model
from tests.test_convert import shaken, tiny_singularity
from tools.convert_checkpoint import import_weights

TOLERANCE = 1e-5


def beit_config(frames: int = 1, frames_kept: int = 1, **vision: Any) -> ModelConfig:
    return small_config(frames, frames_kept, layout="beit", **vision)


def hugging_face(kind: str, vision: VisionConfig) -> Any:
    """A model with random weights: BEiT pooled by mean or class token, with one table for all layers, or ViT."""
    sizes: dict[str, Any] = {
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    if kind == "vit":
        return shaken(ViTModel(ViTConfig(**sizes)))
    bias = {"use_relative_position_bias": kind != "shared", "use_shared_relative_position_bias": kind == "shared"}
    return shaken(BeitModel(BeitConfig(**sizes, **bias, use_mean_pooling=kind == "mean")))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mean", "class", "shared", "vit"])
@pytest.mark.parametrize("told", [False, True])
def test_imported_weights_compute_what_their_model_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, told: bool
) -> None:
    dense = small_config(keep_rate=1.0, mask_ratio=0.0)
    theirs = hugging_face(kind, dense.vision)
    theirs.save_pretrained(tmp_path)
    mean, std = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]) if told else ([0.5] * 3, [0.5] * 3)
    if told:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    weights, config = import_weights({"beit": tmp_path}, dense)
    assert (config.vision.layout, config.vision.pooling) == ("beit", "mean" if kind == "mean" else "class")
    unused = "pooler.dense.bias, pooler.dense.weight" if kind == "vit" else "none"
    assert f"not used: {unused}\n" in capsys.readouterr().out
    encoder = BeitEncoder(config.vision).eval()
    own = {key.removeprefix("vision."): value for key, value in weights.items()}
    encoder.load_state_dict(own)

    picture = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    normal = (picture.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = theirs(normal)
    tokens = encoder(patchify(normalise_pixels(picture)[:, None], 8), None).tokens[:, 0]
    if kind == "mean":  # BEiT leaves its tokens without a norm
        assert (tokens[:, 0] - expected.pooler_output).abs().max() < TOLERANCE
        normed = theirs.pooler.layernorm(expected.last_hidden_state)
        assert (tokens[:, 1:] - normed[:, 1:]).abs().max() < TOLERANCE
    else:
        assert (tokens - expected.last_hidden_state).abs().max() < TOLERANCE


def attend_slowly(layer: BeitAttention, x: Tensor, ids: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """One query and key at a time. ``x`` (B, L, D), ``ids`` (B, L - 1)."""
    batch, length, width = x.shape
    each = width // layer.heads
    table = layer.position_bias
    rows, means = [], []
    for b in range(batch):
        q, k, v = layer.qkv(x[b]).split(width, dim=1)
        place: list[int | None] = [None, *(int(i) if i < side * side else None for i in ids[b])]
        heads, attentions = [], []
        for h in range(layer.heads):
            part = slice(h * each, (h + 1) * each)
            scores = []
            for i, one in enumerate(place):
                for j, other in enumerate(place):
                    if one is None or other is None:
                        entry = len(table) - (1 if one is other else 3 if one is None else 2)
                    else:
                        down, right = one // side - other // side, one % side - other % side
                        entry = (down + side - 1) * (2 * side - 1) + right + side - 1
                    scores.append(q[i, part] @ k[j, part] / each**0.5 + table[entry, h])
            attention = torch.stack(scores).view(length, length).softmax(dim=1)
            heads.append(attention @ v[:, part])
            attentions.append(attention[0, 1:])
        rows.append(layer.out(torch.cat(heads, dim=1)))
        means.append(torch.stack(attentions).mean(dim=0))
    return torch.stack(rows), torch.stack(means)


def test_attention_among_some_patches_and_a_fused_token_equals_the_slow_one() -> None:
    torch.manual_seed(0)
    layer = BeitAttention(16, 2, patches=16)
    with torch.no_grad():
        layer.position_bias.normal_()
    ids = torch.tensor([[0, 3, 7, 14, 16], [5, 6, 9, 15, 16]])  # 16 stands for a fused token
    x = torch.randn(2, 6, 16, requires_grad=True)
    found: list[list[Tensor]] = []
    for tokens, attention in (layer.attend(x, ids), attend_slowly(layer, x, ids, 4)):
        weights = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)
        loss = (tokens * weights).sum() + (attention * torch.arange(5.0)).sum()
        gradients = torch.autograd.grad(loss, [x, *layer.parameters()])
        found.append([tokens.detach(), attention.detach(), *gradients])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_relative_places_are_those_of_beit() -> None:
    theirs = BeitModel(BeitConfig(image_size=32, patch_size=8, use_relative_position_bias=True, num_hidden_layers=1))
    bias = next(module for module in theirs.modules() if hasattr(module, "generate_relative_position_index"))
    expected = bias.generate_relative_position_index((4, 4))  # class token first, ours last
    ours = relative_index(16)
    order = [17, *range(16)]
    assert torch.equal(ours[order][:, order], expected)
    assert relative_places(16) == len(bias.relative_position_bias_table) == 52
    assert torch.equal(ours[16, :16], ours[17, :16]) and torch.equal(ours[:16, 16], ours[:16, 17])


def test_a_table_grows_to_a_larger_grid() -> None:
    side, ends = 5, torch.tensor([[7.0], [8.0], [9.0]])
    down, right = torch.meshgrid(torch.arange(5.0) - 2, torch.arange(5.0) - 2, indexing="ij")
    table = torch.cat([(3 * down + right).view(-1, 1), ends])
    assert torch.equal(resize_bias(table, 9), table)
    larger = resize_bias(table, 36)
    assert larger.shape == (11 * 11 + 3, 1) and torch.equal(larger[-3:], ends)
    grid = larger[:-3].view(11, 11)
    assert grid[5, 5].abs() < 1e-5, "no distance stays no distance"
    torch.testing.assert_close(grid[[0, 0, -1, -1], [0, -1, 0, -1]], torch.tensor([-8.0, -4.0, 4.0, 8.0]))
    torch.testing.assert_close(grid, -grid.flip(0, 1), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="27 relative places belong to no square grid"):
        resize_bias(torch.zeros(27, 1), 16)
    assert side == 2 * 3 - 1


def test_import_interpolates_to_another_picture_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hugging_face("mean", small_config().vision).save_pretrained(tmp_path)
    weights, config = import_weights({"beit": tmp_path}, small_config(image_size=64))
    assert weights["vision.layers.2.attention.position_bias"].shape == (15 * 15 + 3, 4)
    assert "52 places interpolated to 228" in capsys.readouterr().out
    assert "unused: none" in checkpoint.initialise(SmaugModel(with_words(config)), weights)


def with_words(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=50))


@torch.no_grad()
def test_singularity_sees_a_frame_as_it_did() -> None:
    """Its ``_encode_image``: one norm for BEiT's tokens, the pooler's for their mean."""
    theirs = hugging_face("mean", small_config().vision)
    source = tiny_singularity()
    source = {key: value for key, value in source.items() if not key.startswith("vision_encoder.")}
    encoder = {f"vision_encoder.{key}": value for key, value in named_as_saved(theirs).items()}
    weights, config = import_weights_of({**source, **encoder}, small_config(keep_rate=1.0, mask_ratio=0.0))
    model = SmaugModel(config)
    checkpoint.initialise(model, weights)
    model.eval()
    picture = torch.randint(0, 256, (2, 1, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    output = theirs((picture[:, 0].float() / 255 - 0.5) / 0.5)
    norm = torch.nn.LayerNorm(32, eps=1e-12)
    norm.load_state_dict({part: source[f"vision_layernorm.{part}"] for part in ("weight", "bias")})
    embedding = torch.nn.functional.linear(
        output.pooler_output, source["vision_proj.weight"], source["vision_proj.bias"]
    )
    visual = model.encode_frames(picture)
    assert (visual.embedding - torch.nn.functional.normalize(embedding, dim=-1)).abs().max() < TOLERANCE
    assert (visual.tokens[:, 0, 1:] - norm(output.last_hidden_state)[:, 1:]).abs().max() < TOLERANCE


def named_as_saved(model: Any) -> dict[str, Tensor]:
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def import_weights_of(source: dict[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({"model": source}, file.name)
        return import_weights({"singularity": file.name}, config)


@pytest.mark.parametrize("pooling", ["class", "mean"])
@pytest.mark.parametrize("every", [0, 1])
def test_a_whole_model_trains_on_it(pooling: str, every: int, tmp_path: Path) -> None:
    config = beit_config(3, 2, pooling=pooling, checkpoint_every=every)
    model = small_model(config)
    losses = Pretraining(model, LossConfig())(random_batch(config, 4))
    losses["loss"].backward()
    without = {name for name, parameter in model.vision.named_parameters() if parameter.grad is None}
    assert not without
    for name in ("layers.0.attention.position_bias", "layers.2.mlp_scale"):
        assert model.vision.get_parameter(name).grad.abs().max() > 0, name  # type: ignore[union-attr]
    decayed = {id(parameter) for parameter in parameter_groups(model, 0.02)[0]["params"]}
    assert not any(id(p) in decayed for n, p in model.named_parameters() if n.endswith(("position_bias", "_scale")))
    model.save_pretrained(tmp_path)
    again = SmaugModel.from_pretrained(tmp_path)
    assert again.config == config
    frames = random_batch(config, 2).frames
    assert torch.equal(model.eval().encode_frames(frames).embedding, again.encode_frames(frames).embedding)


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vision\.pooling is mean, but model\.vision\.layout clip"):
        VisionConfig(pooling="mean")
    theirs = hugging_face("mean", small_config().vision)
    weights = {k: v for k, v in named_as_saved(theirs).items() if "relative" not in k}
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="neither positions nor relative places"):
        import_weights({"beit": tmp_path / "weights.pt"}, small_config())
    theirs.save_pretrained(tmp_path / "beit")
    (tmp_path / "beit" / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: image_mean is \[0\.5\]"):
        import_weights({"beit": tmp_path / "beit"}, small_config())
    small_model().save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["vision"]["layout"] = "resnet"
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"vision\.layout is 'resnet', which is none of clip, beit"):
        SmaugModel.from_pretrained(tmp_path / "ours")


def test_a_start_from_another_encoder_is_refused_where_it_is_known(tmp_path: Path) -> None:
    small_model(beit_config()).save_pretrained(tmp_path)
    require_vision(tmp_path, beit_config())
    for other, key in (
        (small_config(), "layout = beit, but this one has clip"),
        (beit_config(pooling="mean"), "pooling = class"),
    ):
        with pytest.raises(ValueError, match=rf"config\.json is of a model with model\.vision\.{key}"):
            require_vision(tmp_path, other)
    # a checkpoint from before there were layouts, and before its architecture lay beside it
    (tmp_path / "config.json").unlink()
    (tmp_path / "state.json").write_text(json.dumps({"config": {"model": {"vision": {"width": 32}}}}))
    require_vision(tmp_path, small_config())
    with pytest.raises(
        ValueError, match=r"state\.json is of a model with model\.vision\.layout = clip, but this one has beit"
    ):
        require_vision(tmp_path, beit_config())
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"state\.json does not describe a SMAUG model"):
        require_vision(tmp_path, beit_config())
    (tmp_path / "state.json").unlink()
    require_vision(tmp_path, beit_config())  # bare weights
