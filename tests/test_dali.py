"""The DALI graph against torchvision, and (marker gpu) NVDEC against PyAV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from smaug_ds.config import ConfigError
from smaug_ds.data.clip import Clip, Window
from smaug_ds.data.dali import Pixels, choose_decoder
from smaug_ds.data.draw import centre_crop
from smaug_ds.data.video import Video, choose_frames, decode, probe

CPU = torch.device("cpu")
CLIPS = ["open/exo_face.mp4", "open/intel_asl_bird.mkv", "open/tos_12.webm", "testasset/mmaction_pool.mp4"]


def by_torchvision(clip: Clip, size: int) -> Tensor:
    """(T, 3, S, S) uint8. On float: torchvision's uint8 path rounds and clips between its two passes."""
    assert clip.frames is not None
    frames = torch.from_numpy(np.ascontiguousarray(clip.frames)).permute(0, 3, 1, 2).float()
    crop = F.crop(frames, *clip.window)
    resized = F.resize(crop, [size, size], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    resized = resized.round().clamp(0, 255).to(torch.uint8)
    return F.horizontal_flip(resized) if clip.flip else resized


def difference(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("size", [64, 224])
def test_graph_equals_torchvision(shared_data: Path, size: int) -> None:
    """Whole frames, windows at the borders, windows that grow, flipped and not, several sizes in one batch."""
    clips = []
    for name in CLIPS:
        frames = decode((shared_data / "videos" / name).read_bytes(), [0, 5])
        height, width = frames.shape[1:3]
        for number, window in enumerate(
            [(0, 0, height, width), (11, 7, height // 2, width - 7), (height - 50, 3, 50, 49), (5, width - 90, 120, 90)]
        ):
            clips.append(Clip(Window(*window), flip=number % 2 == 1, frames=frames))
    ours = Pixels(size, len(clips), CPU, threads=1)(clips)
    assert ours.shape == (len(clips), 2, 3, size, size)
    assert ours.dtype == torch.uint8
    assert max(difference(ours[i], by_torchvision(clip, size)) for i, clip in enumerate(clips)) <= 2


def test_sharpest_edges(size: int = 64) -> None:
    noise = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (1, 200, 300, 3))
    clips = [
        Clip(Window(0, 0, h, w), flip=False, frames=noise)
        for h, w in [(200, 300), (64, 64), (63, 65), (1, 300), (20, 9)]
    ]
    ours = Pixels(size, 8, CPU, threads=1)(clips)
    assert max(difference(ours[i], by_torchvision(clip, size)) for i, clip in enumerate(clips)) <= 2


def make_clip(seed: int, frames: int) -> Clip:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 255, (frames, 40 + seed, 50, 3), dtype=np.uint8)
    return Clip(Window(1, 2, 30, 40), flip=seed % 2 == 0, frames=pixels)


def test_batches_of_any_length_and_number_of_frames_stay_apart() -> None:
    """Results keep their contents while the graph runs on, and do not depend on who shares the batch."""
    pixels = Pixels(32, 8, CPU, threads=1)
    kept = []
    for batch, frames in [(8, 1), (8, 4), (3, 2), (1, 1), (8, 1)]:
        clips = [make_clip(seed, frames) for seed in range(batch)]
        result = pixels(clips)
        assert result.shape == (batch, frames, 3, 32, 32)
        kept.append((clips, result, result.clone()))
    for clips, result, copy in kept:
        assert torch.equal(result, copy)
        for i, clip in enumerate(clips):
            assert torch.equal(result[i], pixels([clip])[0])


def test_decoder_without_gpu_says_why() -> None:
    assert str(choose_decoder("auto", CPU)) == "pyav (no GPU)"
    assert choose_decoder("pyav", CPU).name == "pyav"
    with pytest.raises(ConfigError, match=r"data\.decoder is nvdec, but no GPU"):
        choose_decoder("nvdec", CPU)


@pytest.mark.gpu
def test_nvdec_equals_pyav(shared_data: Path) -> None:
    """Trimmed real clips, decoded by the card: same frames, colours within rounding of chroma interpolation."""
    device = torch.device("cuda")
    decoder = choose_decoder("nvdec", device)
    assert {"h264", "hevc", "vp9"} <= decoder.codecs
    compared = set()
    for path in sorted((shared_data / "videos/open").iterdir()):
        media = path.read_bytes()
        facts = probe(media, "mp4")
        if facts.codec not in decoder.codecs or facts.pixel_format != "yuv420p" or facts.rotation or facts.height > 800:
            continue
        video = Video(media)
        wanted = choose_frames(len(video), 4, None)
        trimmed, indices = video.trim(wanted)
        window = centre_crop(facts.height, facts.width)
        here = Clip(window, False, frames=video.decode(wanted))
        there = Clip(window, False, encoded=np.frombuffer(trimmed, np.uint8), indices=indices.astype(np.int32))
        # Both kinds in one batch, the encoded one twice, so that the way back into order is seen, too.
        frames = Pixels(224, 3, device, threads=2)([there, here, there]).cpu()
        assert torch.equal(frames[0], frames[2]), path.name
        apart = (frames[0].float() - frames[1].float()).abs()
        assert apart.mean() < 1, f"{path.name}: mean difference {apart.mean():.2f}"
        assert torch.quantile(apart, 0.999) <= 6, f"{path.name}: {torch.quantile(apart, 0.999):.0f}"
        compared.add(facts.codec)
    assert {"h264", "vp8"} <= compared


@pytest.mark.gpu
def test_gpu_graph_equals_cpu_graph() -> None:
    clips = [make_clip(seed, 3) for seed in range(5)]
    on_gpu = Pixels(64, 8, torch.device("cuda"), threads=1)(clips)
    assert on_gpu.is_cuda
    assert difference(on_gpu.cpu(), Pixels(64, 8, CPU, threads=1)(clips)) <= 1


@pytest.mark.gpu
def test_graph_survives_a_bad_stream(shared_data: Path) -> None:
    device = torch.device("cuda")
    media = (shared_data / "videos/open/exo_face.mp4").read_bytes()
    pixels = Pixels(64, 2, device, threads=1)
    index = np.array([0], dtype=np.int32)
    good = Clip(Window(0, 0, 720, 1080), False, encoded=np.frombuffer(media, np.uint8), indices=index)
    bad = Clip(Window(0, 0, 720, 1080), False, encoded=np.arange(200, dtype=np.uint8), indices=index)
    before = pixels([good, good])
    with pytest.raises(RuntimeError):
        pixels([good, bad])
    assert torch.equal(before, pixels([good, good]))
