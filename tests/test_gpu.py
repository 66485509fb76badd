"""On a GPU: the model in bf16, real runs with FusedAdam, NVDEC against PyAV, and what NVDEC refuses.

Both decoders give the same YUV pictures: the codecs are exact. They differ in how chroma is brought to full size, which
DALI does on a GPU with samples in the middle between pixels, FFmpeg with samples on every other column. So brightness
has to agree to within rounding, colour only away from sharp edges.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from smaug_ds.data import nvdec
from smaug_ds.data.clip import Clip, GraphError, Window, make_clip
from smaug_ds.data.config import DataConfig
from smaug_ds.data.dali import Decoder, Pixels, choose_decoder
from smaug_ds.data.draw import centre_crop
from smaug_ds.data.index import Corpus
from smaug_ds.data.indexing import build_index
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.media import MediaFacts
from smaug_ds.data.order import Order
from smaug_ds.data.quarantine import Ledger, read_ledgers
from smaug_ds.data.reader import EvalReader
from smaug_ds.data.rescue import finish as finish_batch
from smaug_ds.data.sample import Batch, BatchShape, Sample
from smaug_ds.data.video import Video, probe
from smaug_ds.engine.objectives import Pretraining
from smaug_ds.losses import LossConfig
from smaug_ds.text import Tokenizer
from tests.clips import CONTAINERS, moving_clip
from tests.launching import finish, launch, settings
from tests.models import random_batch, small_config, small_model
from tests.shards import crawled, make_image, write_tar
from tests.standin import ROOT

pytestmark = pytest.mark.gpu
NAMES = ("loss", "vtc", "vtm", "mlm", "mvm")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = BatchShape(frames=3, image_size=64, patches=16, max_text_length=12, mlm_probability=0.15)
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # BT.601


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_losses_on_the_gpu_equal_those_on_the_cpu(frames: int, dtype: torch.dtype, tolerance: float) -> None:
    config = small_config(frames, min(frames, 2))
    batch = random_batch(config, 8)
    expected = Pretraining(small_model(config), LossConfig())(batch)
    module = Pretraining(small_model(config), LossConfig()).to("cuda", dtype)
    found = module(batch.to("cuda"))
    found["loss"].backward()
    for name in NAMES:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=tolerance), name
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("json_name", ["zero2_bf16", "zero2_fp16", "zero1"])
def test_a_run_of_both_stages_on_the_gpu(json_name: str, toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    """FusedAdam is compiled at its first use, which takes a minute."""
    gpu = [f"run.deepspeed={ROOT / 'ds_configs' / json_name}.json", "batch.micro_size=16", "evaluation.precision=bf16"]
    first, second = tmp_path / "first", tmp_path / "second"
    finish(launch([*settings(toy_shards, toy_media, first), *gpu], ranks=1, accelerator="cuda"))
    stage_two = ["model.frames=4", "model.frames_kept=2", f"run.init_from={first}"]
    finish(launch([*settings(toy_shards, toy_media, second), *gpu, *stage_two], ranks=1, accelerator="cuda"))
    summary = json.loads((second / "summary.json").read_text())
    assert summary["accelerator"] != "cpu" and summary["steps"] == 8
    assert all(abs(value) < 100 for value in summary["losses_last"].values())


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return choose_decoder("nvdec", GPU)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three shards of clips of all codecs in sizes with and without cropping, each with one that is too small for
    NVDEC, and of pictures."""
    folder = tmp_path_factory.mktemp("mixed")
    kinds = [("h264", (320, 240)), ("h264", (328, 180)), ("vp9", (256, 144)), ("h264", (200, 360)), ("vp8", (160, 120))]
    for shard in range(3):
        members: list[tuple[str, bytes]] = []
        for number in range(15):
            codec, size = kinds[number % len(kinds)]
            media = moving_clip(codec, 100 * shard + number, size)
            members += crawled(f"v{shard}{number:02d}", media, CONTAINERS[codec], f"the clip {number}")
        members += crawled(f"small{shard}", moving_clip("h264", shard, (32, 16)), "mp4", "a small clip")
        for number in range(8):
            members += crawled(f"i{shard}{number:02d}", make_image(30 * number), "jpg", f"the image {number}")
        write_tar(folder / f"{shard:05d}.tar", members)
    build_index(folder)
    return Corpus.open([folder], 0.0, "train")


