"""Open the tiles on which candidates are scored, and check that the candidates can be compared on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import MASK_SETTINGS, Config
from common.console import UserError, warn
from common.store import Store, open_store
from dataset import SPLITS, TILE_LIST, Tile, identity, read_tiles
from evaluation.candidates import Candidate
from training.run_folder import TRAINED_ON, read_trained_on


@dataclass(frozen=True)
class TestSet:
    """The tiles that every candidate predicts."""

    config: Config  # its `data` describes the tiles and their mask values
    split: str
    tiles: list[Tile]
    rows: list[int]  # of the tiles in the store
    store: Store
    tiles_identity: str  # dataset.identity of the list of tiles
    caveats: list[str]  # reasons why the scores may be too high


def tiles_of_split(config: Config, split: str) -> tuple[list[Tile], list[int]]:
    """Return all kept tiles of the data root, and the indices of those of `split`: test, train or all."""
    path = config.data.list_folder / TILE_LIST
    tiles = [tile for tile in read_tiles(config.data) if tile.split in SPLITS]
    rows = [i for i, tile in enumerate(tiles) if split in (tile.split, "all")]
    if not rows:
        wanted = "tile is kept" if split == "all" else f"tile has split = {split}"
        raise UserError(f"{path}: no {wanted}; run data_filter.py again or fix the list")
    return tiles, rows


def open_test_set(candidates: Sequence[Candidate], split: str) -> TestSet:
    """Open the tiles; raise a `UserError` if candidates have other classes, mask values or tiles than the first one."""
    first = candidates[0]
    tiles, rows = tiles_of_split(first.config, split)
    for other in candidates[1:]:
        _check_comparable(first, other)
    tiles_identity = identity(tiles, first.config.data)
    path = first.config.data.list_folder / TILE_LIST
    caveats = [f"{path} has changed since {candidate.name} was trained; some test tiles "
               "may have been training tiles."
               for candidate in candidates if candidate.tiles_identity not in (None, tiles_identity)
               and not _are_of_another_folder(tiles, candidate)]
    if split != "test" and any(candidate.tiles_identity == tiles_identity for candidate in candidates):
        caveats.append(f"Split {split} contains training tiles. Only test tiles show how a model performs on new "
                       "tiles.")
    for caveat in caveats:
        warn(caveat)
    store = open_store([tile.pair for tile in tiles], first.config.data)
    labelled = store.counts(rows).any(axis=1)
    if not labelled.all():
        warn(f"{path}: {split} tiles in which no pixel has a class: {np.count_nonzero(~labelled)}. They are left out")
        rows = [row for row, is_labelled in zip(rows, labelled, strict=True) if is_labelled]
    if not rows:
        raise UserError(f"{path}: no pixel of the {split} tiles has a class, so nothing can be scored")
    return TestSet(first.config, split, [tiles[i] for i in rows], rows, store, tiles_identity, caveats)


def _are_of_another_folder(tiles: Sequence[Tile], candidate: Candidate) -> bool:
    """Return whether a run certainly learned from none of the tiles of a list, by the digests of their images."""
    if candidate.run is None or not (candidate.run / TRAINED_ON).is_file():
        return False
    learned = {row["digest"] for row in read_trained_on(candidate.run)}
    digests = {tile.digest for tile in tiles}
    return "" not in learned | digests and not learned & digests


def _check_comparable(first: Candidate, other: Candidate) -> None:
    for name in ("classes", "root", *MASK_SETTINGS):
        expected, found = (getattr(candidate.config.data, name) for candidate in (first, other))
        if found != expected and (name != "root" or Path(found).resolve() != Path(expected).resolve()):
            advice = ", or give data.root=FOLDER" if name == "root" else ""
            raise UserError(f"{other.name} has data.{name}={found}, {first.name} has {expected}; only candidates with "
                            f"the same classes and tiles can be compared: evaluate them one at a time{advice}")
