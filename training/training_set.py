"""Prepare what a run learns from: the packed store, which of its tiles are for training, and their statistics."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import dataset
from common.config import Config
from common.console import UserError, warn
from common.devices import choose_device
from common.randomness import generator
from common.statistics import Statistics, statistics_of
from common.store import Store, open_store
from training.batches import store_on
from training.crops import deal, draw_folds


@dataclass(frozen=True)
class TrainingSet:
    """The store of all kept tiles, and what is known of the training tiles."""

    store: Store  # with pixels on the GPU if they fit there
    rows: np.ndarray  # (training tiles,) rows of the store
    tiles: list[dataset.Tile]  # one for each of `rows`
    statistics: Statistics
    tiles_identity: str  # dataset.identity of the list of tiles

    @property
    def groups(self) -> list[str]:
        return [tile.group for tile in self.tiles]


def prepare_data(config: Config) -> TrainingSet:
    """Read the cleaned list of tiles, pack the store if needed, and compute the statistics of the training tiles."""
    path = config.data.list_folder / dataset.TILE_LIST
    tiles = [tile for tile in dataset.read_tiles(config.data) if tile.split in dataset.SPLITS]
    for split in dataset.SPLITS:
        if all(tile.split != split for tile in tiles):
            raise UserError(f"{path}: no tile has split = {split}; run data_filter.py again")
    rows = np.array([i for i, tile in enumerate(tiles) if tile.split == "train"])
    warn_about_groups(config, tiles)
    if config.train.leave_out:
        rows = rows[kept_in([tiles[i] for i in rows], config)]
    draw_first_folds(tiles, rows, config)  # may raise, so it comes before tiles are packed
    store = open_store([tile.pair for tile in tiles], config.data)
    labelled = store.counts(rows).any(axis=1)
    if not labelled.all():
        warn(f"{path}: training tiles in which no pixel has a class: {np.count_nonzero(~labelled)}. They are left out")
        rows = rows[labelled]
    dataset.warn_about_small_tiles(store.sizes[rows], config)
    warn_about_repeats(draw_first_folds(tiles, rows, config))
    return TrainingSet(store_on(choose_device(config.device), store), rows, [tiles[i] for i in rows],
                       statistics_of(store.sums[rows]), dataset.identity(tiles, config.data))


def kept_in(tiles: Sequence[dataset.Tile], config: Config) -> list[int]:
    """Return the places of the training tiles that are not in the part of the groups that train.leave_out names."""
    part, parts = map(int, config.train.leave_out.split("/"))
    if parts > (number := len({tile.group or tile.key for tile in tiles})):
        raise UserError(f"train.leave_out={config.train.leave_out}: the {len(tiles)} training tiles have only {number} "
                        f"groups (slides, patients); use at most {number} parts")
    dealt = deal([tile.group for tile in tiles], parts, generator(config.seed, 0, 0, "parts"))
    return sorted(i for other in range(parts) if other != part - 1 for i in dealt[other])


def draw_first_folds(tiles: Sequence[dataset.Tile], rows: np.ndarray, config: Config) -> list[np.ndarray]:
    """Draw the folds of the first epoch."""
    groups, plan = [tiles[i].group for i in rows], config.train
    return draw_folds(groups, plan.folds, plan.images_per_epoch, config.seed, 1, plan.is_plain)


def warn_about_groups(config: Config, tiles: list[dataset.Tile]) -> None:
    """Warn if tiles.csv has no groups, or other groups than data.group finds."""
    path = config.data.list_folder / dataset.TILE_LIST
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
