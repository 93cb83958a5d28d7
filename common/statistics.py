"""Count the labelled pixels of tiles, and compute from the counts what training learns about its tiles."""

import math
from dataclasses import asdict, dataclass

import numpy as np

from common.masks import IGNORE


@dataclass(frozen=True)
class Statistics:
    """What training learns about the labelled pixels of its tiles before it starts. Part of each checkpoint."""

    mean: list[float]  # of red, green, blue, in [0, 1]
    std: list[float]
    frequencies: list[float]  # share of the pixels of each class (section 6.1.1)

    def equals(self, other: "Statistics") -> bool:
        """Return whether both come from the same tiles; another processor may round the last bit differently."""
        return all(np.allclose(ours, theirs, rtol=1e-9, atol=0) for ours, theirs in
                   zip(asdict(self).values(), asdict(other).values(), strict=True))


def sums_of(image: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return (6 + K,) int64 of an image (H, W, 3) and its classes (H, W): a row of `Store.sums`."""
    values, counts = image.reshape(-1, 3), np.bincount(labels.ravel(), minlength=classes)
    if counts[classes:].any():
        values = values[labels.ravel() != IGNORE]
    values = values.astype(np.uint32)
    return np.concatenate([values.sum(0, np.int64), (values * values).sum(0, np.int64), counts[:classes]])


def statistics_of(sums: np.ndarray) -> Statistics:
    """Return the statistics of the tiles whose rows of `Store.sums` (n, 6 + K) are given."""
    total = [int(number) for number in sums.sum(axis=0)]  # Python's integers are exact
    values, squares, counts = total[:3], total[3:6], total[6:]
    pixels = sum(counts)
    variances = [(pixels * square - value**2) / (255 * pixels)**2 for value, square in
                 zip(values, squares, strict=True)]
    return Statistics([value / (255 * pixels) for value in values],
                      [math.sqrt(max(variance, 1e-12)) for variance in variances],
                      [count / pixels for count in counts])
