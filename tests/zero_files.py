"""Checkpoints as a ZeRO run leaves them, written without an engine: flat groups, cut into ranks, with padding."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from smaug_ds.config import to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.engine import checkpoint
from smaug_ds.engine.deepspeed import ZeroStageEnum
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.smaug import SmaugModel


class ZeroFiles:
    """Stands for an engine: its ``save_checkpoint`` writes the files of ``ranks`` ranks.

    Args:
        groups: parameter groups, master weights by name.
        dtype: of the module's weights.
        gap: numbers of padding after every second parameter; None: no such list, as in DeepSpeed's bf16 optimizer.
        extra: further entries of the model's file.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Tensor]],
        ranks: int,
        dtype: torch.dtype = torch.float32,
        gap: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.groups, self.ranks, self.dtype, self.gap, self.extra = groups, ranks, dtype, gap, extra or {}

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool = False) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        module = {name: value.to(self.dtype) for group in self.groups for name, value in group.items()}
        states = {
            "module": OrderedDict(module),
            "buffer_names": [],
            "param_shapes": [
                OrderedDict((name, value.shape) for name, value in group.items()) for group in self.groups
            ],
            "shared_params": {},
            "frozen_param_fragments": None,
        }
        torch.save({**states, **self.extra}, Path(folder) / tag / "mp_rank_00_model_states.pt")
        paddings = [[(self.gap or 0) * (i % 2) for i in range(len(group))] for group in self.groups]
        parts = [self._cut(list(group.values()), gaps) for group, gaps in zip(self.groups, paddings, strict=True)]
        for rank in range(self.ranks):
            own: dict[str, Any] = {
                "loss_scaler": LossScaler(1.0),
                "zero_stage": ZeroStageEnum.gradients,
                "param_slice_mappings": [OrderedDict(first=fragment_address(numel=1, start=0))],
                "single_partition_of_fp32_groups": [torch.nn.Parameter(group[rank]) for group in parts],
                "partition_count": [self.ranks] * len(self.groups),
            }
            if self.gap is not None:
                own["param_alignment_paddings"] = paddings
            name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            prefix = "" if self.gap is not None else "bf16_"
            torch.save({"optimizer_state_dict": own, "ds_version": "0.19.8"}, Path(folder) / tag / f"{prefix}{name}")

    def _cut(self, values: list[Tensor], gaps: list[int]) -> list[Tensor]:
        numbers = [n for v, gap in zip(values, gaps, strict=True) for n in (v.flatten(), torch.full((gap,), 99.0))]
        flat = torch.cat(numbers)
        size = 2 * -(-len(flat) // (2 * self.ranks))  # DeepSpeed rounds the parts up to even sizes
        return [flat[rank * size : (rank + 1) * size].clone() for rank in range(self.ranks)]


def write_run(
    folder: Path,
    model: SmaugModel,
    vocabulary: Path,
    ranks: int,
    dtype: torch.dtype = torch.float32,
    gap: int | None = 0,
) -> Path:
    """A run folder with a checkpoint of ``model`` in two parameter groups; returns the checkpoint."""
    masters = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    groups = [
        {name: value for name, value in masters.items() if (value.ndim > 1) is matrix} for matrix in (True, False)
    ]
    settings = {
        "run": {"seed": 0, "init_from": None},
        "model": to_dict(model.config),
        "data": to_dict(DataConfig(tokenizer=str(vocabulary))),
        "evaluation": to_dict(RetrievalConfig()),
    }
    marks = {"data.tokenizer": hashlib.sha256(vocabulary.read_bytes()).hexdigest()}
    rounded = SmaugModel(model.config)
    rounded.load_state_dict(model.state_dict())
    return checkpoint.save(
        ZeroFiles(groups, ranks, dtype, gap),
        folder / "checkpoints",
        5,
        {"config": settings, "fingerprints": marks},
        {},
        rounded.to(dtype),
        to_dict(model.config),
        keep=1,
    )
