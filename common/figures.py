"""Every picture that the scripts draw, in one palette.

Colours are fixed by class index, never scaled to what a picture happens to contain: on the report's autoscaled grey
plots a mask without tumour looks like one without background (figures 7 and 9 to 11).
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle
from matplotlib.ticker import LogFormatter, PercentFormatter, ScalarFormatter
from scipy.ndimage import maximum_filter, minimum_filter

from common.console import percent
from common.files import replacing

matplotlib.rcParams["text.parse_math"] = False  # keys, runs and classes may hold a $

# Okabe and Ito's colours, told apart with every kind of colour vision; the first is the background
PALETTE = ("#f2f2f2", "#56b4e9", "#d55e00", "#009e73", "#f0e442", "#0072b2", "#cc79a7", "#000000")
ERROR = "#c2007a"
ON_GLASS, UNMARKED = ERROR, "#f0e442"
FOLD, TRAIN, VALIDATION = "#999999", "#0072b2", "#d55e00"
ENTRIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # of a comparison
RADII = ("#56b4e9", "#009e73", "#ffffff")  # circles on a map


def rgb(colour: str) -> np.ndarray:
    """(3,) uint8."""
    return np.round(np.array(to_rgb(colour)) * 255).astype(np.uint8)


def class_colours(classes: int) -> np.ndarray:
    """(K, 3) uint8; beyond eight classes the colours repeat, without the background's."""
    names = [PALETTE[k] if k < len(PALETTE) else PALETTE[1 + (k - 1) % (len(PALETTE) - 1)] for k in range(classes)]
    return np.array([rgb(name) for name in names])


def class_patches(classes: Sequence[str]) -> list[Patch]:
    """Handles of a legend."""
    return [Patch(facecolor=colour, edgecolor="grey", label=name)
            for name, colour in zip(classes, class_colours(len(classes)) / 255, strict=True)]


def legend(classes: Sequence[str]) -> Figure:
    figure = Figure(figsize=(1 + 1.4 * len(classes), 0.5), dpi=120)
    figure.legend(handles=class_patches(classes), loc="center", ncols=len(classes), frameon=False)
    return figure


def colour_mask(mask: np.ndarray, classes: int) -> np.ndarray:
    """Class indices (H, W) to colours (H, W, 3) uint8."""
    return class_colours(classes)[mask]


def error_map(image: np.ndarray, target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) in pale grey with every wrong pixel in one strong colour, uint8."""
    import torch  # here, since the filter draws too and needs no torch, whose import takes seconds
    from torchvision.utils import draw_segmentation_masks

    grey = (128 + image.mean(-1) / 2).astype(np.uint8)
    pale = torch.from_numpy(np.stack([grey] * 3))                                    # (3, H, W)
    wrong = torch.from_numpy(target != prediction)                                   # (H, W)
    return draw_segmentation_masks(pale, wrong, alpha=1.0, colors=ERROR).movedim(0, -1).numpy()


def overlay(image: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The image (H, W, 3) with the colours of all classes (H, W) but the first over it, uint8."""
    mixed = image.copy()
    for k, colour in list(enumerate(class_colours(classes)))[1:]:
        there = labels == k
        mixed[there] = (image[there] * np.uint16(6) + colour * np.uint16(4)) // 10
    return mixed


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


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a key may hold letters that the font lacks
        figure.savefig(temporary, format=path.suffix[1:])


