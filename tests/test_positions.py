"""Position tables are fitted to other sizes of picture and other numbers of frames."""

from __future__ import annotations

import torch

from smaug_ds.model.positions import fit_positions
from smaug_ds.model.smaug import SmaugModel
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
