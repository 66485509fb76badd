"""The random draws of one training sample: what its generator decides, in a fixed order, and what follows from it.

A sample draws the same numbers whatever its media turn out to be (size, length, captions), so a draw never depends on
another sample, and a replacement of a bad file uses the draws of the slot that it fills.

Letters: T frames, N patches, L text tokens at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smaug_ds.data.clip import Window
from smaug_ds.data.sample import BatchShape

_CROP_TRIES = 10  # torchvision's


@dataclass(frozen=True)
class Draws:
    """Uniform numbers in [0, 1) for every random decision about one sample."""

    patch_noise: NDArray[np.float32]  # (N,) tube mask
    frame_noise: NDArray[np.float32]  # (T,) frame selector, 0 excluded
    negative_noise: NDArray[np.float32]  # (2,) hard negative text and video
    mlm_noise: NDArray[np.float32]  # (L, 3)
    crop: NDArray[np.float64]  # (tries, 4) area, ratio, top, left
    flip: float
    caption: float
    generator: np.random.Generator | None  # draws the frames once the clip is open; None: the middles are taken

    @classmethod
    def of(cls, generator: np.random.Generator, shape: BatchShape, frames: int) -> Draws:
        """The first draws of ``generator`` for a sample of ``frames`` frames."""
        return cls(
            patch_noise=generator.random(shape.patches, dtype=np.float32),
            frame_noise=np.maximum(generator.random(frames, dtype=np.float32), np.finfo(np.float32).tiny),
            negative_noise=generator.random(2, dtype=np.float32),
            mlm_noise=generator.random((shape.max_text_length, 3), dtype=np.float32),
            crop=generator.random((_CROP_TRIES, 4)),
            flip=generator.random(),
            caption=generator.random(),
            generator=generator,
        )

    @classmethod
    def neutral(cls, shape: BatchShape, frames: int) -> Draws:
        """No chance at all: what evaluation uses."""
        return cls(
            patch_noise=np.zeros(shape.patches, dtype=np.float32),
            frame_noise=np.full(frames, 0.5, dtype=np.float32),
            negative_noise=np.zeros(2, dtype=np.float32),
            mlm_noise=np.zeros((shape.max_text_length, 3), dtype=np.float32),
            crop=np.zeros((_CROP_TRIES, 4)),
            flip=1.0,
            caption=0.0,
            generator=None,
        )


def random_resized_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], uniform: NDArray[np.float64]
) -> Window:
    """torchvision's ``RandomResizedCrop.get_params``: area a uniform share of the frame's, width/height log-uniform.

    ``uniform``: (tries, 4) numbers in [0, 1). If no try fits, the largest centred window of an allowed ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_share, shape, down, right in uniform.tolist():
        area = height * width * (scale[0] + area_share * (scale[1] - scale[0]))
        aspect = math.exp(low + shape * (high - low))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return Window(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
    h, w = height, width
    if width < ratio[0] * height:
        h = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w = max(1, round(height * ratio[1]))
    return Window((height - h) // 2, (width - w) // 2, h, w)


def centre_crop(height: int, width: int) -> Window:
    """The largest centred square."""
    side = min(height, width)
    return Window((height - side) // 2, (width - side) // 2, side, side)
