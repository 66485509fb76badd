"""A real SLURM: the job script as it is shipped trains, is pre-empted, saves, requeues itself, resumes and finishes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.runs import PATIENCE, arguments, await_step, figures, logs
from tests.standin import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_preempted_job_comes_back_and_loses_nothing(
    toy_shards: Path, toy_media: Path, whole_run: Path, tmp_path: Path
) -> None:
    folder, written = tmp_path / "run", tmp_path / "job.out"
    with Hosts(tmp_path / "hosts") as hosts:
        environment = hosts.start_slurm()

        def slurm(*command: str) -> str:
            variables = {**environment, "RUN": str(folder), "RANKS_PER_NODE": "1"}
            code, output = hosts.run("node1", command, **variables)
            assert code == 0, output
            return output.strip()

        def state() -> str:
            return slurm("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T")

        options = ["--parsable", "--nodes=2", "--partition=low", f"--output={written}"]
        job = slurm("sbatch", *options, "jobs/pretrain.sbatch", *arguments(toy_shards, toy_media, folder))
        await_step(folder, 3, alive=lambda: state() in ("PENDING", "RUNNING", "CONFIGURING"))
        slurm("sbatch", "--nodes=2", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap=sleep 1")
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


def test_arrays_and_evaluation_run_as_they_are_shipped(
    toy_shards: Path, toy_media: Path, whole_run: Path, tmp_path: Path
) -> None:
    lines, containers = tmp_path / "ablations.txt", tmp_path / "bin"
    lines.write_text("first run.max_steps=3\nsecond run.max_steps=2 optim.warmup_steps=1 loss.mvm=0\n")
    containers.mkdir()
    apptainer = containers / "apptainer"  # does what it is told to, without an image
    apptainer.write_text(
        '#!/bin/bash\necho "apptainer $*"\nwhile [ "$1" != image.sif ]; do shift; done\nexec "${@:2}"\n'
    )
    apptainer.chmod(0o755)
    own = arguments(toy_shards, toy_media, tmp_path)
    common = {"RANKS_PER_NODE": "1", "RESTARTS": "0"}
    with Hosts(tmp_path / "hosts") as hosts:
        common |= hosts.start_slurm()
        ablation = ["sbatch", "--wait", "--array=2", f"--output={tmp_path}/ablation.out", "jobs/array_ablation.sbatch"]
        variables = {"RUNS": str(tmp_path / "runs"), "ABLATIONS": str(lines), "PREFLIGHT": "0"}
        array = hosts.popen("node1", [*ablation, *own], **common, **variables)
        evaluation = ["sbatch", "--wait", f"--output={tmp_path}/evaluate.out", "jobs/evaluate.sbatch"]
        variables = {"RUN": str(whole_run), "CONTAINER": "image.sif", "BIND": "/mnt"}
        path = f"{containers}:{os.environ['PATH']}"
        code, _ = hosts.run("node1", evaluation, timeout=PATIENCE, PATH=path, **common, **variables)
        evaluated = (tmp_path / "evaluate.out").read_text()
        assert code == 0, evaluated
        array.communicate(timeout=PATIENCE)
    assert array.returncode == 0, (tmp_path / "ablation.out").read_text()
    steps = figures(tmp_path / "runs" / "second")
    assert [line["step"] for line in steps] == [1, 2] and not any(
        name.startswith("mvm") for line in steps for name in line
    )
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["second"]
    assert f"apptainer exec --nv --bind {ROOT},/mnt --pwd {ROOT} image.sif bash jobs/node.sh" in evaluated
    (report,) = whole_run.glob("evaluation/retrieval-*.json")
    assert json.loads(report.read_text())["n_videos"] == 32
