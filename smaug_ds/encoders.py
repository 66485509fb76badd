"""A trained model as two encoders into one space, as CLIP is used.

    encoders = SmaugEncoders.from_pretrained(folder)
    scores = encoders.encode_text(["a red ball rolls"]) @ encoders.encode_video(["clip.mp4"]).T

Letters: B clips or captions, T frames of a clip, H height, W width, P projection.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smaug_ds.data.draw import centre_crop
from smaug_ds.data.media import MediaError
from smaug_ds.data.video import Video, choose_frames
from smaug_ds.model.pretrained import resolve
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer

_TOKENIZERS = ("tokenizer.json", "vocab.txt")


class SmaugEncoders:
    """Model, tokenizer and preprocessing. Frames, crop and captions are prepared as the evaluation prepares them."""

    def __init__(self, model: SmaugModel, tokenizer: Tokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], device: torch.device | str = "cpu") -> SmaugEncoders:
        """Both encoders of an exported folder, or of ``hf-hub:USER/NAME``.

        Raises ValueError naming the file that is missing or does not fit.
        """
        model = SmaugModel.from_pretrained(name)
        tokenizer = Tokenizer(_tokenizer_file(name))
        if tokenizer.vocab_size != model.config.text.vocab_size:
            raise ValueError(
                f"{tokenizer.path} has {tokenizer.vocab_size} entries, but the model knows "
                f"{model.config.text.vocab_size} words: it belongs to another model"
            )
        return cls(model.to(device), tokenizer)

    @torch.no_grad()
    def encode_video(self, clips: Sequence[str | os.PathLike[str] | Tensor | NDArray[np.uint8]]) -> Tensor:
        """Embeddings (B, P) of unit length, on the model's device.

        clips: video files, or frames (T, H, W, 3) uint8 RGB of any number, rate and size: as many as the
        model wants are taken at even distances, and of each the largest centred square. Raises ValueError for a file
        that cannot be decoded or frames of another shape or type.
        """
        pictures = torch.stack([self._prepare(clip) for clip in clips])
        return self.model.encode_frames(pictures.to(self._device)).embedding

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (B, P) of unit length, on the model's device. Captions are cleaned as in training."""
        ids = self.tokenizer.encode(captions, self.model.config.text.max_length)
        return self.model.encode_text(ids.input_ids.to(self._device), ids.lengths).embedding

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device

    def _prepare(self, clip: str | os.PathLike[str] | Tensor | NDArray[np.uint8]) -> Tensor:
        """(frames of the model, 3, S, S) uint8."""
        wanted, size = self.model.config.frames, self.model.config.vision.image_size
        if isinstance(clip, (str, os.PathLike)):
            frames = torch.from_numpy(_decode(Path(clip), wanted))
        else:
            frames = torch.as_tensor(clip)
            if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not len(frames):
                raise ValueError(f"a clip is {list(frames.shape)} {frames.dtype}: it must be (T, H, W, 3) uint8")
            frames = frames[torch.from_numpy(choose_frames(len(frames), wanted, None))].cpu()
        top, left, height, width = centre_crop(*frames.shape[1:3])
        square = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2).float()
        resized = F.interpolate(square, size=(size, size), mode="bicubic", antialias=True)
        return resized.round().clamp(0, 255).to(torch.uint8)


def _decode(path: Path, wanted: int) -> NDArray[np.uint8]:
    """(wanted, H, W, 3)."""
    try:
        video = Video(path.read_bytes())
        return video.decode(choose_frames(len(video), wanted, None))
    except (OSError, MediaError) as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error


def _tokenizer_file(name: str | os.PathLike[str]) -> Path:
    for file in _TOKENIZERS:
        with contextlib.suppress(ValueError):
            return resolve(name, file)
    raise ValueError(f"{name} holds no tokenizer ({' or '.join(_TOKENIZERS)}): export it from its run")
