"""The assembled model: shapes, checkpointing, frame choice, partial decoding, and what stages share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.model import recompute
from smaug_ds.model.frame_selector import SelectorConfig
from smaug_ds.model.language import TextConfig
from smaug_ds.model.pixel_decoder import PixelDecoderConfig
from smaug_ds.model.recompute import Recompute
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.model.temporal import TemporalConfig
from smaug_ds.model.vision import VisionConfig, normalise_pixels, patchify, unpatchify
from tests.models import random_batch, small_config, small_model


def test_base_is_the_paper() -> None:
    config = ModelConfig.of_size("base")
    assert config == ModelConfig()
    assert config.vision.token_counts() == [99, 81, 66, 54]
    assert config.vision.patches == 196


def test_shapes_of_the_multi_frame_stage() -> None:
    config = small_config(frames=3, frames_kept=2)
    model, batch = small_model(config), random_batch(config, 4)
    visual = model.encode_frames(batch.frames, batch.patch_noise)
    tokens = config.vision.token_counts()[-1]
    assert visual.tokens.shape == (4, 3, tokens, 32)
    assert visual.embedding.shape == (4, 16)
    torch.testing.assert_close(visual.embedding.norm(dim=1), torch.ones(4))
    text = model.encode_text(batch.input_ids, batch.lengths)
    assert model.look_at(visual.tokens, text.sentence).shape == (4, 2 * tokens, 32)
    assert model.match(visual, text).shape == (4,)
    assert model.reconstruct(visual).shape == (4, 3, 16, 192)
    picked = visual.index(torch.tensor([3, 0]))
    assert torch.equal(picked.tokens[1], visual.tokens[0]) and torch.equal(picked.kept_ids[0], visual.kept_ids[3])


def test_fusion_sees_only_chosen_frames() -> None:
    config = small_config(frames=4, frames_kept=2)
    model = small_model(config).eval()
    batch = random_batch(config, 3)
    visual = model.encode_frames(batch.frames)
    text = model.encode_text(batch.input_ids, batch.lengths)
    choice = model.choose_frames(visual, text)
    before = model.match(visual, text)
    hidden = visual.tokens.clone()
    for row in range(3):
        for frame in range(4):
            if frame not in choice.chosen[row]:
                hidden[row, frame, 1:] = 1000.0
    after = model.match(dataclasses.replace(visual, tokens=hidden), text)
    torch.testing.assert_close(after, before)


def test_selector_learns_from_the_fusion() -> None:
    config = small_config(frames=4, frames_kept=1)
    module = Pretraining(small_model(config), LossConfig(vtc=0, mlm=0, mvm=0))
    module(random_batch(config, 4))["loss"].backward()
    for key, parameter in module.model.selector.named_parameters():
        # a constant added to all scores changes nothing, so the last bias has no gradient but rounding
        assert parameter.grad is not None and (parameter.grad.abs().max() > 0 or key == "project_out.bias"), key


def checkpointed(every: int, what: Recompute, dropout: float) -> ModelConfig:
    config = small_config(frames=3, frames_kept=2, checkpoint_every=every, checkpoint_what=what)
    text = dataclasses.replace(config.text, checkpoint_every=every, checkpoint_what=what, dropout=dropout)
    return dataclasses.replace(config, text=text)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("what", ["layer", "cheap"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_nothing(every: int, what: Recompute, dropout: float, dtype: torch.dtype) -> None:
    results = []
    for checkpoint_every in (0, every):
        config = checkpointed(checkpoint_every, what, dropout)
        module = Pretraining(small_model(config), LossConfig()).to(dtype)
        torch.manual_seed(3)
        losses = module(random_batch(config, 4))
        losses["loss"].backward()
        results.append((losses, {key: value.grad for key, value in module.named_parameters()}))
    (plain, plain_gradients), (recomputed, gradients) = results
    for key in plain:
        assert torch.equal(plain[key], recomputed[key]), key
    for key, gradient in plain_gradients.items():
        if gradient is None:
            assert gradients[key] is None, key
        else:
            assert torch.equal(gradient, gradients[key]), key


def test_cheap_checkpointing_repeats_no_matrix_product_and_holds_less() -> None:
    flops, held = {}, {}
    kinds: list[tuple[int, Recompute]] = [(0, "layer"), (1, "cheap"), (1, "layer")]
    for kind in kinds:
        module = Pretraining(small_model(checkpointed(*kind, dropout=0.1)), LossConfig())
        batch = random_batch(module.model.config, 4)
        with FlopCounterMode(display=False) as counter:
            module(batch)["loss"].backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = module(batch)["loss"]
        flops[kind] = counter.get_total_flops()
        held[kind] = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
        del loss
    plain, cheap, whole = kinds
    assert flops[plain] == flops[cheap] < flops[whole]
    assert held[plain] > held[cheap] > held[whole]


DRAWN: list[float] = []


@torch.library.custom_op("smaug_ds_test::attention", mutates_args=())
def fused_attention(value: torch.Tensor, dropout_p: float) -> list[torch.Tensor]:
    """Stands in for a GPU's: one operation that draws what it drops, and tells which."""
    DRAWN.append(dropout_p)
    mask = (torch.rand_like(value) >= dropout_p).to(value.dtype) if dropout_p else torch.ones_like(value)
    return [value * mask, mask]


