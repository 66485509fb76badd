"""Windows of random crops against torchvision."""

from __future__ import annotations

import numpy as np
import torch
import torchvision.transforms.v2 as transforms

from smaug_ds.data.clip import Window
from smaug_ds.data.draw import centre_crop, random_resized_crop


def test_crop_windows_are_distributed_as_torchvision_draws_them() -> None:
    generator = np.random.default_rng(0)
    image = torch.zeros(3, 90, 160)
    scale, ratio = (0.3, 1.0), (0.75, 4 / 3)
    ours = np.array([random_resized_crop(90, 160, scale, ratio, generator.random((10, 4))) for _ in range(4000)])
    crop = transforms.RandomResizedCrop(8, scale, ratio)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([(d["top"], d["left"], d["height"], d["width"]) for d in drawn])
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=1.2)
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), atol=1.0)
    assert (ours[:, 0] + ours[:, 2] <= 90).all()
    assert (ours[:, 1] + ours[:, 3] <= 160).all()


def test_crop_windows_of_extreme_frames() -> None:
    uniform = np.random.default_rng(0).random((10, 4))
    assert random_resized_crop(16, 1024, (0.9, 1.0), (0.75, 4 / 3), uniform) == Window(0, 501, 16, 21)
    assert random_resized_crop(1024, 16, (0.9, 1.0), (0.75, 4 / 3), uniform) == Window(501, 0, 21, 16)
    assert random_resized_crop(1, 1, (0.1, 0.2), (0.75, 4 / 3), uniform) == Window(0, 0, 1, 1)
    assert random_resized_crop(1, 500, (0.1, 0.2), (0.75, 4 / 3), uniform).width >= 1
    assert centre_crop(30, 51) == Window(0, 10, 30, 30)
