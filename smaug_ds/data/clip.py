"""One sample between decoder and DALI graph: its pixels, or its trimmed stream, and what to show of it.

Letters: T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smaug_ds.data import nvdec
from smaug_ds.data.image import decode_image
from smaug_ds.data.media import MediaFacts
from smaug_ds.data.sample import Sample
from smaug_ds.data.video import Video, choose_frames


class GraphError(RuntimeError):
    """DALI could not run its graph on these clips. The message is DALI's."""


class Window(NamedTuple):
    """Part of a frame that is shown, pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """One sample between decoder and graph: ``frames``, or ``encoded`` with ``indices``; and what to show of it."""

    window: Window
    flip: bool
    frames: NDArray[np.uint8] | None = None  # (T, H, W, 3) RGB
    encoded: NDArray[np.uint8] | None = None  # (bytes,) of a video file
    indices: NDArray[np.int32] | None = None  # (T,) frames of that file, in presentation order


class PackedClips(NamedTuple):
    """Clips with all their bytes in one tensor: it travels between processes as one piece of shared memory."""

    data: Tensor  # (bytes,) uint8
    shapes: list[tuple[int, ...]]  # of each clip's array: (T, H, W, 3) frames or (bytes,) encoded
    bare: list[Clip]  # the clips without their arrays

    @classmethod
    def pack(cls, clips: Sequence[Clip]) -> PackedClips:
        arrays = [clip.frames if clip.frames is not None else clip.encoded for clip in clips]
        present = [array for array in arrays if array is not None]
        data = torch.empty(sum(array.size for array in present), dtype=torch.uint8)
        target, end = data.numpy(), 0
        for array in present:
            target[end : end + array.size].reshape(array.shape)[...] = array
            end += array.size
        bare = [Clip(clip.window, clip.flip, indices=clip.indices) for clip in clips]
        return cls(data, [array.shape for array in present], bare)

    def unpack(self) -> list[Clip]:
        clips, end, data = [], 0, self.data.numpy()
        for shape, clip in zip(self.shapes, self.bare, strict=True):
            start, end = end, end + int(np.prod(shape))
            array = data[start:end].reshape(shape)
            if clip.indices is None:
                clips.append(Clip(clip.window, clip.flip, frames=array))
            else:
                clips.append(Clip(clip.window, clip.flip, encoded=array, indices=clip.indices))
        return clips


def make_clip(
    sample: Sample,
    facts: MediaFacts,
    frames: int,
    generator: np.random.Generator | None,
    flip: bool,
    window: Callable[[int, int], Window],
    encoded_codecs: frozenset[str],
) -> Clip:
    """Decode ``frames`` frames of the sample, or trim them for NVDEC if it takes such a clip of ``encoded_codecs``.

    ``window`` says what to show of a (height, width). Raises MediaError.
    """
    if sample.medium == "image":
        image = decode_image(sample.media)
        return Clip(window(*image.shape[1:3]), flip, frames=image)
    video = Video(sample.media)
    indices = choose_frames(len(video), frames, generator)
    if nvdec.takes(facts, encoded_codecs):
        trimmed, local = video.trim(indices)
        if (file := nvdec.uncropped(facts.codec, trimmed)) is not None:
            encoded = np.frombuffer(file, dtype=np.uint8)
            return Clip(window(facts.height, facts.width), flip, encoded=encoded, indices=local.astype(np.int32))
    pixels = video.decode(indices)
    return Clip(window(*pixels.shape[1:3]), flip, frames=pixels)
