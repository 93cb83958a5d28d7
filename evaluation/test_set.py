"""Open the tiles on which candidates are scored, and check that the candidates can be compared on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import Config
from common.console import UserError, warn
from dataset import SPLITS, TILE_LIST, Tile, identity, open_store, read_tiles
from evaluation.candidates import Candidate


@dataclass(frozen=True)
class TestSet:
    """The tiles that every candidate predicts."""

    config: Config  # its `data` describes the tiles and their mask values
    split: str
    tiles: list[Tile]
    rows: list[int]  # of the tiles in the store
    store: np.ndarray  # (n, H, W, 4) uint8: red, green, blue and class
    tiles_identity: str  # dataset.identity of the list of tiles
    caveats: list[str]  # reasons why the scores may be too high


def tiles_of_split(config: Config, split: str) -> tuple[list[Tile], list[int]]:
    """Return all kept tiles of the data root, and the indices of those of `split`: test, train or all."""
    path = Path(config.data.root) / TILE_LIST
    tiles = [tile for tile in read_tiles(path.parent) if tile.split in SPLITS]
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
    tiles_identity = identity(tiles)
    caveats = [f"{first.config.data.root}/{TILE_LIST} has changed since {candidate.name} was trained; some test tiles "
               "may have been training tiles."
               for candidate in candidates if candidate.tiles_identity not in (None, tiles_identity)]
    if split != "test" and any(candidate.tiles_identity == tiles_identity for candidate in candidates):
        caveats.append(f"Split {split} contains training tiles. Only test tiles show how a model performs on new "
                       "tiles.")
    for caveat in caveats:
        warn(caveat)
    store = open_store(Path(first.config.data.root), tiles, first.config.data.mask_values)
    return TestSet(first.config, split, [tiles[i] for i in rows], rows, store.pixels, tiles_identity, caveats)


def _check_comparable(first: Candidate, other: Candidate) -> None:
    for name in ("classes", "mask_values", "root"):
        expected, found = (getattr(candidate.config.data, name) for candidate in (first, other))
        if found != expected and (name != "root" or Path(found).resolve() != Path(expected).resolve()):
            advice = ", or give data.root=FOLDER" if name == "root" else ""
            raise UserError(f"{other.name} has data.{name}={found}, {first.name} has {expected}; only candidates with "
                            f"the same classes and tiles can be compared: evaluate them one at a time{advice}")
