"""What a run learns from: the packed tiles, which of them train, and their statistics."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from common.config import Config
from common.console import UserError, warn
from common.devices import choose_device
from common.pictures import picture_size
from dataset import (
    SPLITS,
    TILE_LIST,
    Statistics,
    Tile,
    group_of,
    groups_are_missing,
    identity,
    open_store,
    read_tiles,
    statistics_of,
)
from training.batches import store_on
from training.crops import draw_folds


@dataclass(frozen=True)
class TrainingSet:
    """The packed tiles, which of them train, and what is known of those."""

    store: np.ndarray | Tensor  # (N, H, W, 4) uint8: mapped into memory, or on the GPU
    rows: np.ndarray  # (training tiles,) rows of the store
    groups: list[str]  # one for each of `rows`
    statistics: Statistics
    tiles: str  # the identity of the list that was read


def prepare_data(config: Config) -> TrainingSet:
    """Read the cleaned list, pack its tiles where needed, measure the training split."""
    root = Path(config.data.root)
    tiles = [tile for tile in read_tiles(root) if tile.split in SPLITS]
    for split in SPLITS:
        if all(tile.split != split for tile in tiles):
            raise UserError(f"{root / TILE_LIST}: no tile has split = {split}; run data_filter.py again or fix it")
    rows = np.array([i for i, tile in enumerate(tiles) if tile.split == "train"])
    groups = [tiles[i].group for i in rows]
    warn_of_groups(config, tiles)
    warn_of_repeats(draw_folds(groups, config.train.folds, config.train.images_per_epoch, config.seed, epoch=1))
    height, width = picture_size(root / tiles[0].image)
    if config.data.crop > min(height, width):
        multiple = config.model.multiple
        raise UserError(f"data.crop ({config.data.crop}) does not fit the tiles of {root}, {height} x {width} pixels: "
                        f"set data.crop={min(height, width) // multiple * multiple} or a smaller multiple of "
                        f"{multiple}")
    store = open_store(root, tiles, config.data.mask_values)
    pixels = store_on(choose_device(config.device), store.pixels)
    return TrainingSet(pixels, rows, groups, statistics_of(store.sums[rows]), identity(tiles))


def warn_of_repeats(folds: list[np.ndarray]) -> None:
    """Say where a fold has so few tiles of its own that it repeats them more than twice on average."""
    scarce = min(folds, key=lambda fold: len(np.unique(fold)))
    tiles = len(np.unique(scarce))
    if len(scarce) > 2 * tiles:
        warn(f"a fold of the first epoch has {tiles} tiles for the {len(scarce)} images it needs, so each is drawn "
             f"{len(scarce) / tiles:.1f} times an epoch (with other crops): tiles of small slides or patients count "
             "for more than others. A smaller train.images_per_epoch, fewer train.folds or more tiles help")


def warn_of_groups(config: Config, tiles: list[Tile]) -> None:
    """The groups are those of tiles.csv; say so where data.group asks for others, or where there are none."""
    path = Path(config.data.root) / TILE_LIST
    try:
        agree = all(group_of(tile.key, config.data.group) in ("", tile.group) for tile in tiles)
    except UserError:  # the pattern finds no group in a key: made for other tiles
        agree = False
    if groups_are_missing(tiles):
        warn(f"{path} has no group of two tiles, so tiles of one slide or patient may be in train, test and several "
             "folds; run data_filter.py with a data.group that finds the slide in the key")
    elif not agree:
        warn(f"data.group '{config.data.group}' finds other groups than {path} holds; the list counts. Run "
             "data_filter.py again to change it")
