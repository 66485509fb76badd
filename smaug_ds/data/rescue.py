"""The way from a worker's batch to a batch with pixels, also where DALI refuses a clip.

The order and the draws are pure, so a batch can be read again, and what is not the culprit comes out as it was. A
culprit that left its worker encoded is decoded by PyAV, and stays; if PyAV cannot decode it either, the reader puts the
next candidate in its place (in evaluation leaves it out), as it does with any sample that fails.

What this cannot see is damage that the decoder conceals: NVDEC shows smears, grey or the last good picture for packets
that are damaged inside, and DALI does not ask it about them. The demux in the worker finds missing packets and headers,
the index finds files that are cut short (``declared_frames``); the rest is for a full decode when shards are built.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from smaug_ds.data.clip import Clip, GraphError, Window
from smaug_ds.data.quarantine import Failure, Spot, Verdict
from smaug_ds.data.reader import EvalReader, RawBatch, TrainReader
from smaug_ds.data.sample import Batch, Place

if TYPE_CHECKING:  # workers import this module, too: they need no DALI
    from smaug_ds.data.dali import Pixels

Reader = TrainReader | EvalReader
_STAGE = "dali"
_BLACK = Clip(Window(0, 0, 16, 16), False, frames=np.zeros((1, 16, 16, 3), dtype=np.uint8))


def finish(raw: RawBatch, reader: Reader, pixels: Pixels) -> tuple[RawBatch, Batch | None]:
    """Adds the pixels: the batch on the device, None if it has no usable sample.

    What DALI refuses is remembered in ``reader``, the caller's own. The workers have copies of it and will send such a
    clip encoded again; it then goes to PyAV without another try. Raises GraphError for a failure of the graph that is
    no clip's fault, such as a lack of memory.
    """
    if _sends_refused(raw, reader):
        raw = _read_again(raw, reader)
    refused: list[Failure] = []
    rebuilt = False
    while raw.batch is not None:
        clips = raw.clips.unpack()
        try:
            batch = dataclasses.replace(raw.batch, frames=pixels(clips))
        except GraphError as error:
            culprits = find_culprits(clips, pixels, error)
            most = 2 * len(culprits) > len(clips)
            if most and not rebuilt:  # is it the clips, or pipelines that have died?
                pixels.rebuild()
                rebuilt = True
                continue
            if any(clips[number].encoded is None for number in culprits):
                pixels([_BLACK])  # raises if the graph fails whatever it gets
            refused += _condemn(raw, clips, culprits, reader)
            if most:
                warnings.warn(f"DALI: {error}; PyAV decodes this batch, which is slow", RuntimeWarning, stacklevel=1)
            raw = _read_again(raw, reader, encoded=not most)
        else:
            failures = _settled(refused, raw.spots, batch.keys) + raw.failures
            return dataclasses.replace(raw, failures=failures), _on_device(batch, pixels.device)
    return dataclasses.replace(raw, failures=refused + raw.failures), None


def find_culprits(clips: Sequence[Clip], pixels: Pixels, error: GraphError) -> dict[int, str]:
    """The clips that DALI refuses, by number, with its words; ``error`` is what it said to all of them together.

    By bisection: at most 2 log2(B) runs of the graph for each culprit, and no more once they are most of the batch.
    Raises ``error`` if each clip for itself, or half of them together, is no trouble.
    """
    found: dict[int, str] = {}
    groups: list[tuple[Sequence[int], str]] = [(range(len(clips)), str(error))]  # they fail, with what words if known
    while groups and 2 * len(found) <= len(clips):
        group, words = groups.pop()
        if len(group) == 1:
            if words := words or _refusal(clips, group, pixels):
                found[group[0]] = words
            continue
        first, second = group[: len(group) // 2], group[len(group) // 2 :]
        if words := _refusal(clips, first, pixels):
            groups.append((first, words))
            if words := _refusal(clips, second, pixels):
                groups.append((second, words))
        else:  # then it must be the others
            groups.append((second, ""))
    if not found:
        raise error
    return dict(sorted(found.items()))


def _refusal(clips: Sequence[Clip], group: Sequence[int], pixels: Pixels) -> str:
    """DALI's words on these clips; empty if it takes them."""
    try:
        pixels([clips[number] for number in group])
    except GraphError as error:
        return str(error) or "no reason given"
    return ""


def _condemn(raw: RawBatch, clips: Sequence[Clip], culprits: Mapping[int, str], reader: Reader) -> list[Failure]:
    """Has the reader keep the culprits from NVDEC, or from the batch. Failures of those that may stay."""
    assert raw.batch is not None, "the culprits are in it"
    failures = []
    for number, words in culprits.items():
        spot = raw.spots[number]
        if clips[number].encoded is None:
            reader.condemn({spot: Verdict(_STAGE, words)})  # the reader reports what it replaces
            continue
        in_training = isinstance(reader, TrainReader)
        place = Place(*spot[1:]) if in_training else None
        entry = reader.corpus.entry(*spot[1:]) if in_training else reader.corpus.nth(spot.medium, spot.position)
        failures.append(Failure(raw.step, spot.position, place, entry.shard, entry.key, _STAGE, words))
    reader.pyav_only |= {failure.sample for failure in failures}
    return failures


def _sends_refused(raw: RawBatch, reader: Reader) -> bool:
    """Whether it holds an encoded clip that DALI is known to refuse."""
    if raw.batch is None or not reader.pyav_only:
        return False
    in_training = isinstance(reader, TrainReader)
    return any(
        clip.indices is not None and (Place(*spot[1:]) if in_training else name) in reader.pyav_only
        for spot, name, clip in zip(raw.spots, raw.batch.keys, raw.clips.bare, strict=True)
    )


def _read_again(raw: RawBatch, reader: Reader, encoded: bool = True) -> RawBatch:
    """The same batch, as far as ``reader`` knows no better by now. What failed before is not tried again."""
    assert raw.batch is not None, "a batch without samples is not read again"
    again = copy.copy(reader)
    failed = {Spot(f.position, *(f.place or (raw.batch.medium,))): Verdict(f.stage, f.reason) for f in raw.failures}
    again.verdicts = {**reader.verdicts, **failed}
    if not encoded:
        again.encoded_codecs = frozenset()
    return again.again(raw.index)


def _settled(refused: Sequence[Failure], spots: Sequence[Spot], names: Sequence[str]) -> list[Failure]:
    """Who is now where the refused samples were: they themselves if PyAV decoded them."""
    now = {spot.position: name for spot, name in zip(spots, names, strict=True)}
    return [dataclasses.replace(failure, replaced_by=now.get(failure.position)) for failure in refused]


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """In a stream of its own: a copy from ordinary memory waits for its stream, which must not be the model's."""
    if device.type != "cuda":
        return batch.to(device)
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        batch = batch.to(device)
        stream.synchronize()
    for value in vars(batch).values():
        if isinstance(value, torch.Tensor) and value.is_cuda:
            value.record_stream(torch.cuda.default_stream(device))
    return batch


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
