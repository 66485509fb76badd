"""Weights of a model trained with T frames, for one that is shown another number of them."""

from __future__ import annotations

from torch import Tensor, nn

from smaug_ds.config import ConfigError
from smaug_ds.model.positions import resize_time
from smaug_ds.model.smaug import ModelConfig, SmaugModel

_POSITIONS = "temporal.position_embedding"


def fit_frames(model: SmaugModel, weights: dict[str, Tensor], trained: ModelConfig) -> dict[str, Tensor]:
    """``weights`` of a model like ``trained``, made to fit ``model``, which differs in ``frames`` and ``frames_kept``.

    Positions in time are interpolated. A model trained with one frame has no temporal encoder: ``model`` gets none,
    its frames are encoded one by one. What one frame, or all of them, make needless (temporal encoder, frame selector)
    is left out.

    Raises ConfigError where ``model`` would choose frames, which ``trained`` never learnt.
    """
    config = model.config
    fitted = dict(weights)
    if config.frames > config.frames_kept and trained.frames == trained.frames_kept:
        raise ConfigError(
            f"model.frames_kept is {config.frames_kept} of model.frames = {config.frames}, but this checkpoint has "
            f"not learnt to choose frames: set model.frames_kept={config.frames}"
        )
    if config.frames == config.frames_kept:
        fitted = {name: value for name, value in fitted.items() if not name.startswith("selector.")}
    if config.frames == 1:
        fitted = {name: value for name, value in fitted.items() if not name.startswith("temporal.")}
    elif trained.frames == 1:
        model.add_module("temporal", nn.Identity())
    elif config.frames != trained.frames and _POSITIONS in fitted:
        fitted[_POSITIONS] = resize_time(fitted[_POSITIONS], config.frames)
    return fitted
