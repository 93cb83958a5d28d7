"""Draw a tile, its truth, its prediction, and which pixels of the image decide one pixel of the prediction.

    python -m tools.show_field runs/demo --out field.png
    python -m tools.show_field runs/demo --out field.png --tile s01-0003 --pixel 240 130

The last panel shows the surroundings of the pixel: how strongly its logits depend on each pixel of the image, and the
box of all pixels that the network could use (receptive_field.py measures many pixels). Without --pixel it is one in the
middle of a tumour, or else of the last class that the tile has.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter
from scipy.ndimage import distance_transform_edt

from common import geometry, palette
from common.console import UserError, argument_parser, run
from evaluation import arguments
from evaluation.candidates import Candidate, candidate_of_run
from evaluation.test_set import TestSet, open_test_set
from training.batches import normalise

MARGIN = 8  # pixels that are shown around the box
FAINTEST = 1e-4  # of the largest gradient that is drawn


def choose_tile(test_set: TestSet, key: str | None) -> int:
    """Return the place of the tile of a key; without a key, of the one whose rarest class has the most pixels."""
    if key is None:
        counts = test_set.store.counts(test_set.rows)
        return int(counts.min(axis=1).argmax())
    keys = [tile.key for tile in test_set.tiles]
    if key not in keys:
        raise UserError(f"--tile {key}: no such {test_set.split} tile; the first ones are {', '.join(keys[:5])}")
    return keys.index(key)


def middle_of_class(truth: np.ndarray, classes: int, border: int) -> tuple[int, int]:
    """Return row and column of the pixel farthest from other classes, in the last class that the inner tile has."""
    inner = np.zeros(truth.shape, bool)
    inner[border:truth.shape[0] - border, border:truth.shape[1] - border] = True
    for k in reversed(range(classes)):
        depth = np.where(inner, distance_transform_edt(truth == k), 0)
        if depth.any():
            return tuple(map(int, np.unravel_index(depth.argmax(), depth.shape)))
    raise UserError("no pixel of this tile lies so far inside that its whole field does; choose one by --pixel")


def gradient_map(candidate: Candidate, image: np.ndarray, row: int, column: int) -> tuple[np.ndarray, int, int]:
    """Return the sum of |d logit / d input| over classes and channels (h, w), with the place of its corner.

    The map is that of a cut of the image (H, W, 3) around the pixel, which holds its whole field inside the image.
    """
    multiple, reach = candidate.config.model.multiple, geometry.reach(len(candidate.config.model.widths))
    (top, bottom), (left, right) = (
        (max(0, (place - reach) // multiple * multiple), min(-(-(place + reach + 1) // multiple) * multiple,
                                                             size // multiple * multiple))
        for place, size in zip((row, column), image.shape[:2], strict=True))
    if not (top <= row < bottom and left <= column < right):
        raise UserError(f"--pixel {column} {row} lies too near the border of the tile; choose one further inside")
    cut = torch.from_numpy(image[None, top:bottom, left:right].copy()).to(candidate.device)
    inputs = normalise(cut, candidate.statistics).requires_grad_()                   # (1, 3, h, w)
    logits = candidate.model(inputs)[0, :, row - top, column - left]                 # (K,)
    total = sum(torch.autograd.grad(logit, inputs, retain_graph=True)[0].abs().sum(1)[0] for logit in logits)
    return total.cpu().numpy(), top, left


def draw(image: np.ndarray, truth: np.ndarray, labels: np.ndarray, found: tuple[np.ndarray, int, int], row: int,
         column: int, levels: int, classes: Sequence[str]) -> Figure:
    figure = Figure(figsize=(13, 3.7), dpi=110, layout="constrained")
    axes = figure.subplots(1, 4)
    low, high = geometry.box(levels)
    box = {"xy": (column + low - 0.5, row + low - 0.5), "width": high - low + 1, "height": high - low + 1,
           "fill": False, "linestyle": "--", "linewidth": 1.2}
    strength, top, left = found
    panels = [("image", image), ("truth", palette.colour_mask(truth, len(classes))),
              ("prediction", palette.colour_mask(labels, len(classes))), ("what decides the marked pixel", image)]
    for axis, (title, panel) in zip(axes, panels, strict=True):
        axis.imshow(panel, interpolation="antialiased" if panel is image else "nearest")
        axis.plot(column, row, "+", color="black", markersize=8)
        axis.set(xticks=[], yticks=[], title=title)
    axes[0].add_patch(Rectangle(edgecolor="black", **box))
    axis = axes[3]
    axis.add_patch(Rectangle(edgecolor="black", **box))
    norm = LogNorm(strength.max() * FAINTEST, strength.max())
    shown = np.where(strength > norm.vmin, strength, np.nan)
    drawn = axis.imshow(shown, norm=norm, cmap="inferno", alpha=0.8, interpolation="nearest",
                        extent=(left - 0.5, left + strength.shape[1] - 0.5, top + strength.shape[0] - 0.5, top - 0.5))
    axis.set(xlim=(column + low - MARGIN, column + high + MARGIN), ylim=(row + high + MARGIN, row + low - MARGIN))
    figure.colorbar(drawn, ax=axis, shrink=0.9, format=LogFormatter(), label="|gradient|")
    figure.legend(handles=palette.class_patches(classes), loc="outside lower center", ncols=len(classes), frameon=False)
    return figure


def main() -> None:
    parser = argument_parser(__doc__)
    arguments.add_run_arguments(parser)
    parser.add_argument("--tile", metavar="KEY", help="(default: one with all classes)")
    parser.add_argument("--pixel", type=int, nargs=2, metavar=("X", "Y"), help="(default: one inside tumour)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png, .pdf or .svg file")
    args = parser.parse_intermixed_args()
    runs, overrides = arguments.runs_and_overrides(args)
    if len(runs) != 1:
        raise UserError("name one run: python -m tools.show_field runs/demo --out field.png")
    candidate = candidate_of_run(Path(runs[0]), args.checkpoint, overrides, flips=False, precision=args.precision)
    test_set = open_test_set([candidate], args.split)
    place = choose_tile(test_set, args.tile)
    pixels = test_set.store.tile(test_set.rows[place])
    image, truth = pixels[..., :3], pixels[..., 3]
    classes, levels = candidate.config.data.classes, len(candidate.config.model.widths)
    if args.pixel:
        column, row = args.pixel
        if not (0 <= row < truth.shape[0] and 0 <= column < truth.shape[1]):
            raise UserError(f"--pixel {column} {row} lies outside the tile of {truth.shape[1]} x {truth.shape[0]} px")
    else:
        row, column = middle_of_class(truth, len(classes), geometry.reach(levels))
    labels = candidate.predictor.labels(torch.from_numpy(image.copy()).to(candidate.device))
    figure = draw(image, truth, labels, gradient_map(candidate, image, row, column), row, column, levels, classes)
    palette.save(figure, args.out)
    print(f"tile {test_set.tiles[place].key}, pixel {column} {row} ({classes[labels[row, column]]}): wrote {args.out}")


if __name__ == "__main__":
    run(main)
