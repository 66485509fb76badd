"""Image files as bytes: facts, pixels."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from smaug_ds.data.media import MediaError, MediaFacts

# What PIL may take a file for, whatever its name. Its readers of rarer formats are larger doors for damaged files.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # MPO, what stereo cameras write, comes with JPEG
# EXIF's orientation -> what turns the image upright (EXIF 2.32, 4.6.4, tag 0x0112). 1 is upright.
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def probe_image(media: bytes) -> MediaFacts:
    """Facts out of the header alone; pixels are not decoded. Raises ``MediaError``."""
    with _opened(media) as image:
        lying = _orientation(image) in (5, 6, 7, 8)
        width, height = reversed(image.size) if lying else image.size
        return MediaFacts((image.format or "").lower(), image.mode, width, height, 1, 1, 0.0, 0.0, 0, 1)


def decode_image(media: bytes) -> NDArray[np.uint8]:
    """RGB pixels (1, H, W, 3), turned as EXIF says. Raises ``MediaError``."""
    with _opened(media) as image:
        turn = _TURNS.get(_orientation(image))
        upright: Image.Image = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I;16"):  # PIL would clip 16 bits to white
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.mode == "P" and "transparency" in upright.info:  # PIL warns on the direct way; the pixels are equal
            upright = upright.convert("RGBA")
        return np.asarray(upright.convert("RGB"))[None]


@contextlib.contextmanager
def _opened(media: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(media), formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise MediaError("image", f"not an image in a known format ({', '.join(_FORMATS)})") from error
    # PIL names no base class: on damaged bytes its readers raise OSError, SyntaxError, ValueError, TypeError, KeyError,
    # RuntimeError, struct.error ..., and others with each version. Only calls to PIL and numpy stand within this.
    except Exception as error:
        raise MediaError("image", f"{type(error).__name__}: {error}") from error


def _orientation(image: Image.Image) -> object:
    """From the tag alone: ``ImageOps.exif_transpose`` writes all tags anew, which fails where any of them is odd."""
    if image.format == "TIFF":  # PIL turns these itself: sizes and pixels are upright
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)
