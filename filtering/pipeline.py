"""Run all tiles of a folder through the filter: check the masks, measure the images, split what is kept."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from common.config import Config, Filter
from common.console import Progress, UserError
from common.pictures import count_classes, picture_size, read_mask_values
from common.workers import ParallelMap, cores, worker_map
from dataset import SPLITS, Tile, find_pairs, places_by_group, read_pair, reject_different_sizes, split_by_group
from filtering import audit, manual_edits

TILES_PER_WORKER = 64  # fewer are judged before another process has started
SHOWN = 8  # mask values in a message


@dataclass(frozen=True)
class FilterResult:
    """All tiles with their verdicts, and what the masks hold."""

    tiles: list[Tile]
    pixels: np.ndarray  # (N, K) of each class; zeros once a tile is known to be corrupt
    mask_values: np.ndarray  # (256,) pixels of each value in all masks
    size: tuple[int, int]  # height, width of the tiles
    copies: list[list[str]] = field(default_factory=list)  # keys that show the same image

    @property
    def kept(self) -> list[int]:
        return [i for i, tile in enumerate(self.tiles) if tile.split in SPLITS]


def filter_tiles(config: Config, workers: int | None = None, before: Sequence[Tile] = (),
                 announce: Callable[[FilterResult], None] = lambda surveyed: None) -> FilterResult:
    """Measure and judge every tile of data.root. Verdicts that a person set in the list `before` stay in force.

    `announce` gets what the masks show, before any image is decoded. By default few tiles get few workers.
    """
    data, root = config.data, Path(config.data.root)
    tiles = find_pairs(root, data.images, data.masks, data.group)
    with worker_map(workers or min(cores(), len(tiles) // TILES_PER_WORKER)) as parallel_map:
        surveyed = survey_masks(root, tiles, config, parallel_map)
        announce(surveyed)
        tiles, digests = list(surveyed.tiles), [b""] * len(tiles)
        undecided = [i for i, tile in enumerate(tiles) if not tile.proposed]
        audited = parallel_map(partial(audit_tile, root, data.mask_values, config.filter),
                               [tiles[i] for i in undecided])
        with Progress("judge images", len(undecided), "tile") as progress:
            for i, (tile, digest) in zip(undecided, audited, strict=True):
                tiles[i], digests[i] = tile, digest
                progress.advance()
    tiles, copies = mark_copies(tiles, digests, config.filter.drop_duplicates)
    tiles = manual_edits.apply_manual_edits(propose_split(tiles, data.test_fraction, config.seed), before)
    surveyed.pixels[[tile.proposed == "corrupt" for tile in tiles]] = 0
    return replace(surveyed, tiles=tiles, copies=copies)


def survey_masks(root: Path, tiles: Sequence[Tile], config: Config, parallel_map: ParallelMap) -> FilterResult:
    """Measure the foreground of each tile, and propose `corrupt` or `sparse` where the masks alone show it.

    Raise a `UserError` if most masks hold unknown values or no size is common, since then the config is wrong.
    """
    mask_values, surveyed, sizes, unknown = config.data.mask_values, [], [], 0
    pixels = np.zeros((len(tiles), len(mask_values)), np.int64)
    totals, masks = np.zeros(256, np.int64), np.zeros(256, np.int64)  # pixels of each value, masks that hold it
    checks = parallel_map(partial(check_mask, root, mask_values), tiles)
    with Progress("check masks", len(tiles), "tile") as progress:
        for i, (tile, (size, counts, problem)) in enumerate(zip(tiles, checks, strict=True)):
            totals += counts
            masks += counts > 0
            if problem:
                tile = replace(tile, proposed="corrupt", reason=problem)
                unknown += size is not None
            else:
                pixels[i] = counts[list(mask_values)]
            surveyed.append(tile)
            sizes.append(size)
            progress.advance()
    readable = sum(size is not None for size in sizes)
    if not readable:
        raise UserError(f"{root}: none of {len(tiles)} pairs can be read; the first: {surveyed[0].reason}")
    if 2 * unknown > readable:
        raise UserError(f"{root}: {unknown} of {readable} masks hold values that are not in data.mask_values "
                        f"{list(mask_values)}. {_describe_values(totals, masks)}")
    height, width = _common_size(root, sizes)
    for i, tile in enumerate(surveyed):
        if tile.proposed != "corrupt" and sizes[i] != (height, width):
            surveyed[i] = replace(tile, proposed="corrupt", reason=(
                f"{root / tile.image}: {sizes[i][0]} x {sizes[i][1]} pixels (height x width), but most tiles have "
                f"{height} x {width}; all tiles must have one size"))
        elif tile.proposed != "corrupt":
            tile = replace(tile, foreground=float(1 - pixels[i, 0] / pixels[i].sum()))
            surveyed[i] = replace(tile, proposed=audit.verdict(tile, config.filter))
    return FilterResult(surveyed, pixels, totals, (height, width))


def check_mask(root: Path, mask_values: Sequence[int],
               tile: Tile) -> tuple[tuple[int, int] | None, np.ndarray, str]:
    """Return size (height, width), pixels of each value (256,) and problem of a mask; None and zeros if unreadable."""
    try:
        mask, size = read_mask_values(root / tile.mask), picture_size(root / tile.image)
        reject_different_sizes(root, tile, size, mask.shape)
    except UserError as error:
        return None, np.zeros(256, np.int64), str(error)
    counts = np.bincount(mask.ravel(), minlength=256)
    try:
        count_classes(root / tile.mask, counts, mask_values)
    except UserError as error:
        return size, counts, str(error)
    return size, counts, ""


def _describe_values(totals: np.ndarray, masks: np.ndarray) -> str:
    """List the most frequent mask values, from their pixels (256,) and masks that hold them (256,), with advice."""
    number = np.count_nonzero(totals)
    values = sorted(np.argsort(-totals)[:min(SHOWN, number)])
    shares = ", ".join(f"{value} ({totals[value] / totals.sum():.1%} of the pixels, in {masks[value]} masks)"
                       for value in values)
    if number > SHOWN:
        return f"The {SHOWN} most frequent of {number}: {shares}. A mask must have one value for each class; convert it"
    return (f"All values: {shares}. Try data.mask_values=[{','.join(map(str, values))}] with one of data.classes for "
            "each, background first")


def _common_size(root: Path, sizes: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """Return the (height, width) that more than half of the readable tiles have."""
    counts = Counter(size for size in sizes if size)
    size, count = counts.most_common(1)[0]
    if 2 * count <= counts.total():
        found = ", ".join(f"{height} x {width} ({tiles} tiles)" for (height, width), tiles in counts.most_common(5))
        raise UserError(f"{root}: all tiles must have one size (height x width); found {found}. Cut or sort them")
    return size


def audit_tile(root: Path, mask_values: Sequence[int], limits: Filter, tile: Tile) -> tuple[Tile, bytes]:
    """Decode a tile. Return it with its measurements and verdict, and a digest of its image."""
    try:
        image, mask = read_pair(root, tile, mask_values)
    except UserError as error:
        return replace(tile, proposed="corrupt", reason=str(error)), b""
    tile = replace(tile, **audit.measure_tile(image, mask > 0, limits))
    return replace(tile, proposed=audit.verdict(tile, limits)), sha256(image).digest()


def mark_copies(tiles: Sequence[Tile], digests: Sequence[bytes], drop: bool) -> tuple[list[Tile], list[list[str]]]:
    """Note which tiles show the same image, and return the keys of each such image. An empty digest means no image.

    If `drop`, propose `duplicate` for each tile after the first one that is kept.
    """
    marked = list(tiles)
    copies = [places for places in places_by_group(digests) if len(places) > 1 and digests[places[0]]]
    for places in copies:
        for i in places[1:]:
            marked[i] = replace(marked[i], reason=f"same image as {marked[places[0]].key}")
        for i in [i for i in places if drop and not marked[i].proposed][1:]:
            marked[i] = replace(marked[i], proposed="duplicate")
    return marked, [[marked[i].key for i in places] for places in copies]


def propose_split(tiles: Sequence[Tile], test_fraction: float, seed: int) -> list[Tile]:
    """Propose train or test for all tiles that are not to be dropped."""
    kept = [tile for tile in tiles if not tile.proposed]
    splits = iter(split_by_group(kept, test_fraction, seed) if kept else [])
    return [tile if tile.proposed else replace(tile, proposed=next(splits)) for tile in tiles]
