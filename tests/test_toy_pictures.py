"""What the captions of the built-in corpus say is read back from the pixels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from PIL import Image

from smaug_ds.data import toy, toy_scene
from smaug_ds.data.toy_scene import ToyConfig, draw_scene
from tests.toys import Facts, captions_of, config_of, read_caption, read_list


class Blob(NamedTuple):
    """The pixels of one colour in one frame."""

    x: float
    y: float
    area: int
    width: int
    shape: str


def find_blob(frame: np.ndarray, colour: str, others: list[tuple[int, int, int]]) -> Blob | None:
    """Where and how large the object of that colour is in a (96, 96, 3) frame, and its shape; ``others`` lie near."""
    distances = np.stack(
        [np.linalg.norm(frame - np.array(rgb), axis=-1) for rgb in (toy_scene.COLOURS[colour], *others)]
    )
    near = (distances.argmin(axis=0) == 0) & (distances[0] < 75)
    if near.sum() < 30:
        return None
    rows, columns = np.indices(near.shape)
    near &= np.abs(rows - np.median(rows[near])) < 24  # mixed colours at the other object's edge can look alike
    near &= np.abs(columns - np.median(columns[near])) < 24
    ys, xs = near.nonzero()
    box = near[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    height, width = box.shape
    fill, fall = box.mean(), (ys.mean() - ys.min()) / (height - 1)
    if not box[height // 2 - 1 :, width // 2 - 1 :][:3, :3].all():
        shape = "ring"
    elif fill > 0.7:
        shape = "square" if fill > 0.9 else "circle"
    elif fall > 0.59:
        shape = "triangle"
    else:  # a star stands on two legs, a cross on one
        shape = "star" if np.ptp(box[-3:].nonzero()[1]) > 0.5 * width else "cross"
    return Blob(xs.mean(), ys.mean(), int(near.sum()), width, shape)


def see_motion(blobs: list[Blob | None]) -> str:
    """What the object does over the frames that show the scene."""
    if None in blobs:
        assert blobs[0] is None or blobs[-1] is None
        return "appear" if blobs[0] is None else "disappear"
    track = np.array([blob[:2] for blob in blobs if blob])
    reach = np.ptp(track, axis=0)
    if reach.max() < 10:
        growth = blobs[-1].area / blobs[0].area
        assert max(growth, 1 / growth) > 1.8
        return "grow" if growth > 1 else "shrink"
    axis = int(reach.argmax())
    assert reach[1 - axis] < 5
    names, path = (("left", "right"), ("up", "down"))[axis], track[:, axis]
    if abs(path[-1] - path[0]) > 0.8 * np.abs(np.diff(path)).sum():
        return names[int(path[-1] > path[0])]
    turn = np.argmax(np.abs(path - path[0]) + np.abs(path - path[-1]))
    return f"{names[int(path[turn] > path[0])]} then {names[int(path[-1] > path[turn])]}"


def see_shape(blobs: list[Blob | None]) -> str:
    """The shape in nearly all frames; compression can blur a small star in one of them."""
    shapes = Counter(blob.shape for blob in blobs if blob)
    shape, count = shapes.most_common(1)[0]
    assert count >= 0.7 * shapes.total(), shapes
    return shape


def look(frames: np.ndarray, claimed: Facts, moving: bool) -> Facts:
    """What the frames show of the two colours that the caption names."""
    border = np.concatenate([frames[:, :3].reshape(-1, 3), frames[:, -3:].reshape(-1, 3)]).mean(axis=0)
    background = min(
        toy_scene.BACKGROUNDS, key=lambda name: float(np.linalg.norm(border - toy_scene.BACKGROUNDS[name]))
    )
    behind, others = toy_scene.BACKGROUNDS[background], {*toy_scene.COLOURS} - {claimed.colour, claimed.colour2}
    rgb, rgb2 = (toy_scene.COLOURS.get(name, behind) for name in (claimed.colour, claimed.colour2))
    mains = [find_blob(frame, claimed.colour, [rgb2, behind]) for frame in frames]
    seconds = [find_blob(frame, claimed.colour2, [rgb, behind]) for frame in frames] if claimed.colour2 else mains
    second = seconds[0]
    assert second and all(seconds), claimed
    motion = see_motion(mains) if moving else None
    width = next(blob.width for blob in mains if blob)
    if not claimed.colour2:  # an object alone
        known = [rgb, behind]
        assert not any(find_blob(frame, other, known) for frame in frames for other in others), claimed
    place = f"{'top' if second.y < 48 else 'bottom'} {'left' if second.x < 48 else 'right'}"
    size = None if motion in ("grow", "shrink") else "small" if width < 31 else "large"
    shape2 = see_shape(seconds) if claimed.colour2 else ""
    return Facts(size, claimed.colour, see_shape(mains), motion, claimed.colour2, shape2, place, background)


def decode(path: Path) -> tuple[np.ndarray, str, str]:
    """All frames (T, H, W, 3), codec and container of a clip."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.codec_context.codec.canonical_name, container.format.name


