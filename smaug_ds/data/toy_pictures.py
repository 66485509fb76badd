"""The pixels of the built-in corpus: scenes drawn frame by frame, and the clips and images they are stored as."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import cast

import av
import numpy as np
from PIL import Image, ImageDraw

from smaug_ds.data.toy_scene import (
    BACKGROUNDS,
    COLOURS,
    SECOND_RADIUS,
    Split,
    ToyConfig,
    draw_scene,
    main_object,
    scene_generator,
)

X264 = {"preset": "veryfast", "crf": "23", "x264-params": "mbtree=0"}  # its macroblock tree varies from run to run
VP9 = {"deadline": "realtime", "cpu-used": "6", "crf": "22", "b": "0"}
GOP = 12  # frames from one key frame to the next at most


@lru_cache(maxsize=4096)
def _mask(shape: str, half_pixels: int) -> np.ndarray:
    """Coverage (2 h + 1, 2 h + 1, 1) float32 in [0, 1] of a shape with a radius of ``half_pixels`` / 2, centred."""
    radius, fine = half_pixels / 2, 8
    side = 2 * int(np.ceil(1.1 * radius)) + 1
    image = Image.new("L", (side * fine, side * fine))
    draw = ImageDraw.Draw(image)
    middle, r = side * fine / 2, radius * fine

    def box(width: float, height: float) -> tuple[float, float, float, float]:
        return middle - width, middle - height, middle + width, middle + height

    def points(angles: np.ndarray, radii: np.ndarray | float) -> list[tuple[float, float]]:
        xy = np.stack([middle + radii * np.sin(angles), middle - radii * np.cos(angles)], axis=1)
        return [(float(x), float(y)) for x, y in xy]

    if shape in ("circle", "ring"):
        draw.ellipse(box(r, r), fill=255)
    if shape == "ring":
        draw.ellipse(box(0.55 * r, 0.55 * r), fill=0)
    elif shape == "square":
        draw.rectangle(box(0.88 * r, 0.88 * r), fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y + 0.2 * r) for x, y in points(np.arange(3) * 2 * np.pi / 3, 1.15 * r)], fill=255)
    elif shape == "star":
        draw.polygon(points(np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.45, 1.1) * r), fill=255)
    elif shape == "cross":
        draw.rectangle(box(r, 0.33 * r), fill=255)
        draw.rectangle(box(0.33 * r, r), fill=255)
    return (np.asarray(image.reduce(fine), dtype=np.float32) / 255)[..., None]


def _stamp(canvas: np.ndarray, shape: str, colour: np.ndarray, x: float, y: float, radius: float) -> None:
    """Blends a shape into ``canvas`` (S, S, 3) float32 in place; coordinates in 1/96 of the side."""
    scale = canvas.shape[0] / 96
    mask = _mask(shape, round(2 * radius * scale))
    side = mask.shape[0]
    left, top = (round(centre * scale) - side // 2 for centre in (x, y))
    patch = canvas[top : top + side, left : left + side]
    patch += mask * (colour - patch)


def _background(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """(S, S, 3) float32: a background colour, a little off, with a faint slope; far from every colour of an object."""
    slope = rng.uniform(-8, 8, size=2)
    across, down = np.meshgrid(*[np.linspace(-1, 1, size)] * 2)
    light = slope[0] * across + slope[1] * down
    return (light[..., None] + BACKGROUNDS[name] + rng.uniform(-6, 6, size=3)).astype(np.float32)


def _distractors(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(count, S, S, 1) grey pictures that show nothing a caption names: blocks, stripes or blurred blobs, drifting."""
    kind = rng.choice(["blocks", "stripes", "blobs"])
    if kind == "stripes":
        across, down = np.meshgrid(*[np.linspace(0, 2 * np.pi, size, endpoint=False)] * 2)
        waves = np.array([-1, 1])[rng.integers(2, size=2)] * rng.integers(2, 6, size=2)
        picture = 110 + 60 * np.sin(waves[0] * across + waves[1] * down)
    else:
        cells = rng.integers(40, 190, size=(12, 12) if kind == "blocks" else (5, 5)).astype(np.uint8)
        sampling = Image.Resampling.NEAREST if kind == "blocks" else Image.Resampling.BICUBIC
        picture = np.asarray(Image.fromarray(cells).resize((size, size), sampling))
    drift = rng.integers(-2, 3, size=2)
    return np.stack([np.roll(picture, tuple(drift * frame), axis=(0, 1)) for frame in range(count)])[..., None]


def render_frames(config: ToyConfig, split: Split, number: int) -> np.ndarray:
    """(T, S, S, 3) uint8 RGB; T = 1 for an image."""
    scene = draw_scene(config, split, number)
    rng = scene_generator(config.seed, split, number, purpose=3)
    still = _background(scene.background, config.size, rng)
    shades = {name: np.add(COLOURS[name], rng.uniform(-10, 10, 3)) for name in (scene.colour, scene.colour2) if name}
    if scene.shape2:
        _stamp(still, scene.shape2, shades[scene.colour2], *scene.centre2, SECOND_RADIUS)
    count = 1 if scene.motion is None else config.frames
    frames = np.repeat(still[None], count, axis=0)
    for index, frame in enumerate(frames):
        x, y, radius = main_object(scene, index, count)
        if radius:
            _stamp(frame, scene.shape, shades[scene.colour], x, y, radius)
    if hidden := scene.distractors:
        frames[hidden.start : hidden.stop] = _distractors(len(hidden), config.size, rng)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def encode_media(frames: np.ndarray, suffix: str, fps: int) -> bytes:
    """The file of (T, S, S, 3) uint8 frames as ``mp4`` (H.264), ``webm`` (VP9) or ``jpg``; same frames, same bytes."""
    buffer = io.BytesIO()
    if suffix == "jpg":
        Image.fromarray(frames[0]).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()
    # Bit-exact keeps random identifiers out of the WebM header; one thread keeps the rate control reproducible.
    with av.open(buffer, "w", format=suffix, options={"fflags": "+bitexact"}) as container:
        codec, options = ("libx264", X264) if suffix == "mp4" else ("libvpx-vp9", VP9)
        stream = cast(av.VideoStream, container.add_stream(codec, rate=fps, options=options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size, stream.thread_count = "yuv420p", GOP, 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
