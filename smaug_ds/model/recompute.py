"""Activation checkpointing: less memory for more arithmetic (Chen et al. 2016), and how much more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["layer", "cheap"]
_aten = torch.ops.aten
# Matrix products and attention without dropout, whose results "cheap" keeps. What it computes again are norms,
# activations, dropout and casts: hardly any arithmetic, but about half of what a layer holds.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def recomputed(what: Recompute, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, of which the backward pass computes ``what`` again: a "layer" whole, or only what is
    "cheap". Values and gradients are those of a plain call, dropout included.

    Fused attention that drops weights itself, as on a GPU, is computed again, too: it draws from the generator, and
    were its result taken from the first time, all that is dropped after it would be drawn from another place.
    """
    if what == "layer":
        return checkpoint(function, *arguments, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)


def _policy(_: SelectiveCheckpointContext, op: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    keep = op in _KEPT and not _dropout(op, arguments, named)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _dropout(op: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> float:
    """The share that ``op`` drops itself; the dispatcher leaves defaults out, and here that is none."""
    names = [argument.name for argument in op._schema.arguments]
    if "dropout_p" not in names:
        return 0.0
    return float({**dict(zip(names, arguments, strict=False)), **named}.get("dropout_p", 0.0))


def require_recompute(section: str, every: int, what: str) -> None:
    """Raises ValueError for settings that ``recomputed`` cannot follow."""
    if every < 0:
        raise ValueError(f"{section}.checkpoint_every is {every}: it must be 0 or more")
    if what not in ("layer", "cheap"):
        raise ValueError(f"{section}.checkpoint_what is {what!r}: it must be layer or cheap")
