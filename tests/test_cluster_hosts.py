"""Two real hosts, started over ssh by the launch script as it is shipped: the same losses, and faults named by host."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.runs import PATIENCE, STEPS, arguments, await_step, finish, logs
from tests.launching import figures
from tests.standin import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def launch(hosts: Hosts, folder: Path, own: list[str], **variables: str) -> tuple[int, str]:
    """The launch script on the first host: its exit code and what it printed."""
    variables |= place(hosts, folder)
    return hosts.run("node1", ["bash", "jobs/launch_multinode.sh", *own], timeout=PATIENCE, **variables)


def place(hosts: Hosts, folder: Path) -> dict[str, str]:
    """The variables that put a rank on each host."""
    names = folder.parent / "hosts.txt"
    names.write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    return {"HOSTS": str(names), "RUN": str(folder), "DS_ACCELERATOR": "cpu"}


def test_two_hosts_have_the_losses_of_one(toy_shards: Path, toy_media: Path, whole_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Hosts(tmp_path / "hosts") as hosts:
        hosts.start_sshd()
        hosts.listen("node1", 29500)  # DeepSpeed's own port; without MASTER_PORT another one is found
        code, output = launch(hosts, folder, arguments(toy_shards, toy_media, folder))
        assert code == 0, output + logs(folder)
        refused, told = launch(hosts, folder, [], MASTER_PORT="29500", RESTARTS="0", PREFLIGHT="0")
    for name in ("node1", "node2"):
        (line,) = [line for line in output.splitlines() if f"{name}  " in line and "Gbit/s" in line]
        assert "FAILS" not in line and "FLOP/s" in line
    (environment,) = folder.glob("logs/*/deepspeed_env")
    assert "GLOO_SOCKET_IFNAME=eth0" in environment.read_text().splitlines()
    assert figures(folder)[-1]["step"] == STEPS
    assert figures(folder) == figures(whole_run)
    assert refused == 2
    assert told.splitlines()[-1].startswith("error: MASTER_PORT 29500 is taken on node1 (0.0.0.0:29500 ")


def test_what_one_host_lacks_is_named_before_the_start(toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    changed, empty, fewer, folder = (tmp_path / name for name in ("losses.py", "empty", "fewer", "run"))
    changed.write_text((ROOT / "smaug_ds" / "losses.py").read_text() + "\n")
    empty.mkdir()
    shutil.copytree(toy_shards / "train", fewer)
    gone = sorted(fewer.glob("*.tar"))[1]
    gone.unlink()
    mounts = [(changed, ROOT / "smaug_ds" / "losses.py"), (empty, toy_shards / "test"), (fewer, toy_shards / "train")]
    with Hosts(tmp_path / "hosts", mounts={"node2": mounts}) as hosts:
        hosts.start_sshd()
        hosts.slow_down("node2", "100mbit")
        code, output = launch(hosts, folder, arguments(toy_shards, toy_media, folder))
    assert code == 2, output
    errors = output.splitlines()[-3:]
    assert all(error.startswith("error: preflight: node2: ") for error in errors), output
    assert any("smaug_ds/losses.py is version" in error and "on node1 version" in error for error in errors)
    assert any(f"{toy_shards / 'test'} holds no .tar file" in error for error in errors)
    assert any(gone.name in error for error in errors), errors
    (warning,) = [line for line in output.splitlines() if "warning: preflight: node2: the link to node1 " in line]
    assert float(warning.partition(" carries ")[2].split()[0]) < 0.2
    assert not (folder / "metrics.jsonl").exists()


def test_a_host_that_goes_away_ends_the_run_in_time(toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    own = [*arguments(toy_shards, toy_media, folder), "run.max_steps=100000", "run.hang_seconds=20"]
    variables = {"RESTARTS": "1", "JOIN_SECONDS": "10"}
    variables["PDSH_SSH_ARGS_APPEND"] = "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"
    with Hosts(tmp_path / "hosts") as hosts:
        hosts.start_sshd()
        command = ["bash", "jobs/launch_multinode.sh", *own]
        process = hosts.popen("node1", command, **place(hosts, folder), **variables)
        await_step(folder, 5, alive=lambda: process.poll() is None)
        hosts.unplug("node2")
        output = finish(process, folder, 2)
        deaths = [next(folder.glob(f"logs/*/*_rank{rank}.log")) for rank in (0, 1)]
        deadline = time.monotonic() + PATIENCE  # of the rank beyond the cut nobody hears; it must not stay
        while "error: " not in deaths[1].read_text():
            assert time.monotonic() < deadline, deaths[1].read_text()
            time.sleep(0.5)
    assert re.search(r"error: .* rank 0 on node1 (hangs: no step for 20 s .*|failed) after step \d+", output), output
    assert "== ended with code 2 after start 1" in output
    last = output.splitlines()[-1]
    assert last.startswith("error: preflight: node2: ssh from node1 does not reach it: ssh: connect to host"), output


def test_without_ssh_each_host_starts_its_own_ranks(toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    folder, names = tmp_path / "run", tmp_path / "hosts.txt"
    names.write_text("node1 slots=1\nnode2 slots=1\n")
    own = [*arguments(toy_shards, toy_media, folder), "run.max_steps=3"]
    variables = {"HOSTS": str(names), "RUN": str(folder), "DS_ACCELERATOR": "cpu", "PREFLIGHT": "0"}
    command = ["bash", "jobs/launch_multinode.sh", *own]
    with Hosts(tmp_path / "hosts") as hosts:
        second = hosts.popen("node2", command, NODE_RANK="1", **variables)
        code, output = hosts.run("node1", command, timeout=PATIENCE, NODE_RANK="0", **variables)
        other, _ = second.communicate(timeout=60)
    assert code == 0, output + logs(folder)
    assert second.returncode == 0, other
    assert figures(folder)[-1]["step"] == 3
    assert len(list(folder.glob("logs/*-node1/*_rank1.log"))) == 1
