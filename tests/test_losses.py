"""The four objectives against pair-by-pair versions, and their independence of the number of ranks."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from smaug_ds import losses
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from tests import reference
from tests.models import random_batch, share, small_config, small_model
from tests.ranks import run_ranks

MEDIA = [0, 1, 0, 2, 3, 3, 3, 4]


def embeddings(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.nn.functional.normalize(torch.randn(2, 8, 5, generator=generator, dtype=torch.float64), dim=-1)
    return pair[0].requires_grad_(), pair[1].requires_grad_()


def test_info_nce_equals_the_slow_loop() -> None:
    video, text = embeddings()
    scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    fast = losses.vtc(video, text, torch.tensor(MEDIA), scale)
    slow = reference.info_nce(video, text, MEDIA, torch.exp(-scale))
    torch.testing.assert_close(fast, slow.squeeze(), atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(fast, (video, text, scale)), torch.autograd.grad(slow, (video, text, scale)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("contrastive", ["info_nce", "sigmoid"])
def test_cosines_are_not_rounded_under_autocast(contrastive: str) -> None:
    """A temperature of 0.01 would turn bfloat16's rounding into differences of half a logit."""
    ids, scale, bias = torch.tensor(MEDIA), torch.tensor([100.0]).log(), torch.zeros(1)

    def loss_and_gradients(autocast: bool) -> list[torch.Tensor]:
        video, text = (side.detach().float().requires_grad_() for side in embeddings())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if contrastive == "sigmoid":
                loss = losses.vtc_sigmoid(video, text, ids, scale, bias)
            else:
                loss = losses.vtc(video, text, ids, scale)
        return [loss, *torch.autograd.grad(loss, (video, text))]

    for ours, theirs in zip(loss_and_gradients(True), loss_and_gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_info_nce_in_pieces_equals_the_slow_loop(rows: int) -> None:
    video, text = embeddings()
    scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    largest = 0

    def widest(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(tensor) if tensor.shape[1:] == (8,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(widest, lambda tensor: tensor):
        pieces = losses.vtc(video, text, torch.tensor(MEDIA), scale, rows)
    assert largest == (8 if rows >= 8 else 0), "similarities are kept for the backward pass"
    slow = reference.info_nce(video, text, MEDIA, torch.exp(-scale))
    torch.testing.assert_close(pieces, slow.squeeze(), atol=1e-6, rtol=1e-6)
    leaves = (video, text, scale)
    for ours, theirs in zip(torch.autograd.grad(pieces, leaves), torch.autograd.grad(slow, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_sigmoid_equals_the_slow_loop() -> None:
    video, text = embeddings(1)
    scale = torch.tensor([1.1], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    fast = losses.vtc_sigmoid(video, text, torch.tensor(MEDIA), scale, bias)
    slow = reference.sigmoid_loss(video, text, MEDIA, scale, bias)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-6)
    leaves = (video, text, scale, bias)
    for ours, theirs in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(slow, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_temperature_is_bounded() -> None:
    assert losses.inverse_temperature(torch.tensor([50.0])).item() == 100.0


def test_hard_negatives_follow_similarity_and_spare_positives() -> None:
    ids = torch.tensor([0, 1, 0, 2])
    similarity = torch.tensor([[9.0, 1.0, 9.0, 0.0]]).repeat(20000, 1)
    noise = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    columns, valid = losses.draw_hard_negatives(similarity, torch.zeros(20000), ids, noise)
    assert valid.all()
    counts = torch.bincount(columns, minlength=4) / 20000
    expected = torch.softmax(torch.tensor([1.0, 0.0]), dim=0)
    assert counts[0] == counts[2] == 0
    assert abs(counts[1] - expected[0]) < 0.02 and abs(counts[3] - expected[1]) < 0.02


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
def test_hard_negative_at_the_ends_of_the_interval(noise: float) -> None:
    similarity = torch.tensor([[5.0, 0.0, -200.0, 5.0]])
    columns, _ = losses.draw_hard_negatives(
        similarity, torch.tensor([7]), torch.tensor([7, 1, 2, 7]), torch.tensor([noise])
    )
    assert columns.item() == 1


def test_no_negative_is_marked() -> None:
    ids = torch.tensor([4, 4])
    _, valid = losses.draw_hard_negatives(torch.zeros(2, 2), ids, ids, torch.rand(2))
    assert not valid.any()


@pytest.mark.parametrize("frames", [1, 3])
def test_word_and_pixel_losses_equal_the_slow_loops(frames: int) -> None:
    config = small_config(frames, 1)
    model, batch = small_model(config), random_batch(config, 4)
    visual = model.encode_frames(batch.frames, batch.patch_noise)
    text = model.encode_text(batch.input_ids, batch.lengths)
    prediction, target = model.predict_pixels(visual, batch.frames)
    assert visual.masked_ids is not None
    slow = reference.masked_pixels_loss(
        model.reconstruct(visual), model.pixel_targets(batch.frames), visual.masked_ids.tolist()
    )
    weights = list(model.pixel_decoder.parameters())
    check_equal(losses.mvm(prediction, target), slow, weights)
    chosen = model.look_at(visual.tokens, text.sentence, batch.frame_noise)
    fused = model.fuse(model.text(batch.masked_ids, text.packing), text.packing, chosen)
    hidden = batch.mlm_positions
    fast = losses.mlm(model.word_logits(fused[hidden]), batch.mlm_labels[hidden])
    slow = reference.masked_words_loss(model.word_logits(fused), batch.mlm_labels)
    check_equal(fast, slow, list(model.fusion.parameters()))


def check_equal(fast: torch.Tensor, slow: torch.Tensor, weights: list[torch.nn.Parameter]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(fast, weights, retain_graph=True)
    theirs = torch.autograd.grad(slow, weights, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


OBJECTIVES = ["vtc", "pieces", "sigmoid", "vtm", "mlm", "mvm", "all"]
LENGTHS = [12, 5, 9, 7, 3, 11, 5, 6]  # of captions: 33 + 25 tokens on two ranks, 17 + 16 + 14 + 11 on four


def loss_and_gradient(name: str, frames: int) -> tuple[float, dict[str, Any]]:
    """Loss and gradient of one objective, averaged over the ranks as the engine does it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    weights = {"vtc": 0.0, "vtm": 0.0, "mlm": 0.0, "mvm": 0.0}
    weights = {"vtc": 1.0, "vtm": 1.0, "mlm": 1.0, "mvm": 1.0} if name == "all" else weights
    if name != "all":
        weights["vtc" if name in ("sigmoid", "pieces") else name] = 1.0
    # "pieces" and "all" hold two or three rows of similarities at once
    rows = {"pieces": 3, "all": 2}.get(name, 0)
    contrastive: Literal["infonce", "sigmoid"] = "sigmoid" if name == "sigmoid" else "infonce"
    loss_config = LossConfig(**weights, contrastive=contrastive, contrastive_rows=rows)
    config = small_config(frames, min(frames, 2))
    # double precision: what differs is then a mistake and not rounding
    module = Pretraining(small_model(config), loss_config).double()
    batch = share(random_batch(config, 8, lengths=LENGTHS), rank, world)
    loss = module(batch)["loss"]
    loss.backward()
    gradients = {}
    for key, parameter in module.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if world > 1:
            dist.all_reduce(gradient)
        gradients[key] = (gradient / world).numpy()
    value = loss.detach().clone()
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world, gradients


def all_objectives(frames: int) -> dict[str, tuple[float, dict[str, Any]]]:
    return {name: loss_and_gradient(name, frames) for name in OBJECTIVES}


@pytest.mark.parametrize("frames", [1, 3])
def test_losses_do_not_depend_on_the_number_of_ranks(frames: int) -> None:
    alone = all_objectives(frames)
    for world_size in (2, 4):
        for ranks in run_ranks(all_objectives, world_size, frames):
            for name in OBJECTIVES:
                (expected, expected_gradient), (value, gradient) = alone[name], ranks[name]
                assert value == pytest.approx(expected, rel=1e-5), f"{name} at {world_size} ranks"
                touched = 0
                for key, reference_gradient in expected_gradient.items():
                    error = abs(gradient[key] - reference_gradient).max()
                    scale = abs(reference_gradient).max()
                    touched += scale > 0
                    assert error <= 1e-5 * max(scale, 1e-3), f"{name}, gradient of {key}, {world_size} ranks"
                assert touched > 3, f"{name} moves no weights"
    assert abs(alone["vtc"][1]["model.logit_scale"]).max() > 0
