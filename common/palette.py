"""Colours and legends of all pictures, and how a figure is saved.

The index of a class alone decides its colour. In the report's plots the grey levels depend on which classes occur, so
that a mask without tumour looks like one without background (figures 7 and 9 to 11).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.files import replacing
from common.masks import IGNORE

matplotlib.rcParams["text.parse_math"] = False  # names of tiles, runs and classes may contain a $
# the colours of Okabe and Ito, which suit every kind of colour vision; the first one is the background
PALETTE = ("#f2f2f2", "#56b4e9", "#d55e00", "#009e73", "#f0e442", "#0072b2", "#cc79a7", "#000000")
ERROR = "#c2007a"
IGNORED = "#777777"  # the lines over pixels without a class
FOLD, TRAIN, VALIDATION = "#999999", "#0072b2", "#d55e00"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # of candidates


def rgb(colour: str) -> np.ndarray:
    """Return a colour as (3,) uint8."""
    return np.round(np.array(to_rgb(colour)) * 255).astype(np.uint8)


def class_colours(classes: int) -> np.ndarray:
    """Return (K, 3) uint8. From the ninth class on, the colours repeat without the background's."""
    return np.array([rgb(PALETTE[1 + (k - 1) % (len(PALETTE) - 1) if k else 0]) for k in range(classes)])


def class_patches(classes: Sequence[str]) -> list[Patch]:
    """Return the handles of a legend."""
    return [Patch(facecolor=colour, edgecolor="grey", label=name)
            for name, colour in zip(classes, class_colours(len(classes)) / 255, strict=True)]


def legend(classes: Sequence[str]) -> Figure:
    figure = Figure(figsize=(1 + 1.4 * len(classes), 0.5), dpi=120)
    figure.legend(handles=class_patches(classes), loc="center", ncols=len(classes), frameon=False)
    return figure


def ignored_patch() -> Patch:
    """Return the handle of a legend for pixels without a class."""
    return Patch(facecolor="white", edgecolor=IGNORED, hatch="////", label="ignored")


def hatch(area: np.ndarray) -> np.ndarray:
    """Return (H, W) bool: the pixels of diagonal lines inside an area (H, W) bool, about 24 across its longer side."""
    step = max(4, round(max(area.shape) / 24))
    rows, columns = (np.arange(length) for length in area.shape)
    return area & (np.add.outer(rows, columns) % step < max(1, step // 4))


def colour_mask(mask: np.ndarray, classes: int) -> np.ndarray:
    """Return the colours (H, W, 3) uint8 of classes (H, W); pixels without a class are white with grey lines."""
    ignored = mask == IGNORE
    colours = class_colours(classes)[np.where(ignored, 0, mask)]
    if ignored.any():
        colours[ignored] = 255
        colours[hatch(ignored)] = rgb(IGNORED)
    return colours


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name may contain letters that the font lacks
        figure.savefig(temporary, format=path.suffix[1:])
