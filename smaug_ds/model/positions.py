"""Position tables: how they start, and how they are fitted to other picture sizes and other numbers of frames.

Letters: N patches, T frames, D width, R relative places, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

WITHOUT_PLACE = 3  # entries of a bias table after the grid's: class token to patch, patch to class token, to itself


def waves(places: int, width: int) -> Tensor:
    """Sines and cosines of 0 .. ``places`` - 1, (``places``, ``width``), up to 1 (Vaswani et al. 2017, section 3.5).

    The longest wave is a hundred times the shortest, not ten thousand times: a grid or a clip is shorter than a
    sentence, and waves much longer than it are the same everywhere. An odd last column is 0.
    """
    half = width // 2
    angles = torch.arange(places)[:, None] * 100.0 ** (-torch.arange(half) / max(half, 1))
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width - 2 * half))


def grid_waves(patches: int, width: int) -> Tensor:
    """(``patches``, ``width``) for a square grid, row by row: half of the columns wave downwards, the others to the
    right (MAE, appendix A.1).

    Positions drawn at random with a deviation of 0.02, as is usual, are a fiftieth of what an untrained patch embedding
    gives: a model from scratch was still blind to them after 700 steps, and knew colours but no places.

    Raises ValueError when ``patches`` make no square grid.
    """
    side, down = _side(patches), width // 2
    rows = repeat(waves(side, down), "h d -> (h w) d", w=side)
    columns = repeat(waves(side, width - down), "w d -> (h w) d", h=side)
    return torch.cat([rows, columns], dim=1)


def resize_space(table: Tensor, patches: int) -> Tensor:
    """Class token and square grid (1 + N, D) -> (1 + ``patches``, D); the grid bicubic, the class token as it is.

    Raises ValueError when either grid is not square.
    """
    old, new = _side(len(table) - 1), _side(patches)
    grid = rearrange(table[1:].float(), "(h w) d -> 1 d h w", h=old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], rearrange(grid, "1 d h w -> (h w) d").to(table.dtype)])


def resize_time(table: Tensor, frames: int) -> Tensor:
    """(T, D) -> (``frames``, D), linear."""
    line = rearrange(table.float(), "t d -> 1 d t")
    line = F.interpolate(line, size=frames, mode="linear", align_corners=False)
    return rearrange(line, "1 d t -> t d").to(table.dtype)


def resize_bias(table: Tensor, patches: int) -> Tensor:
    """A bias table (R, H) for another square grid, of ``patches``; the grid's part bicubic, the rest as it is.

    Raises ValueError when its size is that of no grid.
    """
    old = round((len(table) - WITHOUT_PLACE) ** 0.5)
    if old * old + WITHOUT_PLACE != len(table) or old % 2 == 0:
        raise ValueError(f"{len(table)} relative places belong to no square grid of patches")
    new = 2 * _side(patches) - 1
    if new == old:
        return table
    grid = rearrange(table[:-WITHOUT_PLACE].float(), "(h w) d -> 1 d h w", h=old)
    # the outermost places stay the outermost: aligned corners
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)
    return torch.cat([rearrange(grid, "1 d h w -> (h w) d").to(table.dtype), table[-WITHOUT_PLACE:]])


def fit_positions(weights: Mapping[str, Tensor], patches: int, frames: int) -> dict[str, Tensor]:
    """``weights`` of a ``SmaugModel`` with its position tables interpolated to so many patches and frames: in space
    bicubic, in time linear. The weights themselves where nothing differs."""
    fitted = dict(weights)
    for name, value in weights.items():
        if name == "vision.position_embedding" and len(value) != 1 + patches:
            fitted[name] = resize_space(value, patches)
        elif name == "pixel_decoder.position_embedding" and len(value) != patches:
            fitted[name] = resize_space(torch.cat([value[:1], value]), patches)[1:]  # it has no class token
        elif name == "temporal.position_embedding" and len(value) != frames:
            fitted[name] = resize_time(value, frames)
        elif name.endswith("attention.position_bias"):
            fitted[name] = resize_bias(value, patches)
    return fitted


def _side(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches make no square grid of positions")
    return side
