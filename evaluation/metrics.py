"""Score segmentations: count pixels for each tile (`Tally`), and compute every score from the counts.

    pooled      the counts of all tiles are added, then scored
    tile_...    each tile is scored, then the mean over tiles is taken
    surface     the pixels of a class that have a pixel of another class above, below, left or right, or touch the
                tile's border

Pixels without a class (data.ignore) are left out of every count. A class is absent from a tile if neither truth nor
prediction has it; its score is then NaN, and means leave it out. A class is missed if only the truth has it, and
falsely predicted if only the prediction has it; it then has the worst score, which is 0, or for a distance the tile's
diagonal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import Tensor

from common.masks import IGNORE

BINS = 15  # of confidence
SURFACE_SCORES = ("hausdorff", "hd95", "surface_dice")


@dataclass(frozen=True)
class Tally:
    """The counts of one candidate on N tiles. Label images have no logits, so the last two are None for them."""

    confusion: np.ndarray  # (N, K, K) int64, pixels of class [truth, prediction]
    surfaces: np.ndarray  # (N, K, 3) the `SURFACE_SCORES`
    soft_dice: np.ndarray | None = None  # (N,)
    calibration: np.ndarray | None = None  # (N, 3, BINS)


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """Count the pixels (B, K, K) int64 of class [truth, prediction]; both (B, H, W) hold class indices."""
    tile = torch.arange(len(target), device=target.device)[:, None, None]
    pairs, bins = (tile * classes + target) * classes + prediction, len(target) * classes**2  # (B, H, W)
    pairs = pairs.masked_fill(target == IGNORE, bins)  # one more bin
    return torch.bincount(pairs.flatten(), minlength=bins + 1)[:bins].reshape(-1, classes, classes)


def calibration(logits: Tensor, target: Tensor) -> Tensor:
    """Return (B, 3, BINS) float64 on the CPU: pixels, summed confidence and correct pixels in bins of confidence.

    Confidence is the softmax of the predicted class. It is summed as an integer in units of 2^-24, the precision of
    float32 between 0.5 and 1: sums of integers do not depend on their order, which differs between devices.
    """
    confidence, prediction = torch.softmax(logits.float(), dim=1).max(dim=1)         # (B, H, W)
    tile = torch.arange(len(target), device=target.device)[:, None, None]
    place = tile * BINS + (confidence * BINS).long().clamp(max=BINS - 1)             # (B, H, W)
    place = place.masked_fill(target == IGNORE, len(target) * BINS).flatten()  # one more bin
    values = torch.stack([torch.ones_like(place), (confidence * 2**24).long().flatten(),
                          (prediction == target).long().flatten()])                  # (3, B H W)
    sums = torch.zeros(3, len(target) * BINS + 1, dtype=torch.long, device=target.device)
    sums.scatter_add_(1, place.expand(3, -1), values)
    sums = sums[:, :-1].reshape(3, -1, BINS).movedim(1, 0).cpu().double()                    # (B, 3, BINS)
    return sums * torch.tensor([1, 2**-24, 1], dtype=torch.double)[:, None]


def surfaces(prediction: np.ndarray, target: np.ndarray, classes: int, tolerance: float) -> np.ndarray:
    """Return Hausdorff distance, HD95 (pixels) and surface Dice of each class, (K, 3), for one tile (H, W).

    HD95 is the larger of the two directions' 95th percentiles. Surface Dice is the share of both surfaces that lies
    within `tolerance` pixels of the other surface (Nikolov et al. 2018, on pixels). Ignored pixels have no surface, and
    none lies against them. A class that both have, but one of them without a surface, has no score.
    """
    scores = np.full((classes, 3), np.nan)
    ignored = target == IGNORE
    ignored = ignored if ignored.any() else None
    for k in range(classes):
        masks = [labels == k if ignored is None else (labels == k) & ~ignored for labels in (target, prediction)]
        present = [mask.any() for mask in masks]
        if all(present):
            edges = [_surface(mask, ignored) for mask in masks]
            if not all(edge.any() for edge in edges):
                continue
            there, back = _surface_distances(*edges)
            percentile = max(np.percentile(there, 95), np.percentile(back, 95))
            near = (there <= tolerance).sum() + (back <= tolerance).sum()
            scores[k] = max(there.max(), back.max()), percentile, near / (len(there) + len(back))
        elif any(present):
            diagonal = math.hypot(*target.shape)
            scores[k] = diagonal, diagonal, 0
    return scores


def _surface(mask: np.ndarray, ignored: np.ndarray | None) -> np.ndarray:
    """Return the surface pixels (H, W) of a mask (H, W), which has no ignored pixels."""
    return mask & ~binary_erosion(mask if ignored is None else mask | ignored)


def _surface_distances(*edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances from each pixel of the first of two surfaces (H, W) to the second one, and back."""
    rows, columns = (np.flatnonzero((edges[0] | edges[1]).any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    edges = [edge[box] for edge in edges]
    return distance_transform_edt(~edges[1])[edges[0]], distance_transform_edt(~edges[0])[edges[1]]


def dice(counts: np.ndarray) -> np.ndarray:
    """Return the hard Dice of each class (..., K), equation 5: 2 |A and B| / (|A| + |B|)."""
    both, truth, predicted = _pixels(counts)
    return _ratio(2 * both, truth + predicted)


def iou(counts: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class (..., K)."""
    both, truth, predicted = _pixels(counts)
    return _ratio(both, truth + predicted - both)


def precision(counts: np.ndarray) -> np.ndarray:
    """Return the correct share of the pixels predicted as each class (..., K); 0 for a class that is missed."""
    both, truth, predicted = _pixels(counts)
    return np.where(truth > 0, np.nan_to_num(_ratio(both, predicted)), _ratio(both, predicted))


def recall(counts: np.ndarray) -> np.ndarray:
    """Return the share of each class's pixels that is found (..., K); 0 for a class that is falsely predicted."""
    return precision(np.swapaxes(counts, -2, -1))


BY_CLASS = {"dice": dice, "iou": iou, "precision": precision, "recall": recall}


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the share of the pixels with the right class (...), equation 8."""
    return _ratio(np.diagonal(counts, axis1=-2, axis2=-1).sum(-1), counts.sum((-2, -1)))


def calibration_error(bins: np.ndarray) -> np.ndarray:
    """Return the expected calibration error (...) of calibration counts (..., 3, BINS) (Guo et al. 2017)."""
    pixels, confidence, correct = np.moveaxis(bins, -2, 0)                           # (..., BINS) each
    return _ratio(np.abs(correct - confidence).sum(-1), pixels.sum(-1))


def mean_present(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean over the scores that are not NaN; NaN if all are."""
    present = ~np.isnan(scores)
    return _ratio(np.where(present, scores, 0).sum(axis), present.sum(axis))


def best_constant(counts: np.ndarray) -> tuple[int, float]:
    """Return the class with the highest mean Dice if it is predicted everywhere, and that Dice; `counts` is (K, K)."""
    pixels = counts.sum(1)
    dices = 2 * pixels / (pixels.sum() + pixels)  # of each class, if it is predicted everywhere; all others have 0
    return int(np.argmax(dices)), float(dices.max() / np.count_nonzero(pixels))


def _pixels(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pixels of each class in both, in the truth, and in the prediction."""
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / np.asarray(denominator, float), np.nan)


def tile_scores(tally: Tally) -> dict[str, np.ndarray]:
    """Return every score of every tile: (N,), or (N, K) for a score of each class."""
    scores = {"pixel_accuracy": pixel_accuracy(tally.confusion)}
    if tally.soft_dice is not None:
        scores = {"soft_dice": tally.soft_dice, **scores, "ece": calibration_error(tally.calibration)}
    scores |= {name: score(tally.confusion) for name, score in BY_CLASS.items()}
    return scores | {name: tally.surfaces[..., i] for i, name in enumerate(SURFACE_SCORES)}


def scores(tally: Tally, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return every score over all tiles for each row of `weights` (R, N): (R,), or (R, K + 1) with the mean last.

    soft_dice and pixel_accuracy are means over tiles. dice, iou, precision, recall and ece are pooled over pixels.
    tile_dice and so on are means over the tiles whose truth or prediction has the class.
    """
    by_tile = tile_scores(tally)
    found = {name: _mean_over_tiles(by_tile[name], weights) for name in ("soft_dice", "pixel_accuracy")
             if name in by_tile}
    if tally.calibration is not None:
        found["ece"] = calibration_error(_pooled(tally.calibration, weights))
    counts = _pooled(tally.confusion, weights)
    by_class = {name: score(counts) for name, score in BY_CLASS.items()}
    by_class |= {f"tile_{name}": _mean_over_tiles(by_tile[name], weights) for name in (*BY_CLASS, *SURFACE_SCORES)}
    return found | {name: np.column_stack([values, _mean_over_classes(values)]) for name, values in by_class.items()}


def merged(counts: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Return the counts (..., 2, 2) of some classes taken together, second, against the rest, from (..., K, K)."""
    sides = np.zeros((2, counts.shape[-1]), counts.dtype)
    sides[1, classes] = 1
    sides[0] = 1 - sides[1]
    return sides @ counts @ sides.T


def binary_scores(counts: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return Dice and IoU of the second of two classes (R,), pooled and as means over tiles; counts are (N, 2, 2)."""
    pooled, scores = _pooled(counts, weights), {"dice": dice, "iou": iou}
    return ({name: score(pooled)[:, 1] for name, score in scores.items()}
            | {f"tile_{name}": _mean_over_tiles(score(counts)[:, 1], weights) for name, score in scores.items()})


def _pooled(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:                  # (N, ...) to (R, ...)
    return (weights @ counts.reshape(len(counts), -1)).reshape(-1, *counts.shape[1:])


def _mean_over_tiles(values: np.ndarray, weights: np.ndarray) -> np.ndarray:         # (N, ...) to (R, ...)
    present = ~np.isnan(values)
    return _ratio(weights @ np.where(present, values, 0), weights @ present)


def _mean_over_classes(values: np.ndarray) -> np.ndarray:                            # (R, K) to (R,)
    """Average over the classes that have a score in row 0, all tiles; NaN for a sample that lacks one of them."""
    present = ~np.isnan(values[0])
    return values[:, present].mean(1) if present.any() else np.full(len(values), np.nan)
