"""Images and masks from files to arrays: read exactly, or refused with the reason."""

import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from common.console import UserError

LOSSLESS = ("PNG", "TIFF", "BMP")  # formats of masks
MAX_PIXELS = 64_000_000  # larger headers are refused before anything is decoded: a small file can hold a huge image
ORIENTATION = 0x0112  # the EXIF tag
_pillows_limit = threading.Lock()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises on a file into a `UserError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; restore it, or run data_filter.py again") from None
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace or remove it") from None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture with its header read and nothing decoded; the caller checks its size."""
    with reading(path):
        with _pillows_limit:  # a global of Pillow, which its `open` alone looks at
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                picture = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = before
        with picture:
            yield picture


def open_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture of at most `max_pixels` pixels and 8 bits a channel."""
    with _opened(path) as picture:
        if picture.width * picture.height > max_pixels:
            raise UserError(f"{path}: {picture.width} x {picture.height} pixels are more than fit here "
                            f"({max_pixels:,}); cut it into tiles")
        if picture.tile and "16" in str(np.ravel(picture.tile[0][3])[0]):  # Pillow would cut RGB to 8 bits unasked
            raise UserError(f"{path}: 16 bits a channel; expected 8. Convert it to 8 bits")
        if getattr(picture, "n_frames", 1) > 1 or picture.getexif().get(ORIENTATION, 1) != 1:
            raise UserError(f"{path}: several pages, or a rotation flag (EXIF) that some programs follow and some do "
                            "not; save it as a plain PNG")
        picture.load()
        return picture


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header alone."""
    with _opened(path) as picture:
        return picture.height, picture.width


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8. RGB and opaque RGBA are read exactly, every other mode is refused."""
    picture = open_picture(path, max_pixels)
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")
    if picture.mode != "RGB":
        raise UserError(f"{path}: an image must be 8-bit RGB, this one has mode {picture.mode}; convert it to RGB")
    return np.asarray(picture)


def read_mask_values(path: Path) -> np.ndarray:
    """(H, W) uint8, the values of a mask as they stand in its file.

    Grey and RGB with three equal channels are read exactly. A palette is refused, since its indices and its colours
    are both candidates, and so are JPEG and other formats that smear labels.
    """
    picture = open_picture(path)
    if picture.format not in LOSSLESS or picture.info.get("compression") == "jpeg":
        raise UserError(f"{path}: {picture.format} may change the values of a mask; save masks as PNG")
    if picture.mode not in ("L", "RGB"):
        raise UserError(f"{path}: a mask must be 8-bit grey, this one has mode {picture.mode}; convert it so that "
                        "every pixel is one of data.mask_values")
    mask = np.asarray(picture)
    if mask.ndim == 3:
        if (mask != mask[..., :1]).any():
            raise UserError(f"{path}: a mask must be grey, this one is coloured; convert it so that every pixel is "
                            "one of data.mask_values")
        mask = mask[..., 0]
    return mask


def count_classes(path: Path, counts: np.ndarray, mask_values: Sequence[int]) -> np.ndarray:
    """Pixels of each class (K,) from those of each grey (256,); a grey that is not in `greys` is an error."""
    unknown = np.setdiff1d(np.flatnonzero(counts), mask_values)
    if unknown.size:
        found = ", ".join(f"{value} ({counts[value]} pixel{'s' if counts[value] > 1 else ''})" for value in unknown[:5])
        raise UserError(f"{path}: grey {found}{', …' if unknown.size > 5 else ''} is none of data.mask_values "
                        f"{list(mask_values)}; fix the mask or set data.mask_values and data.classes")
    return counts[list(mask_values)]


def read_mask(path: Path, mask_values: Sequence[int]) -> np.ndarray:
    """(H, W) uint8 class indices; class k is the grey `greys[k]`, and any other grey is an error."""
    mask = read_mask_values(path)
    lookup = np.full(256, 255, np.uint8)
    lookup[list(mask_values)] = np.arange(len(mask_values))
    labels = lookup[mask]
    if labels.max() == 255:
        count_classes(path, np.bincount(mask.ravel(), minlength=256), mask_values)
    return labels
