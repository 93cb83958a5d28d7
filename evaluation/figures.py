"""Pictures of an evaluation: predictions beside the truth, loss curves, reliability."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.palette import ERROR, SERIES, class_colours, class_patches, colour_mask


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
            epochs, colour = [row["epoch"] for row in history], SERIES[number % len(SERIES)]
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
        colour, some = SERIES[number % len(SERIES)], pixels > 0
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
