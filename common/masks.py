"""Turn masks into classes: exactly, or not at all with an error that says what the file holds.

    value    grey level, or the index of a palette, from 0 to 255
    colour   red, green and blue
    code     either of both as one number: a value as it is, a colour as COLOUR + 0xrrggbb
    IGNORE   stands for the class of pixels without a class (data.ignore)
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from common.config import Data
from common.console import UserError
from common.pictures import alpha_range, open_picture

IGNORE = 255
UNKNOWN = 254  # while a mask is read: a code that the settings do not name
COLOUR = 1 << 24
LOSSLESS = ("PNG", "TIFF", "BMP")
SHOWN = 5  # codes in an error


@dataclass(frozen=True)
class MaskFile:
    """What a mask's file holds."""

    codes: np.ndarray  # (H, W), uint8 if all are values, else int32
    palette: tuple[int, ...] = ()  # the colour of each of 256 indices, if the codes are indices


def read_mask(path: Path, data: Data) -> np.ndarray:
    """Return (H, W) uint8, the class of each pixel or IGNORE. A code that the settings do not name is an error."""
    codes = read_mask_file(path, data).codes
    labels = classes_of(codes, data)
    if (labels == UNKNOWN).any():
        count_classes(path, *count_codes(codes), data)
    return labels


def read_mask_file(path: Path, data: Data) -> MaskFile:
    """Read the codes of a mask: colours if the settings name colours or the file has some, else values.

    JPEG and similar formats are rejected, because they change values; data.threshold allows them.
    """
    picture = open_picture(path)
    changes_values = picture.format not in LOSSLESS or picture.info.get("compression") == "jpeg"
    if changes_values and data.threshold is None:
        raise UserError(f"{path}: {picture.format} may change the values of a mask; save masks as PNG"
                        + (", or set data.threshold" if len(data.classes) == 2 else ""))
    if picture.mode == "P":
        colours = np.zeros((256, 3), np.int32)
        own = np.array(picture.getpalette("RGB"), np.int32).reshape(-1, 3)
        colours[:len(own)] = own
        if not data.palettes_by_colour:
            return MaskFile(np.asarray(picture), tuple(colour_codes(colours).tolist()))
        pixels = colours[np.asarray(picture)]
    else:
        pixels = _plain_pixels(path, picture)
    is_grey = pixels.ndim == 2 or (pixels == pixels[..., :1]).all()
    if is_grey and not data.colours:
        return MaskFile(np.ascontiguousarray(pixels if pixels.ndim == 2 else pixels[..., 0]).astype(np.uint8))
    return MaskFile(colour_codes(pixels if pixels.ndim == 3 else np.stack([pixels] * 3, -1)))


def _plain_pixels(path: Path, picture: Image.Image) -> np.ndarray:
    """Return the pixels of a picture without a palette, (H, W) or (H, W, 3), whole numbers from 0 to 255."""
    if picture.mode in ("RGBA", "LA"):
        if len({*alpha_range(picture)}) > 1:
            raise UserError(f"{path}: some parts of this mask are more transparent than others; save it without "
                            "transparency")
        picture = picture.convert(picture.mode[:-1])
    if picture.mode == "1":
        picture = picture.convert("L")  # black 0, white 255
    if picture.mode in ("L", "RGB"):
        return np.asarray(picture)
    if picture.mode[0] in "IF":  # 16 or 32 bits, whole numbers or floats
        pixels = np.asarray(picture)
        with np.errstate(invalid="ignore"):
            small = pixels.astype(np.uint8)
        if (small == pixels).all():
            return small
        raise UserError(f"{path}: holds values from {pixels.min():g} to {pixels.max():g}; a mask must hold whole "
                        "numbers from 0 to 255. Convert it so that each class has one of them")
    raise UserError(f"{path}: a mask must be grey, have a palette or be RGB; this one has mode {picture.mode}. Convert "
                    "it to 8-bit grey")


def colour_codes(pixels: np.ndarray) -> np.ndarray:
    """Return the codes (...) int32 of colours (..., 3)."""
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return COLOUR + (red << 16) + (green << 8) + blue


def classes_of(codes: np.ndarray, data: Data) -> np.ndarray:
    """Return (H, W) uint8, the class of each code, IGNORE or UNKNOWN."""
    known, classes, by_value = _tables(data)
    if codes.dtype == np.uint8:
        return by_value[codes]
    places = np.searchsorted(known, codes).clip(max=len(known) - 1)
    return np.where(known[places] == codes, classes[places], np.uint8(UNKNOWN))


@lru_cache(maxsize=8)
def _tables(data: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the known codes in order, their classes, and the class of each value (256,)."""
    if data.threshold is not None:
        class_of = {value: int(value >= data.threshold) for value in range(256)}
    else:
        names = data.colours or data.mask_values
        class_of = {code_of(name): k for k, name in enumerate(names)} | {code_of(name): IGNORE for name in data.ignore}
    known = np.array(sorted(class_of), np.int32)
    classes = np.array([class_of[code] for code in known.tolist()], np.uint8)
    by_value = np.array([class_of.get(value, UNKNOWN) for value in range(256)], np.uint8)
    return known, classes, by_value


def code_of(name: int | str) -> int:
    """Return the code of a value, or of a colour as in the settings, rrggbb."""
    return name if isinstance(name, int) else COLOUR + int(name, 16)


def name_of(code: int) -> str:
    """Return a value or a colour as a person writes it."""
    return str(code) if code < COLOUR else f"{code - COLOUR:06x}"


def count_codes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes that occur (n,) and the pixels of each (n,)."""
    if codes.dtype == np.uint8:
        counts = np.bincount(codes.ravel(), minlength=256)
        return np.flatnonzero(counts), counts[counts > 0]
    return np.unique(codes, return_counts=True)


def count_classes(path: Path, codes: np.ndarray, counts: np.ndarray, data: Data) -> np.ndarray:
    """Return the pixels of each class (K,) from those of each code (n,); an unknown code is an error."""
    classes = classes_of(codes if codes.max() >= COLOUR else codes.astype(np.uint8), data)
    unknown = np.flatnonzero(classes == UNKNOWN)
    if unknown.size:
        found = ", ".join(f"{name_of(codes[i])} ({counts[i]} pixel{'s' if counts[i] > 1 else ''})"
                          for i in unknown[:SHOWN])
        expected = f"data.colours is {list(data.colours)}" if data.colours else (
            f"data.mask_values is {list(data.mask_values)}")
        setting = "data.colours" if data.colours else "data.mask_values"
        advice = f"set {setting} and data.classes, or data.ignore for pixels without a class"
        if codes.max() >= COLOUR and not data.colours:
            advice = "set data.colours to read colours" if data.threshold is None else "convert it to grey"
        raise UserError(f"{path}: contains {found}{', …' if unknown.size > SHOWN else ''}, but {expected}; fix the "
                        f"mask, or {advice}")
    return np.bincount(classes, counts, minlength=256)[:len(data.classes)].astype(np.int64)


def label_image(labels: np.ndarray, data: Data) -> Image.Image:
    """Return classes (H, W) as a picture that `read_mask` reads back: in mask values, or as a palette of colours."""
    if not data.colours:
        return Image.fromarray(np.array(data.mask_values, np.uint8)[labels])
    picture = Image.fromarray(labels.astype(np.uint8)).convert("P")
    picture.putpalette(b"".join(bytes.fromhex(colour) for colour in data.colours))
    return picture
