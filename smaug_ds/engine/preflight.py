"""The meeting of all ranks before a run: each says what it finds, and hears the verdict.

They report through a store on the main rank, so that a host whose network, file system or GPU fails is still named.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.engine.inspection import Facts, Inspection, Needs, pace
from smaug_ds.engine.verdict import brief, judge, slow, table

LINK_BYTES = 16 << 20  # sent to measure a link
CONNECT_SECONDS = 60.0  # that connecting all ranks may take
LINK_SECONDS = 2.0  # that measuring a link may take: they are measured one by one


def join(rank: int, world_size: int, seconds: float) -> dist.Store:
    """The store that the main rank opens at MASTER_ADDR and MASTER_PORT. Raises ConfigError where that fails."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    address, port, host = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), socket.gethostname()
    try:
        return dist.TCPStore(
            address, port, world_size, rank == 0, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        if rank == 0:
            raise ConfigError(f"{host}: port {port} cannot be opened, set another MASTER_PORT: {reason}") from error
        raise ConfigError(
            f"{host}: rank {rank} cannot reach {address}:{port} (MASTER_ADDR, MASTER_PORT) in {seconds:g} s: is the "
            f"name known there, is the port open, did the ranks of {address} start? {reason}"
        ) from error


class Meeting:
    """The ranks' way through a preflight: come, report, measure paces and links, hear the verdict.

    Args:
        seconds: to wait for a rank to come and to answer.
        names: of all hosts in the order of their ranks, as far as the launch script told them.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, seconds: float, names: Sequence[str] = ()
    ) -> None:
        self.store, self.rank, self.world_size, self.seconds, self.names = store, rank, world_size, seconds, names
        self.host = socket.gethostname()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_size = int(os.environ.get("LOCAL_SIZE", "1"))

    def hold(self, read: Callable[[], Needs]) -> int:
        """Returns the exit code, 0 or 2. Raises ConfigError when this rank is left alone.

        read: what the ranks need, see ``Inspection``.
        """
        self.store.set(f"host/{self.rank}", self.host)
        try:
            if self.rank == 0:
                verdict = self._lead(read)
                self.store.set("verdict", str(verdict))
                self._await_listeners()
                return verdict
            self._report(Inspection(self.rank, self.local_rank, read))
            self._wait("verdict", 4 * self.seconds)  # the main rank may have to wait for others, and more than once
            verdict = int(self.store.get("verdict"))
        except dist.DistError as error:
            raise ConfigError(f"{self.host}: the main rank is gone: {str(error).partition(chr(10))[0]}") from error
        self.store.add("heard", 1)
        return verdict

    def _lead(self, read: Callable[[], Needs]) -> int:
        hosts = self._collect("host")
        if missing := [rank for rank in range(self.world_size) if rank not in hosts]:
            nodes = sorted({rank // self.local_size for rank in missing})
            absent = ", ".join(self.names[node] if self.names else f"node {node}" for node in nodes)
            came = ", ".join(sorted(set(hosts.values())))
            return _tell(
                [
                    f"{len(missing)} of {self.world_size} ranks did not come in {self.seconds:g} s: those of {absent} "
                    f"(ranks {brief(missing)}); came: {came}"
                ]
            )
        inspection = Inspection(self.rank, self.local_rank, read)
        with inspection.seal() as seal:
            self.store.set("begin", seal)
            self._report(inspection)
            told = self._collect("facts")
        faults = [
            f"{hosts[rank]}: rank {rank} did not answer in {self.seconds:g} s: do its disks, data or GPU hang?"
            for rank in range(self.world_size)
            if rank not in told
        ]
        facts = [Facts(**json.loads(text)) for _, text in sorted(told.items())]
        found = judge(facts)
        faults += [fault for host in found.values() for group in host.values() for fault in group]
        patience = CONNECT_SECONDS + LINK_SECONDS * len(set(hosts.values()))
        links = {rank: json.loads(text) for rank, text in sorted(self._collect("links", patience).items())}
        faults += [f"{hosts[rank]}: {link['error']}" for rank, link in links.items() if link["error"]]
        paces = {rank: link["pace"] for rank, link in links.items() if link["pace"]}
        speeds = {rank: link["gbit"] for rank, link in links.items()}
        print("\n".join([table(facts, found, paces, speeds), *facts[0].notes]), flush=True)
        if not faults and self.world_size > 1:
            print(f"all-reduce of {LINK_BYTES >> 20} MiB by all ranks: {links[0]['seconds'] * 1000:.1f} ms", flush=True)
        for warning in slow(hosts, paces, speeds):
            print(f"warning: preflight: {warning}", file=sys.stderr, flush=True)
        return _tell(list(dict.fromkeys(faults)))

    def _report(self, inspection: Inspection) -> None:
        """Tells what this rank finds, then whether it can talk to the others, and how fast."""
        self._wait("begin", 4 * self.seconds)
        clock = time.time()  # here the ranks are let go at the same moment
        facts = inspection.facts(clock, seal=self.store.get("begin").decode())
        self.store.set(f"facts/{self.rank}", json.dumps(asdict(facts)))
        self.store.set(f"links/{self.rank}", json.dumps(self._measure()))

    def _measure(self) -> dict[str, object]:
        """Joins the process group and measures; ``error`` is empty if that went well.

        ``pace`` is in FLOP/s while all ranks compute, ``gbit`` per second, ``seconds`` those of an all-reduce.
        """
        result: dict[str, object] = {"error": "", "pace": 0.0, "seconds": 0.0, "gbit": 0.0}
        try:
            distributed.init(CONNECT_SECONDS, dist.PrefixStore("group", self.store))
            distributed.barrier()
            result["pace"] = pace()
            result["gbit"] = self._link()
            buffer = torch.ones(LINK_BYTES // 4, device=distributed.device())
            for _ in range(2):  # the first one sets connections up
                distributed.barrier()
                began = time.perf_counter()
                total = float(distributed.all_reduce_sum(buffer)[-1])
                result["seconds"] = time.perf_counter() - began
            if total != self.world_size:
                result["error"] = f"an all-reduce of ones over {self.world_size} ranks gave {total:g}"
        except (RuntimeError, ValueError) as error:  # what torch raises for broken networks and devices
            reason = " ".join(str(error).split())[:300]
            result["error"] = f"rank {self.rank} cannot talk to all others (NETWORK names the interface): {reason}"
        return result

    def _link(self) -> float:
        """Gbit/s from the first rank of this host to that of the next host, one link at a time; 0 for other ranks."""
        hosts = distributed.gather_objects(self.host)
        first = [rank for rank, host in enumerate(hosts) if hosts.index(host) == rank]
        speed = 0.0
        if len(first) == 1:
            return speed
        buffer = torch.ones(LINK_BYTES // 4, device=distributed.device())
        for here, there in zip(first, [*first[1:], first[0]], strict=True):
            for _ in range(2):
                distributed.barrier()
                began = time.perf_counter()
                if self.rank == here:
                    dist.send(buffer, there)
                    dist.recv(buffer[:1], there)
                    speed = LINK_BYTES * 8e-9 / (time.perf_counter() - began)
                elif self.rank == there:
                    dist.recv(buffer, here)
                    dist.send(buffer[:1], here)
        return speed

    def _collect(self, what: str, seconds: float | None = None) -> dict[int, str]:
        """``what`` of each rank that has told it in time."""
        found: dict[int, str] = {}
        deadline = time.monotonic() + (self.seconds if seconds is None else seconds)
        for rank in range(self.world_size):
            try:
                self._wait(f"{what}/{rank}", max(0.1, deadline - time.monotonic()))
            except dist.DistError:  # not in time
                continue
            found[rank] = self.store.get(f"{what}/{rank}").decode()
        return found

    def _wait(self, key: str, seconds: float) -> None:
        self.store.wait([key], timedelta(seconds=seconds))

    def _await_listeners(self) -> None:
        """The store ends with this rank, and the launcher ends the others when it leaves."""
        deadline = time.monotonic() + distributed.SECONDS_TO_SPEAK
        while self.store.add("heard", 0) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


def _tell(faults: Sequence[str]) -> int:
    for fault in faults:
        print(f"error: preflight: {fault}", file=sys.stderr, flush=True)
    return 2 if faults else 0
