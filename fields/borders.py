"""How accuracy changes near the border of a tile and of a crop."""

from dataclasses import dataclass

import numpy as np
import torch

from common.console import Progress
from common.geometry import multiple, unpadded
from common.randomness import generator
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet

BORDER_TILES = 100  # at most
DISTANCES = (0, 4, 8, 16, 32, 64, 128, 256)  # pixels from a tile's border


@dataclass(frozen=True)
class Border:
    """Pixels that are right, near the border of their tiles and far from it."""

    tiles: list[int]  # numbers of the N tiles
    confusion: np.ndarray  # (N, 2, K, K) where the field leaves the tile, and where it does not
    by_distance: np.ndarray  # (N, distances, 2) right and all pixels, by distance to the tile's border
    crop: int | None  # pixels, the side of the tile's centre that is predicted alone; None: the tile is too small
    moved: np.ndarray | None  # (N, distances, 3) from the crop's border: all pixels, right alone, right in the tile


def measure_border(candidate: Candidate, test_set: TestSet) -> Border:
    """Predict tiles whole, and besides the crops at their centres alone, whose surroundings are then missing."""
    config, (height, width) = candidate.config, test_set.store.shape[1:3]
    levels, classes, crop = len(config.model.widths), len(config.data.classes), config.data.crop
    order = generator(config.seed, 0, 0, "border").permutation(len(test_set.rows))
    chosen = sorted(order[:BORDER_TILES].tolist())
    inside = np.outer(*(unpadded(levels, length, canvas=False) for length in (height, width)))
    bins, crop_bins = _bands(height, width), _bands(crop, crop)
    top, left = (_centred(levels, length, crop) for length in (height, width))
    has_crop = min(top, left) > 0
    inner = np.s_[top:top + crop, left:left + crop]
    counts, right_by_distance, moved = [], [], []
    with Progress(f"borders of {candidate.name}", len(chosen), "tile") as progress:
        for tile in chosen:
            pixels = test_set.store[test_set.rows[tile]]
            image, target = torch.from_numpy(np.ascontiguousarray(pixels[..., :3])).to(candidate.device), pixels[..., 3]
            labels = candidate.predictor.labels(image)
            counts.append([metrics.confusion(*(torch.from_numpy(array[where].astype(np.int64)).reshape(1, -1, 1)
                                               for array in (labels, target)), classes)[0].numpy()
                           for where in (~inside, inside)])
            right = labels == target
            right_by_distance.append([np.bincount(bins[which], minlength=len(DISTANCES))
                                      for which in (right, np.ones_like(right))])
            if has_crop:
                alone = candidate.predictor.labels(image[inner]) == target[inner]
                moved.append([np.bincount(crop_bins[which], minlength=len(DISTANCES))
                              for which in (np.ones_like(alone), alone, right[inner])])
            progress.advance()
    return Border(chosen, np.array(counts), np.array(right_by_distance).swapaxes(1, 2),
                  crop if has_crop else None, np.array(moved).swapaxes(1, 2) if has_crop else None)


def _bands(height: int, width: int) -> np.ndarray:
    """(height, width) which of `DISTANCES` a pixel is at least away from the border."""
    rows, columns = (np.minimum(np.arange(n), np.arange(n)[::-1]) for n in (height, width))
    return np.digitize(np.minimum.outer(rows, columns), DISTANCES) - 1


def _centred(levels: int, length: int, crop: int) -> int:
    """Where a crop at the centre begins so that its pixels keep their alignment; 0 or less where it does not fit."""
    before = (-length % multiple(levels)) // 2
    return (before + (length - crop) // 2) // multiple(levels) * multiple(levels) - before
