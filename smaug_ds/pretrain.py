"""Pre-trains SMAUG: either stage, any number of ranks.

    deepspeed --module smaug_ds.pretrain --config FILE key=value ...

A run in ``run.folder`` that was broken off goes on from its last checkpoint. Exit codes: 0 finished, 85 told to stop
and saved (start it again), 2 a setting is wrong, 1 anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from smaug_ds import distributed
from smaug_ds.config import ConfigError, add_arguments, dump, naming, parse, to_dict
from smaug_ds.data.loader import EvalLoader, TrainLoader
from smaug_ds.data.mixture import open_mixture
from smaug_ds.data.quarantine import DataError, Failure, Ledger, read_ledgers
from smaug_ds.data.sample import MEDIA
from smaug_ds.engine import checkpoint
from smaug_ds.engine.deepspeed import build_engine, zero_stage
from smaug_ds.engine.monitor import Monitor, NonFiniteError, truncate_lines
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.engine.optim import Schedule
from smaug_ds.engine.pictures import make_pictures
from smaug_ds.engine.preempt import EXIT_CODE, StopRequest
from smaug_ds.engine.resume import check_resumable, fingerprints
from smaug_ds.engine.train import Actions, PretrainConfig, train
from smaug_ds.evaluation.held_out import batch_shape, open_held_out
from smaug_ds.evaluation.retrieval import evaluate
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can mend is one line on standard error."""
    parser = argparse.ArgumentParser(prog="smaug_ds.pretrain", description="Pre-trains SMAUG.")
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    try:
        return pretrain(parse(PretrainConfig, options.config, options.overrides))
    except (ConfigError, DataError, NonFiniteError) as error:
        distributed.print_error(error)  # all ranks raise it, see distributed.agreeing
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        distributed.shutdown()


