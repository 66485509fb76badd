"""One run from its start or its last checkpoint to its end, whatever is trained in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from smaug_ds import distributed
from smaug_ds.config import ConfigError, dump, naming, to_dict
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.quarantine import DataError, Failure, Ledger, TooManyFailuresError, merge, read_ledgers
from smaug_ds.data.quarantine import summary as summarise
from smaug_ds.data.sample import MEDIA
from smaug_ds.engine import checkpoint
from smaug_ds.engine.allocator import keep_freed_memory
from smaug_ds.engine.compiled import compile_static
from smaug_ds.engine.deepspeed import build_engine, zero_stage
from smaug_ds.engine.files import Retention
from smaug_ds.engine.inspection import CHECKPOINT_BYTES
from smaug_ds.engine.monitor import Monitor, NonFiniteError, truncate_lines
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.engine.optim import Schedule
from smaug_ds.engine.pictures import make_pictures
from smaug_ds.engine.preempt import EXIT_CODE, StopRequest, stop_time
from smaug_ds.engine.resume import check_resumable, fingerprints
from smaug_ds.engine.saving import SaveError, Saver
from smaug_ds.engine.tasks import Task
from smaug_ds.engine.train import Actions, PretrainConfig, train
from smaug_ds.engine.trained import require_vision
from smaug_ds.engine.watchdog import Watchdog
from smaug_ds.evaluation.held_out import batch_shape
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer

REPORTED = (ConfigError, DataError, NonFiniteError)  # errors that all ranks meet and one line explains
EXIT_CODE_FAILED = 87  # samples or losses fail, and would again: the job scripts do not repeat it
C = TypeVar("C", bound=PretrainConfig)
_LEAST_ROOM = 1 << 16  # bytes that a run folder has to take before anything slow is done


def run(config: C, watchdog: Watchdog, open_task: Callable[[C, Tokenizer], Task]) -> int:
    """Does or resumes the run that ``config`` describes; returns 0, or 85 when told to stop before the end.

    open_task: makes what is trained and measured out of the config, in which by then the vocabulary's size stands.

    Raises ConfigError for what a setting or more room can mend, DataError when too many samples fail, NonFiniteError
    when training has diverged.
    """
    # ---- environment
    device, folder = distributed.device(), Path(config.run.folder)
    if device.type == "cpu":
        keep_freed_memory()  # before gloo has threads
    distributed.init(config.run.timeout_seconds)
    with distributed.agreeing(ConfigError):
        stop_at = stop_time(config.run.wall_minutes, config.run.stop_minutes)
    stop = StopRequest(folder / "stop" if distributed.is_main() else None, stop_at).install()
    seed, micro_size = config.run.seed, config.batch.micro_size
    accumulation = config.batch.accumulation(distributed.world_size())

    # ---- data
    with distributed.agreeing(ConfigError):
        with naming("data.tokenizer"):
            tokenizer = Tokenizer(config.data.tokenizer)
        config = with_vocabulary(config, tokenizer.vocab_size)
        task = open_task(config, tokenizer)
        mixture = task.mixture
        order = mixture.order(config.batch.global_size, seed, config.data.shuffle_group)
        config.batch.require({medium: order.samples(medium) for medium in MEDIA})
        schedule = Schedule.of(config.optim, order.steps_per_epoch, config.run.max_steps)
        shape = batch_shape(config.model, config.loss.mlm_probability)
        ledger = Ledger(folder / "quarantine", distributed.rank())
        loader = TrainLoader(
            mixture.corpus, order, tokenizer, config.data, shape, seed, micro_size, accumulation, device, ledger
        )
        marks = fingerprints(mixture.fingerprint(), tokenizer)
    if mixture.stocks:
        say(f"{config.data.corpus}:\n{mixture.table()}")
    if task.without_evaluation:
        say(f"no evaluation: {task.without_evaluation}")
        if config.run.keep_best:
            raise ConfigError(f"run.keep_best is {config.run.keep_best}, but {task.without_evaluation}")
    require_metric(config.run.keep_best, task.metrics)

    # ---- checkpoint to resume from: looked at before anything slow
    with distributed.agreeing(ConfigError), naming("run.folder"):
        require_writable(folder)
    with naming("run.folder"):
        latest, state = checkpoint.open_latest(folder / "checkpoints", say) or (None, {})
    if latest:
        check_resumable(state, to_dict(config), marks, latest)

    # ---- model
    torch.manual_seed(seed)
    model = SmaugModel(config.model)
    if config.run.init_from and not latest:
        with distributed.agreeing(ConfigError), naming("run.init_from"):
            require_vision(config.run.init_from, config.model)
            taken = checkpoint.initialise(model, task.start(config, checkpoint.load_weights(config.run.init_from)))
        say(f"{config.run.init_from}: {taken}")

    # ---- engine
    objective = task.objective(model)
    if config.run.compile:
        compile_static(model, objective, say)
    engine = build_engine(objective, config.run.deepspeed, config.optim, schedule, micro_size, accumulation)
    torch.manual_seed(seed * 1000 + distributed.rank())  # dropout differs between ranks
    write_configs(folder, config, engine)

    # ---- resume
    first_step, seconds = state.get("step", 0), state.get("wall_seconds", 0.0)
    earlier = [Failure.from_dict(failure) for failure in state.get("quarantine", ())]
    with distributed.agreeing(ConfigError), naming("run.folder"):
        if distributed.is_main():
            for path in ledger.path.parent.glob("*.jsonl"):  # of all ranks that the run ever had
                truncate_lines(path, first_step - 1)
        monitor = Monitor(folder, device, schedule.total_steps, order.global_batch, first_step, seconds)
    if latest:
        rank_state = checkpoint.restore(engine, latest)
        loader.load_state_dict(state["loader"])
        loader.honour(earlier)
        monitor.meters.load_state_dict(rank_state["meters"], device)
        loader.budget.load_state_dict(rank_state["budget"])
        say(f"resumed from {latest}")
        if first_step >= schedule.total_steps:
            say(f"{folder} is finished, all {first_step} steps: to go on raise run.max_steps or optim.epochs")
    settings = config.run
    saver = Saver(
        engine,
        model,
        folder / "checkpoints",
        to_dict(config.model),
        Retention(settings.keep_checkpoints, settings.keep_every),
        settings.keep_best,
        background=settings.save_in_background,
        go_on=settings.on_full_disk == "continue",
        tell=say,
        report=monitor.saved,
    )
    resumed = saver.latest
    if distributed.is_main():
        warn_of_room(folder, CHECKPOINT_BYTES * sum(parameter.numel() for parameter in model.parameters()))

    # ---- loop
    def quarantined() -> list[Failure]:
        # A ledger that was lost on the way takes nothing with it that a checkpoint holds.
        return merge([*earlier, *read_ledgers(ledger.path.parent)]) if distributed.is_main() else []

    def save(step: int) -> None:
        failures = quarantined()
        monitor.scalars(step, summarise(failures))
        run_state = {
            "loader": loader.state_dict(),
            "fingerprints": marks,
            "quarantine": [dataclasses.asdict(failure) for failure in failures],
            "wall_seconds": monitor.wall_seconds(),
            "config": to_dict(config),
            **task.state(),
        }
        monitor.flush()
        saver.begin(step, run_state, {"meters": monitor.meters.state_dict(), "budget": loader.budget.state_dict()})

    def evaluate(step: int) -> dict[str, Any]:
        if task.without_evaluation:
            return {}
        told, report = task.evaluate(model, f"{folder} ({step} steps)")
        say(told)
        monitor.scalars(step, {f"{task.name}/{k}": v for k, v in report.items() if isinstance(v, (int, float))})
        return report

    steps_told = f"{order.steps_per_epoch} steps of {order.global_batch} per epoch, {schedule.total_steps} in all"
    say(f"{len(mixture.corpus)} samples, {steps_told}; decoder {loader.decoder}")
    if accumulation > 1 and isinstance(objective, Pretraining):
        at_once = micro_size * distributed.world_size()
        say(
            f"contrastive and matching losses see batch.micro_size * ranks = {at_once} pairs at a time "
            f"(accumulation {accumulation} does not widen them)"
        )
    actions = Actions(
        finished=watchdog.finished,
        save=save,
        writing=lambda: saver.writing,
        advance=saver.advance,
        evaluate=lambda step: saver.judge(step, evaluate(step)),
        draw=lambda batch: make_pictures(model, batch),
    )
    with loader, watchdog.watching(first_step):
        try:
            steps = train(engine, loader, order, config.run, schedule.total_steps, accumulation, monitor, stop, actions)
        except REPORTED as error:  # all ranks meet them: what is being saved is saved
            if not isinstance(error, SaveError):
                saver.finish()
            raise
        saver.finish()
    stop.clear()
    saved, newest = saver.latest == f"step_{steps}", saver.latest or "none"
    if steps < schedule.total_steps:
        if not saved and saver.latest == resumed:  # another start would do the same steps again, over and over
            raise SaveError(
                f"{folder}: told to stop after step {steps}, but nothing was saved in this start, the latest "
                f"checkpoint is {newest}: make room and start it again"
            )
        told = "saved after" if saved else f"not saved, the latest checkpoint is {newest}; after"
        say(f"told to stop: {told} step {steps} of {schedule.total_steps}, start it again to go on")
        monitor.close()
        return EXIT_CODE
    if not saved:
        raise SaveError(f"{folder}: done, but the last checkpoint is {newest}: make room and start it again")

    # ---- what came of it
    failures = quarantined()
    if failures:
        counts = ", ".join(f"{name.partition('/')[2]} {count:.0f}" for name, count in summarise(failures).items())
        say(f"quarantine: {counts}; see {ledger.path.parent}")
    report = evaluate(steps)
    if report:
        saver.judge(steps, report)
    summary = {
        **monitor.summary(),
        "world_size": distributed.world_size(),
        "zero_stage": zero_stage(engine),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "decoder": str(loader.decoder),
        "quarantined": int(summarise(failures)["quarantine/samples"]),
        task.name: report,
    }
    with distributed.agreeing(ConfigError), naming("run.folder"):
        if distributed.is_main():
            (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    monitor.close()
    stop.clear()  # told too late to stop anything
    return 0


def exit_code(error: Exception) -> int:
    """Of a run that one of ``REPORTED`` has ended: 2 for a setting, 87 for what another start would meet, else 1."""
    if isinstance(error, ConfigError):
        return 2
    return EXIT_CODE_FAILED if isinstance(error, (NonFiniteError, TooManyFailuresError)) else 1


def require_metric(keep_best: str, metrics: Sequence[str]) -> None:
    """Raises ConfigError when the evaluation yields no figure of that name."""
    if keep_best and keep_best not in metrics:
        raise ConfigError(f"run.keep_best is {keep_best}: the evaluation yields {', '.join(metrics)}")


def with_vocabulary(config: C, vocab_size: int) -> C:
    """The config with the tokenizer's vocabulary size in ``model.text.vocab_size``; ConfigError if it names another."""
    text = config.model.text
    if text.vocab_size not in (0, vocab_size):
        raise ConfigError(
            f"model.text.vocab_size is {text.vocab_size}, but data.tokenizer {config.data.tokenizer} has {vocab_size} "
            "entries: leave out model.text.vocab_size or name the tokenizer that belongs to it"
        )
    text = dataclasses.replace(text, vocab_size=vocab_size)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))


def require_writable(folder: Path) -> None:
    """Makes the run folder. Raises ValueError or OSError when it is a file or nothing can be written there."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_LEAST_ROOM))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            free = shutil.disk_usage(folder).free / 1e6
            raise ValueError(f"{folder} cannot be written: {error.strerror} ({free:.1f} MB free)") from error


def warn_of_room(folder: Path, needed: int) -> None:
    """Says when the disk of ``folder`` has no room for a checkpoint of about so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        say(
            f"WARNING: {folder} has {free / 1e6:.1f} MB free, but a checkpoint takes about {needed / 1e6:.1f} MB: "
            "make room before the first one is due"
        )


def write_configs(folder: Path, config: PretrainConfig, engine: Any) -> None:
    """Leaves the whole run config and the whole DeepSpeed config in the run folder."""
    with distributed.agreeing(ConfigError), naming("run.folder"):
        if distributed.is_main():
            dump(config, folder / "config.yaml")
            (folder / "deepspeed.json").write_text(json.dumps(engine.config, indent=2) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Prints on the main rank, above a progress bar if there is one; lost if that goes to a file on a full disk."""
    if distributed.is_main():
        with contextlib.suppress(OSError):
            tqdm.write(text)
            sys.stdout.flush()
