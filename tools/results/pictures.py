"""Draw the pictures of a page: scores, loss curves and predictions of the rows of a comparison."""

import csv
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import palette
from common.config import Config
from common.masks import read_mask
from common.store import open_store
from evaluation import figures
from evaluation.test_set import tiles_of_split

CLOSE = 0.02  # of the mean Dice: the least space beside the points
TILES = 4  # of a picture of predictions


def scores(numbers: dict) -> Figure:
    """Draw the mean Dice of each row with its interval as a line, and that of each seed as a small point."""
    rows = numbers["rows"]
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(rows)), dpi=110, layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        mean, colour = row["scores"]["dice"]["mean"], palette.SERIES[place % len(palette.SERIES)]
        if mean["low"] is not None:
            axis.plot([mean["low"], mean["high"]], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot(mean["value"], place, "o", color=colour, markersize=8)
        seeds = [run["scores"]["dice"]["mean"] for run in row["runs"]]
        if len(seeds) > 1:
            axis.plot(seeds, [place + 0.22] * len(seeds), "|", color=colour, markersize=8, markeredgewidth=1.5)
    axis.axvline(rows[0]["scores"]["dice"]["mean"]["value"], color="grey", linestyle=":", linewidth=1)
    axis.set(yticks=range(len(rows)), yticklabels=[row["row"] for row in rows], ylim=(len(rows) - 0.5, -0.5),
             xlabel="mean Dice, 95 % interval" + ("; short lines: each seed" if len(numbers["seeds"]) > 1 else ""))
    low, high = axis.get_xlim()
    axis.set_xlim(max(0, low - CLOSE), min(1, high + CLOSE))
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def curves(histories: Mapping[str, Sequence[Sequence[dict]]]) -> Figure:
    """Draw figures 6 and 8: training and validation loss of the runs of each row by epoch, a panel for each row."""
    columns = min(3, len(histories))
    lines = -(-len(histories) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * lines + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(histories):]:
        axis.set_axis_off()
    for axis, (row, runs) in zip(axes, histories.items(), strict=False):
        for history in runs:
            epochs = [epoch["epoch"] for epoch in history]
            for part, colour in (("train", palette.TRAIN), ("val", palette.VALIDATION)):
                axis.plot(epochs, [epoch[f"{part}_loss"] for epoch in history], color=colour, linewidth=1.2, alpha=0.8)
            for before, after in pairwise(history):
                if after["lr"] < before["lr"]:
                    axis.axvline(after["epoch"], color="grey", linestyle=":", linewidth=0.8)
        axis.set_title(row, fontsize=10)
        axis.set_xlabel("epoch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    handles = [axes[0].plot([], [], color=colour, label=label)[0]
               for colour, label in ((palette.TRAIN, "training loss"), (palette.VALIDATION, "validation loss"))]
    handles.append(axes[0].plot([], [], color="grey", linestyle=":", label="the learning rate falls")[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def predictions(config: Config, split: str, scores_of_tiles: Path, labels: Mapping[str, Path]) -> Figure:
    """Draw figures 7 and 9 to 11 for one run of each row; `labels` are the rows' folders of label images.

    Shows tiles from low to high accuracy: the mean over all candidates in the tiles.csv of an evaluation.
    """
    with scores_of_tiles.open(newline="", encoding="utf-8") as file:
        accuracy: dict[str, list[float]] = {}
        for line in csv.DictReader(file):
            accuracy.setdefault(line["key"], []).append(float(line["pixel_accuracy"]))
    ranked = sorted(accuracy, key=lambda key: np.mean(accuracy[key]))
    chosen = [ranked[int((i + 0.5) * len(ranked) / TILES)] for i in range(min(TILES, len(ranked)))]
    tiles, _ = tiles_of_split(config, split)
    store = open_store([tile.pair for tile in tiles], config.data)
    places = {tile.key: place for place, tile in enumerate(tiles)}
    rows = []
    for key in chosen:
        pixels = store.tile(places[key])
        found = [read_mask(folder / f"{key}.png", config.data) for folder in labels.values()]
        captions = [f"accuracy {np.mean(label == pixels[..., 3]):.3f}" for label in found]
        rows.append((key, "", pixels[..., :3], pixels[..., 3], list(zip(captions, found, strict=True))))
    return figures.tiles(rows, list(labels), config.data.classes)
