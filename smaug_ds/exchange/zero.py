"""fp32 master weights and Adam's moments out of what DeepSpeed's ZeRO-1 and -2 engines save, without DeepSpeed.

Each rank keeps its part of the optimizer state in a file of its own. Per parameter group, the ranks' parts one after
the other are the group's weights, flat and in the order of ``param_shapes``, with padding between parameters where
``param_alignment_paddings`` says so and at the end (DeepSpeed 0.19, ``deepspeed/runtime/zero/stage_1_and_2.py`` and
``runtime/bf16_optimizer.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smaug_ds.exchange.unpickle import read_pickle

MODEL_STATES = "mp_rank_00_model_states.pt"
_PARTITION = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_HUSKS = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class _Place(NamedTuple):
    """Where a parameter stands among all numbers of its group."""

    group: int
    start: int
    shape: tuple[int, ...]


class MasterWeights(Mapping[str, Tensor]):
    """The master weights of an engine's folder by parameter name; each look-up reads one tensor from the files.

    Names that share a weight both give it. Frozen parameters and buffers, which ZeRO does not divide, are here, too.
    Raises ValueError naming the file or parameter: a rank's file is missing or cannot be read, it is not of ZeRO-1 or
    -2, or the parts do not add up to the parameters.
    """

    def __init__(self, folder: Path) -> None:
        states = read_states(folder / MODEL_STATES)
        ranks = [_read(file, "optimizer_state_dict")["optimizer_state_dict"] for file in partition_files(folder)]
        for rank, state in enumerate(ranks):
            if "single_partition_of_fp32_groups" not in state:
                raise ValueError(f"{folder}: rank {rank}'s file holds no weights of ZeRO stage 1 or 2")
            counts = state["partition_count"]
            wanted = max(counts) if isinstance(counts, list) else counts
            if wanted != len(ranks):
                raise ValueError(f"{folder}: rank {rank} was one of {wanted} ranks, but there are {len(ranks)} files")
        self._parts = list(zip(*(state["single_partition_of_fp32_groups"] for state in ranks), strict=True))
        self._adam = [state.get("base_optimizer_state", {}).get("state", {}) for state in ranks]
        self._places = _places(states["param_shapes"], ranks[0].get("param_alignment_paddings"))
        self._require_complete(folder)
        whole = {name: states["module"][name] for name in states["buffer_names"]}
        self._whole: dict[str, Tensor] = {**whole, **(states.get("frozen_param_fragments") or {})}
        self._aliases: dict[str, str] = dict(states.get("shared_params") or {})

    def __getitem__(self, name: str) -> Tensor:
        name = self._aliases.get(name, name)
        if name in self._whole:
            return self._whole[name].detach().float()
        place = self._places[name]
        return _flat(self._parts[place.group], place.start, math.prod(place.shape)).view(place.shape)

    def moment(self, name: str, kind: str) -> Tensor | None:
        """A moment of Adam's ("exp_avg", "exp_avg_sq") in the shape of the weight; None before the first step."""
        place = self._places[self._aliases.get(name, name)]
        if not all(place.group in state for state in self._adam):
            return None
        parts = [state[place.group][kind] for state in self._adam]  # padded at the end, which moves nothing
        return _flat(parts, place.start, math.prod(place.shape)).view(place.shape)

    def steps(self) -> Tensor | None:
        """Steps that Adam has taken, a float32 scalar; None before the first."""
        return torch.tensor(float(self._adam[0][0]["step"])) if self._adam[0] else None

    def __iter__(self) -> Iterator[str]:
        yield from self._places
        yield from self._whole
        yield from self._aliases

    def __len__(self) -> int:
        return len(self._places) + len(self._whole) + len(self._aliases)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, without reading it."""
        name = self._aliases.get(name, name)
        return tuple(self._whole[name].shape) if name in self._whole else self._places[name].shape

    def _require_complete(self, folder: Path) -> None:
        groups = {place.group for place in self._places.values()}
        if groups != set(range(len(self._parts))):
            raise ValueError(f"{folder}: parameters in {len(groups)} groups, but weights in {len(self._parts)}")
        for name, place in self._places.items():
            held = sum(part.numel() for part in self._parts[place.group])
            end = place.start + math.prod(place.shape)
            if end > held:
                raise ValueError(f"{folder}: {name} ends at number {end} of its group, but the ranks hold {held}")


def _flat(parts: Sequence[Tensor], start: int, count: int) -> Tensor:
    """Numbers ``start`` to ``start + count`` of a group, (count,), from as many ranks' parts as they lie on."""
    pieces, offset = [], 0
    for part in parts:
        low, high = max(start, offset), min(start + count, offset + part.numel())
        if low < high:
            pieces.append(part.detach()[low - offset : high - offset])
        offset += part.numel()
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def partition_files(folder: Path) -> list[Path]:
    """The files of ranks 0, 1, ... in that order."""
    found = {int(match[1]): path for path in folder.glob("*.pt") if (match := _PARTITION.fullmatch(path.name))}
    if not found:
        raise ValueError(
            f"{folder} holds no optimizer files of ZeRO, such as zero_pp_rank_0_mp_rank_00_optim_states.pt"
        )
    missing = sorted(set(range(max(found) + 1)) - found.keys())
    if missing:
        raise ValueError(f"{folder} holds the files of ranks {sorted(found)}, but not of {missing}: copy them there")
    return [found[rank] for rank in range(len(found))]


def _places(shapes: list[Mapping[str, Any]], paddings: list[list[int]] | None) -> dict[str, _Place]:
    places = {}
    for group, parameters in enumerate(shapes):
        start = 0
        between = paddings[group] if paddings else [0] * len(parameters)
        for (name, shape), padding in zip(parameters.items(), between, strict=True):
            places[name] = _Place(group, start, tuple(shape))
            start += math.prod(shape) + padding
    return places


def read_states(path: Path) -> dict[str, Any]:
    """What an engine saves beside the divided weights: the module in its own type, the schedule, counters."""
    return _read(path, "param_shapes")


def _read(path: Path, key: str) -> dict[str, Any]:
    content = read_pickle(path, _HUSKS, mmap=True)
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{path} is not a file of a ZeRO engine: it has no {key}")
    return content
