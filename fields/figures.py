"""Draw receptive fields: maps, profiles through the maps, shares of the paths, accuracy near borders."""

from collections.abc import Sequence
from itertools import pairwise, zip_longest

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle
from matplotlib.ticker import LogFormatter, PercentFormatter, ScalarFormatter

from common import geometry
from common.console import percent
from common.palette import SERIES
from fields import theory
from fields.gradients import NOISE, TRAINED, UNTRAINED, ZEROS, Condition
from fields.numbers import ENERGIES, MeasuredRun, fit_gaussian, gaussian

CIRCLES = ("#56b4e9", "#009e73", "#ffffff")  # on a map, one for each of `ENERGIES`
SHARE_OF_GRADIENT = "share of the mean |gradient|"


def shares(run: MeasuredRun, condition: Condition, inside: int | None = None) -> np.ndarray:
    """Return the map (D, D) with sum 1, since models have logits of different scales; a map of zeros stays."""
    strength = run.fields[condition].map(inside, None)
    return strength / (strength.sum() or 1)


def fields(runs: Sequence[MeasuredRun], radii: Sequence[Sequence[float]]) -> Figure:
    """Draw figure 12 on one scale: above the centre of each map, linear; below the whole map, logarithmic.

    `radii` are those of each run, one for each of `ENERGIES`.
    """
    figure = Figure(figsize=(3.3 * len(runs) + 1.9, 7.6), dpi=120, layout="constrained")
    grid = figure.subplots(2, len(runs), squeeze=False)
    maps = [shares(run, TRAINED) for run in runs]
    centre, widest = max(8, *(1.4 * max(distances) for distances in radii)), max(map(len, maps)) / 2 + 3
    scales = [("linear", centre, Normalize(0, max(strength.max() for strength in maps) or 1), ScalarFormatter()),
              ("logarithmic", widest, _log_norm(maps), LogFormatter())]
    for axes, (scale, radius, norm, ticks) in zip(grid, scales, strict=True):
        for axis, run, strength, distances in zip(axes, runs, maps, radii, strict=True):
            image = _draw_map(axis, strength, norm)
            low, high = geometry.box(run.levels)
            axis.add_patch(Rectangle((low - 0.5, low - 0.5), high - low + 1, high - low + 1, fill=False, color="white",
                                     linestyle="--", linewidth=1))
            for distance, colour, width in zip(distances, CIRCLES, (1.2, 2.6, 1.2), strict=True):  # r90 may equal r95
                axis.add_patch(Circle((0, 0), distance, fill=False, color=colour, linewidth=width))
            axis.set(xlim=(-radius, radius), ylim=(radius, -radius))
            if scale == "linear":
                values = ", ".join(f"{name} {value:g}" for name, value in zip(ENERGIES, distances, strict=True))
                exact = f"{run.levels} levels: {theory.sizes(run.levels)} px"
                axis.set_title(f"{run.name}\n{exact}\n{values} px", fontsize=9)
        axes[0].set_ylabel("pixels from the output pixel", fontsize=8)
        figure.colorbar(image, ax=axes, label=f"{SHARE_OF_GRADIENT}, {scale}", format=ticks, shrink=0.85)
    handles = [Line2D([], [], color="white", linestyle="--", label="theory, over all alignments")]
    handles += [Line2D([], [], color=colour, label=f"{100 * share:g} % of the energy")
                for share, colour in zip(ENERGIES.values(), CIRCLES, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * len(runs)), fontsize=8,
                  facecolor="#333333", labelcolor="white")
    return figure


def _draw_map(axis: Axes, strength: np.ndarray, norm: Normalize) -> AxesImage:
    """Draw a map with the output pixel at (0, 0), black where it is zero."""
    radius = len(strength) // 2
    axis.set_facecolor("black")
    axis.tick_params(labelsize=7)
    return axis.imshow(np.where(strength > 0, strength, np.nan), norm=norm, cmap="inferno", interpolation="nearest",
                       extent=(-radius - 0.5, radius + 0.5, radius + 0.5, -radius - 0.5))


def _log_norm(strengths: Sequence[np.ndarray]) -> LogNorm:
    """Return one scale for all maps: from the strongest pixel down six powers of ten."""
    highest = max(strength.max() for strength in strengths) or 1
    return LogNorm(highest * 1e-6, highest, clip=True)


