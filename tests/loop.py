"""The training loop over the stand-in of tests/standin.py, as ranks run it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smaug_ds import distributed
from smaug_ds.data.quarantine import DataError
from smaug_ds.engine import checkpoint
from smaug_ds.engine.deepspeed import build_engine
from smaug_ds.engine.files import Retention
from smaug_ds.engine.monitor import Monitor, NonFiniteError
from smaug_ds.engine.optim import OptimConfig, Schedule
from smaug_ds.engine.preempt import StopRequest
from smaug_ds.engine.saving import Saver
from smaug_ds.engine.train import Actions, RunConfig, train
from tests.standin import CPU_JSON, Batches, Standin, order_of

TOTAL, GLOBAL, MICRO, ACCUMULATION = 9, 8, 2, 2  # of 2 ranks
OPTIM = OptimConfig(lr=0.01, min_lr=0.0, warmup_steps=2)


def run(
    folder: Path,
    module: Standin,
    stop_at: int = -1,
    log_every: int = 1,
    total: int = TOTAL,
    lose_at: int = -1,
    json: Path = CPU_JSON,
) -> dict[str, Any]:
    """Trains the stand-in from its latest checkpoint on, ``total`` steps in all; the last rank is told to stop once
    step ``stop_at`` is logged, and has no data for the second micro step of step ``lose_at``."""
    schedule = Schedule.of(OPTIM, 1, total)
    micro = 2 * MICRO // distributed.world_size()
    engine = build_engine(module, json, OPTIM, schedule, micro, ACCUMULATION)
    torch.manual_seed(distributed.rank())
    latest, state = checkpoint.open_latest(folder, print) or (None, {"step": 0})
    first_step = state["step"]
    if distributed.is_main():
        folder.mkdir(exist_ok=True)
    distributed.barrier()
    monitor = Monitor(folder, engine.device, total, GLOBAL, first_step)
    if latest:
        monitor.meters.load_state_dict(checkpoint.restore(engine, latest)["meters"], engine.device)
    order, stop = order_of(GLOBAL), StopRequest()
    calls: dict[str, list[int]] = {"finished": [], "save": [], "evaluate": [], "draw": []}
    saver = Saver(engine, module, folder, {}, Retention(9))

    def save(step: int) -> None:
        calls["save"].append(step)
        saver.begin(step, {}, {"meters": monitor.meters.state_dict(), "budget": []})

    def evaluate(step: int) -> bool:
        calls["evaluate"].append(step)
        return False

    def draw(batch: Any) -> dict[str, np.ndarray]:
        calls["draw"].append(batch.step + 1)
        return {"gray": np.zeros((4, 4, 3), np.uint8)}

    is_last = distributed.rank() == distributed.world_size() - 1

    class Signalled(Batches):
        def __iter__(self) -> Any:
            for number, batch in enumerate(super().__iter__()):
                if is_last and batch.step + 1 == lose_at and number % ACCUMULATION == 1:
                    raise DataError("too many samples fail")
                if is_last and batch.step + 1 == stop_at:
                    stop._handle(signal.SIGUSR1, None)
                yield batch

    batches = Signalled(order, micro, ACCUMULATION, first_step)
    config = RunConfig(log_every=log_every, save_every=4, picture_every=5, evaluate_every=3)
    actions = Actions(calls["finished"].append, save, lambda: saver.writing, saver.advance, evaluate, draw)
    try:
        done = train(engine, batches, order, config, total, ACCUMULATION, monitor, stop, actions)
        error = None
    except (NonFiniteError, DataError) as caught:
        done, error = -1, str(caught)
    saver.finish()
    monitor.close()
    weights = {name: value.float().numpy() for name, value in module.state_dict().items()}
    return {"done": done, "error": error, "weights": weights, **calls}
