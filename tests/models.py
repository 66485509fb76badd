"""Small models and batches for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from smaug_ds.data.sample import Batch, Medium
from smaug_ds.model.smaug import ModelConfig, SmaugModel

VOCABULARY = 50


def small_config(frames: int = 1, frames_kept: int = 1, **vision: Any) -> ModelConfig:
    """Three layers, 32 wide, 16 patches of 8 pixels."""
    tiny = ModelConfig.of_size("tiny")
    vision = {"width": 32, "mlp_width": 64, "depth": 3, "image_size": 32, "sparsify_layers": (1, 2), **vision}
    return dataclasses.replace(
        tiny,
        frames=frames,
        frames_kept=frames_kept,
        projection=16,
        vision=dataclasses.replace(tiny.vision, **vision),
        decoder=dataclasses.replace(tiny.decoder, width=32, depth=1),
        selector=dataclasses.replace(tiny.selector, mlp_width=64),
        text=dataclasses.replace(
            tiny.text, vocab_size=VOCABULARY, width=32, mlp_width=64, text_layers=2, fusion_layers=1, max_length=12
        ),
    )


def small_model(config: ModelConfig | None = None, seed: int = 0) -> SmaugModel:
    """A model with seeded weights, none of them zero, so that no part of it can hide."""
    torch.manual_seed(seed)
    model = SmaugModel(config or small_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter is not model.logit_scale and parameter is not model.logit_bias:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def random_batch(config: ModelConfig, size: int = 8, seed: int = 0, lengths: list[int] | None = None) -> Batch:
    """Noise for frames and words, captions of ``lengths`` tokens; the second pair repeats the media of the first."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    side, length = config.vision.image_size, config.text.max_length
    medium: Medium = "image" if config.frames == 1 else "video"
    lengths = lengths or torch.randint(5, length + 1, (size,), generator=generator).tolist()
    is_token = torch.arange(length) < torch.tensor(lengths)[:, None]
    input_ids = torch.randint(5, VOCABULARY, (size, length), generator=generator)[is_token]
    hidden = uniform(size, length) < 0.3
    hidden[:, 1] = True
    hidden = hidden[is_token]
    media_ids = torch.arange(size)
    media_ids[1] = media_ids[0]
    return Batch(
        step=0,
        medium=medium,
        frames=(uniform(size, config.frames, 3, side, side) * 256).to(torch.uint8),
        lengths=lengths,
        input_ids=input_ids,
        masked_ids=torch.where(hidden, 4, input_ids),
        mlm_labels=torch.where(hidden, input_ids, -100),
        mlm_positions=hidden.nonzero().squeeze(1),
        media_ids=media_ids,
        patch_noise=uniform(size, config.vision.patches),
        frame_noise=uniform(size, config.frames),
        negative_noise=uniform(size, 2),
        keys=[f"shard/{row}" for row in range(size)],
        captions=["" for _ in range(size)],
        all_captions=[("",) for _ in range(size)],
    )


def share(batch: Batch, rank: int, world_size: int) -> Batch:
    """The rows of ``rank`` out of ``world_size`` equal parts."""
    size = len(batch) // world_size
    rows = slice(rank * size, (rank + 1) * size)
    tokens = slice(sum(batch.lengths[: rows.start]), sum(batch.lengths[: rows.stop]))
    packed = ("input_ids", "masked_ids", "mlm_labels")
    parts = {
        field.name: value[tokens if field.name in packed else rows]
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), (torch.Tensor, list))
    }
    parts["mlm_positions"] = (parts["mlm_labels"] != -100).nonzero().squeeze(1)
    return dataclasses.replace(batch, **parts)