@pytest.fixture(scope="module")
def config(toy_media: Path) -> ToyConfig:
    return config_of(toy_media)


@pytest.mark.parametrize("split", ["video_train", "video_test"])
def test_clips_show_what_their_captions_say(toy_media: Path, config: ToyConfig, split: toy_scene.Split) -> None:
    rows = read_list(toy_media, f"{split}.json")
    codecs = set()
    for number, row in enumerate(rows):
        frames, codec, container = decode(toy_media / row["video"])
        assert (Path(row["video"]).suffix, codec) in ((".mp4", "h264"), (".webm", "vp9"))
        assert Path(row["video"]).suffix[1:] in container
        codecs.add(codec)
        assert frames.shape == (config.frames, config.size, config.size, 3)
        hidden = draw_scene(config, split, number).distractors
        shown = np.array([frame for index, frame in enumerate(frames) if index not in hidden])
        for caption in captions_of(row):
            claimed = read_caption(caption)
            assert look(shown, claimed, moving=True) == claimed, (row, hidden)
            for index in hidden:
                coloured = [c for c in (claimed.colour, claimed.colour2) if find_blob(frames[index], c, [])]
                assert not coloured, (row, index)
    assert codecs == {"h264", "vp9"}


def test_images_show_what_their_captions_say(toy_media: Path) -> None:
    for row in read_list(toy_media, "image_train.json"):
        with Image.open(toy_media / row["image"]) as image:
            assert image.format == "JPEG"
            frames = np.asarray(image)[None]
        claims = {read_caption(caption) for caption in captions_of(row)}
        assert claims == {look(frames, next(iter(claims)), moving=False)}, row


def test_half_of_the_clips_hide_a_quarter_and_never_the_event(config: ToyConfig) -> None:
    scenes = [draw_scene(config, "video_train", number) for number in range(1000)]
    hiding = [scene for scene in scenes if scene.distractors]
    assert 450 < len(hiding) < 550
    for scene in hiding:
        assert len(scene.distractors) == config.frames // 4
        assert 0 <= scene.distractors.start < scene.distractors.stop <= config.frames
        visible = [main for f in range(config.frames) if f not in scene.distractors for main in [scene_at(scene, f)]]
        if scene.motion in ("appear", "disappear"):
            assert 4 <= sum(visible) <= len(visible) - 4
        else:
            assert all(visible)
    assert len({scene.distractors.start for scene in hiding}) > config.frames // 2


def scene_at(scene: toy_scene.Scene, frame: int) -> bool:
    """Whether the main object is to be seen in that frame of 24."""
    return toy_scene.main_object(scene, frame, 24)[2] > 0


def test_objects_keep_from_the_border_and_from_each_other(config: ToyConfig) -> None:
    for number in range(300):
        for split in ("video_train", "image_train"):
            scene = draw_scene(config, split, number)
            for frame in range(24):
                x, y, radius = toy_scene.main_object(scene, frame, 24)
                assert min(x, y) - radius > 3.9 and max(x, y) + radius < 92.1
                if not scene.colour2:
                    continue
                gap = np.hypot(x - scene.centre2[0], y - scene.centre2[1]) - radius - toy_scene.SECOND_RADIUS
                assert gap > 2 or not radius, scene


def test_files_lie_in_folders_of_a_thousand(config: ToyConfig) -> None:
    assert toy.media_path(config, "image_train", 0) == "media/image_train/000/000000.jpg"
    assert toy.media_path(config, "image_train", 99_999) == "media/image_train/099/099999.jpg"
    suffixes = [Path(toy.media_path(config, "video_train", number)).suffix for number in range(2000)]
    assert 140 < suffixes.count(".webm") < 260 and suffixes.count(".webm") + suffixes.count(".mp4") == 2000
