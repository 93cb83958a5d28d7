"""Which output pixels are measured, and what the network is fed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.console import Progress, UserError
from common.geometry import multiple, smallest_cut
from common.randomness import generator
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet
from training.batches import normalise

PIXELS_AT_ONCE = 2**18  # of the input: six cuts of the report's network
FREE_PIXELS = 32  # of inputs that are no tiles
Inputs = Callable[[int, int], Tensor]  # the pixels [start, stop) to the network's input (B, C, cut, cut)


@dataclass(frozen=True)
class Pixels:
    """Output pixels, and where their cuts lie."""

    tiles: np.ndarray  # (S,) numbers of their tiles
    corners: np.ndarray  # (S, 2) top and left of the cut in its tile
    places: np.ndarray  # (S, 2) row and column of the pixel in its cut
    classes: np.ndarray  # (S,) the truth there
    shares: np.ndarray  # (K,) how often each class occurs in the tiles

    def __len__(self) -> int:
        return len(self.classes)

    def weights(self, region: int | None) -> np.ndarray:
        """(S,) of a mean over the pixels of a class; over all, each class as often as it occurs."""
        counts = np.bincount(self.classes, minlength=len(self.shares))
        shares = self.shares if region is None else np.eye(len(self.shares))[region]
        weights = (shares / np.maximum(counts, 1))[self.classes]
        return weights / weights.sum()


def _alignments(random: np.random.Generator, count: int, levels: int) -> np.ndarray:
    """(count, 2) alignments of rows and columns: all of each in every `multiple` pixels, all pairs in its square."""
    block, i = multiple(levels), np.arange(count)
    rows, columns = random.permutation(block), random.permutation(block)
    return np.stack([rows[i % block], columns[(i + i // block) % block]], 1)


def draw_pixels(candidate: Candidate, test_set: TestSet, count: int) -> Pixels:
    """`count` pixels of each class (by the truth), from as many tiles as there are, and none of a class that lies
    nowhere far enough from the borders.

    Raises `UserError` where the tiles are smaller than the cut.
    """
    config = candidate.config
    levels, classes, seed = len(config.model.widths), len(config.data.classes), config.seed
    store, rows = test_set.store, test_set.rows
    cut, found = smallest_cut(levels), []
    height, width = store.shape[1:3]
    if min(height, width) < cut.size:
        raise UserError(f"{candidate.name}: the tiles of {test_set.config.data.root} are {height} x {width} pixels, "
                        f"too small to hold the field of {levels} levels: give tiles of at least {cut.size} x "
                        f"{cut.size} with data.root=FOLDER, or train a model with fewer model.widths")
    pixels = np.zeros(classes, np.int64)
    with Progress("count classes", len(rows), "tile") as progress:
        for row in rows:
            pixels += np.bincount(store[row, ..., 3].ravel(), minlength=classes)[:classes]
            progress.advance()
    for k in range(classes):
        random = generator(seed, 0, k, "receptive field")
        order, places = random.permutation(len(rows)), cut.origin + _alignments(random, count, levels)
        turn = 0
        for y, x in places if pixels[k] else ():
            for tried in range(turn, turn + len(order)):  # the next tile that has the class where this alignment fits
                tile = order[tried % len(order)]
                target = store[rows[tile], y:y + height - cut.size + 1, x:x + width - cut.size + 1, 3]
                there = np.flatnonzero(target == k)
                if len(there):
                    corner = np.unravel_index(random.choice(there), target.shape)
                    found.append((tile, *corner, y, x, k))
                    turn = tried + 1
                    break
    drawn = generator(seed, 0, classes, "receptive field").permutation(np.array(found).reshape(-1, 6))
    return Pixels(drawn[:, 0], drawn[:, 1:3], drawn[:, 3:5], drawn[:, 5], pixels / pixels.sum())


def free_pixels(count: int, levels: int, seed: int) -> Pixels:
    """Pixels of inputs that are no tiles."""
    places = smallest_cut(levels).origin + _alignments(generator(seed, 0, 0, "receptive field"), count, levels)
    none = np.zeros(count, np.int64)
    return Pixels(none, np.zeros((count, 2), np.int64), places, none, np.ones(1))


def tile_inputs(candidate: Candidate, test_set: TestSet, pixels: Pixels) -> Inputs:
    size = smallest_cut(len(candidate.config.model.widths)).size

    def inputs(start: int, stop: int) -> Tensor:
        places = zip(pixels.tiles[start:stop], pixels.corners[start:stop], strict=True)
        cuts = np.stack([test_set.store[test_set.rows[tile], top:top + size, left:left + size, :3]
                         for tile, (top, left) in places])                           # (B, cut, cut, 3)
        return normalise(torch.from_numpy(cuts).to(candidate.device), candidate.statistics)
    return inputs


def zero_inputs(levels: int, device: torch.device) -> Inputs:
    """The report's input: every pixel has the mean colour."""
    size = smallest_cut(levels).size
    return lambda start, stop: torch.zeros(stop - start, 3, size, size, device=device)


def noise_inputs(levels: int, device: torch.device, seed: int) -> Inputs:
    """Independent normal numbers with the mean and variance of normalised tiles."""
    size = smallest_cut(levels).size

    def inputs(start: int, stop: int) -> Tensor:
        noise = [generator(seed, 0, i, "noise").standard_normal((3, size, size), np.float32)
                 for i in range(start, stop)]
        return torch.from_numpy(np.stack(noise)).to(device)
    return inputs


def batch_ranges(count: int, levels: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIXELS_AT_ONCE // smallest_cut(levels).size ** 2)
    for start in range(0, count, step):
        yield start, min(start + step, count)
