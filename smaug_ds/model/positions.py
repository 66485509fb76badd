"""Position embeddings for other picture sizes and other numbers of frames.

Letters: N patches, T frames, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


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


def _side(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches make no square grid of positions")
    return side
