"""Objects from one process to another, with no copy of large arrays at the receiving end and nothing left behind.

An object is pickled into a file without a name (memfd) whose descriptor travels over a socket; the receiver maps it. So
no limit of /dev/shm applies, and whichever end is killed, the kernel frees the memory. The socket keeps messages apart
(SOCK_SEQPACKET): one is there whole or not at all, so nobody waits for the rest of it.
"""

from __future__ import annotations

import copyreg
import errno
import io
import mmap
import os
import pickle
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WORTH_A_VIEW = 1 << 16  # bytes: smaller arrays are copied, or each would keep the whole mapping alive
_ALIGNMENT = 64  # bytes
_NOTE_BYTES = 1 << 16  # at most, of what is not in the file
_NOW = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_INT = struct.Struct("i")  # a descriptor


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a connection."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(pipe: socket.socket, note: Any, value: Any, wait: Callable[[], None]) -> None:
    """Sends ``value`` and, apart from it, the small object ``note``. Blocks; calls ``wait`` while it has to try again.

    Tensors have to be on the CPU.
    """
    large: list[pickle.PickleBuffer] = []

    def keep_inside(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < _WORTH_A_VIEW:
            return True
        large.append(buffer)
        return False

    pickled = io.BytesIO()
    pickler = pickle.Pickler(pickled, protocol=5, buffer_callback=keep_inside)
    pickler.dispatch_table = {**copyreg.dispatch_table, Tensor: _reduce_tensor}
    pickler.dump(value)
    parts = [buffer.raw() for buffer in large] + [pickled.getbuffer()]
    ends, end = [], 0
    file = os.memfd_create("batch", os.MFD_CLOEXEC)
    try:
        for part in parts:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + part.nbytes
            ends.append((start, end))
            while start < end:
                start += os.pwrite(file, part[part.nbytes - (end - start) :], start)
        message = pickle.dumps((note, ends))
        while True:
            try:
                socket.send_fds(pipe, [message], [file])
                return
            except OSError as error:  # so many descriptors of this user are on their way to processes that are busy
                if error.errno != errno.ETOOMANYREFS:
                    raise
            wait()
            time.sleep(0.05)
    finally:
        os.close(file)


def receive(pipe: socket.socket) -> tuple[Any, Any]:
    """(note, value) of the next message. Large arrays in ``value`` are views of the memory that the sender filled.

    Raises:
        BlockingIOError: there is none now.
        EOFError: there will be none, the other end is gone.
    """
    while True:
        try:
            # Not socket.recv_fds, which drops the flags.
            message, descriptors, _, _ = pipe.recvmsg(_NOTE_BYTES, socket.CMSG_LEN(_INT.size), _NOW)
            break
        except ConnectionResetError:
            continue  # told once: the other end went without having read all; what it had sent still comes
    if not message:
        raise EOFError
    if not descriptors:
        raise OSError(errno.EMFILE, "no file descriptor left for a batch that arrived: raise ulimit -n")
    (file,) = _INT.unpack(descriptors[0][2])
    try:
        area = memoryview(mmap.mmap(file, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    finally:
        os.close(file)
    note, ends = pickle.loads(message)
    *large, pickled = (area[start:end] for start, end in ends)
    return note, pickle.loads(pickled, buffers=large)


def _reduce_tensor(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    return torch.from_numpy, (tensor.numpy(),)
