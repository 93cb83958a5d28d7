"""How good a segmentation is: counts first, scores from counts.

    confusion   (K, K) int64, rows = truth, columns = prediction; confusions add up over tiles (pooled scores)

The absent-class rule: a class that is neither in the truth nor in the prediction has no score (NaN, left out of means);
a class that is predicted but absent, or present but missed, scores 0.
"""

import numpy as np


def confusion(prediction: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """Counts (K, K) of the pixels of class [truth, prediction]; both arrays hold class indices and have one shape."""
    pairs = target.astype(np.int64).ravel() * classes + prediction.ravel()
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def dice(counts: np.ndarray) -> np.ndarray:
    """Hard Dice of each class (..., K), equation 5: 2 |A and B| / (|A| + |B|)."""
    overlap, total = _overlap_and_total(counts)
    return _ratio(2 * overlap, total)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class (..., K)."""
    overlap, total = _overlap_and_total(counts)
    return _ratio(overlap, total - overlap)


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of the pixels with the right class (...), equation 8."""
    return _ratio(np.diagonal(counts, axis1=-2, axis2=-1).sum(-1), counts.sum((-2, -1)))


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


def _overlap_and_total(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1) + counts.sum(-2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / np.asarray(denominator, float), np.nan)
