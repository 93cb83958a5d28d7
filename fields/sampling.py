"""Choose the output pixels that are measured, and build the inputs that the network gets for them.

    cut     the smallest part of a tile that contains the whole field of a pixel, so that no padding is seen
    place   row and column of a pixel in its cut

Letters as in unet.py; besides, S is the number of measured pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.console import UserError, warn
from common.geometry import multiple, smallest_cut
from common.randomness import generator
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet
from training.batches import normalise

PIXELS_AT_ONCE = 2**18  # of the input: six cuts of the report's network
FREE_PIXELS = 32  # measured pixels of zeros and of noise
Inputs = Callable[[int, int], Tensor]  # from start and stop to the cuts (B, C, cut, cut) of the pixels [start, stop)


@dataclass(frozen=True)
class Pixels:
    """The output pixels that are measured."""

    tiles: np.ndarray  # (S,) numbers of their tiles
    corners: np.ndarray  # (S, 2) top and left of the cut in its tile
    places: np.ndarray  # (S, 2)
    classes: np.ndarray  # (S,) the true class
    shares: np.ndarray  # (K,) of each class in the pixels of all tiles

    def __len__(self) -> int:
        return len(self.classes)

    def weights(self, inside: int | None) -> np.ndarray:
        """Return weights (S,) for a mean over the pixels inside a class; None: over all, each class by its share."""
        counts = np.bincount(self.classes, minlength=len(self.shares))
        shares = self.shares if inside is None else np.eye(len(self.shares))[inside]
        weights = (shares / np.maximum(counts, 1))[self.classes]
        return weights / weights.sum()


def draw_pixels(candidate: Candidate, test_set: TestSet, count: int) -> Pixels:
    """Draw `count` pixels of each true class, from as many tiles as possible.

    A class has fewer pixels, or none, if it occurs nowhere far enough from the borders. Tiles smaller than the cut give
    no pixels. Raises `UserError` if all are.
    """
    levels, seed = len(candidate.config.model.widths), candidate.config.seed
    cut, sizes = smallest_cut(levels), test_set.store.sizes[test_set.rows]
    small = np.count_nonzero(sizes.min(axis=1) < cut.size)
    if small == len(sizes):
        height, width = sizes[sizes.min(axis=1).argmax()]
        raise UserError(f"{candidate.name}: the largest tile in {test_set.config.data.root} has {height} x {width} "
                        f"pixels, but the field of {levels} levels needs at least {cut.size} x {cut.size}; set "
                        "data.root=FOLDER to larger tiles, or train a model with fewer model.widths")
    if small:
        warn(f"{candidate.name}: tiles too small for the field of {levels} levels ({cut.size} x {cut.size} pixels): "
             f"{small} of {len(sizes)}. Pixels are drawn from the others")
    frequencies = test_set.store.counts(test_set.rows).sum(axis=0)
    drawn = []
    for label in np.flatnonzero(frequencies):
        drawn += _pixels_of_class(test_set, label, count, levels, generator(seed, 0, label, "receptive field"))
    if not drawn:
        raise UserError(f"{candidate.name}: no pixel was found far enough from the borders of its "
                        "tile; use more --pixels")
    order = generator(seed, 0, len(frequencies), "receptive field").permutation(len(drawn))
    tiles, corners, places, labels = (np.array(values)[order] for values in zip(*drawn, strict=True))
    return Pixels(tiles, corners, places, labels, frequencies / frequencies.sum())


def _pixels_of_class(test_set: TestSet, label: int, count: int, levels: int,
                     random: np.random.Generator) -> Iterator[tuple[int, tuple[int, int], np.ndarray, int]]:
    """Draw up to `count` pixels of a class from the tiles in turn; return tile, corner, place and class of each."""
    cut, store = smallest_cut(levels), test_set.store
    tiles = deque(random.permutation(len(test_set.rows)))
    for place in cut.origin + _alignments(random, count, levels):
        top, left = place
        for _ in range(len(tiles)):
            tile = tiles[0]
            tiles.rotate(-1)
            rows, columns = np.maximum(store.sizes[test_set.rows[tile]] - cut.size + 1, 0)  # possible corners
            labels = store.tile(test_set.rows[tile])[top:top + rows, left:left + columns, 3]
            matches = np.flatnonzero(labels == label)
            if len(matches):
                yield tile, np.unravel_index(random.choice(matches), labels.shape), place, label
                break


def _alignments(random: np.random.Generator, count: int, levels: int) -> np.ndarray:
    """Return alignments (count, 2) of rows and columns: with m = 2^(levels - 1), all in every m, all pairs in m^2."""
    block, i = multiple(levels), np.arange(count)
    rows, columns = random.permutation(block), random.permutation(block)
    return np.stack([rows[i % block], columns[(i + i // block) % block]], 1)


def free_pixels(count: int, levels: int, seed: int) -> Pixels:
    """Return pixels of inputs that are not tiles: all have class 0."""
    places = smallest_cut(levels).origin + _alignments(generator(seed, 0, 0, "receptive field"), count, levels)
    zeros = np.zeros(count, np.int64)
    return Pixels(zeros, np.zeros((count, 2), np.int64), places, zeros, np.ones(1))


def tile_inputs(candidate: Candidate, test_set: TestSet, pixels: Pixels) -> Inputs:
    size = smallest_cut(len(candidate.config.model.widths)).size

    def inputs(start: int, stop: int) -> Tensor:
        corners = zip(pixels.tiles[start:stop], pixels.corners[start:stop], strict=True)
        cuts = np.stack([test_set.store.tile(test_set.rows[tile])[top:top + size, left:left + size, :3]
                         for tile, (top, left) in corners])                          # (B, cut, cut, 3)
        return normalise(torch.from_numpy(cuts).to(candidate.device), candidate.statistics)
    return inputs


def zero_inputs(levels: int, device: torch.device) -> Inputs:
    """Return the report's input: every pixel has the mean colour."""
    size = smallest_cut(levels).size
    return lambda start, stop: torch.zeros(stop - start, 3, size, size, device=device)


def noise_inputs(levels: int, device: torch.device, seed: int) -> Inputs:
    """Draw independent normal numbers with the mean and variance of normalised tiles."""
    size = smallest_cut(levels).size

    def inputs(start: int, stop: int) -> Tensor:
        noise = [generator(seed, 0, i, "noise").standard_normal((3, size, size), np.float32)
                 for i in range(start, stop)]
        return torch.from_numpy(np.stack(noise)).to(device)
    return inputs


def batch_ranges(count: int, levels: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of batches of pixels whose cuts have about `PIXELS_AT_ONCE` pixels."""
    step = max(1, PIXELS_AT_ONCE // smallest_cut(levels).size ** 2)
    for start in range(0, count, step):
        yield start, min(start + step, count)
