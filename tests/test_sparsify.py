"""Masking, token fusion and frame choice against slow versions, forward and backward."""

from __future__ import annotations

import pytest
import torch

from smaug_ds.model.layers import ClipBlock, gather_tokens
from smaug_ds.model.sparsify import gumbel_top_k, keep_and_fuse, kept_count, random_mask
from smaug_ds.model.vision import VisionConfig, VisionEncoder
from tests import reference


def test_token_counts_of_the_paper() -> None:
    config = VisionConfig()
    assert config.token_counts() == [99, 81, 66, 54]
    encoder = VisionEncoder(VisionConfig(width=12, heads=2, mlp_width=12))
    encoder.init_weights()
    encoded = encoder(torch.randn(2, 1, 196, 768), torch.rand(2, 196))
    assert encoded.tokens.shape == (2, 1, 54, 12)
    assert [ids.shape[-1] + 1 for ids in encoded.layer_ids] == [81, 66, 54]
    assert encoded.visible_ids is not None and encoded.visible_ids.shape == (2, 98)


@pytest.mark.parametrize(("tokens", "rate", "kept"), [(98, 0.8, 79), (80, 0.8, 64), (65, 0.8, 52), (10, 1.0, 10)])
def test_kept_count(tokens: int, rate: float, kept: int) -> None:
    assert kept_count(tokens, rate) == kept


def test_mask_is_a_partition_and_a_tube() -> None:
    noise = torch.rand(3, 20)
    visible, masked = random_mask(noise, 0.65)
    assert visible.shape == (3, 7) and masked.shape == (3, 13)
    for row in range(3):
        assert sorted([*visible[row].tolist(), *masked[row].tolist()]) == list(range(20))
        assert noise[row, visible[row]].max() < noise[row, masked[row]].min()
    config = VisionConfig(image_size=32, patch_size=8, width=16, heads=2, mlp_width=16, depth=1, sparsify_layers=())
    encoder = VisionEncoder(config)
    encoder.init_weights()
    kept = encoder(torch.randn(2, 3, 16, 192), torch.rand(2, 16)).kept_ids
    assert (kept[:, 0] == kept[:, 1]).all() and (kept[:, 0] == kept[:, 2]).all()


@pytest.mark.parametrize("keep_rate", [0.3, 0.8])
def test_keep_and_fuse_equals_the_slow_loop(keep_rate: float) -> None:
    torch.manual_seed(0)
    block = ClipBlock(24, 3, 48).double()
    x = torch.randn(4, 11, 24, dtype=torch.float64)
    ids = torch.stack([torch.randperm(50)[:10] for _ in range(4)])
    results = []
    for slow in (False, True):
        seen = x.clone().requires_grad_()
        block.zero_grad()
        if slow:
            attended, matrix = reference.attention_matrix(block.attention, block.attention_norm(seen))
            tokens, new_ids = reference.keep_and_fuse(seen + attended, ids, matrix, keep_rate, fused_id=50)
        else:
            attended, scores = block.attend_and_rank(seen)
            kept, kept_ids = keep_and_fuse(attended[:, 1:], ids, scores, keep_rate, fused_id=50)
            tokens, new_ids = torch.cat([attended[:, :1], kept], dim=1), kept_ids.tolist()
        tokens.sin().sum().backward()
        gradients = [parameter.grad.clone() for parameter in block.attention.parameters()]
        results.append((tokens.detach(), new_ids, seen.grad, gradients))
    (fast, fast_ids, fast_grad, fast_weights), (slow_, slow_ids, slow_grad, slow_weights) = results
    assert fast_ids == slow_ids
    # the class attention is taken in single precision, whatever the model's: its error is what is allowed here
    torch.testing.assert_close(fast, slow_, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fast_grad, slow_grad, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(fast_weights, slow_weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_nothing_dropped_changes_nothing() -> None:
    tokens, ids = torch.randn(2, 5, 4), torch.arange(5).expand(2, 5)
    same, same_ids = keep_and_fuse(tokens, ids, torch.rand(2, 5), 1.0, 99)
    assert same is tokens and same_ids is ids


def test_gather_tokens() -> None:
    tokens, ids = torch.randn(2, 6, 3), torch.tensor([[5, 0], [2, 2]])
    for row in range(2):
        assert torch.equal(gather_tokens(tokens, ids)[row], tokens[row, ids[row]])


def test_gumbel_top_k_is_hard_forward_and_soft_backward() -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, 6, requires_grad=True)
    noise = torch.rand(5, 6)
    chosen, weights = gumbel_top_k(scores, 2, noise, temperature=0.7)
    perturbed = scores - torch.log(-torch.log(noise))
    for row in range(5):
        best = sorted(range(6), key=lambda frame: -float(perturbed[row, frame]))[:2]
        assert chosen[row].tolist() == sorted(best)
        assert weights[row].detach().round(decimals=6).tolist() == [float(frame in best) for frame in range(6)]
    direction = torch.randn(5, 6)
    (gradient,) = torch.autograd.grad((weights * direction).sum(), scores, retain_graph=True)
    (expected,) = torch.autograd.grad((torch.softmax(perturbed / 0.7, dim=1) * direction).sum(), scores)
    torch.testing.assert_close(gradient, expected)


def test_gumbel_noise_draws_frames_in_proportion() -> None:
    torch.manual_seed(0)
    shares = torch.tensor([0.5, 0.3, 0.2])
    chosen, _ = gumbel_top_k(shares.log().expand(20000, 3), 1, torch.rand(20000, 3))
    counts = torch.bincount(chosen.flatten(), minlength=3) / 20000
    assert (counts - shares).abs().max() < 0.02


def test_without_noise_the_best_frames_are_chosen() -> None:
    chosen, _ = gumbel_top_k(torch.tensor([[0.1, 3.0, -1.0, 2.0]]), 2, None)
    assert chosen.tolist() == [[1, 3]]
