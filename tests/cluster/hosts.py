"""Hosts on one machine: each with a network, a name and, where told, files of its own. Needs root and iproute2.

They share the file system, as a cluster shares its storage, but for what ``Hosts`` is told to hide. Only processes
that were started here, or run inside these hosts, are ever ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from tests.standin import ROOT

SSH_PORT, SLURM_PORT = 22, 17000


class Hosts:
    """``node1``, ``node2`` ... joined by a bridge; use it in ``with``.

    Args:
        folder: for keys, configuration and logs.
        mounts: per host, what lies over a path there: pairs of a source (a file or folder) and the path.
    """

    def __init__(
        self, folder: Path, count: int = 2, mounts: Mapping[str, Sequence[tuple[Path, Path]]] | None = None
    ) -> None:
        self.folder, self.mounts = folder, mounts or {}
        self.names = [f"node{number}" for number in range(1, count + 1)]
        self._hub, self._spaces = f"smaug{os.getpid()}-hub", {n: f"smaug{os.getpid()}-{n}" for n in self.names}
        self._addresses = {name: f"10.83.0.{number}" for number, name in enumerate(self.names, start=1)}
        self._daemons: list[subprocess.Popen] = []
        self._stack = ExitStack()

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:  # what was set up is undone, too, when a later step fails
            hub = self._hub
            self._add_space(hub, stack)
            _do("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
            _do("ip", "-n", hub, "link", "set", "bridge", "up")
            for number, name in enumerate(self.names):
                space = self._spaces[name]
                self._add_space(space, stack)
                _do(
                    "ip",
                    "link",
                    "add",
                    "eth0",
                    "netns",
                    space,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    f"v{number}",
                    "netns",
                    hub,
                )
                _do("ip", "-n", space, "addr", "add", f"{self._addresses[name]}/24", "dev", "eth0")
                _do("ip", "-n", space, "link", "set", "eth0", "up")
                _do("ip", "-n", hub, "link", "set", f"v{number}", "master", "bridge", "up")
                self._write_etc(space, name, stack)
            stack.callback(self._end_all)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """The command as this machine has to run it for it to run on ``host``."""
        covers = [f"mount --bind {source} {path}" for source, path in self.mounts.get(host, ())]
        inside = "; ".join([f"hostname {host}", *covers, 'exec "$@"'])
        space = self._spaces[host]
        return ["ip", "netns", "exec", space, "unshare", "--uts", "--mount", "sh", "-ec", inside, "sh", *command]

    def popen(self, host: str, command: Sequence[str], **environment: str) -> subprocess.Popen:
        """Starts it on ``host``, output and errors together in a pipe."""
        return subprocess.Popen(
            self.command(host, command), cwd=ROOT, env={**os.environ, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, host: str, command: Sequence[str], timeout: float = 60, **environment: str) -> tuple[int, str]:
        """Exit code and output of a command on ``host``; after ``timeout`` seconds it is ended and the test fails."""
        process = self.popen(host, command, **environment)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate(timeout=10)
            raise AssertionError(f"{command} took longer than {timeout} s:\n{output}") from None
        return process.returncode, output

    def listen(self, host: str, port: int) -> None:
        """Takes a port of ``host`` until the end."""
        server = f"s = socket.create_server(('0.0.0.0', {port}))"
        script = f"import socket, time; {server}; print('on', flush=True); time.sleep(1e5)"
        listener = self.popen(host, ["python3", "-c", script])
        assert listener.stdout is not None and listener.stdout.readline() == "on\n"
        self._daemons.append(listener)

    def slow_down(self, host: str, rate: str) -> None:
        """Lets ``host`` send no faster than ``rate``, as tc writes it."""
        shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
        _do("tc", "-n", self._spaces[host], "qdisc", "add", "dev", "eth0", "root", *shape)

    def unplug(self, host: str) -> None:
        """Nothing comes to ``host`` or from it any more; nobody is told."""
        _do("ip", "-n", self._hub, "link", "set", f"v{self.names.index(host)}", "down")

    def start_sshd(self) -> None:
        """On every host; root may go from any to any."""
        for name in self.names:
            self._start_daemon(name, ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config"])
        for name in self.names:
            _await(lambda name=name: self.run(self.names[0], ["ssh", name, "true"])[0] == 0, f"ssh to {name}", 20)

    def start_slurm(self) -> dict[str, str]:
        """A private SLURM over all hosts, with partitions ``high`` and ``low``; the environment to use it with."""
        folder = self.folder
        for inner in ("state", *(f"spool/{name}" for name in self.names)):
            (folder / inner).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "slurm.conf").write_text(self._slurm_conf())
        environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock"]
        munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"]
        self._start_daemon(self.names[0], munge)
        _await((folder / "munge.sock").exists, "munged", 20)
        self._start_daemon(self.names[0], ["slurmctld", "-D", "-c", "-f", environment["SLURM_CONF"]])
        for name in self.names:
            self._start_daemon(name, ["slurmd", "-D", "-N", name, "-f", environment["SLURM_CONF"]])
        idle = ["sinfo", "--noheader", "--Node", "--partition=low", "--states=idle", "--format=%N"]
        wanted = sorted(self.names)
        _await(lambda: sorted(self.run(wanted[0], idle, **environment)[1].split()) == wanted, "idle SLURM nodes", 60)
        return environment

    def _slurm_conf(self) -> str:
        first, folder = self.names[0], self.folder
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={self._addresses[name]} Port={SLURM_PORT + 1} CPUs={os.cpu_count()} "
            "RealMemory=1000 State=UNKNOWN"
            for name in self.names
        )
        every = ",".join(self.names)
        # cred_expire: a requeued job starts after it, by default two minutes.
        return f"""\