def losses(history: Sequence[dict], folds: int, title: str) -> Figure:
    """Figures 6 and 8: train and validation loss, raw and EMA, and each fold's validation loss as a faint dot."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for fold in range(folds):
        axes.plot(epochs, [row[f"val_loss_{fold}"] for row in history], ".", color=FOLD, alpha=0.45, markersize=4,
                  label="validation, each fold" if fold == 0 else None)
    for name, colour, label in (("train", TRAIN, "training"), ("val", VALIDATION, "validation of the survivor")):
        axes.plot(epochs, [row[f"{name}_loss"] for row in history], color=colour, alpha=0.35, linewidth=1)
        axes.plot(epochs, [row[f"{name}_ema"] for row in history], color=colour, linewidth=2,
                  label=f"{label}: EMA (thin: raw)")
    cuts = [row["epoch"] for row, after in pairwise(history) if after["lr"] < row["lr"]]
    for i, epoch in enumerate(cuts):
        axes.axvline(epoch + 0.5, color="black", linestyle=":", linewidth=1,
                     label="learning rate cut" if i == 0 else None)
    best = min(history, key=lambda row: row["val_loss"])
    axes.plot(best["epoch"], best["val_loss"], "*", color=VALIDATION, markeredgecolor="black", markersize=11,
              label=f"best.pt (epoch {best['epoch']})")
    axes.set(xlabel="epoch", ylabel="loss", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return figure


def tiles(rows: Sequence[tuple], names: Sequence[str], classes: Sequence[str]) -> Figure:
    """Figures 9 to 11: image, truth and the prediction of each of `names`, and of a single one the errors.

    A row is (key, why it is shown, image (H, W, 3), target (H, W), [(caption, prediction (H, W)) of each name]).
    """
    titles = ["image", "truth", *([*names, "errors"] if len(names) == 1 else names)]
    figure = Figure(figsize=(2.6 * len(titles), 2.75 * len(rows) + 0.7), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for number, (axes, (key, why, image, target, answers)) in enumerate(zip(grid, rows, strict=True)):
        panels = [("", image), ("", colour_mask(target, len(classes))),
                  *((caption, colour_mask(answer, len(classes))) for caption, answer in answers)]
        if len(names) == 1:
            panels.append(("", error_map(image, target, answers[0][1])))
        for axis, title, (caption, panel) in zip(axes, titles, panels, strict=True):
            axis.imshow(panel, interpolation="antialiased" if title in ("image", "errors") else "nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(caption, fontsize=8)
            if number == 0:
                axis.set_title(title, fontsize=11)
        axes[0].set_ylabel(f"{key}\n{why}" if why else key, fontsize=8)
    handles = class_patches(classes)
    if len(names) == 1:
        handles.append(Patch(facecolor=ERROR, edgecolor="grey", label="wrong class"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def compared_losses(histories: dict[str, Sequence[dict]]) -> Figure:
    """Figures 6 and 8 over each other: moving averages of the training and validation loss of each run, thin the raw.

    Losses of different kinds have different scales: their heights cannot be compared, their courses can.
    """
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    titles = {"train": "training: EMA (thin: raw)", "val": "survivor's validation: EMA (thin: raw, star: best.pt)"}
    for axis, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        lines = []
        for number, (name, history) in enumerate(histories.items()):
            epochs, colour = [row["epoch"] for row in history], ENTRIES[number % len(ENTRIES)]
            axis.plot(epochs, [row[f"{kind}_loss"] for row in history], color=colour, alpha=0.3, linewidth=1)
            lines += axis.plot(epochs, [row[f"{kind}_ema"] for row in history], color=colour, linewidth=2, label=name)
            if kind == "val":
                best = min(history, key=lambda row: row["val_loss"])
                axis.plot(best["epoch"], best["val_loss"], "*", color=colour, markeredgecolor="black", markersize=10)
        axis.set(xlabel="epoch", ylabel="loss", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.legend(handles=lines, fontsize=8)  # given, since a name that begins with _ is not found
    return figure


def reliability(bins: dict[str, np.ndarray]) -> Figure:
    """For each name's counts (3, BINS) of metrics.calibration: accuracy by confidence, and how often each occurs."""
    figure = Figure(figsize=(5.5, 6), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    lines = above.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    for number, (name, (pixels, confidence, right)) in enumerate(bins.items()):
        colour, some = ENTRIES[number % len(ENTRIES)], pixels > 0
        error = np.abs(right - confidence).sum() / pixels.sum()
        lines += above.plot(confidence[some] / pixels[some], right[some] / pixels[some], "o-", color=colour,
                            markersize=4, label=f"{name}: error {error:.3f}")
        below.stairs(pixels / pixels.sum(), np.linspace(0, 1, len(pixels) + 1), color=colour, linewidth=1.5)
    above.set(ylabel="share of pixels that are right", ylim=(0, 1), xlim=(0, 1), title="Reliability")
    below.set(xlabel="confidence (softmax of the predicted class)", ylabel="share of pixels")
    above.legend(handles=lines, fontsize=8, loc="upper left")
    for axis in (above, below):
        axis.grid(alpha=0.25)
    return figure


def _map(axis: Axes, strength: np.ndarray, norm: Normalize) -> AxesImage:
    """A map with the pixel at (0, 0), on black where nothing is."""
    radius = len(strength) // 2
    axis.set_facecolor("black")
    axis.tick_params(labelsize=7)
    return axis.imshow(np.where(strength > 0, strength, np.nan), norm=norm, cmap="inferno", interpolation="nearest",
                       extent=(-radius - 0.5, radius + 0.5, radius + 0.5, -radius - 0.5))


def _log_norm(strengths: Sequence[np.ndarray]) -> LogNorm:
    """One scale for all: the strongest pixel and six powers of ten below it."""
    highest = max(strength.max() for strength in strengths) or 1
    return LogNorm(highest * 1e-6, highest, clip=True)


SHARE_OF_GRADIENT = "share of the mean |gradient|"


def fields(runs: Sequence[tuple[str, str, np.ndarray, tuple[int, int], Sequence[float]]],
           radii: Sequence[str]) -> Figure:
    """Figure 12 on one scale: (run, what theory says, map (D, D) with sum 1, theoretical box, its `radii`).

    Above the centre, linear; below the whole field, logarithmic.
    """
    figure = Figure(figsize=(3.3 * len(runs) + 1.2, 7.6), dpi=120, layout="constrained")
    grid = figure.subplots(2, len(runs), squeeze=False)
    strengths = [strength for _, _, strength, _, _ in runs]
    centre = max(8, *(1.4 * max(distances) for *_, distances in runs))
    widest = max(len(strength) for strength in strengths) / 2 + 3
    scales = [("linear", centre, Normalize(0, max(strength.max() for strength in strengths) or 1), ScalarFormatter()),
              ("logarithmic", widest, _log_norm(strengths), LogFormatter())]
    for axes, (scale, around, norm, ticks) in zip(grid, scales, strict=True):
        for axis, (name, theory, strength, (low, high), distances) in zip(axes, runs, strict=True):
            image = _map(axis, strength, norm)
            axis.add_patch(Rectangle((low - 0.5, low - 0.5), high - low + 1, high - low + 1, fill=False, color="white",
                                     linestyle="--", linewidth=1))
            for distance, colour, width in zip(distances, RADII, (1.2, 2.6, 1.2), strict=True):  # 90 % may be 95 %
                axis.add_patch(Circle((0, 0), distance, fill=False, color=colour, linewidth=width))
            axis.set(xlim=(-around, around), ylim=(around, -around))
            if scale == "linear":
                values = ", ".join(f"{radius} {distance:g}" for radius, distance in zip(radii, distances, strict=True))
                axis.set_title(f"{name}\n{theory}\n{values} px", fontsize=9)
        axes[0].set_ylabel("pixels from the output pixel", fontsize=8)
        figure.colorbar(image, ax=axes, label=f"{SHARE_OF_GRADIENT}, {scale}", format=ticks, shrink=0.85)
    handles = [Line2D([], [], color="white", linestyle="--", label="theory, over all alignments")]
    handles += [Line2D([], [], color=colour, label=f"holds {radius[1:]} % of the energy")
                for radius, colour in zip(radii, RADII, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * len(runs)), fontsize=8,
                  facecolor="#333333", labelcolor="white")
    return figure


def profiles(runs: Sequence[tuple[str, np.ndarray, np.ndarray, tuple[int, int], tuple[float, float]]],
             gaussian: Callable[..., np.ndarray]) -> Figure:
    """Maps along both axes: (run, map (D, D), map before training, theoretical box, height and sigma of the fit)."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    for axis, direction in zip(figure.subplots(1, 2, sharey=True), ("across", "down"), strict=True):
        lines, highest = [], 0
        for number, (name, trained, untrained, box, (height, sigma)) in enumerate(runs):
            colour, radius = ENTRIES[number % len(ENTRIES)], len(trained) // 2
            steps = np.arange(-radius, radius + 1)
            for strength, style in ((trained, {"linewidth": 1.6, "label": name}),
                                    (untrained, {"linewidth": 0.8, "alpha": 0.6})):
                line = strength[radius] if direction == "across" else strength[:, radius]
                drawn = axis.plot(steps, np.where(line > 0, line, np.nan), color=colour, **style)
                lines += drawn if strength is trained else []
                highest = max(highest, line.max())
            axis.plot(steps, gaussian(np.abs(steps), height, sigma), color=colour, linestyle="--", linewidth=1)
            for end in (box[0] - 0.5, box[1] + 0.5):
                axis.axvline(end, color=colour, linestyle=":", linewidth=1)
        axis.set(yscale="log", ylim=(highest * 1e-7, highest * 2), title=direction,
                 xlabel="pixels from the output pixel")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.grid(alpha=0.25)
    lines += [Line2D([], [], color="grey", linewidth=0.8, label="before training"),
              Line2D([], [], color="grey", linestyle="--", linewidth=1, label="Gaussian fit"),
              Line2D([], [], color="grey", linestyle=":", label="theory")]
    figure.axes[0].set_ylabel(SHARE_OF_GRADIENT)
    figure.axes[1].legend(handles=lines, fontsize=8)
    return figure


def field_panels(runs: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]]) -> Figure:
    """For each run its maps (title, (D, D) with sum 1), on one logarithmic scale."""
    columns = max(len(panels) for _, panels in runs)
    figure = Figure(figsize=(1.75 * columns + 1.2, 1.95 * len(runs) + 0.3), dpi=120, layout="constrained")
    grid = figure.subplots(len(runs), columns, squeeze=False)
    norm = _log_norm([strength for _, panels in runs for _, strength in panels])
    for axes, (name, panels) in zip(grid, runs, strict=True):
        for axis, panel in zip_longest(axes, panels):
            if panel is None:
                axis.axis("off")
                continue
            image = _map(axis, panel[1], norm)
            axis.set_title(panel[0], fontsize=8)
        axes[0].set_ylabel(name, fontsize=9)
    colours = figure.colorbar(image, ax=grid, format=LogFormatter(), fraction=0.03, pad=0.01)
    colours.set_label(SHARE_OF_GRADIENT, fontsize=8)
    colours.ax.tick_params(labelsize=7)
    return figure


def path_shares(runs: Sequence[tuple[str, Sequence[dict]]]) -> Figure:
    """What comes by each path, for each run its rows of paths.csv: two shares as bars."""
    figure = Figure(figsize=(11, 1.6 + 0.28 * sum(len(rows) for _, rows in runs)), dpi=110, layout="constrained")
    columns = {"gradient_x_activation": "share of |gradient x activation|",
               "energy_alone": "energy of its gradient, of the whole network's"}
    labels = [f"{name}: {row['path']}{' (dead)' if row['dead'] else ''}" for name, rows in runs for row in rows]
    colours = [ENTRIES[number % len(ENTRIES)] for number, (_, rows) in enumerate(runs) for _ in rows]
    for axis, (column, title) in zip(figure.subplots(1, 2, sharey=True), columns.items(), strict=True):
        values = np.nan_to_num([row[column] for _, rows in runs for row in rows])
        bars = axis.barh(range(len(values)), values, color=colours)
        axis.bar_label(bars, [percent(value) for value in values], fontsize=7, padding=2)
        axis.set_title(title, fontsize=10)
        axis.set(yticks=range(len(values)), yticklabels=labels, xlim=(0, 1.12 * max(*values, 1e-9)))
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        axis.tick_params(labelsize=8)
    figure.axes[0].invert_yaxis()  # both, as they share it
    return figure


def border_accuracy(runs: dict[str, dict]) -> Figure:
    """For each run its "border" in fields.json: accuracy by distance to the border, and what crops alone lose."""
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    panels = [("tile's", "accuracy, on other tissue at each distance",
               {name: border["by_distance"] for name, border in runs.items()}),
              ("crop's", "the same pixels: crop alone minus whole tile",
               {name: border["crop"]["difference_by_distance"] for name, border in runs.items() if "crop" in border})]
    for axis, (whose, title, by_distance) in zip(figure.subplots(1, 2), panels, strict=True):
        starts = sorted({band["from_px"] for bands in by_distance.values() for band in bands})
        for number, (name, bands) in enumerate(by_distance.items()):
            places = [starts.index(band["from_px"]) + 0.06 * (number - (len(runs) - 1) / 2) for band in bands]
            values = np.array([[band["value"], band["low"], band["high"]] for band in bands])
            spans = np.nan_to_num(np.abs(values[:, 1:] - values[:, :1]).T)
            axis.errorbar(places, values[:, 0], spans, marker="o", markersize=4, capsize=3, linewidth=1.2,
                          color=ENTRIES[number % len(ENTRIES)], label=name)
        ends = [f"to {after - 1}" for after in starts[1:]] + ["or more"] * bool(starts)
        axis.set(xticks=range(len(starts)), xticklabels=[f"{a} {b}" for a, b in zip(starts, ends, strict=True)],
                 xlabel=f"pixels from the {whose} border", ylabel="accuracy (95 % interval)")
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(handles=axis.containers, fontsize=8)
    return figure
