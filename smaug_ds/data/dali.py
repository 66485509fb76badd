"""The DALI graph: one way from decoded or encoded clips to training pixels, on CPU and GPU. The only user of DALI.

On a GPU with NVDEC the graph begins with the hardware decoder, else with frames that PyAV decoded in a worker. What
follows is one graph: crop window -> bicubic resize with antialiasing -> flip -> (T, 3, S, S) uint8. Windows and flips
are inputs: DALI's own random numbers cannot be resumed.

DALI and torchvision share the bicubic kernel but not the treatment of borders: DALI repeats the edge pixels,
torchvision (like PIL) leaves out what lies beyond and scales the other weights up. We do as torchvision does, by
resizing the crop within a margin of zeros and multiplying by the inverse of the weights that fell on pixels.

Letters: B batch, T frames, H height, W width, S side of the output.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import av
import numpy as np
import torch
from av.video.stream import VideoStream
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali import types as dali_types
from torch import Tensor

from smaug_ds.config import ConfigError
from smaug_ds.data.clip import Clip, GraphError, Window

# Codecs that NVDEC may decode, with an encoder and a container to try whether this one does. Few cards have AV1, and
# its decoder on the CPU is quick.
_NVDEC_CANDIDATES = {
    "h264": ("libx264", "mp4"),
    "hevc": ("libx265", "mp4"),
    "vp8": ("libvpx", "matroska"),
    "vp9": ("libvpx-vp9", "matroska"),
}
types: Any = dali_types  # made at run time, unseen by type checkers
_SUPPORT = 2.0  # of the bicubic kernel, in pixels of the coarser grid
_SHARPNESS = -0.5  # Keys' parameter a, as in PIL, torchvision and DALI


@dataclass(frozen=True)
class Decoder:
    """What decodes videos in this run, and why."""

    name: Literal["pyav", "nvdec"]
    codecs: frozenset[str]  # that NVDEC decodes
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@pipeline_def(prefetch_queue_depth=1)
def graph(size: int, encoded: bool, on_gpu: bool) -> Any:
    """(T, 3, size, size) uint8 per sample. ``encoded``: it decodes, too; ``on_gpu``: where it runs.

    On a GPU it decodes with NVDEC. On a CPU it decodes VP8, VP9 and MJPEG, which no run asks for: it stands in for
    NVDEC where the handling of encoded clips is tested.
    """
    if encoded:
        files = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        indices = fn.external_source(name="indices", dtype=types.INT32, ndim=1)
        # The decoder has ``num_threads`` threads of its own, without affinity because several ranks share the cores.
        # Each works on one clip at a time and holds an NVDEC session meanwhile: that bounds the sessions at work. They
        # take the largest clips first and find any session that was built for the size before, so sorting the batch
        # by size, or running it size by size, would change nothing; what does help is in nvdec.py. (DALI 2.4,
        # dali/operators/video/decoder/video_decoder_base.h and frames_decoder_gpu.cc.)
        device = "mixed" if on_gpu else "cpu"
        frames = fn.decoders.video(files, device=device, frames=indices, pad_mode="edge", affine=False)
    else:
        frames = fn.external_source(name="frames", dtype=types.UINT8, ndim=4, layout="FHWC")
        frames = frames.gpu() if on_gpu else frames
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    margin = fn.external_source(name="margin", dtype=types.INT32, ndim=1)
    gain = fn.external_source(name="gain", dtype=types.FLOAT, ndim=4)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    crop = fn.slice(frames, start=start, shape=shape, axis_names="HW")
    framed = fn.slice(crop, start=-margin, shape=shape + 2 * margin, axis_names="HW", out_of_bounds_policy="pad")
    resized = fn.resize(
        framed,
        size=(size, size),
        roi_start=fn.cast(margin, dtype=types.FLOAT),
        roi_end=fn.cast(margin + shape, dtype=types.FLOAT),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        dtype=types.FLOAT,
    )
    resized = resized * (gain.gpu() if on_gpu else gain)
    return fn.crop_mirror_normalize(
        resized, mirror=flip, dtype=types.UINT8, output_layout="FCHW", mean=[0.0] * 3, std=[1.0] * 3
    )


class Pixels:
    """Runs the graph on batches of clips.

    Args:
        size: S, pixels.
        batch_size: most clips in one call.
        device: where the graph runs and the result lies.
        threads: of the graph's CPU operators; on a GPU also the most NVDEC sessions at a time.
    """

    def __init__(self, size: int, batch_size: int, device: torch.device, threads: int) -> None:
        self.size = size
        self._on_gpu = device.type == "cuda"
        # With its index: the thread that calls may have another current device than the one that built this.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
        self._built: dict[bool, Any] = {}
        self._settings = {"batch_size": batch_size, "num_threads": threads, "device_id": self.device.index}
        # A stream of its own, so that waiting for a copy is not waiting for the model.
        self._stream = torch.cuda.Stream(self.device) if self._on_gpu else None

    def __call__(self, clips: Sequence[Clip]) -> Tensor:
        """(B, T, 3, S, S) uint8 on the device; all clips have the same T. The result belongs to the caller.

        Raises GraphError where DALI cannot make pixels of a clip. Other batches can follow: with its dynamic executor,
        the default, a pipeline takes the next batch as if nothing had happened, whatever its message says.
        """
        if self._stream is None:
            return self._pixels(clips)
        with torch.cuda.stream(self._stream):
            frames = self._pixels(clips)
            self._stream.synchronize()
        frames.record_stream(torch.cuda.default_stream(self.device))
        return frames

    def rebuild(self) -> None:
        """Has the next call build its pipelines anew."""
        self._built.clear()

    def _pixels(self, clips: Sequence[Clip]) -> Tensor:
        decoded = [i for i, clip in enumerate(clips) if clip.encoded is None]
        encoded = [i for i, clip in enumerate(clips) if clip.encoded is not None]
        parts = [
            self._run([clips[i] for i in group], encoded=group is encoded) for group in (decoded, encoded) if group
        ]
        if len(parts) == 1:
            # DALI's buffer lives as long as the tensor. On a GPU it would be used again while kernels still read it.
            return parts[0].clone() if self._on_gpu else parts[0]
        return torch.cat(parts)[torch.from_numpy(np.argsort(decoded + encoded)).to(self.device)]

    def _run(self, clips: Sequence[Clip], encoded: bool) -> Tensor:
        """DALI's own buffer, of which the current stream may read."""
        if encoded not in self._built:
            self._built[encoded] = graph(self.size, encoded, self._on_gpu, **self._settings)
        windows = np.array([clip.window for clip in clips], dtype=np.int32)  # (B, 4)
        margins = np.ceil(_SUPPORT * np.maximum(windows[:, 2:] / self.size, 1)).astype(np.int32) + 1
        inputs: dict[str, list[Any]] = {
            "start": list(windows[:, :2]),
            "shape": list(windows[:, 2:]),
            "margin": list(margins),
            "gain": [border_gain(height, width, self.size) for height, width in windows[:, 2:].tolist()],
            "flip": [np.array(clip.flip, dtype=np.int32) for clip in clips],
        }
        if encoded:
            inputs |= {"encoded": [clip.encoded for clip in clips], "indices": [clip.indices for clip in clips]}
        else:
            inputs["frames"] = [clip.frames for clip in clips]
        try:
            (output,) = self._built[encoded].run(**inputs)
        except RuntimeError as error:
            raise GraphError(_reason(error)) from error
        return torch.from_dlpack(output.as_tensor())


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that tells what happened, not where."""
    report = str(error).strip()
    return (report.partition("encountered:")[2].strip() or report).partition("\n")[0]


def border_gain(height: int, width: int, size: int) -> NDArray[np.float32]:
    """(1, S, S, 1): for each pixel of the output, all weights of its kernel over those that fall into the crop."""
    return _axis_gain(height, size)[None, :, None, None] * _axis_gain(width, size)[None, None, :, None]


@functools.lru_cache(maxsize=8192)
def _axis_gain(length: int, size: int) -> NDArray[np.float32]:
    """(S,) gain along one axis of a crop of ``length`` pixels."""
    scale = length / size
    stretch = max(scale, 1.0)  # antialiasing widens the kernel when the image shrinks
    centres = (np.arange(size) + 0.5) * scale
    reach = int(np.ceil(_SUPPORT * stretch)) + 1
    taps = np.floor(centres)[:, None] + np.arange(-reach, reach + 1)  # (S, taps) pixel numbers
    distance = np.abs((taps + 0.5 - centres[:, None]) / stretch)
    a = _SHARPNESS
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    inside = (taps >= 0) & (taps < length)
    return (weights.sum(axis=1) / (weights * inside).sum(axis=1)).astype(np.float32)


def choose_decoder(setting: Literal["auto", "pyav", "nvdec"], device: torch.device) -> Decoder:
    """What decodes videos, by ``data.decoder`` and by trying: a short clip of each codec is sent through the graph.

    Raises ConfigError if NVDEC is demanded and cannot decode anything.
    """
    if setting == "pyav":
        return Decoder("pyav", frozenset(), "data.decoder=pyav")
    if device.type == "cuda":
        refused = {codec: reason for codec in _NVDEC_CANDIDATES if (reason := _refusal(codec, device)) is not None}
        reason = "; ".join(f"NVDEC refuses {codec}: {reason}" for codec, reason in refused.items())
        codecs = frozenset(_NVDEC_CANDIDATES) - refused.keys()
    else:
        codecs, reason = frozenset(), "no GPU"
    if codecs:
        rest = "PyAV decodes images, other codecs, other pixel formats, odd sizes and rotated clips"
        return Decoder("nvdec", codecs, "; ".join(filter(None, [", ".join(sorted(codecs)), rest, reason])))
    if setting == "nvdec":
        raise ConfigError(f"data.decoder is nvdec, but {reason}: set data.decoder=auto or pyav")
    return Decoder("pyav", codecs, reason)


def _refusal(codec: str, device: torch.device) -> str | None:
    """DALI's words on a clip of the codec, None if it decodes it."""
    file = np.frombuffer(_test_clip(*_NVDEC_CANDIDATES[codec]), dtype=np.uint8)
    clip = Clip(Window(0, 0, 256, 256), False, encoded=file, indices=np.array([1], dtype=np.int32))
    try:
        Pixels(size=16, batch_size=1, device=device, threads=1)([clip])
    except RuntimeError as error:  # a GPU without NVDEC may fail before there is a graph
        return str(error).partition("\n")[0]
    return None


def _test_clip(encoder: str, container: str) -> bytes:
    """Two grey frames of 256x256."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = cast(VideoStream, output.add_stream(encoder, rate=25, width=256, height=256, pix_fmt="yuv420p"))
        stream.options = {"x265-params": "log-level=none"} if encoder == "libx265" else {}
        for _ in range(2):
            picture = np.full((256, 256, 3), 128, dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()
