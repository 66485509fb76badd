"""Captions without padding: the tokens of all captions one after the other, and where each of them belongs.

Letters: B captions, S tokens of all captions together, L tokens of the longest one, R of them that are wanted,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How (S, ...) packed tokens divide into captions.

    Whatever works on single tokens works on packed ones. Only attention needs captions beside each other: it pads, and
    unpacks what it has attended to. All sizes come from ``lengths`` on the host, so nothing waits for the device.
    """

    lengths: list[int]  # of the B captions, at least 1 token each
    positions: Tensor  # (S,) place of each token in its caption
    first_rows: Tensor  # (B,) row of each caption's first token
    padded_rows: Tensor  # (S,) row of each token among the (B * L) padded ones
    mask: Tensor  # (B, 1, 1, L) True on tokens

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Packing:
        """The packing of captions of these ``lengths``, for tokens on ``device``."""
        count = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        number = torch.arange(len(count), device="cpu")
        longest = max(lengths)
        return cls(
            lengths=list(lengths),
            positions=to_device(_ranges(torch.zeros_like(count), count), device),
            first_rows=to_device(_starts(count), device),
            padded_rows=to_device(_ranges(number * longest, count), device),
            mask=to_device((torch.arange(longest, device="cpu") < count[:, None])[:, None, None], device),
        )

    def pad(self, tokens: Tensor) -> Tensor:
        """(S, ...) -> (B, L, ...), zeros after each caption."""
        batch, longest = self.mask.shape[0], self.mask.shape[-1]
        padded = tokens.new_zeros((batch * longest, *tokens.shape[1:]))
        return padded.index_copy_(0, self.padded_rows, tokens).unflatten(0, (batch, longest))

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, L, ...) -> (S, ...)."""
        return padded.flatten(0, 1).index_select(0, self.padded_rows)

    def captions_of(self, rows: Tensor) -> Tensor:
        """The number of the caption that each of the packed tokens ``rows`` (R,) belongs to, (R,)."""
        return self.padded_rows.index_select(0, rows) // self.mask.shape[-1]

    def first(self, tokens: Tensor) -> Tensor:
        """(S, ...) -> (B, ...), the first token of each caption: the class token."""
        return tokens.index_select(0, self.first_rows)


def pick_captions(tokens: Tensor, lengths: Sequence[int], captions: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The tokens (S', ...) of some ``captions``, in that order, out of ``tokens`` (S, ...), and their lengths.

    A caption may be picked several times.
    """
    count = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    picked = torch.tensor(captions, dtype=torch.int64, device="cpu")
    rows = _ranges(_starts(count)[picked], count[picked])
    return tokens.index_select(0, to_device(rows, tokens.device)), count[picked].tolist()


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """``lengths[i]`` whole numbers from ``starts[i]`` on, for each i, one range after the other."""
    return torch.arange(int(lengths.sum()), device="cpu") + (starts - _starts(lengths)).repeat_interleave(lengths)


def to_device(index: Tensor, device: torch.device | str) -> Tensor:
    """``index`` on ``device``; a copy from pinned memory does not wait for a GPU."""
    pinned = index.pin_memory() if torch.device(device).type == "cuda" and len(index) else index
    return pinned.to(device, non_blocking=True)
