"""Parts of the model that leave work out, against the same parts that do it all: forward and backward."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smaug_ds.config import ConfigError
from smaug_ds.engine import run as engine_run
from smaug_ds.engine.allocator import keep_freed_memory
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.model.language import MultiModalEncoder, TextConfig
from smaug_ds.model.layers import QuickGelu, ViTBlock, attend, drop_out
from smaug_ds.model.packing import Packing
from smaug_ds.model.smaug import SmaugModel
from tests.models import random_batch, small_config, small_model
from tests.standin import ROOT

TEXT = TextConfig(vocab_size=50, width=32, heads=4, mlp_width=64, text_layers=2, fusion_layers=2, dropout=0.0)
LENGTHS = [3, 9, 7, 4]


def same(fast: Tensor, slow: Tensor, leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    """Equal values and, for one random direction, equal gradients that are not all zero."""
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=tolerance)
    direction = torch.randn(slow.shape, generator=torch.Generator().manual_seed(1)).to(slow.dtype)
    ours = torch.autograd.grad((fast * direction).sum(), leaves, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad((slow * direction).sum(), leaves, retain_graph=True, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in theirs)


@pytest.mark.parametrize(("clips", "frames", "kept"), [(4, 1, 1), (4, 3, 3), (4, 3, 2), (4, 4, 1), (1, 4, 1)])
def test_shared_keys_and_values_equal_those_of_every_pair(clips: int, frames: int, kept: int) -> None:
    """With 4 frames, 6 pairs that keep one look at fewer frames than 4 clips have: the others are not projected."""
    config = small_config(frames, kept)
    model = small_model(dataclasses.replace(config, text=dataclasses.replace(TEXT, width=32))).double()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(clips, frames, 5, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    sentence = torch.randn(6, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    rows, noise = torch.tensor([0, 1, 1, 0, 1, 3]) % clips, torch.rand(6, frames, generator=generator)
    choice = model.choose_for_pairs(tokens, rows, sentence, noise)
    assert (choice is None) == (frames == kept)
    shared = model.look_at_pairs(tokens, rows, choice)
    slow = model.fusion.project(model.look_at(tokens[rows], sentence, noise))
    leaves = [tokens, *([] if choice is None else [sentence]), *model.fusion.parameters(), *model.parameters()]
    for layer, (ours, theirs) in enumerate(zip(shared, slow, strict=True)):
        assert ours.shape == (6, kept * 5, 64), layer
        same(ours, theirs, leaves)


@pytest.mark.parametrize("seeing", [True, False])
def test_wanted_rows_equal_those_of_the_whole_result(seeing: bool) -> None:
    torch.manual_seed(0)
    encoder = MultiModalEncoder(TEXT, visual_width=24).double()
    states = torch.randn(sum(LENGTHS), 32, dtype=torch.float64, requires_grad=True)
    visual = torch.randn(len(LENGTHS), 5, 24, dtype=torch.float64, requires_grad=True)
    packing, rows = Packing.of(LENGTHS, "cpu"), torch.tensor([0, 3, 12, 19, 22, 4, 5])
    assert packing.captions_of(rows).tolist() == [0, 1, 2, 3, 3, 1, 1]
    seen = encoder.project(visual) if seeing else None
    fast, slow = encoder(states, packing, seen, rows), encoder(states, packing, seen)[rows]
    same(fast, slow, [states, *([visual] if seeing else []), *encoder.parameters()])


def test_the_first_tokens_of_a_block_equal_those_of_all() -> None:
    torch.manual_seed(0)
    block = ViTBlock(32, 4).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    same(block(x, 4), block(x)[:, :4], [x, *block.parameters()])


def test_clean_and_masked_captions_in_one_pass_equal_two() -> None:
    model = small_model().double()
    batch = random_batch(model.config, 4)
    text, masked = model.encode_twice(batch.input_ids, batch.masked_ids, batch.lengths)
    alone = model.encode_text(batch.input_ids, batch.lengths)
    leaves = list(model.text.parameters())
    same(text.states, alone.states, leaves)
    same(masked, model.text(batch.masked_ids, alone.packing), leaves)
    torch.testing.assert_close(text.embedding, alone.embedding)


def test_quick_gelu_is_clips() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64, requires_grad=True)
    same(QuickGelu()(x), x * torch.sigmoid(1.702 * x), [x], 1e-12)
    assert torch.autograd.gradcheck(QuickGelu(), (x,))


@pytest.mark.parametrize("masked", [True, False])
def test_attention_by_products_equals_the_fused_kernel(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, size, 16, generator=generator) for size in (6, 9, 9))
    mask = (torch.arange(9) < torch.tensor([9, 2, 5])[:, None])[:, None, None] if masked else None
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in half]
    ours, theirs = attend(*half, mask), F.scaled_dot_product_attention(*exact, attn_mask=mask)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-2, rtol=2e-2)
    ours.sum().backward()
    theirs.sum().backward()
    for one, other in zip(half, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 333, dtype=dtype, requires_grad=True)
    dropped = drop_out(x, share)
    count = x.numel()
    zeros = int((dropped == 0).sum())
    assert abs(zeros - share * count) < 5 * (share * (1 - share) * count) ** 0.5
    rest = dropped[dropped != 0]
    torch.testing.assert_close(rest, torch.full_like(rest, 1 / (1 - share)), atol=0, rtol=1e-2)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(gradient, dropped)
    # neither neighbours nor rows of the mask depend on each other
    kept = (dropped.detach() != 0).double() - (1 - share)
    for one, other in ((kept[:, 1:], kept[:, :-1]), (kept[:, 4:], kept[:, :-4]), (kept[1:], kept[:-1])):
        assert abs(float((one * other).mean())) < 5 * share * (1 - share) / one.numel() ** 0.5
    assert not torch.equal(drop_out(x, share), dropped)
    torch.manual_seed(0)
    assert torch.equal(drop_out(x, share), dropped), "it is drawn from torch's generator"


def test_few_words_on_a_cpu_are_predicted_in_full_precision() -> None:
    model = small_model()
    states = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        few, many = model.word_logits(states), model.word_logits(states.repeat(20, 1))
    exact = model.word_logits(states)
    assert (few - exact).abs().max() < 0.05
    torch.testing.assert_close(many[:5], exact, atol=0.1, rtol=0.1)


def test_a_config_from_before_checkpoint_what_is_read(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert values["vision"].pop("checkpoint_what") == values["text"].pop("checkpoint_what") == "layer"
    file.write_text(json.dumps(values))
    assert SmaugModel.from_pretrained(tmp_path).config == small_config()


MEMORY = """
import resource, sys, threading, numpy
from smaug_ds.engine.allocator import keep_freed_memory
keep, threaded = "keep" in sys.argv, "thread" in sys.argv
assert not keep or keep_freed_memory()

