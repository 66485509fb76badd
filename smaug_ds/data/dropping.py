"""Takes samples that turned out to be bad out of a shard index, without another look at the tars.

Memory holds one shard at a time, whatever their number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from smaug_ds.data.index import ShardIndex
from smaug_ds.data.indexing import PARTIAL, IndexReport, put_in_place
from smaug_ds.data.parallel import alone_in, room_in
from smaug_ds.data.scanning import NAMED, Reject, Scan


def drop(folder: str | Path, samples: Mapping[str, Mapping[int, tuple[str, str]]]) -> IndexReport:
    """Takes samples out of the index of ``folder``, as if it had been made without them; the tars stay untouched.

    samples: of a tar, by name, the rows among its samples, from 0, each with a reason and details for
        ``index/rejects.jsonl``.

    Raises:
        ShardError: as ``ShardIndex.open`` and ``build_index``; not one sample would be left.
    """
    index = ShardIndex.open(folder)
    sizes = {shard["name"]: shard["bytes"] for shard in index.manifest["shards"]}
    with alone_in(index.folder / PARTIAL), room_in(index.folder):
        return put_in_place(
            index.folder, sizes, index.manifest.get("skipped", []), lambda: _scans_without(index, samples)
        )


def _scans_without(index: ShardIndex, samples: Mapping[str, Mapping[int, tuple[str, str]]]) -> Iterator[Scan]:
    """The index as the scans that it was made of, some samples among their rejects."""
    rows, keys = (np.load(index.folder / "index" / f"{name}.npy", mmap_mode="r") for name in ("samples", "keys"))
    names = {column: index.manifest[name] for column, name in NAMED.items()}
    with (index.folder / "index" / "rejects.jsonl").open(encoding="ascii") as ledger:
        # in the order of the tars, of which many have none
        groups = groupby((Reject(**json.loads(line)) for line in ledger), key=lambda reject: reject.shard)
        of, rejects = next(groups, ("", iter(())))
        for path, (start, end) in zip(index.shards, pairwise(index.starts), strict=True):
            shard, own, own_rejects = Path(path).name, rows[start:end].copy(), list[Reject]()
            if of == shard:
                own_rejects = list(rejects)
                of, rejects = next(groups, ("", iter(())))
            dropped = samples.get(shard, {})
            own_rejects += [Reject(shard, index.entry(start + row).key, *dropped[row]) for row in sorted(dropped)]
            first = int(own["key_offset"][0]) if len(own) else 0
            last = int(own["key_offset"][-1] + own["key_size"][-1]) if len(own) else 0
            own["key_offset"] -= np.uint64(first)
            kept = ~np.isin(np.arange(end - start), list(dropped))
            yield Scan(own[kept], keys[first:last].tobytes(), names, own_rejects)
