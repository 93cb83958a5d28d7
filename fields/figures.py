"""Pictures of receptive fields: maps, profiles, paths and borders."""

from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle
from matplotlib.ticker import LogFormatter, PercentFormatter, ScalarFormatter

from common.console import percent
from common.palette import SERIES

RADII = ("#56b4e9", "#009e73", "#ffffff")  # circles on a map


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
            colour, radius = SERIES[number % len(SERIES)], len(trained) // 2
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
    colours = [SERIES[number % len(SERIES)] for number, (_, rows) in enumerate(runs) for _ in rows]
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
                          color=SERIES[number % len(SERIES)], label=name)
        ends = [f"to {after - 1}" for after in starts[1:]] + ["or more"] * bool(starts)
        axis.set(xticks=range(len(starts)), xticklabels=[f"{a} {b}" for a, b in zip(starts, ends, strict=True)],
                 xlabel=f"pixels from the {whose} border", ylabel="accuracy (95 % interval)")
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(handles=axis.containers, fontsize=8)
    return figure
