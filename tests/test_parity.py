"""Our encoders against transformers' CLIP and BERT on the same random weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel

from smaug_ds import convert
from smaug_ds.model.language import MultiModalEncoder, TextConfig, TextEncoder
from smaug_ds.model.packing import Packing
from smaug_ds.model.vision import VisionConfig, VisionEncoder, normalise_pixels, patchify

TOLERANCE = 1e-5


def shake(module: torch.nn.Module, spread: float = 0.02) -> torch.nn.Module:
    """Moves every weight off its initial value: norms of ones and biases of zeros would hide a mistake."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("size", ["small", pytest.param("base", marks=pytest.mark.slow)])
def test_vision_encoder_equals_clip(size: str) -> None:
    ours = VisionConfig(keep_rate=1.0, mask_ratio=0.0)
    if size == "small":
        small = {"image_size": 32, "patch_size": 8, "width": 64, "heads": 4, "mlp_width": 128}
        ours = dataclasses.replace(ours, depth=5, sparsify_layers=(2, 4), **small)
    theirs = CLIPVisionConfig(
        hidden_size=ours.width,
        intermediate_size=ours.mlp_width,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.heads,
        image_size=ours.image_size,
        patch_size=ours.patch_size,
    )
    clip = shake(CLIPVisionModel(theirs))
    encoder = VisionEncoder(ours)
    encoder.load_state_dict(convert.clip_vision(clip.state_dict())[0])
    frames = torch.randint(0, 256, (2, 1, 3, ours.image_size, ours.image_size), dtype=torch.uint8)
    pixels = normalise_pixels(frames)
    encoded = encoder.train()(patchify(pixels, ours.patch_size), torch.rand(2, ours.patches))
    expected = clip(pixels[:, 0])
    with torch.no_grad():
        tokens = clip.post_layernorm(expected.last_hidden_state)
    assert encoded.tokens.shape == (2, 1, ours.patches + 1, ours.width)
    assert (encoded.tokens[:, 0] - tokens).abs().max() < TOLERANCE
    assert (encoded.tokens[:, 0, 0] - expected.pooler_output).abs().max() < TOLERANCE


def bert_pair(layers: int, text_layers: int) -> tuple[BertModel, TextConfig]:
    ours = TextConfig(
        vocab_size=99, width=64, heads=4, mlp_width=128, text_layers=text_layers, fusion_layers=layers - text_layers
    )
    theirs = BertConfig(
        vocab_size=99,
        hidden_size=ours.width,
        num_hidden_layers=layers,
        num_attention_heads=ours.heads,
        intermediate_size=ours.mlp_width,
    )
    return shake(BertModel(theirs, add_pooling_layer=False)), ours


LENGTHS = [11, 4, 7]


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids (B, L) and mask (B, L): ``ids[mask]`` are the packed ones."""
    mask = torch.arange(11) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(0, 99, (3, 11)), mask


def test_text_encoder_equals_the_first_nine_layers_of_bert() -> None:
    bert, config = bert_pair(12, 9)
    encoder = TextEncoder(config).eval()
    encoder.load_state_dict(convert.bert(bert.state_dict(), 9)[0])
    ids, mask = captions()
    expected = bert(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[9]
    assert (encoder(ids[mask], Packing.of(LENGTHS, "cpu")) - expected[mask]).abs().max() < TOLERANCE


def test_multi_modal_encoder_without_vision_equals_the_last_three_layers_of_bert() -> None:
    bert, config = bert_pair(12, 9)
    encoder = MultiModalEncoder(config, visual_width=48).eval()
    missing, unexpected = encoder.load_state_dict(convert.bert(bert.state_dict(), 9)[1], strict=False)
    assert not unexpected and all("cross_attention" in key for key in missing)
    ids, mask = captions()
    states = bert(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    packing = Packing.of(LENGTHS, "cpu")
    assert (encoder(states[9][mask], packing, None) - states[12][mask]).abs().max() < TOLERANCE
    seen = encoder(states[9][mask], packing, encoder.project(torch.randn(3, 5, 48)))
    assert (seen - states[12][mask]).abs().max() > 0.01, "the cross-attention must matter when it is not silenced"


def test_missing_key_is_named() -> None:
    bert, _ = bert_pair(2, 1)
    weights = bert.state_dict()
    del weights["encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.attention\.self\.key\.bias"):
        convert.bert(weights, 1)
