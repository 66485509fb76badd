"""Memory of a CPU process."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_NEVER = -1  # of the threshold of trimming alone
_INT_MAX = 2**31 - 1  # bytes
_DEFAULT_LIMIT = 128 * 1024
_OLD_MMAP_LIMIT = 32 * 2**20


def keep_freed_memory(keep: bool = True) -> bool:
    """Asks the C library to keep what is freed for what is wanted next, or not to; returns whether it will.

    By default glibc hands large blocks back to the kernel, which clears every page when it is asked for the next one.
    A step of training frees and wants the same gradients and activations again and again. Elsewhere than on Linux with
    glibc nothing happens. The process holds what it once needed, and what lies between blocks in use. Since an aligned
    block does not always fit where one of its size was freed, it may grow for some steps before it stays the same.

    To be called before there are threads: one that has an arena of its own by then keeps it, and large blocks never
    come from such an arena. Gloo gathers the weights of all ranks in a thread, into a block as large as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    if not keep:
        return bool(mallopt(_MMAP_THRESHOLD, _DEFAULT_LIMIT)) and bool(mallopt(_TRIM_THRESHOLD, _DEFAULT_LIMIT))
    # glibc before 2.35 refuses more than 32 MiB: larger blocks go back to the kernel there
    large = mallopt(_MMAP_THRESHOLD, _INT_MAX) or mallopt(_MMAP_THRESHOLD, _OLD_MMAP_LIMIT)
    return bool(large) and bool(mallopt(_TRIM_THRESHOLD, _NEVER)) and bool(mallopt(_ARENA_MAX, 1))


def give_back_freed_memory() -> None:
    """Hands what is free to the kernel once, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
