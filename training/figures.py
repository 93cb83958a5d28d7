"""Draw the loss curves of a run (figures 6 and 8 of the report), and predictions while it trains."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from common.masks import IGNORE
from common.palette import FOLD, TRAIN, VALIDATION, class_patches, colour_mask, ignored_patch

LONGEST_KEY = 24  # characters above a tile


def losses(history: Sequence[dict], folds: int, title: str) -> Figure:
    """Draw training and validation loss of each epoch, raw and as EMA; dots are the validation losses of all folds.

    `folds` is the number of models of an epoch; one is plain training.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for fold in range(folds) if folds > 1 else ():
        axes.plot(epochs, [row[f"val_loss_{fold}"] for row in history], ".", color=FOLD, alpha=0.45, markersize=4,
                  label="validation, each fold" if fold == 0 else None)
    validation = "validation of the survivor" if folds > 1 else "validation"
    for name, colour, label in (("train", TRAIN, "training"), ("val", VALIDATION, validation)):
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


def predictions(keys: Sequence[str], images: np.ndarray, truth: np.ndarray, predicted: np.ndarray,
                classes: Sequence[str], title: str) -> Figure:
    """Draw images (N, H, W, 3), their truth (N, H, W) and prediction (N, H, W), uint8; a tile in each column."""
    figure = Figure(figsize=(0.6 + 1.9 * len(keys), 6.6), dpi=100, layout="constrained")
    grid = figure.subplots(3, len(keys), squeeze=False)
    for i, key in enumerate(keys):
        panels = images[i], colour_mask(truth[i], len(classes)), colour_mask(predicted[i], len(classes))
        for axis, panel, name in zip(grid[:, i], panels, ("image", "truth", "prediction"), strict=True):
            axis.imshow(panel, interpolation="antialiased" if name == "image" else "nearest")
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_ylabel(name, fontsize=10)
        grid[0, i].set_title(key if len(key) <= LONGEST_KEY else f"…{key[-LONGEST_KEY:]}", fontsize=8)
    figure.suptitle(title, fontsize=11)
    handles = [*class_patches(classes), *([ignored_patch()] if (truth == IGNORE).any() else [])]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return figure
