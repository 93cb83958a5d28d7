"""How good a segmentation is: counts for each tile first (`Tally`), every score from the counts.

    pooled      over the pixels of all tiles together        counts add up, then one score
    tile_...    mean over tiles                              a score for each tile, then the mean of those that exist
    surface     the pixels of a class with a neighbour (up, down, left, right) outside it; the tile's border is outside

The absent-class rule: a class that is neither in the truth nor in the prediction of a tile has no score there (NaN,
left out of means). A class that is missed or invented has the worst score: 0, or as a distance the tile's diagonal.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

BINS = 15  # of confidence
SURFACE_SCORES = ("hausdorff", "hd95", "surface_dice")


@dataclass(frozen=True)
class Tally:
    """What one model did on N tiles, tile by tile; the last two only where more than labels is known."""

    confusion: np.ndarray  # (N, K, K) int64
    surfaces: np.ndarray  # (N, K, 3) the `SURFACE_SCORES`
    soft_dice: np.ndarray | None = None  # (N,)
    calibration: np.ndarray | None = None  # (N, 3, BINS)

    @property
    def dice(self) -> np.ndarray:
        """(N,) mean hard Dice over the classes that a tile's truth or prediction has."""
        return mean_present(dice(self.confusion))


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """Pixels (B, K, K) int64 of class [truth, prediction]; both (B, H, W) hold class indices."""
    tile = torch.arange(len(target), device=target.device)[:, None, None]
    pairs = (tile * classes + target) * classes + prediction                         # (B, H, W)
    return torch.bincount(pairs.flatten(), minlength=len(target) * classes**2).reshape(-1, classes, classes)


def calibration(logits: Tensor, target: Tensor) -> Tensor:
    """Pixels, summed confidence and right pixels (B, 3, BINS) float64 on the CPU, by confidence in equal bins.

    Confidence is the softmax of the predicted class. It is summed in units of 2^-24, float32's own between 0.5 and 1:
    whole numbers have the same sum in any order and on any device.
    """
    confidence, prediction = torch.softmax(logits.float(), dim=1).max(dim=1)         # (B, H, W)
    tile = torch.arange(len(target), device=target.device)[:, None, None]
    place = (tile * BINS + (confidence * BINS).long().clamp(max=BINS - 1)).flatten()
    values = torch.stack([torch.ones_like(place), (confidence * 2**24).long().flatten(),
                          (prediction == target).long().flatten()])                  # (3, B H W)
    sums = torch.zeros(3, len(target) * BINS, dtype=torch.long, device=target.device)
    sums.scatter_add_(1, place.expand(3, -1), values)
    sums = sums.reshape(3, -1, BINS).movedim(1, 0).cpu().double()                    # (B, 3, BINS)
    return sums * torch.tensor([1, 2**-24, 1], dtype=torch.double)[:, None]


def surfaces(prediction: np.ndarray, target: np.ndarray, classes: int, tolerance: float) -> np.ndarray:
    """Hausdorff distance, HD95 (px) and surface Dice at `tolerance` px of each class, (K, 3), for one tile (H, W).

    HD95 is the larger of the two directions' 95th percentiles. Surface Dice is the share of both surfaces that lies
    within the tolerance of the other one (Nikolov et al. 2018, on pixels).
    """
    scores = np.full((classes, 3), np.nan)
    for k in range(classes):
        masks = [np.pad(labels == k, 1) for labels in (target, prediction)]
        present = [mask.any() for mask in masks]
        if all(present):
            there, back = _surface_distances(*masks)
            percentile = max(np.percentile(there, 95), np.percentile(back, 95))
            near = (there <= tolerance).sum() + (back <= tolerance).sum()
            scores[k] = max(there.max(), back.max()), percentile, near / (len(there) + len(back))
        elif any(present):
            scores[k] = *[math.hypot(*target.shape)] * 2, 0
    return scores


def _surface_distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each surface pixel of the mask `a` to the surface of `b`, and back; both masks have a margin."""
    edges = [_surface(mask) for mask in (a, b)]
    rows, columns = (np.flatnonzero((edges[0] | edges[1]).any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    edges = [edge[box] for edge in edges]
    return distance_transform_edt(~edges[1])[edges[0]], distance_transform_edt(~edges[0])[edges[1]]


def _surface(mask: np.ndarray) -> np.ndarray:
    surface = mask.copy()
    surface[1:-1, 1:-1] &= ~(mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:])
    return surface


def dice(counts: np.ndarray) -> np.ndarray:
    """Hard Dice of each class (..., K), equation 5: 2 |A and B| / (|A| + |B|)."""
    both, truth, predicted = _pixels(counts)
    return _ratio(2 * both, truth + predicted)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class (..., K)."""
    both, truth, predicted = _pixels(counts)
    return _ratio(both, truth + predicted - both)


