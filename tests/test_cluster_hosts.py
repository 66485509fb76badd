"""Two real hosts, started over ssh by the launch script as it is shipped: the same losses, and faults named by host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.runs import PATIENCE, STEPS, arguments, figures, logs
from tests.standin import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def launch(hosts: Hosts, folder: Path, own: list[str], **variables: str) -> tuple[int, str]:
    names = folder.parent / "hosts.txt"
    names.write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    variables |= {"HOSTS": str(names), "RUN": str(folder), "DS_ACCELERATOR": "cpu"}
    return hosts.run("node1", ["bash", "jobs/launch_multinode.sh", *own], timeout=PATIENCE, **variables)


def test_two_hosts_have_the_losses_of_one(toy_shards: Path, toy_media: Path, whole_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Hosts(tmp_path / "hosts") as hosts:
        hosts.start_sshd()
        code, output = launch(hosts, folder, arguments(toy_shards, toy_media, folder))
    assert code == 0, output + logs(folder)
    for name in ("node1", "node2"):
        (line,) = [line for line in output.splitlines() if f"{name}  " in line and "Gbit/s" in line]
        assert "FAILS" not in line
    (environment,) = folder.glob("logs/*/deepspeed_env")
    assert "GLOO_SOCKET_IFNAME=eth0" in environment.read_text().splitlines()
    assert figures(folder)[-1]["step"] == STEPS
    assert figures(folder) == figures(whole_run)


def test_what_one_host_lacks_is_named_before_the_start(toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    changed, empty, folder = tmp_path / "losses.py", tmp_path / "empty", tmp_path / "run"
    changed.write_text((ROOT / "smaug_ds" / "losses.py").read_text() + "\n")
    empty.mkdir()
    mounts = [(changed, ROOT / "smaug_ds" / "losses.py"), (empty, toy_shards / "test")]
    with Hosts(tmp_path / "hosts", mounts={"node2": mounts}) as hosts:
        hosts.start_sshd()
        code, output = launch(hosts, folder, arguments(toy_shards, toy_media, folder))
    assert code == 2, output
    errors = [line.partition("preflight: ")[2] for line in output.splitlines() if "error: preflight: " in line]
    assert len(errors) == 2 and all(error.startswith("node2: ") for error in errors), output
    assert any("smaug_ds/losses.py is version" in error and "on node1 version" in error for error in errors)
    assert any(f"{toy_shards / 'test'} holds no .tar file" in error for error in errors)
    assert not (folder / "metrics.jsonl").exists()


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
