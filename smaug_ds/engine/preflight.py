"""Looks, on all ranks, at what a run needs before it starts, and says which host lacks what.

    deepspeed ... --module smaug_ds.engine.preflight [--join_seconds S] --config FILE key=value ...

takes the arguments of ``smaug_ds.pretrain`` and the place of its ranks for some seconds. Ranks report through a store
on the main one, so that a host whose network, file system or GPU fails is still named. Exit codes: 0 all well, 2 not.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from smaug_ds import distributed
from smaug_ds.config import ConfigError, add_arguments
from smaug_ds.engine.inspection import GROUPS, Facts, Inspection, judge

LINK_BYTES = 16 << 20  # sent to measure a link
CONNECT_SECONDS = 60.0  # that connecting all ranks and measuring links may take


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, the same on all ranks that could be reached."""
    parser = argparse.ArgumentParser(prog="smaug_ds.engine.preflight", description="Checks all hosts before a run.")
    add_arguments(parser)
    parser.add_argument(
        "--join_seconds", type=float, default=300.0, metavar="S", help="to wait for a rank to come and to answer"
    )
    options = parser.parse_intermixed_args(arguments)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        store = join(rank, world_size, options.join_seconds)
        meeting = Meeting(store, rank, world_size, options.join_seconds)
        return meeting.hold(options.config, options.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        distributed.shutdown()


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
    """The ranks' way through a preflight: come, report, measure links, hear the verdict."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, seconds: float) -> None:
        self.store, self.rank, self.world_size, self.seconds = store, rank, world_size, seconds
        self.host = socket.gethostname()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_size = int(os.environ.get("LOCAL_SIZE", "1"))

    def hold(self, config: str | None, overrides: Sequence[str]) -> int:
        """Returns the exit code. Raises ConfigError when this rank is left alone."""
        self.store.set(f"host/{self.rank}", self.host)
        try:
            if self.rank == 0:
                verdict = self._lead(config, overrides)
                self.store.set("verdict", str(verdict))
                self._await_listeners()
                return verdict
            self._report(Inspection(self.rank, self.local_rank, config, overrides))
            self._wait("verdict", 4 * self.seconds)  # the main rank may have to wait for others, and more than once
            verdict = int(self.store.get("verdict"))
        except dist.DistError as error:
            raise ConfigError(f"{self.host}: the main rank is gone: {str(error).partition(chr(10))[0]}") from error
        self.store.add("heard", 1)
        return verdict

    def _lead(self, config: str | None, overrides: Sequence[str]) -> int:
        hosts = self._collect("host")
        if missing := [rank for rank in range(self.world_size) if rank not in hosts]:
            nodes = sorted({rank // self.local_size for rank in missing})
            return _tell(
                [
                    f"{len(missing)} of {self.world_size} ranks did not come in {self.seconds:g} s: nodes "
                    f"{_brief(nodes)} counted from 0, ranks {_brief(missing)}; came: "
                    f"{', '.join(sorted(set(hosts.values())))}"
                ]
            )
        inspection = Inspection(self.rank, self.local_rank, config, overrides)
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
        links = {rank: json.loads(text) for rank, text in sorted(self._collect("links", CONNECT_SECONDS).items())}
        faults += [f"{hosts[rank]}: {link['error']}" for rank, link in links.items() if link["error"]]
        print(table(facts, found, {rank: link["gbit"] for rank, link in links.items()}), flush=True)
        if not faults and self.world_size > 1:
            print(f"all-reduce of {LINK_BYTES >> 20} MiB by all ranks: {links[0]['seconds'] * 1000:.1f} ms", flush=True)
        return _tell(faults)

    def _report(self, inspection: Inspection) -> None:
        """Tells what this rank finds, then whether it can talk to the others, and how fast."""
        self._wait("begin", 4 * self.seconds)
        clock = time.time()  # here the ranks are let go at the same moment
        facts = inspection.facts(clock, seal=self.store.get("begin").decode())
        self.store.set(f"facts/{self.rank}", json.dumps(asdict(facts)))
        self.store.set(f"links/{self.rank}", json.dumps(self._measure()))

    def _measure(self) -> dict[str, object]:
        """Joins the process group and measures; ``error`` is empty if that went well."""
        result: dict[str, object] = {"error": "", "seconds": 0.0, "gbit": 0.0}
        try:
            distributed.init(CONNECT_SECONDS, dist.PrefixStore("group", self.store))
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


def table(facts: Sequence[Facts], faults: dict[str, dict[str, list[str]]], speeds: dict[int, float]) -> str:
    """One line per host: its ranks, what is well, and Gbit/s to the next host."""
    lines = [["host", "ranks", *GROUPS, "to next host"]]
    hosts = list(dict.fromkeys(fact.host for fact in facts))
    for host in hosts:
        own = [fact for fact in facts if fact.host == host]
        shown = {**own[0].shown, "clock": f"{own[0].clock - facts[0].clock:+.2f} s"}
        cells = ["FAILS" if faults[host].get(group) else shown.get(group, "ok") for group in GROUPS]
        speed = speeds.get(own[0].rank, 0.0)
        lines.append([host, _brief([fact.rank for fact in own]), *cells, f"{speed:.3g} Gbit/s" if speed else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _brief(numbers: Sequence[int]) -> str:
    """Sorted numbers with runs drawn together: 0-3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _tell(faults: Sequence[str]) -> int:
    for fault in faults:
        print(f"error: preflight: {fault}", file=sys.stderr, flush=True)
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