def profiles(runs: Sequence[MeasuredRun]) -> Figure:
    """Draw the maps along both axes through the output pixel, before and after training, with the Gaussian fit."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    for axis, direction in zip(figure.subplots(1, 2, sharey=True), ("across", "down"), strict=True):
        lines, highest = [], 0
        for number, run in enumerate(runs):
            maps = shares(run, TRAINED), shares(run, UNTRAINED)
            colour, radius = SERIES[number % len(SERIES)], len(maps[0]) // 2
            steps = np.arange(-radius, radius + 1)
            trained, untrained = (strength[radius] if direction == "across" else strength[:, radius]
                                  for strength in maps)
            lines += axis.plot(steps, np.where(trained > 0, trained, np.nan), color=colour, linewidth=1.6,
                               label=run.name)
            axis.plot(steps, np.where(untrained > 0, untrained, np.nan), color=colour, linewidth=0.8, alpha=0.6)
            highest = max(highest, trained.max(), untrained.max())
            height, sigma, *_ = fit_gaussian(maps[0])
            axis.plot(steps, gaussian(np.abs(steps), height, sigma), color=colour, linestyle="--", linewidth=1)
            low, high = geometry.box(run.levels)
            for end in (low - 0.5, high + 0.5):
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


def inputs(runs: Sequence[MeasuredRun]) -> Figure:
    """Draw the maps of each run inside each class and on each input, on one logarithmic scale."""
    maps = []
    for run in runs:
        row = [(condition.input if inside is None else run.class_names[inside], shares(run, condition, inside))
               for condition in (TRAINED, ZEROS, NOISE) for inside in run.classes_measured(condition)]
        maps.append([*row, ("before training", shares(run, UNTRAINED))])
    columns = max(map(len, maps))
    figure = Figure(figsize=(1.75 * columns + 1.2, 1.95 * len(runs) + 0.3), dpi=120, layout="constrained")
    grid = figure.subplots(len(runs), columns, squeeze=False)
    norm = _log_norm([strength for row in maps for _, strength in row])
    for axes, run, row in zip(grid, runs, maps, strict=True):
        for axis, (title, strength) in zip_longest(axes, row, fillvalue=("", None)):
            if strength is None:
                axis.axis("off")
                continue
            image = _draw_map(axis, strength, norm)
            axis.set_title(title, fontsize=8)
        axes[0].set_ylabel(run.name, fontsize=9)
    colours = figure.colorbar(image, ax=grid, format=LogFormatter(), fraction=0.03, pad=0.01)
    colours.set_label(SHARE_OF_GRADIENT, fontsize=8)
    colours.ax.tick_params(labelsize=7)
    return figure


def path_shares(runs: Sequence[tuple[str, Sequence[dict]]]) -> Figure:
    """Draw two shares of each path as bars; for each run its name and its rows of paths.csv."""
    figure = Figure(figsize=(11, 1.6 + 0.28 * sum(len(rows) for _, rows in runs)), dpi=110, layout="constrained")
    columns = {"gradient_x_activation": "share of |gradient x activation|",
               "energy_alone": "energy of its gradient as a share of the whole"}
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
    figure.axes[0].invert_yaxis()  # of both, since they share it
    return figure


def border_accuracy(runs: dict[str, dict]) -> Figure:
    """Draw accuracy by distance to the border, and what crops alone lose; `runs` holds "border" of fields.json."""
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    panels = [("tile", "accuracy, on other tissue at each distance",
               {name: border["by_distance"] for name, border in runs.items()}),
              ("crop", "equal pixels: crop alone minus whole tile",
               {name: border["crop"]["difference_by_distance"] for name, border in runs.items() if "crop" in border})]
    for axis, (area, title, by_distance) in zip(figure.subplots(1, 2), panels, strict=True):
        starts = sorted({band["from_px"] for bands in by_distance.values() for band in bands})
        for number, (name, bands) in enumerate(by_distance.items()):
            places = [starts.index(band["from_px"]) + 0.06 * (number - (len(runs) - 1) / 2) for band in bands]
            values = np.array([[band["value"], band["low"], band["high"]] for band in bands])
            errors = np.nan_to_num(np.abs(values[:, 1:] - values[:, :1]).T)          # (2, bands) down and up
            axis.errorbar(places, values[:, 0], errors, marker="o", markersize=4, capsize=3, linewidth=1.2,
                          color=SERIES[number % len(SERIES)], label=name)
        labels = [f"{start} to {after - 1}" for start, after in pairwise(starts)]
        labels += [f"{start} or more" for start in starts[-1:]]
        axis.set(xticks=range(len(starts)), xticklabels=labels, xlabel=f"pixels from the border of the {area}",
                 ylabel="accuracy (95 % interval)")
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(handles=axis.containers, fontsize=8)
    return figure
