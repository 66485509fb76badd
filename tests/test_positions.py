"""Position tables: how they start, so that places can be seen at once, and how they are fitted to other sizes."""

from __future__ import annotations

import math

import pytest
import torch

from smaug_ds.model.positions import fit_positions, grid_positions, sine_cosine
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.model.vision import normalise_pixels, patchify
from tests.models import small_config


@pytest.mark.parametrize("width", [8, 10, 32])
def test_grids_start_as_sines_and_cosines_of_row_and_column(width: int) -> None:
    table, half = grid_positions(9, width), width // 4 * 2
    assert table.shape == (9, width)
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (row, column):
                angles = [place / 10000 ** (2 * i / half) for i in range(half // 2)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            expected += [0.0] * (width - 2 * half)
            assert torch.allclose(table[3 * row + column], torch.tensor(expected), atol=1e-6)
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.5, "neighbours differ"
    assert sine_cosine(torch.arange(5), 4).shape == (5, 4)


def test_a_new_model_sees_where_and_when_something_is() -> None:
    torch.manual_seed(0)
    model = SmaugModel(small_config(4, 2)).eval()
    assert torch.equal(model.vision.position_embedding[1:], grid_positions(16, 32))
    assert torch.equal(model.pixel_decoder.position_embedding, grid_positions(16, 32))
    assert model.vision.position_embedding[0].eq(0).all()
    pixels = normalise_pixels(torch.randint(0, 256, (8, 1, 3, 32, 32)).to(torch.uint8))
    with torch.no_grad():
        response = model.vision.patch_embedding(patchify(pixels, 8)).std()
    assert 0.2 < model.vision.position_embedding[1:].std() / response < 5, "of the size of what they are added to"
    times = model.temporal.position_embedding
    assert torch.cdist(times, times).fill_diagonal_(9).min() > 0.1 * 32**0.5, "beside tokens of unit size"


def test_tables_are_fitted_where_they_differ() -> None:
    few, many = small_config(3, 3), small_config(6, 6, image_size=48)
    weights = SmaugModel(few).state_dict()
    fitted = fit_positions(weights, many.vision.patches, many.frames)
    SmaugModel(many).load_state_dict(fitted)
    changed = {name for name, value in fitted.items() if value.shape != weights[name].shape}
    assert changed == {f"{part}.position_embedding" for part in ("vision", "pixel_decoder", "temporal")}
    for name, value in fit_positions(weights, few.vision.patches, few.frames).items():
        assert torch.equal(value, weights[name])
