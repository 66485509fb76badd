"""Position tables are fitted to other sizes of picture and other numbers of frames."""

from __future__ import annotations

import math

import pytest
import torch

from smaug_ds.model.layers import init_weights
from smaug_ds.model.positions import fit_positions, grid_waves, waves
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.model.temporal import TemporalEncoder
from smaug_ds.model.vision import VisionEncoder, normalise_pixels, patchify
from tests.models import small_config


def test_tables_are_fitted_where_they_differ() -> None:
    few, many = small_config(3, 3), small_config(6, 6, image_size=48)
    weights = SmaugModel(few).state_dict()
    fitted = fit_positions(weights, many.vision.patches, many.frames)
    SmaugModel(many).load_state_dict(fitted)
    changed = {name for name, value in fitted.items() if value.shape != weights[name].shape}
    assert changed == {f"{part}.position_embedding" for part in ("vision", "pixel_decoder", "temporal")}
    for name, value in fit_positions(weights, few.vision.patches, few.frames).items():
        assert torch.equal(value, weights[name])


def test_waves_are_those_of_the_formula_and_tell_places_apart() -> None:
    table = waves(5, 8)
    angle = 3 * 100.0 ** (-2 / 4)
    assert table[3, 2].item() == pytest.approx(math.sin(angle)) and table[3, 6].item() == pytest.approx(math.cos(angle))
    assert table.abs().max() <= 1 and waves(5, 7)[:, -1].abs().max() == 0
    grid = grid_waves(49, 32)
    assert torch.cdist(grid, grid).fill_diagonal_(9.0).min() > 0.5
    down, right = grid.view(7, 7, 32).split(16, dim=-1)
    assert torch.equal(down[:, 0], down[:, 6]) and torch.equal(right[0], right[6]), "one half a direction"
    with pytest.raises(ValueError, match="48 patches make no square grid"):
        grid_waves(48, 32)


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_an_untrained_encoder_sees_where_a_patch_is(size: str) -> None:
    """Positions are no small part of what enters the first layer, nor all of it."""
    vision = VisionEncoder(ModelConfig.of_size(size).vision)
    vision.apply(init_weights)
    vision.init_weights()
    frames = torch.randint(0, 256, (2, 1, 3, *[vision.config.image_size] * 2), dtype=torch.uint8)
    content = vision.patch_embedding(patchify(normalise_pixels(frames), vision.config.patch_size))
    share = vision.position_embedding[1:].std(dim=0).mean() / content.std()
    assert 0.1 < share < 1, f"positions deviate {share:.3f} times as much as patches"


def test_an_untrained_temporal_encoder_sees_the_order() -> None:
    """Tokens of the vision encoder deviate by about 1: order is a good part of that, and the frames stay most of it."""
    config = ModelConfig.of_size("tiny")
    temporal = TemporalEncoder(config.temporal, config.vision.width, 4)
    temporal.init_weights()
    table = temporal.position_embedding
    apart = torch.cdist(table, table) / table.shape[1] ** 0.5
    assert apart[~torch.eye(4, dtype=torch.bool)].min() > 0.05 and table.abs().max() <= 0.3
