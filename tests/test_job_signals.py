"""The job scripts with stand-ins for what they start: signals are handed on, stops are seen, codes are kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.standin import ROOT
from tests.test_jobs import JOBS, bash

LAUNCHED = """
trap 'echo $BASHPID told TERM; exit 85' TERM
trap 'echo $BASHPID told USR1; exit 85' USR1
trap 'echo $BASHPID told INT; exit 85' INT
mkdir -p "$RUN"
echo "$TASK $RUN $RANKS $RESTARTS $PREFLIGHT $*" > "$RUN.launched"
[ ! -f ends ] || exit "$(cat ends)"
while :; do sleep 0.1; done
"""
PYTHON = """#!/bin/bash
echo "$*" >> calls
[ "$1" != tools/prepare_corpus.py ] || { mkdir -p out; echo "data.train=[shards]" > out/corpus.args; }
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose python and launch script are stand-ins."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "jobs" / "experiments").mkdir(parents=True)
    shutil.copy(JOBS / "quickstart.sh", tmp_path / "jobs")
    for stage in ("stage1", "stage2"):
        (tmp_path / "jobs" / "experiments" / f"quickstart_{stage}.yaml").write_text("run: {}\n")
    (tmp_path / "jobs" / "environment.sh").write_text(f"export DS_ACCELERATOR=cpu PATH={tmp_path}/bin:$PATH\n")
    (tmp_path / "jobs" / "launch_local.sh").write_text(LAUNCHED)
    return tmp_path


