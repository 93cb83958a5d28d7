"""What each image of an epoch shows: folds, random windows and flips (report, sections 5.1.1 and 5.1.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.console import UserError
from common.randomness import generator
from dataset import places_by_group


def draw_folds(groups: Sequence[str], folds: int, images_per_epoch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """`folds` arrays of `images_per_epoch / folds` row numbers each; no group is in two of them (section 5.1.2).

    The groups ("" = the tile alone) are dealt in random order, each to the fold with the fewest tiles. A fold with
    more tiles than it needs takes a random part of them; one with fewer repeats them, which gives them other crops.
    """
    members = places_by_group([group or f"tile {i}" for i, group in enumerate(groups)])
    if len(members) < folds:
        raise UserError(f"{len(groups)} training tiles of {len(members)} groups cannot fill {folds} folds without "
                        f"cutting a group: set train.folds to at most {len(members)}, or add slides or patients")
    random = generator(seed, epoch, 0, "folds")
    dealt: list[list[int]] = [[] for _ in range(folds)]
    for i in random.permutation(len(members)):
        min(dealt, key=len).extend(members[i])
    return [np.resize(random.permutation(rows), images_per_epoch // folds) for rows in dealt]


@dataclass(frozen=True)
class Crops:
    """Windows into the store, one for each image that passes through the network; all arrays (n,)."""

    rows: np.ndarray
    top: np.ndarray
    left: np.ndarray
    flip_vertical: np.ndarray  # upside down
    flip_horizontal: np.ndarray  # left and right swapped
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, batch_size: int) -> list[range]:
        return [range(len(self))[start:start + batch_size] for start in range(0, len(self), batch_size)]

    def cut(self, store: np.ndarray, part: range, batch: np.ndarray) -> None:
        """Fill a batch (B, size, size, 4) uint8 with the crops `part`."""
        pixels = store.view(np.uint32)[..., 0]  # (N, H, W): one number is copied faster than four
        for target, i in zip(batch.view(np.uint32)[..., 0], part, strict=True):
            top, left = self.top[i], self.left[i]
            window = pixels[self.rows[i], top:top + self.size, left:left + self.size]
            step = (-1 if self.flip_vertical[i] else 1), (-1 if self.flip_horizontal[i] else 1)
            target[:] = window[::step[0], ::step[1]]


def training_crops(folds: Sequence[np.ndarray], fold: int, tile_size: tuple[int, int], size: int,
                   seed: int, epoch: int) -> Crops:
    """All folds but `fold`, shuffled, with random windows and independent flips (section 5.1.1)."""
    random = generator(seed, epoch, fold, "training crops")
    rows = random.permutation(np.concatenate([rows for i, rows in enumerate(folds) if i != fold]))
    top, left = _windows(random, len(rows), tile_size, size)
    flips = random.random((2, len(rows))) < 0.5
    return Crops(rows, top, left, flips[0], flips[1], size)


def validation_crops(folds: Sequence[np.ndarray], fold: int, tile_size: tuple[int, int], size: int,
                     seed: int, epoch: int) -> Crops:
    """The fold itself: one random window an image, no flips."""
    top, left = _windows(generator(seed, epoch, fold, "validation crops"), len(folds[fold]), tile_size, size)
    upright = np.zeros(len(folds[fold]), bool)
    return Crops(folds[fold], top, left, upright, upright, size)


def _windows(random: np.random.Generator, count: int, tile_size: tuple[int, int],
             size: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = tile_size
    return random.integers(0, height - size + 1, count), random.integers(0, width - size + 1, count)
