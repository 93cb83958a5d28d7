"""Draw the pictures of an evaluation: predictions beside the truth, loss curves, reliability."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torchvision.utils import draw_segmentation_masks

from common.masks import IGNORE
from common.palette import ERROR, IGNORED, SERIES, class_patches, colour_mask, hatch, ignored_patch, rgb


def error_map(image: np.ndarray, target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return the image (H, W, 3) in pale grey, wrong pixels in the error colour and ignored ones hatched, uint8."""
    grey = (128 + image.mean(-1) / 2).astype(np.uint8)
    grey[hatch(target == IGNORE)] = rgb(IGNORED)[0]
    pale = torch.from_numpy(np.stack([grey] * 3))                                    # (3, H, W)
    wrong = torch.from_numpy((target != prediction) & (target != IGNORE))            # (H, W)
    return draw_segmentation_masks(pale, wrong, alpha=1.0, colors=ERROR).movedim(0, -1).numpy()


def overlay(image: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the image (H, W, 3) mixed with the colours of the classes (H, W) except the first one, uint8."""
    mixed = (image * np.uint16(6) + colour_mask(labels, classes) * np.uint16(4)) // 10
    return np.where(labels[..., None] > 0, mixed, image).astype(np.uint8)


def tiles(rows: Sequence[tuple], names: Sequence[str], classes: Sequence[str]) -> Figure:
    """Draw figures 9 to 11: image, truth, and the prediction of each of `names`; the errors too if there is one name.

    A row is (key, why it is shown, image (H, W, 3), target (H, W), [(caption, prediction (H, W)) of each name]).
    """
    titles = ["image", "truth", *([*names, "errors"] if len(names) == 1 else names)]
    heights = [2.6 * target.shape[0] / target.shape[1] + 0.15 for _, _, _, target, _ in rows]  # inches
    figure = Figure(figsize=(2.6 * len(titles), sum(heights) + 0.7), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
    for number, (axes, (key, why, image, target, predictions)) in enumerate(zip(grid, rows, strict=True)):
        panels = [("", image), ("", colour_mask(target, len(classes))),
                  *((caption, colour_mask(prediction, len(classes))) for caption, prediction in predictions)]
        if len(names) == 1:
            panels.append(("", error_map(image, target, predictions[0][1])))
        for axis, title, (caption, panel) in zip(axes, titles, panels, strict=True):
            axis.imshow(panel, interpolation="antialiased" if title in ("image", "errors") else "nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(caption, fontsize=8)
            if number == 0:
                axis.set_title(title, fontsize=11)
        axes[0].set_ylabel(f"{key}\n{why}" if why else key, fontsize=8)
    handles = class_patches(classes)
    if any((target == IGNORE).any() for _, _, _, target, _ in rows):
        handles.append(ignored_patch())
    if len(names) == 1:
        handles.append(Patch(facecolor=ERROR, edgecolor="grey", label="wrong class"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def compared_losses(histories: dict[str, Sequence[dict]]) -> Figure:
    """Draw figures 6 and 8 for all runs: training and validation loss by epoch, raw (thin) and as moving averages.

    Different loss functions have different scales, so only the shapes of their curves can be compared.
    """
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    titles = {"train": "training: EMA (thin: raw)", "val": "validation: EMA (thin: raw, star: best.pt)"}
    for axis, (part, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        lines = []
        for number, (name, history) in enumerate(histories.items()):
            epochs, colour = [row["epoch"] for row in history], SERIES[number % len(SERIES)]
            axis.plot(epochs, [row[f"{part}_loss"] for row in history], color=colour, alpha=0.3, linewidth=1)
            lines += axis.plot(epochs, [row[f"{part}_ema"] for row in history], color=colour, linewidth=2, label=name)
            if part == "val":
                best = min(history, key=lambda row: row["val_loss"])
                axis.plot(best["epoch"], best["val_loss"], "*", color=colour, markeredgecolor="black", markersize=10)
        axis.set(xlabel="epoch", ylabel="loss", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.legend(handles=lines, fontsize=8)  # without handles, matplotlib leaves out names that begin with _
    return figure


def reliability(bins: dict[str, np.ndarray]) -> Figure:
    """Draw accuracy and share of the pixels by confidence, from counts (3, BINS) of metrics.calibration by name."""
    figure = Figure(figsize=(5.5, 6), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    lines = above.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    for number, (name, (pixels, confidence, correct)) in enumerate(bins.items()):
        colour, used = SERIES[number % len(SERIES)], pixels > 0
        error = np.abs(correct - confidence).sum() / pixels.sum()
        lines += above.plot(confidence[used] / pixels[used], correct[used] / pixels[used], "o-", color=colour,
                            markersize=4, label=f"{name}: error {error:.3f}")
        below.stairs(pixels / pixels.sum(), np.linspace(0, 1, len(pixels) + 1), color=colour, linewidth=1.5)
    above.set(ylabel="share of pixels that are right", ylim=(0, 1), xlim=(0, 1), title="Reliability")
    below.set(xlabel="confidence (softmax of the predicted class)", ylabel="share of pixels")
    above.legend(handles=lines, fontsize=8, loc="upper left")
    for axis in (above, below):
        axis.grid(alpha=0.25)
    return figure
