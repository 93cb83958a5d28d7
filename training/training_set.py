"""Prepare what a run learns from: the packed store, which of its tiles are for training, and their statistics."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

import dataset
from common.config import Config
from common.console import UserError, warn
from common.devices import choose_device
from common.pictures import picture_size
from training.batches import store_on
from training.crops import draw_folds


@dataclass(frozen=True)
class TrainingSet:
    """The store of all kept tiles, and what is known of the training tiles."""

    store: np.ndarray | Tensor  # (N, H, W, 4) uint8: mapped into memory, or on the GPU
    rows: np.ndarray  # (training tiles,) rows of the store
    groups: list[str]  # one for each of `rows`
    statistics: dataset.Statistics
    tiles_identity: str  # dataset.identity of the list of tiles


def prepare_data(config: Config) -> TrainingSet:
    """Read the cleaned list of tiles, pack the store if needed, and compute the statistics of the training tiles."""
    root = Path(config.data.root)
    tiles = [tile for tile in dataset.read_tiles(root) if tile.split in dataset.SPLITS]
    for split in dataset.SPLITS:
        if all(tile.split != split for tile in tiles):
            raise UserError(f"{root / dataset.TILE_LIST}: no tile has split = {split}; run data_filter.py again")
    rows = np.array([i for i, tile in enumerate(tiles) if tile.split == "train"])
    groups = [tiles[i].group for i in rows]
    warn_about_groups(config, tiles)
    warn_about_repeats(draw_folds(groups, config.train.folds, config.train.images_per_epoch, config.seed, epoch=1))
    height, width = picture_size(root / tiles[0].image)
    if config.data.crop > min(height, width):
        largest = min(height, width) // config.model.multiple * config.model.multiple
        raise UserError(f"data.crop ({config.data.crop}) is larger than the tiles of {root} ({height} x {width} pixels)"
                        f": set data.crop={largest} or a smaller multiple of {config.model.multiple}")
    store = dataset.open_store(root, tiles, config.data.mask_values)
    pixels = store_on(choose_device(config.device), store.pixels)
    return TrainingSet(pixels, rows, groups, dataset.statistics_of(store.sums[rows]), dataset.identity(tiles))


def warn_about_groups(config: Config, tiles: list[dataset.Tile]) -> None:
    """Warn if tiles.csv has no groups, or other groups than data.group finds."""
    path = Path(config.data.root) / dataset.TILE_LIST
    try:
        agree = all(dataset.group_of(tile.key, config.data.group) in ("", tile.group) for tile in tiles)
    except UserError:  # the pattern finds no group in a key: it was made for other tiles
        agree = False
    if dataset.groups_are_missing(tiles):
        warn(f"{path} has no group of two tiles, so tiles of one slide or patient may be in train, test and several "
             "folds; run data_filter.py with a data.group that finds the slide in the key")
    elif not agree:
        warn(f"data.group '{config.data.group}' finds other groups than {path} holds. Training uses those of the list; "
             "run data_filter.py again to change them")


def warn_about_repeats(folds: list[np.ndarray]) -> None:
    """Warn if a fold has so few tiles that each is drawn more than twice on average."""
    smallest = min(folds, key=lambda fold: len(np.unique(fold)))
    images, tiles = len(smallest), len(np.unique(smallest))
    if images > 2 * tiles:
        warn(f"a fold of the first epoch has {tiles} tiles for {images} images, so each tile is drawn "
             f"{images / tiles:.1f} times in an epoch, with other crops. Tiles of small slides or patients then count "
             "more than others. Set a smaller train.images_per_epoch or train.folds, or add tiles")
