"""Memory of a CPU process."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_INT_MAX = 2**31 - 1  # bytes, as all of these
_DEFAULT_LIMIT = 128 * 1024
_OLD_MMAP_LIMIT = 32 * 2**20


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
    limit = _INT_MAX if keep else _DEFAULT_LIMIT
    trims = bool(mallopt(_TRIM_THRESHOLD, limit))
    # glibc before 2.35 refuses more than 32 MiB: larger blocks go back to the kernel there
    return bool(mallopt(_MMAP_THRESHOLD, limit) or mallopt(_MMAP_THRESHOLD, min(limit, _OLD_MMAP_LIMIT))) and trims
