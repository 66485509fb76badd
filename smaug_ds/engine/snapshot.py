"""What a checkpoint holds, copied out of the engine into host memory: the only part of a save that training waits for.

DeepSpeed hands each state to its checkpoint engine, which is replaced for that moment by one that copies instead of
writing. DeepSpeed's own engines would not do: its fast writer writes while training waits, its decoupled one moves the
writing into a process but neither syncs nor hashes, tells of a full disk by dying, and does not start on a CPU.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class HostCopy:
    """The states of one save after the other, in the same buffers: pinned for tensors of a GPU.

    Args:
        copies: False hands the live tensors on, for a save that training waits for to its end.

    Attributes:
        files: by path below the checkpoint, what ``torch.save`` is to write there.
        weights: of the model by name, if this rank writes them.
    """

    def __init__(self, copies: bool) -> None:
        self._copies = copies
        self._buffers: dict[str, Tensor] = {}
        self._taken: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # original and copy
        self._tag = ""
        self.files: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}

    def take(
        self, engine: Any, aside: Path, rank_file: str, rank_state: Mapping[str, Any], model: nn.Module | None
    ) -> None:
        """Copies all that this rank has to write; all ranks call it.

        Args:
            aside: the folder that DeepSpeed is told to write into.
            rank_file: the name for ``rank_state``.
            model: whose weights this rank writes beside the engine's states; None: another rank does.
        """
        self._taken, self.files, self.weights = {}, {}, {}
        self._tag = "engine"
        with _instead_of_writing(engine, self):
            engine.save_checkpoint(str(aside), tag=self._tag, save_latest=False)
        self.files[rank_file] = self._copy(rank_state, rank_file)
        if model is not None:
            # Each by itself: ZeRO lays parameters out in one storage, of which safetensors takes no parts.
            self.weights = {
                name: self._copy(value, f"weights/{name}") if self._copies else value.detach().cpu().clone()
                for name, value in model.state_dict().items()
            }
        self._taken = {}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies are under way until now

    def bytes(self) -> int:
        """Size of what was taken, a little less than that of its files."""
        return sum(_bytes(content) for content in self.files.values()) + _bytes(self.weights)

    def release(self) -> None:
        """Lets go of what is written; the buffers stay."""
        self.files, self.weights = {}, {}

    def _copy(self, value: Any, place: str) -> Any:
        """``value`` as it is now: what training changes later is copied. place: the buffer's name."""
        if not self._copies:
            return value
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), place)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._copy(part, f"{place}/{key}")) for key, part in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._copy(part, f"{place}/{number}") for number, part in enumerate(value))
        return copy.deepcopy(value)

    def _copy_tensor(self, value: Tensor, place: str) -> Tensor:
        # The same weights stand in DeepSpeed's file and in model.safetensors: copied once.
        same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and same in self._taken:
            return self._taken[same][1]
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[place] = buffer
        buffer.copy_(value, non_blocking=True)
        self._taken[same] = value, buffer  # the original, too: its address must not be given to another
        return buffer

    # ---- what DeepSpeed asks of a checkpoint engine

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        """Takes a state that belongs into the file ``path``."""
        name = f"{self._tag}/{Path(path).name}"
        self.files[name] = self._copy(dict(state_dict), name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing is written yet."""

    def create(self, info: Any) -> None:
        """Nothing is to be prepared."""

    def commit(self, info: Any) -> bool:
        """Whoever writes the files says when they are whole."""
        return True

    def is_decoupled(self) -> bool:
        """False: DeepSpeed need not ask later."""
        return False


@contextmanager
def _instead_of_writing(engine: Any, host: HostCopy) -> Iterator[None]:
    """Within it DeepSpeed hands its states to ``host`` and writes nothing, its recovery scripts included: a disk that
    is full would end this rank there, while the others wait for it."""
    before = getattr(engine, "checkpoint_engine", None)
    engine.checkpoint_engine = host
    engine._copy_recovery_script = lambda path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
