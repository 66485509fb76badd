"""Starts ranks of real runs in a moment: forked from a process that has imported torch and DeepSpeed already.

    python -m tests.forked

reads lines of JSON and answers each with one: ``Forks.start`` with the process ids of the ranks, ``{"wait": PID}`` with
the exit code of one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.ranks import free_port
from tests.standin import ROOT

PATIENCE = 200.0  # seconds for a whole run, on a machine that has other things to do


class Forks:
    """The process that ranks are forked from; a context manager that ends all of them with it."""

    def __enter__(self) -> Forks:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.forked"], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._pids: list[int] = []
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self.kill(*self._pids)
        self._process.stdin.close()
        self._process.wait(60)

    def start(self, ranks: int, arguments: Sequence[str], log: Path, **more: Any) -> list[int]:
        """Process ids of that many ranks of ``smaug_ds.pretrain``.

        more: ``port`` to meet at; ``file_bytes`` that a file may have at most; ``keys``, a path: each rank appends
        step, medium and keys of the batches that it trains on to PATH.RANK; ``stop``, a step and a path: with the batch
        of that step the path comes into being.
        """
        pids = self._ask({"ranks": ranks, "arguments": list(arguments), "log": str(log), **more})
        self._pids += pids
        return pids

    def run(
        self, ranks: int, arguments: Sequence[str], log: Path, code: int = 0, seconds: float = PATIENCE, **more: Any
    ) -> None:
        """``start``, and each rank ends by itself with ``code``."""
        self.end(self.start(ranks, arguments, log, **more), log, code, seconds)

    def end(self, pids: Sequence[int], log: Path, code: int = 0, seconds: float = PATIENCE) -> None:
        """Each of these ranks ends by itself with ``code``."""
        assert [self.wait(pid, seconds) for pid in pids] == [code] * len(pids), log.read_text()

    def wait(self, pid: int, seconds: float = PATIENCE) -> int:
        """Exit code of a rank that ends by itself or was killed; -N for signal N. One that does not end in time is
        killed, which its exit code shows."""
        deadline = time.monotonic() + seconds
        while (code := self._ask({"wait": pid})) is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self._pids.remove(pid)
        return code

    def kill(self, *pids: int) -> None:
        """kill -9 for those that are still there."""
        for pid in self.alive(pids):
            os.kill(pid, signal.SIGKILL)  # at worst a zombie: nobody else may have its number yet
        for pid in self.alive(pids):
            self.wait(pid)

    def alive(self, pids: Sequence[int]) -> list[int]:
        """Those that nobody has waited for or killed."""
        return [pid for pid in pids if pid in self._pids]

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that ranks are forked from has ended"
        return json.loads(answer)


def main() -> None:
    """Answers until standard input ends."""
    import deepspeed
    import nvidia.dali  # noqa: F401

    import smaug_ds.pretrain  # noqa: F401

    assert deepspeed.__version__ and threading.active_count() == 1, "a thread would not survive a fork"
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            pid, status = os.waitpid(question["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            port = question.get("port", 0) or free_port()
            answer = [_fork(rank, port, question) for rank in range(question["ranks"])]
        print(json.dumps(answer), flush=True)


def _fork(rank: int, port: int, order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1), os.dup2(log, 2)
        ranks = order["ranks"]
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if "file_bytes" in order:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], resource.RLIM_INFINITY))
        if "keys" in order:
            _watch_batches(f"{order['keys']}.{rank}", *order.get("stop", (-1, "")))
        from smaug_ds.pretrain import main as pretrain

        code = pretrain(order["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # nothing of the parent's is to be tidied here
    raise AssertionError


def _watch_batches(keys: str, last: int, stop: str) -> None:
    """See ``keys`` and ``stop`` of ``Forks.start``."""
    from smaug_ds.engine import run

    train = run.train

    def watched(engine: Any, batches: Any, *rest: Any) -> int:
        def told() -> Any:
            for batch in batches:
                with open(keys, "a", encoding="utf-8") as file:
                    file.write(json.dumps([batch.step, batch.medium, batch.keys]) + "\n")
                if batch.step + 1 == last:
                    Path(stop).touch()
                yield batch

        return train(engine, told(), *rest)

    run.train = watched


if __name__ == "__main__":
    main()
