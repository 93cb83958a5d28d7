"""Draw the loss curves of a run (figures 6 and 8 of the report)."""

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.figure import Figure

from common.palette import FOLD, TRAIN, VALIDATION


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
