"""The DALI graph against torchvision, its decoder against PyAV. NVDEC: test_gpu.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from smaug_ds.config import ConfigError
from smaug_ds.data import dali
from smaug_ds.data.clip import Clip, GraphError, Window
from smaug_ds.data.dali import Pixels, choose_decoder, graph
from smaug_ds.data.video import Video, decode
from tests.clips import damaged, moving_clip

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


@pytest.mark.parametrize("codec", ["vp8", "vp9"])
def test_encoded_clips_equal_decoded_ones(codec: str) -> None:
    """Both kinds in one batch, so that the way back into order is seen, too."""
    clips = []
    for seed in range(4):
        video = Video(moving_clip(codec, seed, (160, 128 + 16 * seed)))
        wanted = np.array([seed, 5, 11])
        file, indices = video.trim(wanted)
        window = Window(seed, 2, 100, 90)
        clips.append(Clip(window, seed % 2 == 0, frames=video.decode(wanted)))
        clips.append(Clip(window, seed % 2 == 0, encoded=np.frombuffer(file, "u1"), indices=indices.astype("i4")))
    clips = [clips[i] for i in (0, 3, 1, 2, 6, 5, 4, 7)]
    frames = Pixels(48, 8, CPU, threads=2)(clips)
    for one, other in [(0, 2), (3, 1), (6, 5), (4, 7)]:
        assert torch.equal(frames[one], frames[other])
    assert not torch.equal(frames[0], frames[3])


def test_pipeline_goes_on_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches, good and refused for several reasons: no input of a refused batch is left over for the next one."""
    built = []
    monkeypatch.setattr(dali, "graph", lambda *args, **settings: built.append(args) or graph(*args, **settings))
    good = [np.frombuffer(moving_clip("vp9", seed), "u1") for seed in range(3)]
    broken = np.frombuffer(damaged(moving_clip("vp9", 4)), "u1")
    generator = np.random.default_rng(0)
    pixels, alone = Pixels(32, 4, CPU, threads=2), Pixels(32, 1, CPU, threads=1)
    refused = 0
    for round_ in range(60):
        clips = []
        for _ in range(generator.integers(1, 5)):
            window = Window(*generator.integers(0, 40, 2).tolist(), *generator.integers(20, 80, 2).tolist())
            indices = np.sort(generator.integers(6, 12, 2)).astype("i4")
            clips.append(
                Clip(window, bool(generator.integers(2)), encoded=good[generator.integers(3)], indices=indices)
            )
        victim = int(generator.integers(len(clips)))
        bad = {
            0: {"encoded": broken},
            1: {"encoded": np.arange(200, dtype="u1")},
            2: {"window": Window(500, 0, 10, 10)},
            3: {},
        }[round_ % 4]
        clips[victim] = dataclasses.replace(clips[victim], **bad)
        if bad:
            refused += 1
            with pytest.raises(GraphError):
                pixels(clips)
        else:
            frames = pixels(clips)
            assert all(torch.equal(frames[i], alone([clip])[0]) for i, clip in enumerate(clips))
    assert refused == 45 and len(built) == 2


def test_rebuilding_gives_the_same_pixels() -> None:
    pixels = Pixels(32, 2, CPU, threads=1)
    clips = [make_clip(seed, 2) for seed in range(2)]
    before = pixels(clips).clone()
    pixels.rebuild()
    assert torch.equal(pixels(clips), before)


def test_each_codec_that_falls_back_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"hevc": "no such codec", "vp8": "no such engine", "h264": None, "vp9": None}
    monkeypatch.setattr(dali, "_refusal", lambda codec, device: words[codec])
    decoder = choose_decoder("auto", torch.device("cuda"))
    assert decoder.name == "nvdec" and decoder.codecs == {"h264", "vp9"}
    assert "NVDEC refuses hevc: no such codec; NVDEC refuses vp8: no such engine" in str(decoder)
    monkeypatch.setattr(dali, "_refusal", lambda codec, device: f"no {codec}")
    decoder = choose_decoder("auto", torch.device("cuda"))
    assert decoder.name == "pyav" and not decoder.codecs and str(decoder).count("NVDEC refuses") == 4
    with pytest.raises(ConfigError, match=r"data\.decoder is nvdec, but NVDEC refuses h264: no h264; .*vp9"):
        choose_decoder("nvdec", torch.device("cuda"))
