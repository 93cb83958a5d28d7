"""Measure how accuracy changes near the border of a tile, and near the border of a crop that is predicted alone.

    interior    the output pixels whose field lies inside their tile; the other pixels see mirrored tissue or padding
    band        the pixels whose distance to the border lies between two of `DISTANCES`; there are D bands

Tissue at the border of a tile is other tissue than in the middle. To compare equal pixels, a crop is predicted alone,
without its surroundings, and also as a part of its tile.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from common.console import Progress
from common.geometry import multiple, unpadded
from common.masks import IGNORE
from common.randomness import generator
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet

BORDER_TILES = 100  # at most
DISTANCES = (0, 4, 8, 16, 32, 64, 128, 256)  # pixels from the border, where the bands begin


@dataclass(frozen=True)
class Border:
    """Counts of labelled pixels in N tiles, and in the crops at their centres; zeros if a tile is too small for one."""

    tiles: list[int]  # numbers of the N tiles
    crop: int | None  # pixels, the side of the crops; None if no tile is large enough
    outer: np.ndarray  # (N, K, K) confusion counts where the field leaves the tile
    interior: np.ndarray  # (N, K, K) confusion counts of the other pixels
    pixels: np.ndarray  # (N, D)
    right: np.ndarray  # (N, D) pixels that are right
    crop_pixels: np.ndarray  # (N, D) of the crop, by distance to the crop's border
    right_alone: np.ndarray  # (N, D) pixels of the crop that are right if it is predicted alone
    right_in_tile: np.ndarray  # (N, D) pixels of the crop that are right if the tile is predicted


def measure_border(candidate: Candidate, test_set: TestSet) -> Border:
    """Predict up to `BORDER_TILES` tiles, and the crops at their centres alone, and count the right pixels."""
    config = candidate.config
    levels, classes, size = len(config.model.widths), len(config.data.classes), config.data.crop
    order = generator(config.seed, 0, 0, "border").permutation(len(test_set.rows))
    tiles = sorted(order[:BORDER_TILES].tolist())
    crop_bands, rows, has_crop = _bands(size, size), [], False
    with Progress(f"borders of {candidate.name}", len(tiles), "tile") as progress:
        for tile in tiles:
            pixels = test_set.store.tile(test_set.rows[tile])
            image, target = torch.from_numpy(np.ascontiguousarray(pixels[..., :3])).to(candidate.device), pixels[..., 3]
            interior, bands = _interior(levels, *target.shape), _bands(*target.shape)
            labels = candidate.predictor.labels(image)
            right, labelled = labels == target, target != IGNORE
            counts = {"outer": _confusion(labels[~interior], target[~interior], classes),
                      "interior": _confusion(labels[interior], target[interior], classes),
                      "pixels": _count(bands[labelled]), "right": _count(bands[right])}
            top, left = (_crop_start(levels, length, size) for length in target.shape)
            counts |= dict.fromkeys(("crop_pixels", "right_alone", "right_in_tile"), np.zeros(len(DISTANCES), int))
            if min(top, left) > 0:
                has_crop, crop = True, np.s_[top:top + size, left:left + size]
                right_alone = candidate.predictor.labels(image[crop]) == target[crop]
                counts |= {"crop_pixels": _count(crop_bands[labelled[crop]]),
                           "right_alone": _count(crop_bands[right_alone]),
                           "right_in_tile": _count(crop_bands[right[crop]])}
            rows.append(counts)
            progress.advance()
    return Border(tiles, size if has_crop else None,
                  **{name: np.array([counts[name] for counts in rows]) for name in rows[0]})


@lru_cache(maxsize=4)  # tiles of one size follow one another, and most data sets have one
def _interior(levels: int, height: int, width: int) -> np.ndarray:
    """Return (height, width) bool."""
    return np.logical_and.outer(*(unpadded(levels, length, canvas=False) for length in (height, width)))


@lru_cache(maxsize=4)
def _bands(height: int, width: int) -> np.ndarray:
    """Return the band of every pixel (height, width)."""
    rows, columns = (np.minimum(np.arange(n), np.arange(n)[::-1]) for n in (height, width))
    return np.digitize(np.minimum.outer(rows, columns), DISTANCES) - 1


def _count(bands: np.ndarray) -> np.ndarray:
    """Return the pixels in each band (D,)."""
    return np.bincount(bands.ravel(), minlength=len(DISTANCES))


def _confusion(labels: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """Return the confusion counts (K, K) of pixels (n,)."""
    prediction, truth = (torch.from_numpy(values.astype(np.int64)).reshape(1, -1, 1) for values in (labels, target))
    return metrics.confusion(prediction, truth, classes)[0].numpy()


def _crop_start(levels: int, length: int, crop: int) -> int:
    """Return where the central crop begins if its pixels keep their alignment; at most 0 if nothing surrounds it."""
    before = (-length % multiple(levels)) // 2
    return (before + (length - crop) // 2) // multiple(levels) * multiple(levels) - before