ClusterName=test
SlurmctldHost={first}({self._addresses[first]})
SlurmctldPort={SLURM_PORT}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
CompleteWait=0
PropagateResourceLimits=NONE
{nodes}
PartitionName=high Nodes={every} MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low Nodes={every} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
"""

    def _add_space(self, space: str, stack: ExitStack) -> None:
        _do("ip", "netns", "add", space)
        stack.callback(_do, "ip", "netns", "delete", space)
        _do("ip", "-n", space, "link", "set", "lo", "up")

    def _write_etc(self, space: str, name: str, stack: ExitStack) -> None:
        """Files that ``ip netns exec`` shows in place of those in /etc. As on Debian, a host's own name is loopback."""
        etc = Path("/etc/netns") / space
        (etc / "ssh").mkdir(parents=True)
        stack.callback(shutil.rmtree, etc)
        lines = [f"{address} {other}" for other, address in self._addresses.items() if other != name]
        own = [f"127.0.1.1 {name}", f"{self._addresses[name]} {name}"]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *own, *lines, ""]))
        for key in ("id", "host_key"):
            if not (self.folder / key).exists():
                _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        (etc / "ssh" / "ssh_config").write_text(
            f"IdentityFile {self.folder}/id\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        (etc / "ssh" / "sshd_config").write_text(
            f"Port {SSH_PORT}\nHostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/id.pub\n"
            "PermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n"
        )

    def _start_daemon(self, host: str, command: Sequence[str]) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
        with (self.folder / f"{Path(command[0]).name}-{host}.out").open("w") as log:
            wrapped = self.command(host, command)
            daemon = subprocess.Popen(wrapped, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._daemons.append(daemon)

    def _end_all(self) -> None:
        """Ends the daemons and every process that is still inside one of the hosts."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for space in self._spaces.values():
                found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, timeout=10)
                for process in found.stdout.split():
                    try:
                        os.kill(int(process), number)
                    except ProcessLookupError:
                        continue
            time.sleep(1)
        for daemon in self._daemons:
            daemon.wait(timeout=10)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _await(there: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.2)