def precision(counts: np.ndarray) -> np.ndarray:
    """Share of the pixels predicted as a class that are right (..., K); 0 for a class that is missed altogether."""
    both, truth, predicted = _pixels(counts)
    return np.where(truth > 0, np.nan_to_num(_ratio(both, predicted)), _ratio(both, predicted))


def recall(counts: np.ndarray) -> np.ndarray:
    """Share of a class's pixels that are found (..., K); 0 for a class that is only predicted."""
    return precision(np.swapaxes(counts, -2, -1))


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of the pixels with the right class (...), equation 8."""
    return _ratio(np.diagonal(counts, axis1=-2, axis2=-1).sum(-1), counts.sum((-2, -1)))


def calibration_error(bins: np.ndarray) -> np.ndarray:
    """Expected calibration error (...) of calibration counts (..., 3, BINS): Guo et al. 2017, 15 equal bins."""
    pixels, confidence, right = np.moveaxis(bins, -2, 0)                             # (..., BINS) each
    return _ratio(np.abs(right - confidence).sum(-1), pixels.sum(-1))


def mean_present(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean over those scores that exist; NaN where none does."""
    present = ~np.isnan(scores)
    return _ratio(np.where(present, scores, 0).sum(axis), present.sum(axis))


def best_constant(counts: np.ndarray) -> tuple[int, float]:
    """The class that, predicted everywhere, has the highest mean Dice, and that mean: what any model must beat."""
    pixels = counts.sum(1)
    means = []
    for k in range(len(pixels)):
        constant = np.zeros_like(counts)
        constant[:, k] = pixels
        means.append(float(mean_present(dice(constant))))
    return int(np.argmax(means)), max(means)


def _pixels(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each class in both, in the truth, in the prediction."""
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / np.asarray(denominator, float), np.nan)


BY_CLASS = {"dice": dice, "iou": iou, "precision": precision, "recall": recall}


def tile_scores(tally: Tally) -> dict[str, np.ndarray]:
    """Every score of every tile: (N,), or (N, K) for those that each class has."""
    scores = {"soft_dice": tally.soft_dice, "pixel_accuracy": pixel_accuracy(tally.confusion),
              "ece": None if tally.calibration is None else calibration_error(tally.calibration)}
    scores |= {name: score(tally.confusion) for name, score in BY_CLASS.items()}
    scores |= {name: tally.surfaces[..., i] for i, name in enumerate(SURFACE_SCORES)}
    return {name: values for name, values in scores.items() if values is not None}


def scores(tally: Tally, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every score over all tiles, for each row of weights (R, N): (R,), or (R, K + 1) with the classes' mean last.

    soft_dice and pixel_accuracy are means over tiles; dice, iou, precision, recall and ece are pooled over pixels;
    tile_dice and so on are means over the tiles whose truth or prediction has the class. The mean over classes is
    always one over the classes that the tiles as they are have: a sample of tiles that lacks one of them has no mean.
    """
    def mean_over_tiles(values: np.ndarray) -> np.ndarray:                           # (N, ...) to (R, ...)
        present = ~np.isnan(values)
        return _ratio(weights @ np.where(present, values, 0), weights @ present)

    def mean_of_classes(values: np.ndarray) -> np.ndarray:                           # (R, K) to (R,)
        there = ~np.isnan(values[0])
        return values[:, there].mean(1) if there.any() else np.full(len(values), np.nan)

    def pooled(counts: np.ndarray) -> np.ndarray:                                    # (N, ...) to (R, ...)
        return (weights @ counts.reshape(len(counts), -1)).reshape(-1, *counts.shape[1:])

    by_tile = tile_scores(tally)
    found = {name: mean_over_tiles(by_tile[name]) for name in ("soft_dice", "pixel_accuracy") if name in by_tile}
    if tally.calibration is not None:
        found["ece"] = calibration_error(pooled(tally.calibration))
    counts = pooled(tally.confusion)
    found |= {name: score(counts) for name, score in BY_CLASS.items()}
    found |= {f"tile_{name}": mean_over_tiles(by_tile[name]) for name in (*BY_CLASS, *SURFACE_SCORES)}
    return {name: values if values.ndim == 1 else np.column_stack([values, mean_of_classes(values)])
            for name, values in found.items()}
