"""Draw the folds of an epoch, and the window and flips of each of its images (report, sections 5.1.1 and 5.1.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.config import Augment
from common.console import UserError
from common.masks import IGNORE
from common.randomness import generator
from common.store import Store
from dataset import places_by_group
from training.augmentation import Views, draw_views, margin


def draw_folds(groups: Sequence[str], count: int, images_per_epoch: int, seed: int, epoch: int,
               fixed: bool = False) -> list[np.ndarray]:
    """Draw `count` folds of `images_per_epoch / count` indices of tiles; no group is in two folds (section 5.1.2).

    `groups` holds the group of each tile; "" means the tile alone. The groups are dealt in random order, each to the
    fold with the fewest tiles. A fold with more tiles than it needs uses some of them. One with fewer repeats them.
    With `fixed`, folds hold the same groups in every epoch, and the first fold, which validates, the same tiles.
    Raises a `UserError` if there are fewer groups than folds.
    """
    if (number := len({group or i for i, group in enumerate(groups)})) < count:
        raise UserError(f"each of the {count} folds (train.folds) needs a group (slide, patient) of its own, but the "
                        f"training tiles ({len(groups)}) have {number}: "
                        f"{_advice_on_folds(number, len(groups), images_per_epoch)}")
    random = generator(seed, 0 if fixed else epoch, 0, "folds")
    dealt = deal(groups, count, random)
    folds = [np.resize(random.permutation(tiles), images_per_epoch // count) for tiles in dealt]
    if fixed:
        random = generator(seed, epoch, 0, "tiles of fixed folds")
        folds[1:] = [np.resize(random.permutation(tiles), images_per_epoch // count) for tiles in dealt[1:]]
    return folds


def deal(groups: Sequence[str], count: int, random: np.random.Generator) -> list[list[int]]:
    """Deal the indices of tiles into `count` parts that share no group: each to the part with the fewest tiles."""
    members = places_by_group([group or f"tile {i}" for i, group in enumerate(groups)])
    dealt: list[list[int]] = [[] for _ in range(count)]
    for i in random.permutation(len(members)):
        min(dealt, key=len).extend(members[i])
    return dealt


def _advice_on_folds(groups: int, tiles: int, images_per_epoch: int) -> str:
    """Say how a training set of few groups can be trained with."""
    if groups > 1:
        fitting = [folds for folds in range(2, groups + 1) if images_per_epoch % folds == 0]
        images = "" if fitting else f" and train.images_per_epoch={images_per_epoch // groups * groups or groups}"
        return f"set train.folds={max(fitting, default=groups)}{images}, or add slides or patients"
    if tiles > 1:
        return ("add slides or patients, or run data_filter.py without data.group and {group}, so that each tile is a "
                "group; tiles of one slide then train and validate, which makes scores too high")
    return "add tiles; training needs at least two"


@dataclass(frozen=True)
class Crops:
    """Windows of tiles, one for each image that the network sees; all arrays have the shape (n,).

    A window may reach over the border of its tile. There it shows the tile's mirror image, without a class.
    """

    rows: np.ndarray  # of the store: the tile of each window
    top: np.ndarray
    left: np.ndarray
    flip_vertical: np.ndarray  # upside down
    flip_horizontal: np.ndarray  # left and right swapped
    transpose: np.ndarray  # rows and columns swapped, after the flips
    size: int  # of the image that the network sees
    views: Views | None = None  # how it shows its window
    margin: int = 0  # pixels by which a window is larger on each side

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def window(self) -> int:
        """The side of a window in pixels."""
        return self.size + 2 * self.margin

    def cut(self, store: Store, part: range, batch: np.ndarray) -> None:
        """Fill a batch (B, window, window, 4) uint8 with the windows `part`."""
        for target, i in zip(batch.view(np.uint32)[..., 0], part, strict=True):
            pixels = store.tile(self.rows[i]).view(np.uint32)[..., 0]  # (H, W): one number is copied faster than four
            top, left = self.top[i] - self.margin, self.left[i] - self.margin
            bottom, right = top + self.window, left + self.window
            if min(top, left) < 0 or bottom > pixels.shape[0] or right > pixels.shape[1]:
                window = self._mirrored(pixels, top, left)
            else:
                window = pixels[top:bottom, left:right]
            step_y, step_x = (-1 if flip[i] else 1 for flip in (self.flip_vertical, self.flip_horizontal))
            window = window[::step_y, ::step_x]
            target[:] = window.T if self.transpose[i] else window

    def _mirrored(self, pixels: np.ndarray, top: int, left: int) -> np.ndarray:
        """Return a window (window, window) uint32 that reaches over the border of a tile (H, W) uint32."""
        (rows, inside_rows), (columns, inside_columns) = (
            mirrored(start + np.arange(self.window), length)
            for start, length in zip((top, left), pixels.shape, strict=True))
        window = np.ascontiguousarray(pixels[np.ix_(rows, columns)])
        window.view(np.uint8).reshape(*window.shape, 4)[~np.logical_and.outer(inside_rows, inside_columns), 3] = IGNORE
        return window


def mirrored(positions: np.ndarray, length: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of a line that its mirror images show at any positions, and which positions are inside."""
    places = positions % (2 * length)
    return np.where(places < length, places, 2 * length - 1 - places), (positions >= 0) & (positions < length)


def training_crops(folds: Sequence[np.ndarray], fold: int, sizes: np.ndarray, size: int, seed: int, epoch: int,
                   augment: Augment = Augment()) -> Crops:  # noqa: B008 (it cannot change)
    """Draw crops of all folds but `fold`: shuffled, with random windows, independent flips (section 5.1.1) and views.

    `folds` hold rows of the store, whose tiles have `sizes` (N, 2).
    """
    random = generator(seed, epoch, fold, "training crops")
    rows = random.permutation(np.concatenate([rows for i, rows in enumerate(folds) if i != fold]))
    top, left = _windows(random, sizes[rows], size)
    flips = (random.random((2, len(rows))) < 0.5) & augment.flips
    transpose = (generator(seed, epoch, fold, "augment right angles").random(len(rows)) < 0.5) & augment.right_angles
    views = draw_views(augment, len(rows), seed, epoch, fold)
    return Crops(rows, top, left, *flips, transpose, size, views, margin(augment, size))


def validation_crops(folds: Sequence[np.ndarray], fold: int, sizes: np.ndarray, size: int, seed: int,
                     epoch: int) -> Crops:
    """Draw crops of the fold itself: one random window for each image, without flips."""
    top, left = _windows(generator(seed, epoch, fold, "validation crops"), sizes[folds[fold]], size)
    no = np.zeros(len(folds[fold]), bool)
    return Crops(folds[fold], top, left, no, no, no, size)


def _windows(random: np.random.Generator, sizes: np.ndarray, size: int) -> list[np.ndarray]:
    """Return the top and left of a window in each tile of these sizes (n, 2): of a smaller one that contains it."""
    return [random.integers(np.minimum(room, 0), np.maximum(room, 0) + 1) for room in (sizes - size).T]
