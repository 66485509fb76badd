"""What a run writes beside its checkpoints and can do without for a while: on a disk that is full, training goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

_ROOM = 1 << 20  # bytes free before TensorBoard's file is tried again


def show(text: str) -> None:
    """Prints a line at once; where it goes to a file on a full disk, it is lost."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


class JsonLines:
    """Appends JSON objects to a file, a line each. What cannot be written is written before the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._told = False

    def write(self, line: Mapping[str, Any]) -> None:
        """JSON has no NaN: ValueError for a figure that is not finite."""
        self._pending += json.dumps(line, allow_nan=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Tries what is not written yet."""
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._told:
                show(f"WARNING: {self._path}: {error.strerror}; its lines are kept in memory until there is room")
            self._told = True
        else:
            self._told = False

    def close(self) -> None:
        """Tries once more and closes the file."""
        self.flush()
        self._file.close()


class Board:
    """TensorBoard. What cannot be written is lost, and later figures go into a new file once there is room."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures after so many finished steps."""
        for name, value in values.items():
            self._write("add_scalar", name, value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures (H, W, 3) uint8."""
        for name, image in images.items():
            self._write("add_image", name, image, step, dataformats="HWC")
        self._write("flush")

    def close(self) -> None:
        """Flushes and closes the file."""
        self._write("close")

    def _write(self, method: str, *arguments: Any, **named: Any) -> None:
        try:
            if self._writer is None and shutil.disk_usage(self._folder).free > _ROOM:
                self._writer = SummaryWriter(str(self._folder))
            if self._writer is not None:
                getattr(self._writer, method)(*arguments, **named)
        except OSError as error:
            self._writer = None  # its thread has ended
            show(f"WARNING: {self._folder}: {error.strerror}; figures are missing there")
