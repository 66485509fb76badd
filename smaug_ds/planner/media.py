"""What the data path has to deliver: samples of an epoch by medium, bytes to read, pictures to decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smaug_ds.config import ConfigError
from smaug_ds.data.mixture import Manifest
from smaug_ds.data.sample import Medium
from smaug_ds.planner.cluster import ASSUMED_NVDEC_PICTURES, Machine


@dataclass(frozen=True)
class MediaConfig:
    """The media of a plan. Times are of the rendered clips (10 s, 320x240) and the machine of docs/measurements.md;
    sizes are assumptions. ``tools/profile_throughput.py loader --data FOLDER`` measures one's own."""

    video_sets: tuple[str, ...] = ("webvid",)  # sets of a manifest that hold clips; the others hold images
    caption_tokens: float = 12.0  # of a caption with [CLS] and [SEP], on average; MSR-VTT's test sentences have 11.8
    longest_caption: float = 24.0  # of a micro batch
    clip_mb: float = 1.5
    image_mb: float = 0.08
    clip_seconds: float = 10.0
    clip_rate: float = 30.0  # pictures of a clip a second
    key_frame_every: float = 50.0  # pictures
    nvdec: bool = True  # clips are decoded on the GPU, if there is one
    nvdec_pictures_s: float = ASSUMED_NVDEC_PICTURES  # of an engine
    image_cpu_ms: float = 5.9  # of one core, for everything that happens to an image
    clip_cpu_ms: float = 10.3  # the same of a clip of which one frame is wanted, decoded by the CPU
    frame_cpu_ms: float = 14.2  # on top, for each further frame
    nvdec_cpu_ms: float = 1.9  # the same of a clip that NVDEC decodes
    nvdec_image_cpu_ms: float = 1.9  # of an image whose graph runs on the GPU

    def __post_init__(self) -> None:
        for name in ("caption_tokens", "longest_caption", "clip_mb", "image_mb", "nvdec_pictures_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"media.{name} is {getattr(self, name)}: it must be above 0")
        if self.longest_caption < self.caption_tokens:
            raise ConfigError(
                f"media.longest_caption is {self.longest_caption}, less than media.caption_tokens, which is "
                f"{self.caption_tokens}: raise it"
            )

    def cpu_seconds(self, medium: Medium, frames: int, on_gpu: bool) -> float:
        """Of one core, for one sample."""
        if medium == "image":
            return (self.nvdec_image_cpu_ms if on_gpu else self.image_cpu_ms) / 1e3
        if on_gpu and self.nvdec:
            return self.nvdec_cpu_ms / 1e3
        return self.decoding_cpu_seconds(frames)

    def decoding_cpu_seconds(self, frames: int) -> float:
        """Of one core, for a clip that the CPU decodes."""
        return (self.clip_cpu_ms + (frames - 1) * self.frame_cpu_ms) / 1e3

    def pictures(self, frames: int) -> float:
        """That a decoder has to decode for ``frames`` random frames, one in each equal part of a clip: from the key
        frame before the first to the last one."""
        between = self.clip_seconds * self.clip_rate * (frames - 1) / frames
        return self.key_frame_every / 2 + between


def epoch_draws(manifest: Manifest, media: MediaConfig) -> dict[Medium, float]:
    """Samples of each medium that an epoch of a manifest draws, if every set is as large as it says.

    Raises ConfigError for a set whose size is unknown.
    """
    draws: dict[Medium, float] = {"image": 0.0, "video": 0.0}
    for part in manifest.sets:
        if not part.expected:
            raise ConfigError(f"set {part.name}: expected is 0: give its size, or index it and name it in data.train")
        # the weight of a set counted in captions is what makes as many draws of its samples
        draws["video" if part.name in media.video_sets else "image"] += part.expected * (
            part.weight if part.unit == "samples" else 1.0
        )
    return draws


@dataclass(frozen=True)
class Supply:
    """Samples a second that a part of the data path of one node could deliver."""

    name: str
    rate: float
    needs: str  # what would raise it


def supplies(mix: Mapping[Medium, float], frames: int, media: MediaConfig, machine: Machine) -> list[Supply]:
    """What each part of a node's data path allows by itself. ``mix``: shares of the samples by medium."""
    cluster = machine.cluster
    cpu = sum(share * media.cpu_seconds(medium, frames, not cluster.on_cpu) for medium, share in mix.items())
    size = 1e6 * (mix.get("video", 0.0) * media.clip_mb + mix.get("image", 0.0) * media.image_mb)
    found = [Supply("storage", cluster.storage_gb_s * 1e9 / size, "faster storage, or smaller clips")]
    if not cluster.on_cpu:  # there, model and data path share the cores, see prediction
        found.append(Supply("cores of the data path", cluster.cores / cpu, "more cores a node, or media.nvdec=true"))
        if media.nvdec and mix.get("video"):
            engines = machine.nvdec * cluster.devices
            clips = engines * media.nvdec_pictures_s / media.pictures(frames)
            on_cores = cluster.cores / media.decoding_cpu_seconds(frames)
            remedy = "clips with closer key frames and fewer pictures a second"
            if on_cores > clips:
                remedy += (
                    f", or data.decoder=pyav ({on_cores:,.0f} clips/s on the cores of a node against {clips:,.0f})"
                )
            found.append(Supply("NVDEC", clips / mix["video"], remedy))
    return found


def slowest(found: Sequence[Supply]) -> Supply:
    """The part that allows least."""
    return min(found, key=lambda supply: supply.rate)
