"""Real runs, killed, stopped and resumed: launcher, model, loader."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from smaug_ds.data.index import Corpus
from smaug_ds.data.quarantine import Failure, read_ledgers
from smaug_ds.engine import checkpoint
from smaug_ds.engine.preempt import EXIT_CODE
from tests.launching import assert_equal_runs, figures, finish, launch, settings
from tests.shards import overwrite
from tests.standin import ROOT


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_bit_for_bit(toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(launch(settings(toy_shards, toy_media, whole)))

    process = launch(settings(toy_shards, toy_media, killed))
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, "the run should have been killed by now"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = [line["step"] for line in figures(killed)]
    assert 5 <= reached[-1] < 8, "killed between the checkpoints of steps 3 or 6 and the end"

    output = finish(launch(settings(toy_shards, toy_media, killed)))
    assert "resumed from" in output
    assert_equal_runs(whole, killed)

    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"], summary["zero_stage"]) == (8, 2, 2)
    assert summary["accelerator"] == "cpu" and summary["decoder"].startswith("pyav") and summary["quarantined"] == 0
    assert summary["lr_last"] == pytest.approx(1e-6)
    assert {"loss", "vtc", "vtm", "mlm", "mvm"} == summary["losses_first"].keys() == summary["losses_last"].keys()
    assert summary["retrieval"]["n_videos"] == 32
    assert (whole / "config.yaml").exists() and (whole / "deepspeed.json").exists()


@pytest.mark.slow
def test_a_lost_ledger_loses_nothing_that_a_checkpoint_holds(toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    shards, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(toy_shards, shards)
    corpus = Corpus.open([shards / "train"], holdout=0.0, split="train")
    for medium in ("image", "video"):
        for number in range(0, corpus.count(medium), 4):
            entry = corpus.nth(medium, number)
            overwrite(entry, bytes(entry.media_size))
    arguments = [*settings(shards, toy_media, folder), "data.test=[]", "data.max_failed_share=1"]
    finish(launch([*arguments, "run.max_steps=4"], ranks=1))
    failures = read_ledgers(folder / "quarantine")
    assert failures
    shutil.rmtree(folder / "quarantine")
    finish(launch(arguments, ranks=1))
    later = read_ledgers(folder / "quarantine")
    assert not {failure.name for failure in failures} & {failure.name for failure in later}
    _, state = checkpoint.open_latest(folder / "checkpoints", print) or (None, {})
    assert [Failure.from_dict(failure) for failure in state["quarantine"]] == failures + later
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["quarantined"] == len({failure.name for failure in failures + later})


@pytest.mark.slow
def test_a_signal_to_a_real_run_saves_and_stage_two_starts_from_it(
    toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = [*settings(toy_shards, toy_media, first), "run.max_steps=400", "run.save_every=0"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "smaug_ds.pretrain", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (first / "metrics.jsonl").exists() or not (first / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, output
    assert "told to stop: saved after step" in output
    assert checkpoint.find(first).parent == first / "checkpoints"

    stage_two = ["model.frames=4", "model.frames_kept=2", f"run.init_from={first}", "run.max_steps=3"]
    output = finish(launch([*settings(toy_shards, toy_media, second), *stage_two]))
    assert "losses see batch.micro_size * ranks = 8 pairs at a time (accumulation 2 does not widen them)" in output
    assert "missing: " in output and "(selector, temporal), unused: none" in output
    losses = [value for line in figures(second) for name, value in line.items() if name.startswith("loss/")]
    assert len(losses) == 3 and all(np.isfinite(losses))
