"""Packed captions against padded ones: indices, encoders, every loss; forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.model.language import MultiModalEncoder, TextConfig, TextEncoder
from smaug_ds.model.layers import CaptionAttention
from smaug_ds.model.packing import Packing, pick_captions
from tests import reference
from tests.models import random_batch, small_config, small_model

LENGTHS = [3, 32, 7, 11, 3, 20]
TEXT = TextConfig(vocab_size=50, width=32, heads=4, mlp_width=64, text_layers=2, fusion_layers=2, dropout=0.0)


@pytest.mark.parametrize("lengths", [LENGTHS, [4], [5, 5, 5], [1, 2]])
def test_indices_equal_slow_loops(lengths: list[int]) -> None:
    packing = Packing.of(lengths, "cpu")
    tokens = torch.randn(sum(lengths), 2, 3)
    captions = tokens.split(lengths)
    padded = packing.pad(tokens)
    assert torch.equal(padded, reference.pad_captions(tokens, lengths))
    assert torch.equal(packing.unpad(padded), tokens)
    assert torch.equal(packing.mask[:, 0, 0], reference.token_mask(lengths))
    assert packing.positions.tolist() == [place for length in lengths for place in range(length)]
    assert torch.equal(packing.first(tokens), torch.stack([caption[0] for caption in captions]))
    wanted = [len(lengths) - 1, 0, 0]
    picked, picked_lengths = pick_captions(tokens, lengths, wanted)
    assert torch.equal(picked, torch.cat([captions[i] for i in wanted]))
    assert picked_lengths == [lengths[i] for i in wanted]


def test_lengths_stay_on_the_host() -> None:
    batch = random_batch(small_config(), 4)
    moved = batch.to("meta")
    assert moved.input_ids.is_meta and moved.lengths == batch.lengths
    assert sum(batch.lengths) == len(batch.input_ids)
    assert Packing.of(batch.lengths, "meta").pad(moved.input_ids).shape == (4, max(batch.lengths))


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def compare(packed: Tensor, padded: Tensor, leaves: list[Tensor]) -> None:
    """Equal values and, for one random direction, equal gradients."""
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    direction = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((packed * direction).mean(), leaves, allow_unused=True)
    theirs = torch.autograd.grad((padded * direction).mean(), leaves, allow_unused=True)
    touched = 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            touched += bool(other.abs().max() > 1e-4)
    assert touched > len(leaves) / 2, "there are hardly any gradients to compare"


def test_text_encoder_equals_padded_reference() -> None:
    encoder = shaken(TextEncoder(TEXT))
    input_ids = torch.randint(0, 50, (sum(LENGTHS),))
    packed = encoder(input_ids, Packing.of(LENGTHS, "cpu"))
    mask = reference.token_mask(LENGTHS)
    padded = reference.padded_text_encoder(encoder, reference.pad_captions(input_ids, LENGTHS), mask)
    compare(packed, padded[mask], list(encoder.parameters()))


def test_fusion_equals_padded_reference() -> None:
    encoder = shaken(MultiModalEncoder(TEXT, visual_width=24))
    states = torch.randn(sum(LENGTHS), 32, requires_grad=True)
    visual = torch.randn(len(LENGTHS), 5, 24, requires_grad=True)
    packed = encoder(states, Packing.of(LENGTHS, "cpu"), encoder.project(visual))
    mask = reference.token_mask(LENGTHS)
    padded = reference.padded_fusion(encoder, reference.pad_captions(states, LENGTHS), mask, visual)
    compare(packed, padded[mask], [states, visual, *encoder.parameters()])


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", ["vtc", "vtm", "mlm"])
def test_every_loss_equals_padded_reference(name: str, frames: int) -> None:
    config = small_config(frames, 1)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, max_length=32))
    model = small_model(config).double()
    batch = random_batch(config, len(LENGTHS), lengths=LENGTHS)
    weights = {"vtc": 0.0, "vtm": 0.0, "mlm": 0.0, "mvm": 0.0, name: 1.0}
    packed = Pretraining(model, LossConfig(**weights))(batch)["loss"]
    padded = reference.padded_losses(model, batch)[name]
    torch.testing.assert_close(packed, padded, atol=1e-6, rtol=0, check_dtype=False)
    leaves = list(model.parameters())
    ours = torch.autograd.grad(packed, leaves, allow_unused=True)
    theirs = torch.autograd.grad(padded, leaves, allow_unused=True)
    touched = 0
    for (key, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
        one, other = (torch.zeros(1) if gradient is None else gradient for gradient in (one, other))
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max())), key
        touched += bool(other.abs().max() > 1e-4)
    assert touched > 20, f"{name} moves hardly any weights"


def test_captions_do_not_see_each_other() -> None:
    encoder = shaken(TextEncoder(TEXT))
    input_ids = torch.randint(0, 50, (sum(LENGTHS),))
    together = encoder(input_ids, Packing.of(LENGTHS, "cpu")).split(LENGTHS)
    for caption, states in zip(input_ids.split(LENGTHS), together, strict=True):
        torch.testing.assert_close(encoder(caption, Packing.of([len(caption)], "cpu")), states, atol=1e-5, rtol=0)


def test_dropout_of_attention_is_unbiased_and_drawn_for_each_caption() -> None:
    torch.manual_seed(0)
    attention = CaptionAttention(16, 2, dropout=0.5)
    copies, lengths = 4000, [5, 3]
    one = torch.randn(sum(lengths), 16)
    with torch.no_grad():
        expected = attention.eval()(one, Packing.of(lengths, "cpu"))
        drawn = attention.train()(one.repeat(copies, 1), Packing.of(lengths * copies, "cpu"))
    drawn = drawn.unflatten(0, (copies, len(one)))
    error = drawn.std(dim=0) / copies**0.5
    assert (error > 0).all(), "every token of every caption is drawn anew"
    assert ((drawn.mean(dim=0) - expected).abs() < 5 * error).all()
