"""Open pictures and read images into arrays: exactly, or not at all with an error that says why."""

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from common.console import UserError

MAX_PIXELS = 64_000_000  # larger pictures are rejected before they are decoded: a small file can hold a huge one
ORIENTATION = 0x0112  # an EXIF tag; 2 to 8 turn or mirror the picture, 1 and undefined numbers do not
_pillow_lock = threading.Lock()


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return (H, W, 3) uint8. RGB, grey, 1-bit and palettes are read exactly if opaque; other modes are rejected."""
    picture = open_picture(path, max_pixels)
    if picture.mode in ("RGBA", "LA") and alpha_range(picture) == (255, 255):
        picture = picture.convert(picture.mode[:-1])
    if picture.mode in ("L", "1") or (picture.mode == "P" and "transparency" not in picture.info):
        picture = picture.convert("RGB")
    if picture.mode != "RGB":
        what = "16 bits for each channel" if picture.mode[0] == "I" else f"mode {picture.mode}"
        what += " and transparency" if picture.mode in ("P", "RGBA", "LA") else ""
        raise UserError(f"{path}: an image must be 8-bit RGB or grey, this one has {what}; convert it to 8-bit RGB")
    return np.asarray(picture)


def alpha_range(picture: Image.Image) -> tuple[int, int]:
    """Return the lowest and highest alpha of a picture that has alpha: from 0, transparent, to 255."""
    return picture.getchannel("A").getextrema()


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    """Return the contents of the file of a picture in a format of Pillow, such as PNG."""
    file = BytesIO()
    picture.save(file, format=form, **options)
    return file.getvalue()


def picture_size(path: Path) -> tuple[int, int]:
    """Return (height, width) from the header alone."""
    with _opened(path) as picture:
        return picture.height, picture.width


def open_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture of at most `max_pixels` pixels with 8 bits for each channel, or with more in grey."""
    with _opened(path) as picture:
        if picture.width * picture.height > max_pixels:
            raise UserError(f"{path}: {picture.width} x {picture.height} pixels are too many; at most {max_pixels:,} "
                            "are allowed. Cut it into tiles")
        is_deep = picture.tile and "16" in str(np.ravel(picture.tile[0][3])[0])
        if is_deep and picture.mode[0] != "I":  # Pillow would reduce colours to 8 bits silently
            raise UserError(f"{path}: 16 bits for each channel; expected 8. Convert it to 8 bits")
        if getattr(picture, "n_frames", 1) > 1:
            raise UserError(f"{path}: several pages; save the one that you need as a plain PNG")
        if picture.getexif().get(ORIENTATION) in range(2, 9):
            raise UserError(f"{path}: an EXIF flag turns or mirrors this picture, and only some programs follow it; "
                            "save it turned, as a plain PNG")
        picture.load()
        return picture


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture and read only its header, so that the caller can check the size before decoding."""
    with reading(path):
        with _pillow_lock:  # Pillow's own limit is global and only checked by `open`
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                picture = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = before
        with picture:
            yield picture


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises on a file into a `UserError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; restore it, or run data_filter.py again") from None
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace or remove it") from None
