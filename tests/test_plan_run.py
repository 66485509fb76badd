"""Plans on the command line: what is told, the scripts that start them, wrong settings."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.plans import ROOT
from tools.plan_run import main


def plan_run(*arguments: str) -> int:
    return main(["--config", str(ROOT / "jobs/experiments/pretrain_stage1.yaml"), *arguments])


def test_a_plan_is_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, script = tmp_path / "plan.json", tmp_path / "start.sh"
    arguments = ["--json", str(file), "--write", str(script), "cluster.nodes=2", "cluster.devices=4"]
    assert plan_run(*arguments, "run.folder=/runs/a b", "data.flip=0.0") == 0
    out = capsys.readouterr().out
    for expected in ("213,147,454", "ZeRO-3", "bottleneck: ", "17M", "assumed, not measured", "exchange of gradients"):
        assert expected in out
    assert f"WARNING: {script} cannot start yet: set data.tokenizer, and data.train or data.corpus" in out
    told = json.loads(file.read_text())
    assert told["parameters"]["vision encoder"] == 85_799_424
    assert len(told["scaling"]) == 11
    # what the script starts, told by a stand-in for sbatch
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$RUN" "$@"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{stand_in.parent}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", str(script), "--partition=P"], capture_output=True, text=True, env=environment, check=True
    )
    folder, nodes, gpus, time, *rest = done.stdout.splitlines()
    assert (folder, nodes, gpus) == ("/runs/a b", "--nodes=2", "--gpus-per-node=4")
    needed = told["runs"][0]["seconds"]
    hours, minutes, _ = map(int, time.removeprefix("--time=").split(":"))
    assert needed < (hours * 60 + minutes) * 60 < 2 * needed + 3600
    config = str(ROOT / "jobs/experiments/pretrain_stage1.yaml")
    assert rest == ["--partition=P", "jobs/pretrain.sbatch", "--config", config, "data.flip=0.0"]


@pytest.mark.parametrize(("nodes", "expected"), [(1, "jobs/launch_local.sh"), (4, "jobs/launch_multinode.sh")])
def test_scripts_for_hosts_are_whole(nodes: int, expected: str, tmp_path: Path) -> None:
    script = tmp_path / "start.sh"
    arguments = ["--launcher", "hosts", "--write", str(script), f"cluster.nodes={nodes}", "batch.global_size=4096"]
    assert plan_run(*arguments) == 0
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert expected in script.read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["batch.micro_size=8192", "batch.global_size=65536"], "error: batch.micro_size is 8192: a rank needs"),
        (["cluster.devices=3"], "error: batch.global_size is 1024"),
        (["cluster.device=h300"], "error: cluster.device is h300"),
        (["cluster.nodes=0"], "error: cluster.nodes is 0"),
        (["cluster.gpus=8"], "error: command line: unknown key cluster.gpus"),
        (["media.longest_caption=3"], "error: media.longest_caption is 3.0"),
        (["--profile", "nowhere.json"], "error: --profile nowhere.json"),
        (["--run", "nowhere"], "error: --run nowhere"),
        (["data.train=[nowhere]"], "error: data.train: "),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert err.count("\n") == 1


PHASE = '"samples_per_second": 1, "seconds_per_step/data":'
SUMMARY = '{"world_size": 1, "accelerator": "cpu"}'


@pytest.mark.parametrize(
    ("summary", "metrics", "expected"),
    [
        ("[]", "", "summary.json is damaged: it holds a list"),
        ('{"world_size": 0, "accelerator": "cpu"}', "", "summary.json tells world_size 0 and accelerator cpu"),
        (SUMMARY, "", "metrics.jsonl holds no logged step"),
        (SUMMARY, '{"samples_per_second": 1}\n{"samples_per', "line 2 of metrics.jsonl is damaged"),
        (SUMMARY, '{"samples_per_second": 1}\n{"samples_per_second": null}', "line 2 of metrics.jsonl tells samples"),
        (SUMMARY, '{"samples_per_second": NaN}', "line 1 of metrics.jsonl tells samples_per_second nan"),
        (SUMMARY, f"{{{PHASE} null}}\n{{{PHASE} 0.5}}", "line 1 of metrics.jsonl tells seconds_per_step/data None"),
        (SUMMARY, '{"samples_per_second": 1}', "metrics.jsonl: none of 1 lines has loss/image"),
    ],
)
def test_a_damaged_run_is_named(
    summary: str, metrics: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("run: {}\n")
    (tmp_path / "summary.json").write_text(summary)
    (tmp_path / "metrics.jsonl").write_text(metrics)
    assert plan_run("--run", str(tmp_path)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --run {tmp_path}: {expected}")
    assert err.count("\n") == 1
