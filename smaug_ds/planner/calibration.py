"""How fast a rank computes: from measured steps, or from the data sheet and an assumed share of its peak."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from smaug_ds.config import ConfigError
from smaug_ds.planner.cluster import Machine
from smaug_ds.planner.memory import Precision


@dataclass(frozen=True)
class Measured:
    """One row of a measured profile, see ``rows``."""

    what: str  # "model": steps on random data in one process; "train": a run with its data
    size: str
    frames: int
    frames_kept: int
    batch: int  # of a rank's micro step
    dtype: str  # fp32, bf16
    device: str
    world_size: int
    seconds: float  # of a step, median
    flops: float  # of a rank's step; 0: not told
    parameters: int = 0  # 0: not told
    phases: dict[str, float] = field(default_factory=dict)  # seconds of data, forward, backward, step
    peak_memory: float = 0.0  # bytes
    captions: float = 0.0  # tokens, mean

    @property
    def compute_seconds(self) -> float:
        """Of forward and backward pass."""
        told = [self.phases[name] for name in ("forward", "backward") if name in self.phases]
        return (
            sum(told) if len(told) == 2 else self.seconds - self.phases.get("step", 0.0) - self.phases.get("data", 0.0)
        )


def rows(profile: Any, source: str) -> list[Measured]:
    """The rows of a file that ``tools/profile_throughput.py model|train --json`` wrote.

    Raises ConfigError, naming ``source`` and the row, for what is not such a file.
    """
    if not isinstance(profile, dict) or not isinstance(profile.get("measured"), list):
        raise ConfigError(f'{source}: has no list "measured": name a file that tools/profile_throughput.py train wrote')
    found = []
    for number, row in enumerate(profile["measured"]):
        try:
            found.append(
                Measured(
                    what=row["what"],
                    size=row["size"],
                    frames=int(row["frames"]),
                    frames_kept=int(row["frames_kept"]),
                    batch=int(row["batch"]),
                    dtype=row["dtype"],
                    device=row["device"],
                    world_size=int(row["world_size"]),
                    seconds=float(row["seconds_per_step"]["median"]),
                    flops=float(row.get("flops_per_step") or 0.0),
                    parameters=int(row.get("parameters") or 0),
                    phases={
                        name: float(value) for name, value in (row.get("phases") or {}).items() if value is not None
                    },
                    peak_memory=float(row.get("peak_memory_bytes") or 0.0),
                    captions=float(row.get("caption_tokens_mean") or 0.0),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f'{source}: row {number} of "measured": {type(error).__name__}: {error}') from error
    if not found:
        raise ConfigError(f'{source}: "measured" is empty: measure a step first')
    return found


@dataclass(frozen=True)
class Speed:
    """What a rank does in a second while the other cores of its host are idle."""

    flops: float  # of forward and backward pass
    optimizer: float  # seconds of AdamW for each parameter that the rank holds
    source: str


def of_device(row: Measured, device: str) -> bool:
    """Whether ``row`` was measured on ``cluster.device``: cpu, or a word in the name of a GPU, as in NVIDIA H200."""
    return re.search(rf"\b{re.escape(device)}\b", row.device, re.IGNORECASE) is not None


def speed(
    found: Sequence[Measured], machine: Machine, size: str, frames: int, parameters: int, precision: Precision
) -> Speed:
    """From the measured row that is nearest to the planned step, or, without rows, from ``machine``.

    Of rows of the same device and size it is one in the width of the plan's dtype, 16 or 32 bit, if there is one; then
    that of the fewest ranks, then of the nearest number of frames. A row of another width is taken and ``source`` says
    so. A measured step of one rank also tells what AdamW costs; of several, that time holds the exchange of gradients,
    too.

    Raises ConfigError where all rows are of another device or size.
    """
    device = machine.cluster.device
    assumed = parameter_bytes(precision.mixed) / machine.memory_bytes_s
    if not found:
        return Speed(machine.peak_flops * machine.efficiency, assumed, f"{machine.efficiency:.0%} of the peak")
    here = [row for row in found if of_device(row, device)]
    if not here:
        names = ", ".join(sorted({row.device for row in found}))
        raise ConfigError(f"the profile measured {names}, the plan has cluster.device {device}: measure there")
    of_size = [row for row in here if row.size == size]
    if not of_size:
        sizes = ", ".join(sorted({row.size for row in here}))
        raise ConfigError(f"the profile measured size {sizes}, the plan has model.size {size}: measure that")
    fitting = [row for row in of_size if row.flops]
    if not fitting:
        raise ConfigError("flops_per_step is missing in all rows of the profile: measure anew with this version")
    narrow = precision.activation_bytes == 2
    row = min(
        fitting,
        key=lambda row: (
            (row.dtype != "fp32") != narrow,
            row.world_size,
            abs(row.frames - frames),
            row.what != "train",
        ),
    )
    optimizer = assumed
    if row.world_size == 1 and "step" in row.phases:
        optimizer = row.phases["step"] / (row.parameters or parameters)
    source = f"measured: {row.what}, {row.frames} frames, batch {row.batch}, {row.dtype}, {row.world_size} ranks"
    if (row.dtype != "fp32") != narrow:
        source += f"; the plan computes in {'16' if narrow else '32'} bit, which was not measured"
    return Speed(row.flops / row.compute_seconds, optimizer, source)


def parameter_bytes(mixed: bool) -> float:
    """Bytes that AdamW reads and writes for a parameter: gradient, both moments, weight, and its 16-bit copy."""
    return 4 + 2 * 8 + 2 * 4 + (2 if mixed else 0)
