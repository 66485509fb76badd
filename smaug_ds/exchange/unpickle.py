"""PyTorch's pickled files without running anything that stands in them.

Tensors and plain values come out. Objects of a few named classes, which other programs leave beside the weights, come
out as empty husks: their own code is not needed, and not imported. Whatever else a file wants is refused.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Husk:
    """Stands in for an object of a named class; takes and does nothing."""

    def __new__(cls, *arguments: Any) -> Husk:
        return object.__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: Path, husks: Sequence[str] = (), mmap: bool = False) -> Any:
    """What ``torch.save`` wrote to ``path``, on the CPU, loaded with ``weights_only=True``.

    Args:
        husks: dotted names of the classes whose objects become a ``Husk``.
        mmap: leave the tensors in the file until they are looked at.

    Raises ValueError naming the file: it is missing, damaged or a TorchScript archive, or it wants something that is
    neither a tensor nor among ``husks``.
    """
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code: where you trust it, write its weights to another file "
            f"with torch.save(torch.jit.load({path.name!r}, map_location='cpu').state_dict(), 'weights.pt')"
        )
    try:
        with torch.serialization.safe_globals([(Husk, name) for name in husks]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error
        raise ValueError(
            f"{path} asks for {wanted[1]} when it is loaded, which is no weight: refused, and nothing of it was run"
        ) from error
    except (OSError, EOFError, RuntimeError) as error:  # RuntimeError: a zip archive that is cut short
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
