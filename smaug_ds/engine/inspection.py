"""What a run or an evaluation needs of its hosts, and what a rank finds of it on its own."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import smaug_ds
from smaug_ds import distributed
from smaug_ds.config import ConfigError, naming, to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.data.dali import choose_decoder
from smaug_ds.data.index import ShardIndex
from smaug_ds.data.mixture import training_folders
from smaug_ds.engine import checkpoint
from smaug_ds.engine.finetuning import FinetuneConfig
from smaug_ds.engine.outline import parameters, source_of_weights, starting_weights
from smaug_ds.engine.resume import flat
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.text import tokenizer_file

GROUPS = ("code", "config", "data", "run folder", "accelerator", "decoder", "clock")
PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda130", "av", "transformers", "timm", "numpy")
CHECKPOINT_BYTES = 20  # per parameter: weights as DeepSpeed's and as safetensors, fp32 copy, two moments of AdamW
SHARED_SECONDS = 15.0  # until a network file system shows one host what another wrote
PACE_SECONDS = 0.3  # of multiplying matrices
_SEAL = ".preflight"


@dataclass(frozen=True)
class Needs:
    """What a run or an evaluation asks of each host."""

    settings: Any  # dataclasses; the same on all hosts
    data: DataConfig  # of them
    model: ModelConfig  # of them
    files: tuple[tuple[str, str], ...]  # setting and file that it names; the same contents on all hosts
    shards: Callable[[], list[str]]  # folders of indexed shards that are read; may raise ConfigError
    folder: Path  # that it writes into; the same folder on all hosts
    folder_key: str  # the setting that it comes from
    checkpoints: int = 0  # that have to find room in the folder
    start: Callable[[], str] = lambda: ""  # says in a line what it starts from; may raise ConfigError

    @classmethod
    def of_run(cls, config: PretrainConfig) -> Needs:
        """Those of pre-training or fine-tuning. Raises ConfigError where ``run.init_from`` cannot be read."""
        files = [("run.deepspeed", config.run.deepspeed), ("data.tokenizer", config.data.tokenizer)]
        if config.data.corpus:
            files.append(("data.corpus", config.data.corpus))
        if isinstance(config, FinetuneConfig):
            asked = config.questions
            files += [("questions.train", path) for path in asked.train]
            files += [("questions.test", path) for path in asked.test]
            files += [("questions.answer_list", path) for path in [asked.answer_list] if path]
        if source := source_of_weights(config):
            with naming("run.init_from"):
                files += [("run.init_from", path) for path in marks_of(checkpoint.find(source))]
        folder = Path(config.run.folder)
        present = len(list((folder / "checkpoints").glob("step_*")))
        return cls(
            settings=config,
            data=config.data,
            model=config.model,
            files=tuple(files),
            shards=lambda: trained_and_tested_on(config.data),
            folder=folder,
            folder_key="run.folder",
            checkpoints=max(1, config.run.keep_checkpoints + 1 - present),  # written before the oldest is removed
            start=lambda: starting_weights(config),
        )


def marks_of(folder: Path) -> list[str]:
    """Those small files of a checkpoint that tell it from others; the first has the hashes of the weights."""
    names = (checkpoint.MANIFEST, checkpoint.STATE, checkpoint.ARCHITECTURE)
    return [str(folder / name) for name in names if (folder / name).is_file()]


def trained_and_tested_on(data: DataConfig) -> list[str]:
    """Folders of shards. Raises ConfigError when there are none."""
    if folders := [*training_folders(data), *data.test]:
        return folders
    raise ConfigError("neither data.train nor data.corpus is set")


@dataclass
class Facts:
    """What a rank tells. The first rank of a host looks at what the host's ranks have in common."""

    rank: int
    host: str
    clock: float = 0.0  # Unix time, seconds, taken at the same moment everywhere
    marks: dict[str, dict[str, str]] = field(default_factory=dict)  # by group: what has to be equal on all hosts
    problems: dict[str, list[str]] = field(default_factory=dict)  # by group: what is wrong here
    shown: dict[str, str] = field(default_factory=dict)  # by group: what the table says in place of "ok"
    notes: list[str] = field(default_factory=list)  # lines to tell below the table

    @contextmanager
    def noting(self, group: str) -> Iterator[None]:
        """Notes as problems of ``group`` what a user can mend (ValueError, OSError) and what a device or DALI refuses
        (RuntimeError)."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            self.problems.setdefault(group, []).append(" ".join(str(error).split()))


class Inspection:
    """One rank's look around.

    read: makes out of the command line what is needed; ConfigError, ValueError and OSError become problems of the
        group "config".
    """

    def __init__(self, rank: int, local_rank: int, read: Callable[[], Needs]) -> None:
        self._facts = Facts(rank, socket.gethostname())
        self._first_of_host = local_rank == 0
        self._needs: Needs | None = None
        with self._facts.noting("config"):
            self._needs = read()

    @contextmanager
    def seal(self) -> Iterator[str]:
        """Within it a file in the run folder holds the text that is returned: other hosts have to see it."""
        text = f"{self._facts.host} {os.getpid()} {time.time()}"
        path = self._needs.folder / _SEAL if self._needs else None
        with contextlib.suppress(OSError):  # found again, and told, by ``facts``
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        yield text
        with contextlib.suppress(OSError):
            if path:
                path.unlink()

    def facts(self, clock: float, seal: str) -> Facts:
        """All that can be found out alone. seal: what the main rank has put into the run folder."""
        facts, needs = self._facts, self._needs
        facts.clock = clock
        with facts.noting("accelerator"):
            facts.shown["accelerator"] = accelerator()
            facts.marks["accelerator"] = {"accelerator": facts.shown["accelerator"]}
        if not self._first_of_host:
            return facts
        facts.marks["code"] = code()
        if needs is None:
            return facts
        facts.marks["config"] = {key: str(value) for key, value in flat(to_dict(needs.settings)).items()}
        for key, path in needs.files:
            with facts.noting("config"), naming(key):
                facts.marks["config"][f"{path} ({key})"] = _digest(_file(key, path))
        with facts.noting("config"):
            facts.notes += filter(None, [needs.start()])
        with facts.noting("data"):
            for folder in needs.shards():
                with facts.noting("data"):
                    facts.marks.setdefault("data", {})[folder] = shards(folder)
        with facts.noting("run folder"):
            facts.shown["run folder"] = run_folder(needs, seal)
        with facts.noting("decoder"):
            decoder = choose_decoder(needs.data.decoder, distributed.device())
            facts.shown["decoder"] = decoder.name
            facts.marks["decoder"] = {"decoder": f"{decoder.name} {' '.join(sorted(decoder.codecs))}".strip()}
        return facts


def accelerator() -> str:
    """Name of this rank's device, after a small computation on it. Raises RuntimeError when that fails."""
    device = distributed.device()
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"{torch.cuda.device_count()} GPUs, but a rank is to take number {device.index}")
    ones = torch.ones(64, 64, device=device)
    if float((ones @ ones).sum()) != 64.0**3:
        raise RuntimeError(f"{device} computes wrongly")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def pace() -> float:
    """FLOP/s of this rank's device in products of matrices; all ranks call it at the same time, as in a step."""
    device = distributed.device()
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    count, began = -1, time.perf_counter()
    while (seconds := time.perf_counter() - began) < PACE_SECONDS or count < 1:
        torch.matmul(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
        if count == 0:  # the first one loads libraries
            began = time.perf_counter()
    return 2.0 * size**3 * count / seconds


def code() -> dict[str, str]:
    """A hash of each of the package's source files, and the versions of what it runs on."""
    root = Path(smaug_ds.__file__).parent
    sources = {f"smaug_ds/{path.relative_to(root).as_posix()}": _digest(path) for path in sorted(root.rglob("*.py"))}
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return sources | versions | {"python": platform.python_version()}


def shards(folder: str) -> str:
    """A hash of the folder's index, after a look at its tars. Raises ShardError or OSError for what cannot be read."""
    index = ShardIndex.open(folder)
    with open(index.shards[0], "rb") as file:
        file.read(1)
    return _digest(index.folder / "index" / "manifest.json")


def run_folder(needs: Needs, seal: str) -> str:
    """What is free in the run folder, after writing into it.

    Raises ConfigError where it is not shared with the main rank (``seal``) or has no room, OSError where it cannot be
    written.
    """
    folder = needs.folder
    with naming(needs.folder_key):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    deadline = time.monotonic() + SHARED_SECONDS
    while not ((folder / _SEAL).is_file() and (folder / _SEAL).read_text() == seal):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{needs.folder_key}: {folder} does not show what {seal.partition(' ')[0]} wrote into it: it has to "
                "lie on storage that all hosts share"
            )
        time.sleep(0.1)
    free, needed = shutil.disk_usage(folder).free, 0
    if needs.checkpoints:
        needed = needs.checkpoints * parameters(needs.model, needs.data) * CHECKPOINT_BYTES
    if free < needed:
        raise ConfigError(
            f"{needs.folder_key}: {folder} has {free / 1e9:.1f} GB free, but {needs.checkpoints} more checkpoints "
            f"(run.keep_checkpoints) take about {needed / 1e9:.1f} GB"
        )
    return f"{free / 1e9:.0f} GB free"


def _file(key: str, path: str) -> Path:
    """The file that the setting ``key`` means. Raises ValueError where it names none."""
    if key == "data.tokenizer":
        return tokenizer_file(path)
    if not path or Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name a file" if path else "is empty: name a file")
    return Path(path)


def _digest(path: Path) -> str:
    return "version " + hashlib.sha256(path.read_bytes()).hexdigest()[:12]