def work():
    numpy.ones(2 * 2**20)  # a thread's own arena, if it gets one, is chosen here
    for _ in range(30):
        numpy.ones(16 * 2**20)  # 128 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        numpy.ones(16 * 2**20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
(thread.run if not threaded else thread.start)()
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_kept_memory_is_not_cleared_again(where: str) -> None:
    if platform.libc_ver()[0] != "glibc":
        assert not keep_freed_memory()
        return

    def page_faults(*arguments: str) -> int:
        command = [sys.executable, "-c", MEMORY, where, *arguments]
        small_pages = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
        done = subprocess.run(command, cwd=ROOT, env=small_pages, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert page_faults("keep") < page_faults() / 3


@pytest.mark.parametrize("most", [2**31 - 1, 32 * 2**20])
def test_what_an_older_glibc_refuses_is_asked_for_in_part(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.35 it takes no threshold of mmap (-3) above 32 MiB; that of trimming (-1) is set all the same."""
    limits: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        if name == -3 and value > most:
            return 0
        limits[name] = value
        return 1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory() and limits == {-1: -1, -3: most, -8: 1}
    assert keep_freed_memory(False) and limits == {-1: 128 * 1024, -3: 128 * 1024, -8: 1}


def test_modules_keep_their_names() -> None:
    """Weights of earlier checkpoints still fit."""
    names = dict(small_model(small_config(4, 2)).named_parameters())
    for name in (
        "vision.layers.0.mlp.fc1.weight",
        "pixel_decoder.blocks.0.attn.qkv.weight",
        "temporal.blocks.1.mlp.fc2.bias",
        "selector.blocks.0.norm1.weight",
        "fusion.layers.0.cross_attention.key_value.weight",
    ):
        assert name in names


def test_a_run_keeps_memory_before_it_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def init(*_: object) -> None:
        calls.append("group")
        raise ConfigError("far enough")

    monkeypatch.setattr(engine_run, "keep_freed_memory", lambda: calls.append("memory"))
    monkeypatch.setattr(engine_run.distributed, "init", init)
    monkeypatch.setattr(engine_run.distributed, "device", lambda: torch.device("cpu"))
    with pytest.raises(ConfigError, match="far enough"):
        engine_run.run(PretrainConfig(), Mock(), Mock())
    assert calls == ["memory", "group"]