fused_attention.register_autograd(
    lambda ctx, grads: (grads[0] * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cheap_checkpointing_repeats_attention_that_draws(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept, it would draw nothing the second time, and the dropout after it would get its numbers."""
    monkeypatch.setattr(recompute, "_KEPT", {*recompute._KEPT, torch.ops.smaug_ds_test.attention.default})
    DRAWN.clear()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(fused_attention(x, dropout)[0].sin(), 0.5)

    x = torch.randn(8, 16, requires_grad=True)
    gradients = []
    for function in (layer, lambda x: recompute.recomputed("cheap", layer, x)):
        torch.manual_seed(0)
        gradients += torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(*gradients)
    assert len(DRAWN) == (3 if dropout else 2), "forward each time, and backward only if it draws"


def test_partial_decoding_predicts_a_random_part_of_the_masked_patches() -> None:
    config = small_config()
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, predicted_share=0.5))
    model, batch = small_model(config), random_batch(config, 4)
    visual = model.encode_frames(batch.frames, batch.patch_noise)
    prediction, target = model.predict_pixels(visual, batch.frames)
    assert prediction.shape == target.shape == (4, 1, 4, 192)
    assert visual.masked_ids is not None
    everything = model.pixel_targets(batch.frames)
    for row in range(4):
        assert torch.equal(target[row, 0], everything[row, 0, visual.masked_ids[row, :4]])


def test_normalised_targets_have_unit_patches() -> None:
    config = small_config()
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, normalise_targets=True))
    targets = small_model(config).pixel_targets(random_batch(config, 2).frames)
    assert targets.mean(dim=-1).abs().max() < 1e-5
    assert (targets.std(dim=-1) - 1).abs().max() < 1e-3


def test_patchify_round_trip() -> None:
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    pixels = normalise_pixels(frames)
    assert torch.equal(unpatchify(patchify(pixels, 8), 8), pixels)


def test_second_stage_starts_where_the_first_ended() -> None:
    """With silent temporal blocks and no positions yet, a clip of equal frames means what its frame meant."""
    single = small_model(small_config())
    torch.manual_seed(5)
    multi = SmaugModel(small_config(frames=4, frames_kept=2))
    missing, unexpected = multi.load_state_dict(single.state_dict(), strict=False)
    assert not unexpected
    assert {key.split(".")[0] for key in missing} == {"temporal", "selector"}
    torch.nn.init.zeros_(multi.temporal.position_embedding)
    frames = random_batch(single.config, 3).frames
    one = single.eval().encode_frames(frames).embedding
    four = multi.eval().encode_frames(frames.expand(-1, 4, -1, -1, -1)).embedding
    torch.testing.assert_close(four, one)


def test_image_in_the_multi_frame_stage() -> None:
    config = small_config(frames=4, frames_kept=2)
    module = Pretraining(small_model(config), LossConfig())
    batch = random_batch(small_config(), 4)
    module(batch)["loss"].backward()
    assert all(parameter.grad is None for parameter in module.model.temporal.parameters())


def test_inference_without_sparsification_keeps_every_token() -> None:
    config = small_config(sparsify_at_inference=False)
    model = small_model(config).eval()
    visual = model.encode_frames(random_batch(config, 2).frames)
    assert visual.tokens.shape[2] == config.vision.patches + 1
    assert visual.layer_ids == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"frames": 2, "frames_kept": 3}, r"model\.frames_kept is 3.*model\.frames = 2"),
        ({"frames": 0}, r"model\.frames is 0"),
        ({"projection": 0}, r"model\.projection is 0: it must be at least 1"),
        (
            {"frames": 2, "temporal": {"heads": 5}},
            r"model\.vision\.width is 768, .* model\.temporal\.heads, which is 5",
        ),
        (
            {"frames": 2, "selector": {"heads": 5}},
            r"model\.vision\.width is 768, .* model\.selector\.heads, which is 5",
        ),
    ],
)
def test_impossible_model_is_refused(values: dict, key: str) -> None:
    sections = {"temporal": TemporalConfig, "selector": SelectorConfig}
    with pytest.raises(ValueError, match=key):
        ModelConfig(**{name: sections[name](**value) if name in sections else value for name, value in values.items()})


def test_parts_that_a_stage_lacks_need_not_fit() -> None:
    assert ModelConfig(temporal=TemporalConfig(heads=5), selector=SelectorConfig(heads=5)).frames == 1


SECTIONS = {
    "vision": (VisionConfig, ["image_size", "patch_size", "width", "depth", "mlp_width", "heads"]),
    "text": (TextConfig, ["width", "mlp_width", "text_layers", "fusion_layers", "heads"]),
    "decoder": (PixelDecoderConfig, ["width", "depth", "heads"]),
    "selector": (SelectorConfig, ["depth", "heads", "mlp_width"]),
    "temporal": (TemporalConfig, ["depth", "heads"]),
}


@pytest.mark.parametrize(("section", "name"), [(part, name) for part, (_, names) in SECTIONS.items() for name in names])
def test_sizes_below_one_are_refused(section: str, name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf"model\.{section}\.{name} is {value}: it must be at least 1"):
            SECTIONS[section][0](**{name: value})


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("vision", {"heads": 5}, r"model\.vision\.width is 768, not a multiple of model\.vision\.heads, which is 5"),
        ("text", {"heads": 5}, r"model\.text\.width is 768, not a multiple of model\.text\.heads"),
        ("decoder", {"heads": 5}, r"model\.decoder\.width is 512, not a multiple of model\.decoder\.heads"),
        (
            "vision",
            {"sparsify_layers": (4, 7, 4)},
            r"model\.vision\.sparsify_layers is \[4, 7, 4\]: name each layer once",
        ),
        (
            "vision",
            {"image_size": 32, "mask_ratio": 0.9},
            r"model\.vision\.mask_ratio is 0\.9, which masks all of the 4",
        ),
        ("text", {"dropout": 1.0}, r"model\.text\.dropout is 1\.0: it must lie in \[0, 1\)"),
        ("text", {"dropout": -0.1}, r"model\.text\.dropout is -0\.1"),
        ("text", {"checkpoint_what": "some"}, r"model\.text\.checkpoint_what is 'some': it must be layer or cheap"),
        ("vision", {"checkpoint_every": -1}, r"model\.vision\.checkpoint_every is -1: it must be 0 or more"),
        ("text", {"vocab_size": -1}, r"model\.text\.vocab_size is -1"),
        ("selector", {"temperature": 0.0}, r"model\.selector\.temperature is 0\.0: it must be above 0"),
    ],
)
def test_an_impossible_section_is_refused(section: str, values: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SECTIONS[section][0](**values)


def test_wrong_image_size_is_refused() -> None:
    config = small_config()
    frames = torch.zeros(1, 1, 3, 48, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"48.*model\.vision\.image_size is 32"):
        small_model(config).encode_frames(frames)


def test_what_a_model_was_not_built_for_is_refused() -> None:
    single = small_model(small_config())
    with pytest.raises(ValueError, match=r"clips have 2 frames, but model\.frames is 1"):
        single.encode_frames(torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8))
    batch = random_batch(single.config, 2)
    text = single.encode_text(batch.input_ids, batch.lengths)
    with pytest.raises(ValueError, match=r"model\.frames_kept are both 1"):
        single.choose_frames(single.encode_frames(batch.frames), text)
    with pytest.raises(ValueError, match=r"model\.answer_layers is 0"):
        single.answer(batch.input_ids, batch.lengths, text.states, text.packing)


def test_mask_ratio_zero_cannot_reconstruct() -> None:
    config = small_config(mask_ratio=0.0)
    batch = random_batch(config, 2)
    model = small_model(config)
    with pytest.raises(ValueError, match=r"model\.vision\.mask_ratio"):
        model.predict_pixels(model.encode_frames(batch.frames, batch.patch_noise), batch.frames)
