"""What a measurement has to say beside its figures (machine, versions, command), and what its processes use."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smaug_ds.engine.allocator import give_back_freed_memory

_PACKAGES = ("torch", "torchvision", "deepspeed", "transformers", "nvidia-dali-cuda130", "av", "numpy", "tokenizers")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def conditions(config: Any) -> dict[str, Any]:
    """Hardware, versions, config and command of this run; load is the mean number of running processes of the last
    minute, before the measurement began."""
    found = {package: _version(package) for package in _PACKAGES}
    return {
        "hardware": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "load": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **{name: v for name, v in found.items() if v is not None}},
        "config": config,
        "command": shlex.join(["python", *sys.argv]),
    }


def announce(config: Any) -> dict[str, Any]:
    """``conditions``, printed before the measurement begins."""
    told = conditions(config)
    print(describe(told), flush=True)
    return told


def describe(told: dict[str, Any]) -> str:
    """``conditions`` in two lines."""
    hardware = told["hardware"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return (
        f"{hardware['cores']} cores of {hardware['processor']}, {hardware['memory_gb']} GB, {gpus}; "
        f"load {hardware['load']:.1f} at the start\n{versions}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def matrix_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """Floating-point operations a second of the fastest matrix product found: the peak that a step can be held against.

    Squares and shapes of a transformer's MLP, each for ``seconds`` at least; the best repetition counts.
    """
    large = device.type == "cuda"
    sizes = [(8192, 8192, 8192), (16384, 4096, 4096)] if large else [(2048, 2048, 2048), (1024, 768, 3072)]
    best = 0.0
    for rows, inner, columns in sizes:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        (a @ b).sum().item()
        ended = time.perf_counter() + seconds
        while time.perf_counter() < ended:
            began = time.perf_counter()
            for _ in range(10 if large else 1):
                a @ b
            if large:
                torch.cuda.synchronize(device)
            took = (time.perf_counter() - began) / (10 if large else 1)
            best = max(best, 2.0 * rows * inner * columns / took)
    return best


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: of torch's allocator on a GPU, else resident pages of this process, its libraries too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no VmHWM")


def forget_peak(device: torch.device) -> None:
    """Begins ``peak_memory`` anew, from what is in use now: freed memory that the process keeps is given back first.

    Where a sandbox forbids that for resident pages, the peak stays what it was.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    give_back_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc


@dataclass(frozen=True)
class Use:
    """What one process holds and has used up."""

    name: str
    resident_mb: float  # pages in memory, shared ones included
    descriptors: int  # open files, pipes and sockets
    cpu_seconds: float  # of user and system, since the process began


def use(process: int | str) -> Use | None:
    """Of a process by its number ("self" is this one); None if it has ended."""
    folder = Path("/proc") / str(process)
    try:
        fields = _status(folder)
        pages = int((folder / "statm").read_text().split()[1])
        descriptors = len(os.listdir(folder / "fd"))
        name = (folder / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    cpu = (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
    return Use(name, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, descriptors, cpu)


def family() -> dict[int, Use]:
    """This process and all that it started, directly or not, by process number."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                children.setdefault(int(_status(folder)[1]), []).append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
    found, waiting = {}, [os.getpid()]
    while waiting:
        process = waiting.pop()
        used = use(process)
        if used is not None:
            found[process] = used
            waiting += children.get(process, [])
    return found


def cpu_seconds() -> float:
    """User and system time of this process and all that it started."""
    return sum(used.cpu_seconds for used in family().values())


def _status(folder: Path) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold blanks: state, parent, ..."""
    return (folder / "stat").read_text().rpartition(")")[2].split()
