"""What a build was made from: another command on the same folder is told by it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smaug_ds.data.annotations import SourceError
from smaug_ds.data.corpora import texts_of
from smaug_ds.data.shard import ShardError

SIGNATURE = "build.json"


def digest(path: Path, outputs: set[Path]) -> dict[str, str]:
    """Name and digest of a list; of a folder by the names, sizes and times of its files, which are not read, less
    ``outputs``, which a build writes itself. Raises SourceError if it cannot be read."""
    found = hashlib.blake2b(digest_size=16)
    try:
        if path.is_dir():
            for line in _listing(path.resolve(), outputs):
                found.update(line)
        for text in filter(Path.is_file, texts_of(path)):
            with text.open("rb") as file:
                while block := file.read(2**20):
                    found.update(block)
    except OSError as error:
        raise SourceError(f"list {path} cannot be read: {error}") from error
    return {"name": path.name, "digest": found.hexdigest()}


def _listing(folder: Path, outputs: set[Path]) -> Iterator[bytes]:
    """A line for each file at any depth, in a fixed order."""
    with os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        if Path(entry.path) in outputs:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield os.fsencode(entry.name) + b"/\0"
            yield from _listing(Path(entry.path), outputs)
            yield b"..\0"
        else:
            status = entry.stat(follow_symlinks=False)
            yield os.fsencode(entry.name) + b"\0%d %d\0" % (status.st_size, status.st_mtime_ns)


def compare(folder: Path, signature: dict[str, Any]) -> None:
    """Raises ShardError if ``folder`` holds what another command built; names the first difference."""
    before = json.loads((folder / SIGNATURE).read_text())
    for key in signature:
        if before.get(key) != signature[key]:
            raise ShardError(
                f"{folder} holds a build with {key} = {json.dumps(before.get(key))}, this command has "
                f"{json.dumps(signature[key])}: give the same command to go on, another --out, or remove {folder}"
            )