@pytest.fixture
def small_clips_to_nvdec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers send clips to NVDEC that it refuses for their size and PyAV decodes."""
    monkeypatch.setattr(nvdec, "_SMALLEST", dict.fromkeys(("h264", "hevc", "vp8", "vp9"), (1, 1)))


def brightness_apart(one: Tensor, other: Tensor) -> Tensor:
    """Per pixel, from (..., 3, H, W) uint8."""
    return ((one.cpu().float() - other.cpu().float()) * LUMA).sum(dim=-3).abs()


def assert_alike(one: Tensor, other: Tensor, name: str) -> None:
    brightness = brightness_apart(one, other)
    colour = (one.cpu().float() - other.cpu().float()).abs()
    assert torch.quantile(brightness.flatten(), 0.999) <= 2.5, f"{name}: brightness differs by {brightness.max():.0f}"
    assert colour.mean() <= 1.5, f"{name}: colours differ by {colour.mean():.2f} on average"


def both_ways(media: bytes, facts: MediaFacts, codecs: frozenset[str], frames: int = 4) -> tuple[Clip, Clip]:
    """As it leaves a worker for NVDEC, and decoded by PyAV."""
    sample = Sample("shard", "key", "id", "video", "mp4", media, ("",))
    clip = functools.partial(make_clip, sample, facts, frames, None, False, centre_crop)
    return clip(codecs), clip(frozenset())


def test_decoder_choice(decoder: Decoder) -> None:
    assert decoder.name == "nvdec" and {"h264", "hevc", "vp9"} <= decoder.codecs
    for codec in {"h264", "hevc", "vp8", "vp9"} - decoder.codecs:
        assert f"NVDEC refuses {codec}: " in str(decoder)
    assert choose_decoder("auto", GPU) == decoder
    assert str(choose_decoder("pyav", GPU)) == "pyav (data.decoder=pyav)"


@pytest.mark.slow
def test_nvdec_equals_pyav_on_real_clips(shared_data: Path, decoder: Decoder) -> None:
    """Codec by codec; each batch holds both kinds, so that the way back into order is seen, too."""
    pixels = Pixels(224, 3, GPU, threads=2)
    apart: dict[str, list[float]] = defaultdict(list)
    for path in sorted(
        path for path in (shared_data / "videos").rglob("*") if path.suffix in (".mp4", ".webm", ".mkv")
    ):
        media = path.read_bytes()
        facts = probe(media, path.suffix[1:])
        if facts.height > 1100 or not nvdec.takes(facts, decoder.codecs):
            continue
        there, here = both_ways(media, facts, decoder.codecs)
        if there.encoded is None:
            continue
        frames = pixels([there, here, there])
        assert torch.equal(frames[0], frames[2]), path.name
        assert_alike(frames[0], frames[1], path.name)
        apart[facts.codec].append(float(brightness_apart(frames[0], frames[1]).max()))
    for codec, most in sorted(apart.items()):
        print(f"{codec}: {len(most)} clips, brightness at most {max(most):.1f} of 255 apart")
    assert {"h264", "vp8", "vp9"} & decoder.codecs <= apart.keys()
    assert len(apart["h264"]) > 20


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp8", "vp9"])
def test_nvdec_equals_pyav_in_every_codec(codec: str, decoder: Decoder) -> None:
    if codec not in decoder.codecs:  # the card lacks it, as test_decoder_choice has it said
        return
    for size in [(256, 144), (320, 240), (160, 176)]:
        media = moving_clip(codec, 5, size)
        there, here = both_ways(media, probe(media, CONTAINERS[codec]), decoder.codecs)
        assert there.encoded is not None and there.indices is not None
        frames = Pixels(96, 2, GPU, threads=1)([there, here])
        assert_alike(frames[0], frames[1], f"{codec} {size}")


def test_sizes_that_share_a_coded_size_keep_their_colours() -> None:
    """640x368 comes first: its decoder would be taken for 640x360 and 640x354, and their chroma read from elsewhere."""
    pixels = Pixels(128, 2, GPU, threads=1)
    for height in (368, 360, 354, 368, 360):
        media = moving_clip("h264", 7, (640, height))
        frames = pixels(list(both_ways(media, probe(media, "mp4"), frozenset({"h264"}))))
        assert_alike(frames[0], frames[1], f"640x{height}")


def test_gpu_graph_equals_cpu_graph() -> None:
    generator = np.random.default_rng(0)
    clips = []
    for seed in range(5):
        frames = generator.integers(0, 255, (3, 40 + seed, 50, 3), dtype=np.uint8)
        clips.append(Clip(Window(1, 2, 30, 40), flip=seed % 2 == 0, frames=frames))
    on_gpu = Pixels(64, 8, GPU, threads=1)(clips)
    assert on_gpu.is_cuda
    assert (on_gpu.cpu().int() - Pixels(64, 8, CPU, threads=1)(clips).int()).abs().max() <= 1


def test_graph_goes_on_after_bad_streams() -> None:
    """What is no file is refused; damage within may be refused or concealed. The good ones are as ever."""
    media = moving_clip("h264", 1, (320, 240), frames=30)
    zeroed = bytearray(media)
    for packet in Video(media)._packets[3:]:
        place = media.index(bytes(packet))
        zeroed[place : place + packet.size] = bytes(packet.size)
    window, indices = Window(0, 0, 240, 320), np.array([2, 10, 25], dtype=np.int32)
    good, junk, nulled = (
        Clip(window, False, encoded=np.frombuffer(content, np.uint8), indices=indices)
        for content in (media, bytes(range(256)), bytes(zeroed))
    )
    pixels = Pixels(64, 4, GPU, threads=2)
    expected = pixels([good, good])
    for _ in range(5):
        with pytest.raises(GraphError):
            pixels([good, junk, good])
        assert torch.equal(pixels([good, good]), expected)
        try:
            frames = pixels([good, nulled, good])
        except GraphError:
            pass
        else:
            assert torch.equal(frames[::2], expected)
        assert torch.equal(pixels([good, good]), expected)


@pytest.mark.usefixtures("small_clips_to_nvdec")
def test_culprits_are_found_and_the_others_stay(corpus: Corpus, tokenizer: Tokenizer, decoder: Decoder) -> None:
    make = functools.partial(EvalReader, corpus, tokenizer, SHAPE, 16, 0, 1)
    reader, pyav = make(decoder.codecs), make(frozenset())
    pixels = Pixels(SHAPE.image_size, 16, GPU, threads=2)
    failures = []
    for index in range(len(reader)):
        raw, batch = finish_batch(make(decoder.codecs)[index], reader, pixels)
        _, expected = finish_batch(pyav[index], pyav, pixels)
        assert batch is not None and expected is not None
        assert batch.frames.is_cuda and batch.input_ids.is_cuda
        assert batch.keys == expected.keys
        for row, name in enumerate(batch.keys):
            assert_alike(batch.frames[row], expected.frames[row], name)
        failures += raw.failures
    assert {failure.key for failure in failures} == {"small0", "small1", "small2"}
    assert all(failure.stage == "dali" and failure.replaced_by == failure.name for failure in failures)
    assert {failure.sample for failure in failures} == reader.pyav_only


def test_changing_sizes_do_not_pile_up_memory(decoder: Decoder) -> None:
    """Every size twice in another order, then again and again: decoders are kept and used again."""
    clips = []
    for number in range(24):
        media = moving_clip("h264", number, (192 + 24 * (number % 6), 144 + 20 * (number // 6)), frames=4)
        clips.append(both_ways(media, probe(media, "mp4"), decoder.codecs)[0])
    pixels = Pixels(64, 8, GPU, threads=2)
    generator = np.random.default_rng(0)

    def turns(count: int) -> int:
        for _ in range(count):
            order = generator.permutation(len(clips))
            for start in range(0, len(clips), 8):
                pixels([clips[i] for i in order[start : start + 8]])
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    free = turns(10)
    assert free - turns(40) < 64 * 2**20


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_on_the_gpu_equals_one_on_the_cpu(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    """Same samples, captions and draws in the same order; pictures alike. Nothing is refused."""
    order = Order(corpus.sizes(), 8, seed=3, group=2)
    steps = order.steps_per_epoch
    config = DataConfig(workers=workers, shuffle_group=2)

    def loader(device: torch.device) -> TrainLoader:
        return TrainLoader(corpus, order, tokenizer, config, SHAPE, 3, 8, 1, device, Ledger(tmp_path / device.type, 0))

    with loader(GPU) as ours, loader(CPU) as theirs:
        assert ours.decoder.name == "nvdec" and theirs.decoder.name == "pyav"
        for one, other in zip(islice(ours, steps), islice(theirs, steps), strict=True):
            for field in dataclasses.fields(Batch):
                mine, his = getattr(one, field.name), getattr(other, field.name)
                if field.name == "frames":
                    assert mine.is_cuda
                    for row, name in enumerate(one.keys):
                        assert_alike(mine[row], his[row], name)
                elif isinstance(mine, Tensor):
                    assert mine.is_cuda and torch.equal(mine.cpu(), his), field.name
                else:
                    assert mine == his, field.name
    assert not read_ledgers(tmp_path / "cuda")


@pytest.mark.usefixtures("small_clips_to_nvdec")
def test_training_goes_on_past_refused_clips(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two epochs: each refused clip is on record once, and in the batches all the same."""
    order = Order(corpus.sizes(), 8, seed=3, group=2)
    config = DataConfig(workers=0, shuffle_group=2)
    with TrainLoader(corpus, order, tokenizer, config, SHAPE, 3, 8, 1, GPU, Ledger(tmp_path, 0)) as loader:
        seen = [name for batch in islice(loader, 2 * order.steps_per_epoch + 2) for name in batch.keys]
    failures = read_ledgers(tmp_path)
    assert sorted(failure.key for failure in failures) == ["small0", "small1", "small2"]
    for failure in failures:
        assert failure.stage == "dali" and failure.replaced_by == failure.name
        assert seen.count(failure.name) >= 2
