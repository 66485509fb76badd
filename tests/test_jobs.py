"""The job scripts without a cluster: their settings, containers and ports, and what one reads when they fail."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from smaug_ds.config import parse
from smaug_ds.engine.train import PretrainConfig
from tests.cluster.runs import finish, launch_local
from tests.standin import ROOT

JOBS = ROOT / "jobs"
SCRIPTS = sorted([*JOBS.glob("*.sh"), *JOBS.glob("*.sbatch")])


def bash(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs lines of bash after jobs/functions.sh."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source jobs/functions.sh\n{script}"], cwd=ROOT, text=True,
        capture_output=True, timeout=60, env={"PATH": os.environ["PATH"], "HOME": "/nowhere", **variables},
    )  # fmt: skip


def test_other_hosts_get_settings_and_nothing_that_is_none(tmp_path: Path) -> None:
    content = "# NCCL_IB_DISABLE=1\n\n=x\n A = b=c\r\nNCCL_IB_HCA=mlx5"  # no newline at its end
    (tmp_path / ".deepspeed_env").write_text(content)
    done = bash("NCCL_DEBUG=INFO remote_settings", HOME=str(tmp_path), SECRET="no", NCCL_SOCKET_IFNAME="eth0")
    assert sorted(done.stdout.splitlines()) == [
        "A=b=c",
        "NCCL_DEBUG=INFO",
        "NCCL_IB_HCA=mlx5",
        "NCCL_SOCKET_IFNAME=eth0",
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.sbatch")), ids=lambda path: path.name)
def test_job_scripts_are_not_started_by_hand(path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "submit it with sbatch" in done.stderr
    done = subprocess.run(
        ["bash", str(path)], env={**environment, "SLURM_SUBMIT_DIR": "/usr"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: submit from the checkout, not from /usr\n")


def test_the_shipped_ablations_are_settings_of_the_first_stage() -> None:
    lines = [line.split() for line in (JOBS / "array_ablation.txt").read_text().splitlines()]
    assert len({name for name, *_ in lines}) == len(lines) == 5
    stage = JOBS / "experiments" / "pretrain_stage1.yaml"
    models = [parse(PretrainConfig, stage, own) for _, *own in lines]
    assert len(set(models)) == len(models)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"TASK": "pretian"}, "error: TASK is pretian: it has to be pretrain, finetune or evaluate\n"),
        ({"TASK": "evaluate"}, "error: TASK=evaluate needs RUN=FOLDER: the run to evaluate\n"),
    ],
)
def test_a_mistake_in_a_variable_is_told(variables: dict[str, str], told: str) -> None:
    done = bash(":", **variables)
    assert (done.returncode, done.stderr) == (2, told)


def test_the_run_folder_follows_the_task() -> None:
    assert bash('echo "$TASK $RUN"').stdout == f"pretrain {ROOT}/runs/pretrain\n"
    assert bash('echo "$TASK $RUN"', TASK="finetune").stdout == f"finetune {ROOT}/runs/finetune\n"
    assert bash('echo "$RUN"', RUN="/a/../b").stdout == "/b\n"
    checkpoint = {"TASK": "evaluate", "RUN": "/a/checkpoints/step_7"}
    assert bash('echo "$RUN $checkpoint"', **checkpoint).stdout == "/a /a/checkpoints/step_7\n"
    done = bash("keep_running run.max_steps=3 run.folder=/c", RUN="/b")
    told = "error: run.folder=/c, but RUN is /b: leave out run.folder, which follows RUN\n"
    assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, []),
        (
            {"CONTAINER": "a.sif"},
            ["apptainer", "exec", "--nv", "--bind", f"{ROOT},/run", "--pwd", str(ROOT), "a.sif"],
        ),
        (
            {"CONTAINER": "docker://a/b", "BIND": "/data,/x:/y"},
            ["apptainer", "exec", "--nv", "--bind", f"{ROOT},/run,/data,/x:/y", "--pwd", str(ROOT), "docker://a/b"],
        ),
        (
            {"CONTAINER": "a.sqsh", "BIND": "/data,/x:/y", "BY": "srun"},
            [
                "--container-image=a.sqsh",
                f"--container-workdir={ROOT}",
                f"--container-mounts={ROOT}:{ROOT},/run:/run,/data:/data,/x:/y",
            ],
        ),
    ],
)
def test_what_runs_in_an_image(variables: dict[str, str], words: list[str]) -> None:
    done = bash('enter_container "${BY:-}"; printf "%s\\n" "${container[@]}"', RUN="/run", **variables)
    assert done.stdout.split("\n")[:-1] == (words or [""]), done.stderr


def test_enroot_takes_along_what_it_is_told_of(tmp_path: Path) -> None:
    enroot = tmp_path / "enroot"  # does what it is told to, without an image, in another folder and environment
    enroot.write_text(
        '#!/bin/bash\nkept=()\nwhile [ "$1" != a.sqsh ]; do\n'
        '    [ "$1" != --env ] || kept+=("$2=${!2}")\n    [ "$1" != --mount ] || echo "$2"\n    shift\ndone\n'
        'cd / && exec env -i PATH=/usr/bin:/bin "${kept[@]}" "${@:2}"\n'
    )
    enroot.chmod(0o755)
    script = 'enter_container; "${container[@]}" bash -c \'echo "$PWD $1 $RUN $TASK $NCCL_DEBUG ${SECRET:-}"\' sh "a b"'
    variables = {"CONTAINER": "a.sqsh", "BIND": "/data", "RUN": "/run", "NCCL_DEBUG": "INFO", "SECRET": "s"}
    done = bash(script, PATH=f"{tmp_path}:{os.environ['PATH']}", **variables)
    assert done.stdout.splitlines() == [f"{ROOT}:{ROOT}", "/run:/run", "/data:/data", f"{ROOT} a b /run pretrain INFO "]


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = int(bash(f"open_port {port}").stdout)
        refused = bash(f"require_port {port}")
    assert found > port
    assert refused.returncode == 2
    assert re.match(
        rf"error: MASTER_PORT {port} is taken on \S+ \(127\.0\.0\.1:{port} .*pid={os.getpid()}", refused.stderr
    )
    assert bash(f"open_port {port}; require_port {port}").stdout == f"{port}\n"


def test_the_image_is_made_of_what_is_there() -> None:
    recipe = (JOBS / "container.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?:    .*\n|\n)*)", recipe, flags=re.MULTILINE))
    assert list(sections) == ["files", "post", "environment", "test"]
    sources = [line.split()[0] for line in sections["files"].splitlines() if line.strip()]
    assert "setup.cfg" in sources and all((ROOT / source).exists() for source in sources)
    for name in ("post", "environment"):
        done = subprocess.run(["bash", "-n"], input=sections[name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    subprocess.run(["bash", "-ec", sections["test"].replace("/opt/venv/bin/python", sys.executable)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("preflight", ["0", "1"])
def test_what_is_wrong_stands_last(tmp_path: Path, preflight: str) -> None:
    folder = tmp_path / "run"
    output = finish(launch_local(folder, ["model.framse=2"], PREFLIGHT=preflight), folder, 2)
    last = output.splitlines()[-1]
    assert re.match(
        r"error: (preflight: \S+: )?command line: unknown key model.framse; did you mean model.frames", last
    )
    assert output.splitlines()[-2].startswith("== ended with code 2 after start 0; logs in ")
