"""What a rank finds about its host before a run, and what all findings together say: the inner part of a preflight."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import smaug_ds
from smaug_ds import distributed
from smaug_ds.config import ConfigError, naming, parse, to_dict
from smaug_ds.data.dali import choose_decoder
from smaug_ds.data.index import ShardIndex
from smaug_ds.data.mixture import training_folders
from smaug_ds.engine import checkpoint
from smaug_ds.engine.resume import flat
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer

GROUPS = ("code", "config", "data", "run folder", "accelerator", "decoder", "clock")
PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda130", "av", "transformers", "timm", "numpy")
SKEW_SECONDS = 10.0  # that clocks may differ: a run stops before its job's end by them
CHECKPOINT_BYTES = 20  # per parameter: weights as DeepSpeed's and as safetensors, fp32 copy, two moments of AdamW
SHARED_SECONDS = 15.0  # until a network file system shows one host what another wrote
_SEAL = ".preflight"


@dataclass
class Facts:
    """What a rank tells. The first rank of a host looks at what the host's ranks have in common."""

    rank: int
    host: str
    clock: float = 0.0  # Unix time, seconds, taken at the same moment everywhere
    marks: dict[str, dict[str, str]] = field(default_factory=dict)  # by group: what has to be equal on all hosts
    problems: dict[str, list[str]] = field(default_factory=dict)  # by group: what is wrong here
    shown: dict[str, str] = field(default_factory=dict)  # by group: what the table says in place of "ok"

    @contextmanager
    def noting(self, group: str) -> Iterator[None]:
        """Notes as problems of ``group`` what a user can mend (ValueError, OSError) and what a device or DALI refuses
        (RuntimeError)."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            self.problems.setdefault(group, []).append(" ".join(str(error).split()))


class Inspection:
    """One rank's look around."""

    def __init__(self, rank: int, local_rank: int, config_file: str | None, overrides: Sequence[str]) -> None:
        self._facts = Facts(rank, socket.gethostname())
        self._first_of_host = local_rank == 0
        self._config: PretrainConfig | None = None
        with self._facts.noting("config"):
            self._config = parse(PretrainConfig, config_file, overrides)

    @contextmanager
    def seal(self) -> Iterator[str]:
        """Within it a file in the run folder holds the text that is returned: other hosts have to see it."""
        text = f"{self._facts.host} {os.getpid()} {time.time()}"
        path = Path(self._config.run.folder) / _SEAL if self._config else None
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
        facts, config = self._facts, self._config
        facts.clock = clock
        with facts.noting("accelerator"):
            facts.shown["accelerator"] = accelerator()
            facts.marks["accelerator"] = {"accelerator": facts.shown["accelerator"]}
        if not self._first_of_host:
            return facts
        facts.marks["code"] = code()
        if config is None:
            return facts
        facts.marks["config"] = {key: str(value) for key, value in flat(to_dict(config)).items()}
        with facts.noting("config"):
            facts.marks["config"] |= files(config)
        for folder in self._data_folders(config):
            with facts.noting("data"):
                facts.marks.setdefault("data", {})[folder] = shards(folder)
        with facts.noting("run folder"):
            facts.shown["run folder"] = run_folder(config, seal)
        with facts.noting("decoder"):
            decoder = choose_decoder(config.data.decoder, distributed.device())
            facts.shown["decoder"] = decoder.name
            facts.marks["decoder"] = {"decoder": f"{decoder.name} {' '.join(sorted(decoder.codecs))}".strip()}
        return facts

    def _data_folders(self, config: PretrainConfig) -> list[str]:
        with self._facts.noting("data"):
            if folders := [*training_folders(config.data), *config.data.test]:
                return folders
            raise ConfigError("neither data.train nor data.corpus is set")
        return []


def accelerator() -> str:
    """Name of this rank's device, after a small computation on it. Raises RuntimeError when that fails."""
    device = distributed.device()
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"{torch.cuda.device_count()} GPUs, but a rank is to take number {device.index}")
    ones = torch.ones(64, 64, device=device)
    if float((ones @ ones).sum()) != 64.0**3:
        raise RuntimeError(f"{device} computes wrongly")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def code() -> dict[str, str]:
    """A hash of each of the package's source files, and the versions of what it runs on."""
    root = Path(smaug_ds.__file__).parent
    sources = {f"smaug_ds/{path.relative_to(root).as_posix()}": _digest(path) for path in sorted(root.rglob("*.py"))}
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return sources | versions | {"python": platform.python_version()}


