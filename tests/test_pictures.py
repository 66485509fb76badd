"""Pictures: what they show is what the model saw."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from smaug_ds.data.sample import Batch
from smaug_ds.engine import pictures
from smaug_ds.engine.pictures import GREEN, LARGEST, MARGIN, Tile, chosen_frames, make_pictures, retrieval_sheet, sheet
from smaug_ds.model.smaug import SmaugModel, VisualOutput
from tests.models import random_batch, small_config, small_model


@pytest.fixture
def model() -> SmaugModel:
    return small_model(small_config(4, 2))


@pytest.fixture
def batch(model: SmaugModel) -> Batch:
    return random_batch(model.config, 5)


def is_green(picture: np.ndarray) -> np.ndarray:
    return (picture == np.array(GREEN)).all(axis=-1)


def plain(value: int) -> np.ndarray:
    return np.full((32, 32, 3), value, dtype=np.uint8)


def test_all_pictures(model: SmaugModel, batch: Batch) -> None:
    model.train()
    made = make_pictures(model, batch)
    assert set(made) == {"reconstruction", "kept_tokens", "chosen_frames"}
    for picture in made.values():
        assert picture.dtype == np.uint8 and picture.ndim == 3
        assert picture.shape[1] >= 1000 and picture.shape[2] == 3
    assert model.training


def test_only_what_the_model_does() -> None:
    single = small_model(small_config(1, 1))
    assert set(make_pictures(single, random_batch(single.config, 2))) == {"reconstruction", "kept_tokens"}
    plain_model = small_model(small_config(1, 1, mask_ratio=0.0, sparsify_layers=()))
    assert make_pictures(plain_model, random_batch(plain_model.config, 2)) == {}


def test_kept_tokens_even_if_inference_keeps_all(batch: Batch) -> None:
    model = small_model(small_config(4, 2, sparsify_at_inference=False)).eval()
    assert "kept_tokens" in make_pictures(model, batch)
    assert not model.training


@pytest.mark.parametrize("normalise", [False, True])
def test_reconstruction_keeps_what_was_seen(
    model: SmaugModel, batch: Batch, monkeypatch: pytest.MonkeyPatch, normalise: bool
) -> None:
    """A decoder that predicts masked patches exactly, and nonsense elsewhere, gives the original back; masked tiles
    hide masked patches."""
    decoder = dataclasses.replace(model.config.decoder, normalise_targets=normalise)
    model.config = dataclasses.replace(model.config, decoder=decoder)

    def reconstruct(visual: VisualOutput) -> torch.Tensor:
        predicted = model.pixel_targets(batch.frames[:4])
        assert visual.visible_ids is not None
        for sample, seen in enumerate(visual.visible_ids):
            predicted[sample, :, seen] = 9.0
        return predicted

    monkeypatch.setattr(model, "reconstruct", reconstruct)
    rows = []
    monkeypatch.setattr(pictures, "sheet", lambda shown, headings=(): rows.extend(shown) or plain(0))
    made = make_pictures(model, dataclasses.replace(batch, captions=[""] * 5))
    assert "reconstruction" in made
    tiles = [tile for _, row in rows[:2] for tile in row]
    for sample in range(4):
        original, masked, rebuilt = (tile.pixels for tile in tiles[3 * sample : 3 * sample + 3])
        assert np.array_equal(original, batch.frames[sample, 2].permute(1, 2, 0).numpy())
        assert np.abs(rebuilt.astype(int) - original).max() <= 1
        cells = masked.reshape(4, masked.shape[0] // 4, 4, masked.shape[1] // 4, 3)
        covered = (cells == np.array(pictures.HIDDEN)).all(axis=(1, 3, 4)).reshape(16)
        noise = batch.patch_noise[sample].numpy()
        assert set(np.flatnonzero(covered)) == set(np.argsort(noise)[8:])


def test_chosen_frames_are_framed() -> None:
    frames = torch.zeros((1, 4, 3, 32, 32), dtype=torch.uint8)
    scores = torch.tensor([[0.0, 3.0, 0.0, 2.0]])
    picture = chosen_frames(frames, scores, torch.tensor([[1, 3]]), ["a caption"])
    green = is_green(picture).any(axis=0)
    assert not green[:MARGIN].any()
    edges = np.flatnonzero(np.diff(green.astype(int)) == 1)
    assert len(edges) == 2  # frames 1 and 3
    pitch = (1200 - 2 * MARGIN + 18) // 4
    assert [round((edge - MARGIN) / pitch) for edge in edges] == [1, 3]


def test_retrieval_sheet_marks_the_right_clip() -> None:
    picture = retrieval_sheet(
        ["one", "two"], [[plain(10 * i) for i in range(5)]] * 2, [[False] * 5, [True] + [False] * 4]
    )
    green = is_green(picture)
    assert not green[: picture.shape[0] // 2].any()
    assert green[picture.shape[0] // 2 :, : picture.shape[1] // 5 + MARGIN].any()
    assert not green[:, picture.shape[1] // 4 :].any()


def test_sheet_layout() -> None:
    short = sheet([("", [Tile(plain(0))])])
    assert short.shape == (2 * MARGIN + LARGEST, 1200, 3)
    assert (short[MARGIN : MARGIN + LARGEST, MARGIN : MARGIN + LARGEST] == 0).all()
    long = sheet([("word " * 200, [Tile(plain(0))])])
    assert long.shape[0] == short.shape[0] + 2 * 32  # two lines of the caption, no more
    ragged = sheet([("a", [Tile(plain(0))] * 3), ("b", [Tile(plain(0))])], ["x"])
    assert (ragged == 0).all(axis=-1).any()