def pretrain(config: PretrainConfig) -> int:
    """Does or resumes the run that ``config`` describes; returns 0, or 85 when told to stop before the end.

    Raises ConfigError for what a setting can mend, DataError when too many samples fail, NonFiniteError when training
    has diverged.
    """
    # ---- environment
    distributed.init(config.run.timeout_seconds)
    stop = StopRequest().install()
    device, folder = distributed.device(), Path(config.run.folder)
    seed, micro_size = config.run.seed, config.batch.micro_size
    accumulation = config.batch.accumulation(distributed.world_size())

    # ---- data
    held_out: EvalLoader | None = None
    with distributed.agreeing(ConfigError):
        with naming("data.tokenizer"):
            tokenizer = Tokenizer(config.data.tokenizer)
        config = with_vocabulary(config, tokenizer.vocab_size)
        mixture = open_mixture(config.data)
        order = mixture.order(config.batch.global_size, seed, config.data.shuffle_group)
        config.batch.require({medium: order.samples(medium) for medium in MEDIA})
        schedule = Schedule.of(config.optim, order.steps_per_epoch, config.run.max_steps)
        shape = batch_shape(config.model, config.loss.mlm_probability)
        ledger = Ledger(folder / "quarantine", distributed.rank())
        loader = TrainLoader(
            mixture.corpus, order, tokenizer, config.data, shape, seed, micro_size, accumulation, device, ledger
        )
        if config.evaluation.split == "train" or config.data.test or config.data.holdout:
            aside = Ledger(folder / "evaluation", distributed.rank())
            held_out = open_held_out(config.model, config.data, config.evaluation, tokenizer, device, aside)
        marks = fingerprints(mixture.fingerprint(), tokenizer)
    if mixture.stocks:
        say(f"{config.data.corpus}:\n{mixture.table()}")
    if held_out is None:
        say("no evaluation: neither data.test nor data.holdout is set")

    # ---- checkpoint to resume from: looked at before anything slow
    state: dict[str, Any] = {}
    with distributed.agreeing(ConfigError), naming("run.folder"):
        require_writable(folder)
        latest = checkpoint.latest(folder / "checkpoints")
    if latest:
        with naming("run.folder"):
            state = checkpoint.read_state(latest)
        check_resumable(state, to_dict(config), marks, latest)

    # ---- model
    torch.manual_seed(seed)
    model = SmaugModel(config.model)
    if config.run.init_from and not latest:
        with distributed.agreeing(ConfigError), naming("run.init_from"):
            taken = checkpoint.initialise(model, checkpoint.load_weights(config.run.init_from))
        say(f"{config.run.init_from}: {taken}")

    # ---- engine
    module = Pretraining(model, config.loss)
    engine = build_engine(module, config.run.deepspeed, config.optim, schedule, micro_size, accumulation)
    torch.manual_seed(seed * 1000 + distributed.rank())  # dropout differs between ranks
    write_configs(folder, config, engine)

    # ---- resume
    first_step, seconds = state.get("step", 0), state.get("wall_seconds", 0.0)
    truncate_lines(ledger.path, first_step - 1)
    monitor = Monitor(folder, device, schedule.total_steps, order.global_batch, first_step, seconds)
    if latest:
        rank_state = checkpoint.restore(engine, latest)
        loader.load_state_dict(state["loader"])
        monitor.meters.load_state_dict(rank_state["meters"], device)
        say(f"resumed from {latest}")

    # ---- loop
    def quarantined() -> list[Failure]:
        return read_ledgers(ledger.path.parent) if distributed.is_main() else []

    def save(step: int) -> None:
        run_state = {
            "loader": loader.state_dict(),
            "fingerprints": marks,
            "quarantine": [dataclasses.asdict(failure) for failure in quarantined()],
            "wall_seconds": monitor.wall_seconds(),
            "config": to_dict(config),
        }
        own = {"meters": monitor.meters.state_dict()}
        keep = config.run.keep_checkpoints
        checkpoint.save(engine, folder / "checkpoints", step, run_state, own, model, to_dict(config.model), keep)

    def retrieval(step: int) -> dict[str, Any]:
        if held_out is None:
            return {}
        result = evaluate(model, held_out, tokenizer, config.evaluation, f"{folder} ({step} steps)")
        say(result.table())
        report = result.report()
        monitor.scalars(step, {f"retrieval/{k}": v for k, v in report.items() if isinstance(v, (int, float))})
        return report

    steps_told = f"{order.steps_per_epoch} steps of {order.global_batch} per epoch, {schedule.total_steps} in all"
    say(f"{len(mixture.corpus)} samples, {steps_told}; decoder {loader.decoder}")
    if accumulation > 1:
        at_once = micro_size * distributed.world_size()
        say(
            f"contrastive and matching losses see batch.micro_size * ranks = {at_once} pairs at a time "
            f"(accumulation {accumulation} does not widen them)"
        )
    actions = Actions(save=save, evaluate=retrieval, draw=lambda batch: make_pictures(model, batch))
    with loader:
        steps = train(engine, loader, order, config.run, schedule.total_steps, accumulation, monitor, stop, actions)
    if steps < schedule.total_steps:
        say(f"told to stop: saved after step {steps} of {schedule.total_steps}, start it again to go on")
        monitor.close()
        return EXIT_CODE

    # ---- what came of it
    summary = {
        **monitor.summary(),
        "world_size": distributed.world_size(),
        "zero_stage": zero_stage(engine),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "decoder": str(loader.decoder),
        "quarantined": len({(failure.shard, failure.key) for failure in quarantined()}),
        "retrieval": retrieval(steps),
    }
    if distributed.is_main():
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    monitor.close()
    return 0


def with_vocabulary(config: PretrainConfig, vocab_size: int) -> PretrainConfig:
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
        tempfile.TemporaryFile(dir=folder).close()


def write_configs(folder: Path, config: PretrainConfig, engine: Any) -> None:
    """Leaves the whole run config and the whole DeepSpeed config in the run folder."""
    if distributed.is_main():
        dump(config, folder / "config.yaml")
        (folder / "deepspeed.json").write_text(json.dumps(engine.config, indent=2) + "\n", encoding="utf-8")
    distributed.barrier()


def say(text: str) -> None:
    """Prints on the main rank, above a progress bar if there is one."""
    if distributed.is_main():
        tqdm.write(text)
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