def files(config: PretrainConfig) -> dict[str, str]:
    """Hashes of the files that the settings name. Raises ConfigError where one cannot be read."""
    marks = {}
    for key, path in {"run.deepspeed": config.run.deepspeed, "data.tokenizer": config.data.tokenizer}.items():
        with naming(key):
            marks[f"the file of {key}"] = _digest(Path(path))
    if config.run.init_from:
        with naming("run.init_from"):
            checkpoint.find(config.run.init_from)
    return marks


def shards(folder: str) -> str:
    """A hash of the folder's index, after a look at its tars. Raises ShardError or OSError for what cannot be read."""
    index = ShardIndex.open(folder)
    with open(index.shards[0], "rb") as file:
        file.read(1)
    return _digest(index.folder / "index" / "manifest.json")


def run_folder(config: PretrainConfig, seal: str) -> str:
    """What is free in the run folder, after writing into it.

    Raises ConfigError where it is not shared with the main rank (``seal``) or has no room, OSError where it cannot be
    written.
    """
    folder = Path(config.run.folder)
    with naming("run.folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    deadline = time.monotonic() + SHARED_SECONDS
    while not ((folder / _SEAL).is_file() and (folder / _SEAL).read_text() == seal):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run.folder: {folder} does not show what {seal.partition(' ')[0]} wrote into it: it has to lie on "
                "storage that all hosts share"
            )
        time.sleep(0.1)
    present = len(list((folder / "checkpoints").glob("step_*")))
    wanted = max(1, config.run.keep_checkpoints + 1 - present)  # one is written before the oldest is removed
    free, needed = shutil.disk_usage(folder).free, wanted * parameters(config) * CHECKPOINT_BYTES
    if free < needed:
        raise ConfigError(
            f"run.folder: {folder} has {free / 1e9:.1f} GB free, but {wanted} more checkpoints (run.keep_checkpoints "
            f"is {config.run.keep_checkpoints}) take about {needed / 1e9:.1f} GB"
        )
    return f"{free / 1e9:.0f} GB free"


def parameters(config: PretrainConfig) -> int:
    """Number of the model's parameters, without making them."""
    with naming("data.tokenizer"):
        vocab_size = Tokenizer(config.data.tokenizer).vocab_size
    model = dataclasses.replace(config.model, text=dataclasses.replace(config.model.text, vocab_size=vocab_size))
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in SmaugModel(model).parameters())


def judge(facts: Sequence[Facts]) -> dict[str, dict[str, list[str]]]:
    """What is wrong, by host and group; each text begins with the host.

    Where hosts differ, most of them are right; if there are no most, the main rank's host is.
    """
    faults: dict[str, dict[str, list[str]]] = {fact.host: {} for fact in facts}

    def blame(fact: Facts, group: str, text: str) -> None:
        told = faults[fact.host].setdefault(group, [])
        if f"{fact.host}: {text}" not in told:  # of several ranks of one host
            told.append(f"{fact.host}: {text}")

    for fact in facts:
        for group, problems in fact.problems.items():
            for problem in problems:
                blame(fact, group, problem)
        skew = fact.clock - facts[0].clock
        if abs(skew) > SKEW_SECONDS:
            blame(fact, "clock", f"the clock is {skew:+.0f} s off that of {facts[0].host}: set it by NTP")
    for group in GROUPS:
        told = [fact for fact in facts if group in fact.marks]
        differing: dict[int, list[str]] = {fact.rank: [] for fact in told}
        for name in dict.fromkeys(name for fact in told for name in fact.marks[group]):
            values = Counter(fact.marks[group].get(name) for fact in told)
            right = values.most_common(1)[0][0]  # of equally many the first met, which is the main rank's
            reference = next(fact for fact in told if fact.marks[group].get(name) == right)
            for fact in told:
                value = fact.marks[group].get(name)
                # what could not be read is a problem already
                if value != right and not (value is None and fact.problems.get(group)):
                    text = f"{name} is {value or 'absent'}, on {reference.host} {right or 'absent'}"
                    differing[fact.rank].append(text)
        for fact in told:
            if texts := differing[fact.rank]:
                blame(fact, group, texts[0] + (f" ({len(texts) - 1} more differ)" if texts[1:] else ""))
    return faults


def _digest(path: Path) -> str:
    return "version " + hashlib.sha256(path.read_bytes()).hexdigest()[:12]