def quickstart(checkout: Path, setting: str = "optim.lr=1") -> subprocess.Popen[str]:
    command = ["bash", str(checkout / "jobs" / "quickstart.sh"), "--out", "out", setting]
    return subprocess.Popen(
        command,
        cwd=checkout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # tests that run in the background ignore it, and a shell cannot trap what it was told to ignore
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_quickstart_stops_what_it_has_started(checkout: Path, number: signal.Signals) -> None:
    process, launched = quickstart(checkout), checkout / "out" / "stage1.launched"
    deadline = time.monotonic() + 60
    while not launched.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85, output
    told = [line for line in output.splitlines() if " told " in line]
    assert len(told) == 1 and told[0].endswith(number.name.removeprefix("SIG")), output
    assert not Path("/proc", told[0].split()[0]).exists()
    assert "== stopped and saved: the same command goes on from here" in output
    assert launched.read_text().startswith(f"pretrain {checkout}/out/stage1 2 0 0 --config ")


def test_quickstart_goes_through_both_stages_or_leaves_with_the_code(checkout: Path) -> None:
    (checkout / "ends").write_text("7")
    process = quickstart(checkout)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 7 and "stage 2" not in output, output
    (checkout / "ends").write_text("0")
    process = quickstart(checkout)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "run.init_from=" in (checkout / "out" / "stage2.launched").read_text()
    assert (checkout / "calls").read_text().splitlines()[-1].startswith("tools/report.py ")


def test_quickstart_tells_of_a_wrong_setting_before_it_makes_a_corpus(checkout: Path) -> None:
    (checkout / "bin" / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    process = quickstart(checkout, "optim.lrr=1")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and output.count("\n") == 1, output
    assert output.startswith("error: command line: unknown key optim.lrr")


def test_without_an_answer_the_end_of_a_job_is_not_midnight(tmp_path: Path) -> None:
    stand_ins = {"squeue": 'echo "$SAYS"; exit "$CODE"', "scontrol": "echo node1"}
    for name, line in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(tmp_path / "run"), "RANKS_PER_NODE": "1",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "CONTAINER": "a.sqsh", "TZ": "UTC",
    }  # fmt: skip
    for says, code, end in (("", "1", ""), ("", "0", ""), ("N/A", "0", ""), ("2026-11-21T10:00:00", "0", "1795255200")):
        done = bash('slurm_job; echo "end=${SLURM_JOB_END_TIME:-}"', SAYS=says, CODE=code, **variables)
        assert done.stdout.splitlines()[-1] == f"end={end}", done.stderr


def test_a_stop_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = bash("ask_to_stop TERM; echo goes on", RUN=str(tmp_path / "file" / "run"))
    assert done.stdout == "goes on\n"
    assert f"error: told to stop, but {tmp_path}/file/run/stop cannot be written" in done.stderr


KEEP_RUNNING = """
record() { :; }
start() { echo "$1" >> "$RUN/started"; eval "${DOES:-:}"; }
code=0; keep_running || code=$?; echo "code $code"
"""


@pytest.mark.parametrize("place", ["", "1"])
def test_a_host_that_is_told_to_stop_before_the_start_tells_the_others(tmp_path: Path, place: str) -> None:
    does = '[ "$1" != smaug_ds.preflight ] || touch "$RUN/stop"'  # as another host\'s script does
    done = bash(KEEP_RUNNING, RUN=str(tmp_path), DOES=does, **({"NODE_RANK": place} if place else {}))
    assert done.stdout.splitlines()[-1] == "code 85", done.stdout + done.stderr
    assert (tmp_path / "started").read_text() == "smaug_ds.preflight\n"
    assert (tmp_path / "stop").exists() == bool(place)


def test_a_host_that_starts_late_keeps_the_stop_that_others_obey(tmp_path: Path) -> None:
    def start(does: str = ":") -> tuple[str, list[str]]:
        """What the script of the second host says last, and what it has started."""
        (tmp_path / "started").unlink(missing_ok=True)
        done = bash(KEEP_RUNNING, RUN=str(tmp_path), DOES=does, NODE_RANK="1", RESTARTS="0")
        return done.stdout.splitlines()[-1], (tmp_path / "started").read_text().splitlines()

    stop, look = tmp_path / "stop", "smaug_ds.preflight"
    stop.touch()  # by the script of a host that waits in its preflight, or has left
    for does in (":", "exit 2"):
        assert start(does) == ("code 85", [look])
        assert stop.exists()
        os.utime(stop)  # another one: the host has not left on this one before
    assert start() == ("code 85", [look])
    assert start() == ("code 0", [look, "smaug_ds.pretrain"])  # it has been obeyed
    assert not stop.exists()
    late = f'[ "$1" = {look} ] || {{ touch "$RUN/stop"; exit 85; }}'  # told while the ranks leave
    assert start(late) == ("code 85", [look, "smaug_ds.pretrain"])
    assert not stop.exists()


def test_an_agreed_stop_is_not_shown_as_an_error(tmp_path: Path) -> None:
    ended = "[2026-11-21 12:00:00,123] [ERROR] [launch.py:259:sigkill_handler] ['python'] exits with return code ="
    srun = "srun: error: node1: task 0: Exited with exit code"
    agreed = [f"{ended} 85", f"node2: {ended} 85", "pdsh@node1: node2: ssh exited with exit code 85", f"{srun} 85"]
    real = [f"{ended} 1", f"{srun} 247", "an error that exits with return code = 85"]
    (tmp_path / "said").write_text("\n".join([*agreed, *real, ""]))
    does = '[ "$1" = smaug_ds.preflight ] || { cat "$RUN/said"; exit $CODE; }'
    for code, told in ((85, ["== stopped as asked, which is no error: the same command goes on from there"]), (1, [])):
        done = bash(KEEP_RUNNING, RUN=str(tmp_path), DOES=does, CODE=str(code), RESTARTS="0")
        *shown, last = [
            line for line in done.stdout.splitlines() if "error" in line.lower() or line.startswith("== ended")
        ]
        assert shown == real + told
        assert ("exit code 85" in done.stderr, "exit code 247" in done.stderr) == (False, True), done.stderr
        assert last.startswith(f"== ended with code {code} after start 0; logs in ")
        (log,) = tmp_path.glob("logs/*/launcher.log")
        assert log.read_text() == (tmp_path / "said").read_text()
        shutil.rmtree(tmp_path / "logs")


@pytest.mark.parametrize(("code", "starts"), [(87, 1), (2, 1), (1, 3)])
def test_what_would_fail_again_is_not_started_again(tmp_path: Path, code: int, starts: int) -> None:
    done = bash(KEEP_RUNNING, RUN=str(tmp_path), DOES=f"exit {code}", RESTARTS="2", PREFLIGHT="0")
    assert done.stdout.splitlines()[-1] == f"code {code}", done.stdout + done.stderr
    assert len((tmp_path / "started").read_text().splitlines()) == starts


def test_a_comment_among_the_hosts_is_no_host(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# rack 1\n\nnode1 slots=2\n  # node2 slots=2\nnode3 slots=2\n")
    for script in ("launch_multinode.sh", "node.sh"):
        lines = [line for line in (ROOT / "jobs" / script).read_text().splitlines() if "mapfile" in line]
        done = bash(f"{lines[0]}\n" + 'echo "${names[*]}"', HOSTS=str(tmp_path / "hosts"))
        assert done.stdout == "node1 node3\n", done.stderr
