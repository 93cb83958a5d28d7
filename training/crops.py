"""Draw the folds of an epoch, and the window and flips of each of its images (report, sections 5.1.1 and 5.1.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.console import UserError
from common.randomness import generator
from dataset import places_by_group


def draw_folds(groups: Sequence[str], count: int, images_per_epoch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Draw `count` folds of `images_per_epoch / count` indices of tiles; no group is in two folds (section 5.1.2).

    `groups` holds the group of each tile; "" means the tile alone. The groups are dealt in random order, each to the
    fold with the fewest tiles. A fold with more tiles than it needs uses some of them. One with fewer repeats them.
    Raises a `UserError` if there are fewer groups than folds.
    """
    members = places_by_group([group or f"tile {i}" for i, group in enumerate(groups)])
    if len(members) < count:
        raise UserError(f"{len(groups)} training tiles of {len(members)} groups cannot fill {count} folds without a "
                        f"shared group: set train.folds to at most {len(members)}, or add slides or patients")
    random = generator(seed, epoch, 0, "folds")
    dealt: list[list[int]] = [[] for _ in range(count)]
    for i in random.permutation(len(members)):
        min(dealt, key=len).extend(members[i])
    return [np.resize(random.permutation(tiles), images_per_epoch // count) for tiles in dealt]


@dataclass(frozen=True)
class Crops:
    """Windows of the store, one for each image that the network sees; all arrays have the shape (n,)."""

    rows: np.ndarray  # of the store: the tile of each window
    top: np.ndarray
    left: np.ndarray
    flip_vertical: np.ndarray  # upside down
    flip_horizontal: np.ndarray  # left and right swapped
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def cut(self, store: np.ndarray, part: range, batch: np.ndarray) -> None:
        """Fill a batch (B, size, size, 4) uint8 with the crops `part`."""
        pixels = store.view(np.uint32)[..., 0]  # (N, H, W): one number is copied faster than four
        for target, i in zip(batch.view(np.uint32)[..., 0], part, strict=True):
            top, left = self.top[i], self.left[i]
            window = pixels[self.rows[i], top:top + self.size, left:left + self.size]
            step_y, step_x = (-1 if flip[i] else 1 for flip in (self.flip_vertical, self.flip_horizontal))
            target[:] = window[::step_y, ::step_x]


def training_crops(folds: Sequence[np.ndarray], fold: int, tile_size: tuple[int, int], size: int,
                   seed: int, epoch: int) -> Crops:
    """Draw crops of all folds but `fold`: shuffled, with random windows and independent flips (section 5.1.1)."""
    random = generator(seed, epoch, fold, "training crops")
    rows = random.permutation(np.concatenate([rows for i, rows in enumerate(folds) if i != fold]))
    top, left = _windows(random, len(rows), tile_size, size)
    flips = random.random((2, len(rows))) < 0.5
    return Crops(rows, top, left, flips[0], flips[1], size)


def validation_crops(folds: Sequence[np.ndarray], fold: int, tile_size: tuple[int, int], size: int,
                     seed: int, epoch: int) -> Crops:
    """Draw crops of the fold itself: one random window for each image, without flips."""
    top, left = _windows(generator(seed, epoch, fold, "validation crops"), len(folds[fold]), tile_size, size)
    no_flip = np.zeros(len(folds[fold]), bool)
    return Crops(folds[fold], top, left, no_flip, no_flip, size)


def _windows(random: np.random.Generator, count: int, tile_size: tuple[int, int], size: int) -> list[np.ndarray]:
    """Return the top and left of each window."""
    return [random.integers(0, side - size + 1, count) for side in tile_size]
