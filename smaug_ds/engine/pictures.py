"""Pictures of what the model sees: masked and reconstructed frames, kept tokens, chosen frames, retrieved clips.

Letters: B batch, T frames, N patches, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smaug_ds.data.sample import Batch
from smaug_ds.model.smaug import SmaugModel, VisualOutput
from smaug_ds.model.vision import PIXEL_MEAN, PIXEL_STD, unpatchify

Pixels = NDArray[np.uint8]  # (H, W, 3)

WIDTH, MARGIN, GAP, LINE = 1200, 28, 18, 32  # of a picture, around it, between tiles, of text: pixels
LARGEST = 360  # side of a tile at most, pixels
_ENLARGED = 384  # side of a frame before patches are covered, pixels at least
BACKGROUND, INK, FAINT, GREEN, HIDDEN = (255, 255, 255), (31, 35, 40), (101, 109, 118), (26, 148, 72), (208, 215, 222)
TEXT, SMALL = ImageFont.load_default(22), ImageFont.load_default(17)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Tile:
    """One frame in a picture."""

    pixels: Pixels
    label: str = ""  # below the frame
    marked: bool = False  # framed in green


@torch.no_grad()
def make_pictures(model: SmaugModel, batch: Batch, samples: int = 4) -> dict[str, Pixels]:
    """Pictures of the first ``samples`` of a batch on the model's device, by name; each (H, W, 3), 1200 pixels wide.

    ``reconstruction``: original, masked, reconstructed middle frame. ``kept_tokens``: the patches that survive each
    sparsification. ``chosen_frames``: the frames of a clip with the scores that the caption gives them. What the
    model does not do (no mask, nothing dropped, one frame) gives no picture.
    """
    was_training = model.training
    frames, captions = batch.frames[:samples], batch.captions[:samples]
    pictures = {}
    try:
        model.train()  # masks and drops as training does, whatever is configured for inference; vision has no dropout
        visual = model.encode_frames(frames, batch.patch_noise[:samples])
        if visual.visible_ids is not None:
            pictures["reconstruction"] = _reconstruction(model, visual, frames)
        if visual.layer_ids:
            pictures["kept_tokens"] = _kept_tokens(model, visual, frames, captions)
        model.eval()
        if frames.shape[1] > model.config.frames_kept:
            lengths = batch.lengths[:samples]
            text = model.encode_text(batch.input_ids[: sum(lengths)], lengths)
            choice = model.choose_frames(model.encode_frames(frames, None), text)
            pictures["chosen_frames"] = chosen_frames(frames, choice.scores, choice.chosen, captions)
    finally:
        model.train(was_training)
    return pictures


def _reconstruction(model: SmaugModel, visual: VisualOutput, frames: Tensor) -> Pixels:
    assert visual.visible_ids is not None
    patches = model.patchify(frames)
    predicted = model.reconstruct(visual).float()
    if model.config.decoder.normalise_targets:  # the decoder knows a patch up to its mean and deviation: borrow them
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
        predicted = predicted * deviation + patches.mean(dim=-1, keepdim=True)
    visible = _is_in(visual.visible_ids, patches.shape[2])  # (B, N)
    shown = torch.where(visible[:, None, :, None], patches, predicted)
    pictures, originals = _to_pixels(unpatchify(shown, model.config.vision.patch_size)), _to_pixels(frames)
    middle = frames.shape[1] // 2
    tiles = []
    for original, picture, seen in zip(originals, pictures, visible, strict=True):
        tiles += [Tile(original[middle]), Tile(_hide(original[middle], seen, shine=0.0)), Tile(picture[middle])]
    headings = ["original", f"{100 - 100 * float(visible[0].float().mean()):.0f} % masked", "reconstruction"]
    return sheet([("", tiles[start : start + 6]) for start in range(0, len(tiles), 6)], headings * 2)


def _kept_tokens(model: SmaugModel, visual: VisualOutput, frames: Tensor, captions: Sequence[str]) -> Pixels:
    originals = _to_pixels(frames)
    middle, count = frames.shape[1] // 2, model.config.vision.patches
    layers = [_is_in(ids[:, middle], count) for ids in visual.layer_ids]
    names = [f"after layer {layer}" for layer in sorted(model.config.vision.sparsify_layers)]
    if visual.visible_ids is not None:
        layers, names = [_is_in(visual.visible_ids, count), *layers], ["seen", *names]
    headings = ["original"] + [f"{name}: {int(kept[0].sum())}" for name, kept in zip(names, layers, strict=True)]
    rows = []
    for i, caption in enumerate(captions):
        image = originals[i][middle]
        rows.append((caption, [Tile(image), *(Tile(_hide(image, kept[i], shine=0.15)) for kept in layers)]))
    return sheet(rows, headings)


def _is_in(ids: Tensor, count: int) -> Tensor:
    """(B, K) patch ids -> (B, N) whether a patch is among them; the id N of a fused token has no place."""
    places = torch.zeros((len(ids), count + 1), dtype=torch.bool, device=ids.device)
    return places.scatter(1, ids, True)[:, :count]


def _to_pixels(frames: Tensor) -> Pixels:
    """uint8, or CLIP-normalised float, (B, T, 3, H, W) -> uint8 (B, T, H, W, 3)."""
    if frames.dtype != torch.uint8:
        mean, std = (frames.new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        frames = ((frames * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return frames.permute(0, 1, 3, 4, 2).cpu().numpy()


def _hide(image: Pixels, shown: Tensor, shine: float) -> Pixels:
    """``image`` with the patches not ``shown`` (N,) covered; ``shine`` of them still shows through. It is enlarged
    first, so that the patches' edges stay sharp."""
    grid = round(len(shown) ** 0.5)
    enlarged = -(-_ENLARGED // len(image)) * len(image)
    large = np.asarray(_resized(image, enlarged), dtype=np.float32)
    patch = enlarged // grid
    keep = np.kron(shown.cpu().numpy().reshape(grid, grid), np.ones((patch, patch)))[..., None]
    covered = shine * large + (1 - shine) * np.array(HIDDEN, dtype=np.float32)
    return np.where(keep, large, covered).round().astype(np.uint8)


def chosen_frames(frames: Tensor, scores: Tensor, chosen: Tensor, captions: Sequence[str]) -> Pixels:
    """All ``frames`` (B, T, 3, H, W) uint8 of each clip under its caption, each with its share of the softmax over
    ``scores`` (B, T); the ``chosen`` (B, k) ones framed in green."""
    shares = torch.softmax(scores.float(), dim=1).tolist()
    rows = []
    for images, share, picked, caption in zip(_to_pixels(frames), shares, chosen.tolist(), captions, strict=True):
        tiles = [Tile(image, f"{100 * share[t]:.0f} %", marked=t in picked) for t, image in enumerate(images)]
        rows.append((caption, tiles))
    return sheet(rows)


def retrieval_sheet(
    queries: Sequence[str], ranked: Sequence[Sequence[Pixels]], correct: Sequence[Sequence[bool]]
) -> Pixels:
    """Each query above the frames that were ranked first for it, the ``correct`` ones framed in green."""
    rows = []
    for query, images, flags in zip(queries, ranked, correct, strict=True):
        tiles = [
            Tile(image, f"{place}   right clip" if flag else str(place), marked=flag)
            for place, (image, flag) in enumerate(zip(images, flags, strict=True), start=1)
        ]
        rows.append((f"“{query}”", tiles))
    return sheet(rows)


def sheet(rows: Sequence[tuple[str, Sequence[Tile]]], headings: Sequence[str] = ()) -> Pixels:
    """Rows of square tiles, each row under its caption (if it has one), ``headings`` above the columns."""
    columns = max(len(tiles) for _, tiles in rows)
    pitch = (WIDTH - 2 * MARGIN + GAP) // columns
    side = min(pitch - GAP, LARGEST)
    captions = [_wrap(caption, TEXT, WIDTH - 2 * MARGIN, lines=2) if caption else [] for caption, _ in rows]
    label = LINE if any(tile.label for _, tiles in rows for tile in tiles) else 0
    heights = [len(lines) * LINE + side + label + MARGIN for lines in captions]
    top = MARGIN + (LINE if headings else 0)
    canvas = Image.new("RGB", (WIDTH, top + sum(heights)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    lefts = [MARGIN + column * pitch for column in range(columns)]
    for left, heading in zip(lefts, headings, strict=False):  # the last row of tiles may be short, so may the headings
        draw.text((left, MARGIN - 4), _cut(heading, SMALL, side), FAINT, SMALL)
    for (_, tiles), lines, height in zip(rows, captions, heights, strict=True):
        for number, words in enumerate(lines):
            draw.text((MARGIN, top + number * LINE - 4), words, INK, TEXT)
        upper = top + len(lines) * LINE
        for left, tile in zip(lefts, tiles, strict=False):
            if tile.marked:
                draw.rounded_rectangle((left - 5, upper - 5, left + side + 4, upper + side + 4), 8, fill=GREEN)
            canvas.paste(_resized(tile.pixels, side), (left, upper))
            draw.text((left, upper + side + 8), tile.label, GREEN if tile.marked else FAINT, SMALL)
        top += height
    return np.asarray(canvas)


def _resized(pixels: Pixels, side: int) -> Image.Image:
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def _wrap(words: str, font: Font, width: int, lines: int) -> list[str]:
    """The text in at most ``lines`` lines of ``width`` pixels, the last one cut."""
    rows = [""]
    for word in words.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width or not rows[-1] or len(rows) == lines:
            rows[-1] = longer
        else:
            rows.append(word)
    return [_cut(row, font, width) for row in rows]


def _cut(words: str, font: Font, width: int) -> str:
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + " ...") > width:
        words = words[:-1]
    return words.rstrip() + " ..."
