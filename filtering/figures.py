"""Draw the pictures of the filter: tiles with the outlines of their masks, and histograms of the measurements."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import ScalarFormatter
from scipy.ndimage import maximum_filter, minimum_filter

from common.masks import IGNORE
from common.palette import ERROR, IGNORED, TRAIN, VALIDATION, class_colours, hatch, ignored_patch, rgb

ON_GLASS, UNMARKED = ERROR, "#f0e442"
SIDE, GAP, CAPTION, HEAD, FOOT = 2.0, 0.1, 0.42, 0.35, 0.4  # inches of a contact sheet


def annotated(image: np.ndarray, mask: np.ndarray, glass: np.ndarray, classes: int, width: int = 250) -> np.ndarray:
    """Return a thumbnail of an image (H, W, 3) uint8, about `width` pixels wide, with the outlines of its mask (H, W).

    One tint marks annotated pixels that are `glass` (H, W) bool, another one tissue that the mask calls background.
    Pixels without a class are hatched.
    """
    tinted = image.astype(np.float32)
    ignored = mask == IGNORE
    for pixels, colour in (((mask > 0) & ~ignored & glass, ON_GLASS), ((mask == 0) & ~glass, UNMARKED)):
        tinted[pixels] = 0.5 * tinted[pixels] + 0.5 * 255 * np.array(to_rgb(colour))
    step = max(1, round(mask.shape[1] / width))
    height, width = (length // step * step for length in mask.shape)
    squares = tinted[:height, :width].reshape(height // step, step, width // step, step, 3)
    thumbnail = squares.mean((1, 3)).astype(np.uint8)
    labels, ignored = (values[:height:step, :width:step] for values in (mask, ignored))
    highest = maximum_filter(np.where(ignored, 0, labels), 3)
    edge = ~ignored & (highest != minimum_filter(labels, 3))  # IGNORE is above every class
    thumbnail[edge] = class_colours(classes)[highest[edge]]
    thumbnail[hatch(ignored)] = rgb(IGNORED)
    return thumbnail


def contact_sheet(cells: Sequence[tuple[str, np.ndarray]], title: str, classes: Sequence[str],
                  has_ignored: bool = False) -> Figure:
    """Draw (caption, thumbnail (h, w, 3) uint8) in rows of six, like figures 2 to 4 of the report."""
    columns = min(6, len(cells))
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    heights = [SIDE * max(thumbnail.shape[0] / thumbnail.shape[1] for _, thumbnail in row) for row in rows]
    width = max(columns, 4) * (SIDE + GAP)
    height = HEAD + len(rows) * (CAPTION + GAP) + sum(heights) + FOOT
    figure = Figure(figsize=(width, height), dpi=120)
    sheet = figure.add_axes((0, 0, 1, 1))  # in inches; an axes for each tile is slow
    first, top = (width - columns * (SIDE + GAP) + GAP) / 2, HEAD + CAPTION
    for row, tallest in zip(rows, heights, strict=True):
        for i, (caption, thumbnail) in enumerate(row):
            left, bottom = first + i * (SIDE + GAP), top + SIDE * thumbnail.shape[0] / thumbnail.shape[1]
            sheet.imshow(thumbnail, extent=(left, left + SIDE, bottom, top))
            sheet.text(left + SIDE / 2, top - 0.04, caption, fontsize=7.5, ha="center", va="bottom")
        top += tallest + CAPTION + GAP
    sheet.set(xlim=(0, width), ylim=(height, 0))
    sheet.axis("off")
    figure.text(0.5, 1 - HEAD / 2 / height, title, fontsize=11, ha="center", va="center")
    colours = class_colours(len(classes)) / 255
    handles = [Line2D([], [], color=colour, linewidth=3, label=f"outline of {name}")
               for name, colour in zip(classes[1:], colours[1:], strict=True)]
    handles += [Patch(facecolor=ON_GLASS, alpha=0.6, label="annotated, but glass"),
                Patch(facecolor=UNMARKED, alpha=0.6, label="tissue, but not annotated"),
                *([ignored_patch()] if has_ignored else [])]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def histograms(panels: Sequence[tuple[str, list[float], list[float], float | None]]) -> Figure:
    """Draw a histogram for each (label, values of kept tiles, values of dropped tiles, threshold or None)."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.5 * rows), dpi=110, layout="constrained")
    for number, (label, kept, dropped, threshold) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, 2, number)
        highest = max([*kept, *dropped, threshold or 0, 1e-6])
        axis.hist([kept, dropped], bins=np.linspace(0, highest, 41), stacked=True, color=[TRAIN, VALIDATION],
                  label=[f"kept ({len(kept)})", f"dropped ({len(dropped)})"])
        if threshold is not None:
            axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:g}")
        axis.set(xlabel=label, ylabel="tiles", yscale="symlog")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.legend(fontsize=8, title=None if threshold is not None else "no threshold set", title_fontsize=8)
        axis.grid(alpha=0.25)
    return figure
