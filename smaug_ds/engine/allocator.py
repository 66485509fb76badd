"""Memory of a CPU process."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_DEFAULT_LIMIT = 128 * 1024  # bytes


def keep_freed_memory(keep: bool = True) -> bool:
    """Asks the C library to keep what is freed for what is wanted next, or not to; returns whether it will.

    By default glibc hands large blocks back to the kernel, which clears every page when it is asked for the next one.
    A step of training frees and wants the same gradients and activations again and again. Elsewhere than on Linux with
    glibc nothing happens. The process never holds more than it once needed, but for what lies between blocks in use.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    limit = 2**31 - 1 if keep else _DEFAULT_LIMIT  # it takes an int
    return bool(mallopt(_MMAP_THRESHOLD, limit)) and bool(mallopt(_TRIM_THRESHOLD, limit))
