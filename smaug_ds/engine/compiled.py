"""torch.compile of the parts whose shapes stay the same from step to step; captions are packed, so text has no such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._dynamo.utils import counters

from smaug_ds.model.smaug import SmaugModel

_PARTS = ("vision", "temporal", "pixel_decoder")


def compile_static(
    model: SmaugModel, objective: nn.Module, say: Callable[[str], Any], backend: str = "inductor"
) -> None:
    """Compiles the vision, temporal and pixel encoders in place: modules and weights keep their names.

    They are compiled in the first step that uses them, which takes minutes. After the first step of the ``objective``,
    ``say`` is told how many times the graph breaks, and why.
    """
    for name in _PARTS:
        if hasattr(model, name):
            getattr(model, name).compile(backend=backend)
    counters.clear()

    def tell(*_: Any) -> None:
        handle.remove()
        say(told_breaks())

    handle = objective.register_forward_hook(tell)


def told_breaks() -> str:
    """How many graphs were compiled since ``compile_static``, and the reasons for which they end early."""
    graphs, breaks = counters["stats"].get("unique_graphs", 0), counters["graph_break"]
    reasons = "".join(f"\n  {count} x {' '.join(reason.split())[:200]}" for reason, count in breaks.items())
    return f"torch.compile: {graphs} graphs of vision and pixels, {sum(breaks.values())} graph breaks{reasons}"
