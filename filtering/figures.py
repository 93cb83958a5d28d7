"""Pictures of the filter: tiles with their masks, and histograms of the measurements."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import ScalarFormatter
from scipy.ndimage import maximum_filter, minimum_filter

from common.palette import ERROR, TRAIN, VALIDATION, class_colours

ON_GLASS, UNMARKED = ERROR, "#f0e442"


def annotated(image: np.ndarray, mask: np.ndarray, glass: np.ndarray, classes: int, width: int = 250) -> np.ndarray:
    """A thumbnail of the image (H, W, 3) with the outlines of the mask's classes (H, W), uint8.

    Where the mask annotates what `glass` (H, W) bool calls glass the thumbnail is tinted, and in another colour where
    it calls tissue background.
    """
    tinted = image.astype(np.float32)
    for where, colour in (((mask > 0) & glass, ON_GLASS), ((mask == 0) & ~glass, UNMARKED)):
        tinted[where] = 0.5 * tinted[where] + 0.5 * 255 * np.array(to_rgb(colour))
    step = max(1, round(mask.shape[1] / width))
    height, width = (length // step * step for length in mask.shape)
    small = tinted[:height, :width].reshape(height // step, step, width // step, step, 3).mean((1, 3)).astype(np.uint8)
    labels = mask[:height:step, :width:step]
    highest = maximum_filter(labels, 3)
    edge = highest != minimum_filter(labels, 3)
    small[edge] = class_colours(classes)[highest[edge]]
    return small


def contact_sheet(cells: Sequence[tuple[str, np.ndarray]], title: str, classes: Sequence[str]) -> Figure:
    """Figures 2 to 4 of the report: (caption, thumbnail (h, w, 3) uint8) in rows of six."""
    columns = min(6, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(max(2.1 * columns, 8.4), 2.45 * rows + 1.1), dpi=120, layout="constrained")
    for axis, cell in zip_longest(figure.subplots(rows, columns, squeeze=False).flat, cells):
        axis.axis("off")
        if cell:
            axis.imshow(cell[1])
            axis.set_title(cell[0], fontsize=7.5)
    figure.suptitle(title, fontsize=11)
    colours = class_colours(len(classes)) / 255
    handles = [Line2D([], [], color=colour, linewidth=3, label=f"outline of {name}")
               for name, colour in zip(classes[1:], colours[1:], strict=True)]
    handles += [Patch(facecolor=ON_GLASS, alpha=0.6, label="annotated, but glass"),
                Patch(facecolor=UNMARKED, alpha=0.6, label="tissue, but not annotated")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def histograms(panels: Sequence[tuple[str, np.ndarray, np.ndarray, float | None]]) -> Figure:
    """One histogram for each (what is measured, values of kept tiles, values of dropped tiles, threshold or None)."""
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    for axis, (label, kept, dropped, threshold) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        values = np.concatenate([kept, dropped])
        highest = max([*values, *([threshold] if threshold else []), 1e-6])
        axis.hist([kept, dropped], bins=np.linspace(0, highest, 41), stacked=True, color=[TRAIN, VALIDATION],
                  label=[f"kept ({len(kept)})", f"dropped ({len(dropped)})"])
        if threshold is not None:
            axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:g}")
        axis.set(xlabel=label, ylabel="tiles", yscale="symlog")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.legend(fontsize=8, title=None if threshold is not None else "no threshold set", title_fontsize=8)
        axis.grid(alpha=0.25)
    return figure
