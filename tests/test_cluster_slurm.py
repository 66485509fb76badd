"""A real SLURM: the job scripts as they are shipped train, are pre-empted, requeue, resume, fine-tune and evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.runs import PATIENCE, arguments, await_step, logs
from tests.launching import figures, settings
from tests.standin import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


class Slurm:
    """Two nodes without GPUs; every job has a rank on each of its nodes."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.environment = hosts, {**hosts.start_slurm(), "RANKS_PER_NODE": "1"}

    def run(self, *command: str, **variables: str) -> str:
        """What the command printed."""
        code, output = self.hosts.run("node1", command, **self.environment, **variables)
        assert code == 0, output
        return output.strip()

    def submit(self, *command: str, **variables: str) -> subprocess.Popen:
        """``sbatch --wait``."""
        return self.hosts.popen("node1", ["sbatch", "--wait", *command], **self.environment, **variables)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Hosts(tmp_path_factory.mktemp("slurm") / "hosts") as hosts:
        yield Slurm(hosts)


def end(job: subprocess.Popen, written: Path, folder: Path, code: int = 0) -> str:
    """What the job wrote; it has to end with ``code``."""
    job.communicate(timeout=PATIENCE)
    output = written.read_text()
    assert job.returncode == code, output + logs(folder)
    return output


def stand_in(folder: Path, name: str, script: str) -> str:
    """A PATH on which ``name`` is a shell script."""
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_a_preempted_job_comes_back_and_loses_nothing(
    slurm: Slurm, toy_shards: Path, toy_media: Path, whole_run: Path, tmp_path: Path
) -> None:
    folder, written = tmp_path / "run", tmp_path / "job.out"

    def state() -> str:
        return slurm.run("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T")

    options = ["--parsable", "--nodes=2", "--partition=low", f"--output={written}"]
    own = arguments(toy_shards, toy_media, folder)
    job = slurm.run("sbatch", *options, "jobs/pretrain.sbatch", *own, RUN=str(folder))
    await_step(folder, 3, alive=lambda: state() in ("PENDING", "RUNNING", "CONFIGURING"))
    slurm.run("sbatch", "--nodes=2", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap=sleep 1")
    deadline = time.monotonic() + PATIENCE
    while (now := state()) not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
        assert time.monotonic() < deadline, f"{now}\n{written.read_text()}\n{logs(folder)}"
        time.sleep(1)
    output = written.read_text()
    assert now == "COMPLETED", output + logs(folder)
    assert "== told to stop" in output and "== saved: back into the queue" in output
    assert f"== job {job}, start 0: 2 nodes (node1 node2) of 1 ranks" in output
    assert f"== job {job}, start 1: " in output and "resumed from" in output
    assert figures(folder) == figures(whole_run)
    assert (folder / "summary.json").exists() and not (folder / "stop").exists()
    environments = sorted((folder / "logs").glob("*/environment.txt"))
    assert len(environments) == 2 and all(f"SLURM_JOB_ID={job}" in path.read_text() for path in environments)


def test_finetuning_and_evaluation_run_as_they_are_shipped_in_containers(
    slurm: Slurm, toy_shards: Path, toy_media: Path, whole_run: Path, tmp_path: Path
) -> None:
    folder, written = tmp_path / "tuned", tmp_path / "finetune.out"
    own = [text for text in settings(toy_shards, toy_media, folder) if not text.startswith(("run.folder", "model."))]
    # what pyxis adds to srun, taken out again: no image
    taken_out = 'for a in "$@"; do case $a in --container-*) echo "srun $a";; *) kept+=("$a");; esac; done'
    path = stand_in(tmp_path / "pyxis", "srun", f'{taken_out}\nexec /usr/bin/srun "${{kept[@]}}"')
    job = slurm.submit(
        "--nodes=2", f"--output={written}", "jobs/finetune.sbatch", *own, f"run.init_from={whole_run}",
        "run.max_steps=3", RUN=str(folder), RESTARTS="0", PATH=path, CONTAINER="image.sqsh", BIND="/mnt:/data",
    )  # fmt: skip
    output = end(job, written, folder)
    mounts = f"--container-mounts={ROOT}:{ROOT},{folder}:{folder},/mnt:/data"
    for option in ("--container-image=image.sqsh", f"--container-workdir={ROOT}", mounts):
        assert f"srun {option}" in output
    assert "node1  0      ok " in output and "node2  1      ok " in output
    steps = figures(folder)
    assert [line["step"] for line in steps] == [1, 2, 3] and not any("mlm" in name for line in steps for name in line)

    written = tmp_path / "evaluate.out"
    entered = 'echo "apptainer $*"\nwhile [ "$1" != image.sif ]; do shift; done\nexec "${@:2}"'
    path = stand_in(tmp_path / "apptainer", "apptainer", entered)
    job = slurm.submit(
        "--nodes=2", f"--output={written}", "jobs/evaluate.sbatch", "evaluation.rerank_depth=2", RUN=str(folder),
        RESTARTS="0", PATH=path, CONTAINER="image.sif", BIND="/mnt",
    )  # fmt: skip
    output = end(job, written, folder)
    assert f"apptainer exec --nv --bind {ROOT},{folder},/mnt --pwd {ROOT} image.sif bash jobs/node.sh" in output
    assert "node1  0      ok " in output and "node2  1      ok " in output
    (report,) = folder.glob("evaluation/retrieval-*.json")
    result = json.loads(report.read_text())
    assert result["n_videos"] == 32 and result["config"]["evaluation"]["rerank_depth"] == 2


def test_an_array_takes_a_line_of_settings_a_task(
    slurm: Slurm, toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    lines, runs, written = tmp_path / "ablations.txt", tmp_path / "runs", tmp_path / "ablation-%a.out"
    lines.write_text("# no run\nsecond run.max_steps=2 optim.warmup_steps=1 loss.mvm=0\nthird model.framse=2\n")
    variables = {"RUNS": str(runs), "ABLATIONS": str(lines), "PREFLIGHT": "0", "RESTARTS": "0"}
    own = arguments(toy_shards, toy_media, tmp_path)
    array = slurm.submit("--array=1-3", f"--output={written}", "jobs/array_ablation.sbatch", *own, **variables)
    array.communicate(timeout=PATIENCE)
    empty, trained, mistaken = (Path(str(written).replace("%a", task)).read_text() for task in "123")
    assert array.returncode == 2
    assert empty == f"error: line 1 of {lines} names no run\n"
    steps = figures(runs / "second")
    assert [line["step"] for line in steps] == [1, 2], trained
    assert not any(name.startswith("mvm") for line in steps for name in line)
    assert sorted(path.name for path in runs.iterdir()) == ["second", "third"]
    assert mistaken.splitlines()[-1].startswith("error: command line: unknown key model.framse; ")
