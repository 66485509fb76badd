"""What travels through the data path: a ``Sample`` as it lies in a shard, a ``Batch`` as it enters the model.

Letters: B batch, T frames, N patches of a frame, S text tokens of all captions together, R of them hidden,
A tokens of all answers together, W of all wrong texts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Medium = Literal["image", "video"]
MEDIA: tuple[Medium, ...] = ("image", "video")


class Place(NamedTuple):
    """Where the order finds a training sample, whatever folder the shards lie in today."""

    medium: Medium
    shard: int  # number of the shard in the corpus
    row: int  # among the shard's training samples of this medium


@dataclass(frozen=True)
class Sample:
    """One media file with its captions, as read from a shard: media, captions and id always travel together."""

    shard: str  # path of the tar
    key: str  # WebDataset key inside the tar
    media_id: str  # equal for samples that show the same media; captions of one media are positives of each other
    medium: Medium
    suffix: str  # of the media file, lower case, without the dot: "mp4", "jpg"
    media: bytes  # the encoded file, bit for bit
    captions: tuple[str, ...]  # at least one
    answer: str | None = None  # where the one caption is a question
    wrong: tuple[str, ...] = ()  # where the one caption is the right one of a multiple choice: the others


@dataclass(frozen=True)
class BatchShape:
    """The sizes that the model fixes and the data path has to meet."""

    frames: int  # T of a video batch; an image batch has T = 1
    image_size: int  # height and width, pixels
    patches: int  # N
    max_text_length: int  # tokens of a caption at most, special ones included
    mlm_probability: float  # share of the words to predict


@dataclass
class Batch:
    """One micro batch of one medium. Captions are packed: their tokens one after the other, without padding.

    Every random number of a sample was drawn from its own generator, keyed by seed and global position, so the batch is
    the same whatever the number of ranks, workers or restarts.
    """

    step: int  # optimizer step that it belongs to
    medium: Medium
    frames: Tensor  # (B, T, 3, H, W) uint8
    lengths: list[int]  # (B,) tokens of each caption; on the host for good: they are the sizes of all that is text
    input_ids: Tensor  # (S,) int64
    masked_ids: Tensor  # (S,) int64, input_ids with the words to predict hidden
    mlm_labels: Tensor  # (S,) int64, the hidden words, -100 elsewhere
    mlm_positions: Tensor  # (R,) int64, where the hidden words are: to find them on a GPU, the host would have to wait
    media_ids: Tensor  # (B,) int64, stable hash of Sample.media_id
    patch_noise: Tensor  # (B, N) float32 in [0, 1), ranks patches for the tube mask
    frame_noise: Tensor  # (B, T) float32 in (0, 1), Gumbel noise of the frame selector before its double log
    negative_noise: Tensor  # (B, 2) float32 in [0, 1), draws the hard negative text and video of each pair
    keys: list[str]  # shard/key of each sample
    captions: list[str]  # the caption that input_ids holds
    all_captions: list[tuple[str, ...]]  # every caption of each sample, for evaluation
    answer_lengths: list[int] = field(default_factory=list)  # (B,) tokens of each answer where captions are questions
    answer_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (A,) packed as input_ids
    wrong_counts: list[int] = field(default_factory=list)  # (B,) wrong texts of each sample of multiple choices
    wrong_lengths: list[int] = field(default_factory=list)  # tokens of each of them, sample after sample
    wrong_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (W,) packed as input_ids

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``; copies do not block the host."""
        moved: dict[str, Any] = {
            item.name: value.to(device, non_blocking=True)
            for item in dataclasses.fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return self.frames.shape[0]
