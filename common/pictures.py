"""Read images and masks from files into arrays: exactly, or not at all with an error that says why."""

import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from common.console import UserError

LOSSLESS = ("PNG", "TIFF", "BMP")  # formats of masks
MAX_PIXELS = 64_000_000  # larger pictures are rejected before they are decoded: a small file can hold a huge one
ORIENTATION = 0x0112  # an EXIF tag
_pillow_lock = threading.Lock()


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return (H, W, 3) uint8. RGB and opaque RGBA are read exactly, every other mode is rejected."""
    picture = open_picture(path, max_pixels)
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")
    if picture.mode != "RGB":
        raise UserError(f"{path}: an image must be 8-bit RGB, this one has mode {picture.mode}; convert it to RGB")
    return np.asarray(picture)


def read_mask(path: Path, mask_values: Sequence[int]) -> np.ndarray:
    """Return (H, W) uint8 class indices. Class k has the value `mask_values[k]`; any other value is an error."""
    mask = read_mask_values(path)
    class_of_value = np.full(256, 255, np.uint8)
    class_of_value[list(mask_values)] = np.arange(len(mask_values))
    labels = class_of_value[mask]
    if labels.max() == 255:
        count_classes(path, np.bincount(mask.ravel(), minlength=256), mask_values)
    return labels


def count_classes(path: Path, counts: np.ndarray, mask_values: Sequence[int]) -> np.ndarray:
    """Return the pixels of each class (K,) from those of each value (256,); an unknown value is an error."""
    unknown = np.setdiff1d(np.flatnonzero(counts), mask_values)
    if unknown.size:
        found = ", ".join(f"{value} ({counts[value]} pixel{'s' if counts[value] > 1 else ''})" for value in unknown[:5])
        raise UserError(f"{path}: contains {found}{', …' if unknown.size > 5 else ''}, but data.mask_values is "
                        f"{list(mask_values)}; fix the mask, or set data.mask_values and data.classes")
    return counts[list(mask_values)]


def read_mask_values(path: Path) -> np.ndarray:
    """Return (H, W) uint8, the values of a mask as they are in its file.

    Grey and RGB with three equal channels are read exactly. A palette is rejected, because its indices and its colours
    are both candidates for the class. JPEG and similar formats are rejected, because they change values.
    """
    picture = open_picture(path)
    if picture.format not in LOSSLESS or picture.info.get("compression") == "jpeg":
        raise UserError(f"{path}: {picture.format} may change the values of a mask; save masks as PNG")
    mask = np.asarray(picture)
    is_grey_rgb = picture.mode == "RGB" and (mask == mask[..., :1]).all()
    if picture.mode != "L" and not is_grey_rgb:
        found = "is coloured" if picture.mode == "RGB" else f"has mode {picture.mode}"
        raise UserError(f"{path}: a mask must be 8-bit grey, this one {found}; convert it so that every pixel has one "
                        "of data.mask_values")
    return mask[..., 0] if is_grey_rgb else mask


def picture_size(path: Path) -> tuple[int, int]:
    """Return (height, width) from the header alone."""
    with _opened(path) as picture:
        return picture.height, picture.width


def open_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture of at most `max_pixels` pixels with 8 bits for each channel."""
    with _opened(path) as picture:
        if picture.width * picture.height > max_pixels:
            raise UserError(f"{path}: {picture.width} x {picture.height} pixels are too many; at most {max_pixels:,} "
                            "are allowed. Cut it into tiles")
        if picture.tile and "16" in str(np.ravel(picture.tile[0][3])[0]):  # Pillow would reduce RGB to 8 bits silently
            raise UserError(f"{path}: 16 bits for each channel; expected 8. Convert it to 8 bits")
        if getattr(picture, "n_frames", 1) > 1 or picture.getexif().get(ORIENTATION, 1) != 1:
            raise UserError(f"{path}: several pages, or an EXIF rotation flag that only some programs follow; save it "
                            "as a plain PNG")
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
