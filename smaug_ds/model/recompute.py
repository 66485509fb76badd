"""Activation checkpointing: less memory for more arithmetic (Chen et al. 2016), and how much more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["layer", "cheap"]
_aten = torch.ops.aten
# Matrix products and attention, whose results "cheap" keeps. What it computes again are norms, activations, dropout and
# casts: hardly any arithmetic, but about half of what a layer holds.
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def recomputed(what: Recompute, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, of which the backward pass computes ``what`` again: a "layer" whole, or only what is
    "cheap". Values and gradients are those of a plain call, dropout included."""
    if what == "layer":
        return checkpoint(function, *arguments, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _KEPT)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)


def require_recompute(section: str, every: int, what: str) -> None:
    """Raises ValueError for settings that ``recomputed`` cannot follow."""
    if every < 0:
        raise ValueError(f"{section}.checkpoint_every is {every}: it must be 0 or more")
    if what not in ("layer", "cheap"):
        raise ValueError(f"{section}.checkpoint_what is {what!r}: it must be layer or cheap")
