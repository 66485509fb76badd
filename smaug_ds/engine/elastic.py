"""A checkpoint of one number of ranks into an engine of another.

DeepSpeed's ZeRO divides weights and moments into one part per rank and loads only as many parts as it has ranks. Here
each parameter is put together from the parts of its old owners, one at a time, and every rank copies the piece that it
owns now. No second copy of the checkpoint is written, as DeepSpeed's universal checkpoints are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smaug_ds import distributed
from smaug_ds.data.order import stable_hash
from smaug_ds.exchange.zero import MODEL_STATES, MasterWeights, partition_files, read_states

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def restore_engine(engine: Any, folder: Path) -> None:
    """Weights, moments, schedule and counters of the engine that was saved in ``folder``, whatever its ranks were.

    Raises ValueError naming the file that is missing, damaged or not of ZeRO-1 or -2.
    """
    states = read_states(folder / MODEL_STATES)
    engine.module.load_state_dict(states["module"])
    masters = MasterWeights(folder)
    steps = masters.steps()
    groups = [group["params"][0] for group in engine.optimizer.optimizer.param_groups]  # this rank's part of each
    adam = engine.optimizer.optimizer.state
    if steps is not None:
        for part in groups:
            adam[part] |= {name: torch.zeros_like(part) for name in MOMENTS if name not in adam[part]}
            adam[part]["step"] = _as_kept(steps, engine.optimizer.optimizer, part)
    for name, parameter in engine.module.named_parameters():
        mine = getattr(parameter, "_hp_mapping", None)
        if mine is None:  # frozen, or no piece of it lies on this rank
            continue
        part = groups[mine.param_group_index]
        _copy(masters[name], part.data, mine)
        for kind in MOMENTS if steps is not None else ():
            moment = masters.moment(name, kind)
            assert moment is not None, "all groups have stepped together"
            _copy(moment, adam[part][kind], mine)
    if hasattr(engine.optimizer, "loss_scaler"):  # fp16's goes on where it was: anew it would skip steps
        engine.optimizer.loss_scaler = _read_loss_scaler(folder)
    engine.lr_scheduler.load_state_dict(states["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = states["global_steps"], states["skipped_steps"]
    engine.global_samples = states["global_samples"]


def merge_rank_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Meters and failure budgets of a run's ranks as each rank of another number takes them.

    Of the meters the mean over the old ranks; of the budgets what all old ranks saw, in the order in which they did.
    """
    sums: dict[str, Tensor] = {}
    for state in states:
        for key, value in state["meters"]["sums"].items():
            sums[key] = sums.get(key, torch.zeros_like(value)) + value / len(states)
    counts = dict(states[0]["meters"]["counts"])
    budget = [batch for same_time in zip(*(state["budget"] for state in states), strict=False) for batch in same_time]
    return {"meters": {"sums": sums, "counts": counts}, "budget": budget}


def seed_rank(step: int) -> None:
    """Random states for ranks that are not the ones of the checkpoint: their dropout is other, but as random."""
    torch.manual_seed(stable_hash(f"step {step}, rank {distributed.rank()} of {distributed.world_size()}"))


def _read_loss_scaler(folder: Path) -> Any:
    from smaug_ds.engine.deepspeed import safe_load

    with safe_load():
        state = torch.load(partition_files(folder)[0], map_location="cpu", mmap=True)
    return state["optimizer_state_dict"]["loss_scaler"]


def _as_kept(steps: Tensor, adam: torch.optim.Optimizer, part: Tensor) -> Tensor | int:
    """The number of steps as this AdamW keeps it: DeepSpeed's own as a number, torch's as a tensor, on the device if it
    is fused."""
    if not isinstance(adam, torch.optim.AdamW):
        return int(steps)
    return steps.to(part.device if adam.defaults["fused"] or adam.defaults["capturable"] else "cpu", copy=True)


def _copy(whole: Tensor, part: Tensor, mine: Any) -> None:
    """The piece of ``whole`` that this rank owns to its place in ``part``."""
    here, there = mine.lp_fragment_address, mine.hp_fragment_address
    part.narrow(0, there.start, there.numel).copy_(whole.flatten().narrow(0, here.start, here.numel))
