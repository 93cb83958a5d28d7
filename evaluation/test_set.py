"""The tiles on which candidates are scored."""

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
    """The tiles that every entry is asked about."""

    config: Config  # whose `data` say where they lie and what their greys mean
    split: str
    tiles: list[Tile]
    rows: list[int]  # of the tiles in the store
    store: np.ndarray  # (n, H, W, 4) uint8: red, green, blue and class
    identity: str  # of the list of tiles (dataset.identity)
    caveats: list[str]  # why scores on these tiles may say too much


def tiles_of_split(config: Config, split: str) -> tuple[list[Tile], list[int]]:
    """The kept tiles of the data root, and the places of those of `split`: test, train or all."""
    path = Path(config.data.root) / TILE_LIST
    tiles = [tile for tile in read_tiles(path.parent) if tile.split in SPLITS]
    rows = [i for i, tile in enumerate(tiles) if split in (tile.split, "all")]
    if not rows:
        wanted = "tile is kept" if split == "all" else f"tile has split = {split}"
        raise UserError(f"{path}: no {wanted}; run data_filter.py again or fix the list")
    return tiles, rows


def open_test_set(candidates: Sequence[Candidate], split: str) -> TestSet:
    """Check that the entries can be compared, and open the tiles."""
    first = candidates[0]
    tiles, rows = tiles_of_split(first.config, split)
    asked = identity(tiles)
    for other in candidates[1:]:
        for name in ("classes", "mask_values"):
            ours, theirs = (list(getattr(candidate.config.data, name)) for candidate in (first, other))
            if ours != theirs:
                raise UserError(f"{other.name} has data.{name} {theirs}, {first.name} has {ours}; only entries of the "
                                "same classes can be compared: evaluate them one at a time")
        if Path(other.config.data.root).resolve() != Path(first.config.data.root).resolve():
            raise UserError(f"{other.name} would be tested on the tiles of {other.config.data.root}, and {first.name} "
                            f"on those of {first.config.data.root}; only scores of the same tiles can be compared: "
                            "evaluate them one at a time, or give one data.root=FOLDER for all")
    caveats = [f"{first.config.data.root}/{TILE_LIST} does not keep and split the tiles as it did when "
               f"{candidate.name} was trained: some of its test tiles may have been training tiles."
               for candidate in candidates if candidate.trained_on not in (None, asked)]
    if split != "test" and any(candidate.trained_on == asked for candidate in candidates):
        caveats.append(f"Split {split}: models were trained on tiles of it. Only test tiles show what they do on new "
                      "ones.")
    for caveat in caveats:
        warn(caveat)
    store = open_store(Path(first.config.data.root), tiles, first.config.data.mask_values)
    return TestSet(first.config, split, [tiles[i] for i in rows], rows, store.pixels, asked, caveats)
