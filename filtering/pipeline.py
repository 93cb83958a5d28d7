"""All tiles of a folder through the filter: check the masks, measure the images, split what is kept."""

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
from common.workers import Map, cores, worker_map
from dataset import SPLITS, Tile, find_pairs, read_pair, reject_different_sizes, split_by_group
from filtering import audit, manual_edits


@dataclass(frozen=True)
class FilterResult:
    """What the filter found."""

    tiles: list[Tile]
    pixels: np.ndarray  # (N, K) of each class; zeros once a tile is known to be corrupt
    mask_values: np.ndarray  # (256,) pixels of each grey in all masks
    size: tuple[int, int]  # height, width of the tiles
    copies: list[list[str]] = field(default_factory=list)  # keys that show the same image

    @property
    def kept(self) -> list[int]:
        return [i for i, tile in enumerate(self.tiles) if tile.split in SPLITS]


TILES_A_PROCESS = 64  # fewer are judged sooner than another process starts


@dataclass(frozen=True)
class MaskCheck:
    """What the mask and the image's header tell: size (height, width), pixels of each grey (256,); or the problem."""

    size: tuple[int, int] | None = None
    mask_values: np.ndarray | None = None
    problem: str = ""


def check_mask(root: Path, tile: Tile) -> MaskCheck:
    """Decode the mask alone: most of what can be wrong is seen before an image is decoded."""
    try:
        mask, size = read_mask_values(root / tile.mask), picture_size(root / tile.image)
        reject_different_sizes(root, tile, size, mask.shape)
        return MaskCheck(size, np.bincount(mask.ravel(), minlength=256))
    except UserError as error:
        return MaskCheck(problem=str(error))


def audit_tile(root: Path, mask_values: Sequence[int], limits: Filter, tile: Tile) -> tuple[Tile, bytes]:
    """The tile with its measurements and verdict, and a digest of its image, which is decoded here."""
    try:
        image, mask = read_pair(root, tile, mask_values)
    except UserError as error:
        return replace(tile, proposed="corrupt", reason=str(error)), b""
    tile = replace(tile, **audit.measure_tile(image, mask > 0, limits))
    return replace(tile, proposed=audit.verdict(tile, limits)), sha256(image).digest()


def filter_tiles(config: Config, workers: int | None = None, before: Sequence[Tile] = (),
                 announce: Callable[[FilterResult], None] = lambda surveyed: None) -> FilterResult:
    """Every tile of the root with its measurements and verdict; verdicts set by hand in the list `before` hold.

    `announce` hears what the masks alone tell, before any image is decoded. With workers = None there is one for each
    core, or fewer where there are few tiles.
    """
    data, root = config.data, Path(config.data.root)
    tiles = find_pairs(root, data.images, data.masks, data.group)
    with worker_map(workers or min(cores(), len(tiles) // TILES_A_PROCESS)) as over:
        surveyed = survey_masks(root, tiles, config, over)
        announce(surveyed)
        tiles, digests = list(surveyed.tiles), {}
        suspects = [i for i, tile in enumerate(tiles) if not tile.proposed]
        with Progress("judge images", len(suspects), "tile") as progress:
            judged = over(partial(audit_tile, root, data.mask_values, config.filter), [tiles[i] for i in suspects])
            for i, (tile, digest) in zip(suspects, judged, strict=True):
                tiles[i], digests[i] = tile, digest
                progress.advance()
    tiles, copies = mark_copies(tiles, digests, config.filter.drop_duplicates)
    tiles = manual_edits.apply_manual_edits(propose_split(tiles, data.test_fraction, config.seed), before)
    surveyed.pixels[[tile.proposed == "corrupt" for tile in tiles]] = 0
    return replace(surveyed, tiles=tiles, copies=copies)


def survey_masks(root: Path, tiles: Sequence[Tile], config: Config, over: Map) -> FilterResult:
    """The tiles with the share of their foreground, proposed as `sparse`, `corrupt` or not yet.

    Where most masks hold greys that the config does not name, or no size is that of most tiles, it is not the tiles
    that are wrong: a `UserError` says what was found.
    """
    mask_values, surveyed, sizes, strangers = config.data.mask_values, [], [], 0
    census, holders, pixels = (np.zeros(shape, np.int64) for shape in (256, 256, (len(tiles), len(mask_values))))
    with Progress("look at masks", len(tiles), "tile") as progress:
        for i, (tile, seen) in enumerate(zip(tiles, over(partial(check_mask, root), tiles), strict=True)):
            problem = seen.problem
            if not problem:
                census += seen.mask_values
                holders += seen.mask_values > 0
                try:
                    pixels[i] = count_classes(root / tile.mask, seen.mask_values, mask_values)
                except UserError as error:
                    problem, strangers = str(error), strangers + 1
            surveyed.append(replace(tile, proposed="corrupt", reason=problem) if problem else tile)
            sizes.append(seen.size)
            progress.advance()
    known = Counter(size for size in sizes if size)
    if not known:
        raise UserError(f"{root}: none of {len(tiles)} pairs can be read; the first: {surveyed[0].reason}")
    if 2 * strangers > known.total():
        raise UserError(f"{root}: {strangers} of {known.total()} masks hold values that are not in data.mask_values "
                        f"{list(mask_values)}. {_census(census, holders)}")
    common, count = known.most_common(1)[0]
    if 2 * count <= known.total():
        found = ", ".join(f"{size[0]} x {size[1]} ({n} tiles)" for size, n in known.most_common(5))
        raise UserError(f"{root}: tiles must be of one size (height x width); found {found}. Cut or sort them")
    for i, (tile, size) in enumerate(zip(surveyed, sizes, strict=True)):
        if tile.proposed != "corrupt" and size != common:
            surveyed[i] = replace(tile, proposed="corrupt", reason=(
                f"{root / tile.image}: {size[0]} x {size[1]} pixels (height x width), most tiles have {common[0]} x "
                f"{common[1]}; tiles must be of one size"))
        elif tile.proposed != "corrupt":
            tile = replace(tile, foreground=float(1 - pixels[i, 0] / pixels[i].sum()))
            surveyed[i] = replace(tile, proposed=audit.verdict(tile, config.filter))
    return FilterResult(surveyed, pixels, census, common)


def _census(pixels: np.ndarray, holders: np.ndarray) -> str:
    """All greys of the masks with their pixels (256,) and the masks that hold them (256,), and what to do."""
    order = sorted(np.argsort(-pixels)[:min(8, np.count_nonzero(pixels))])
    found = ", ".join(f"{grey} ({pixels[grey] / pixels.sum():.1%} of the pixels, in {holders[grey]} masks)"
                      for grey in order)
    if np.count_nonzero(pixels) > 8:
        return (f"The 8 most frequent of {np.count_nonzero(pixels)}: {found}. A mask must hold one grey for each "
                "class; convert them")
    return (f"All values: {found}. Try data.mask_values=[{','.join(map(str, order))}] with as many data.classes, "
            "background first")


def mark_copies(tiles: Sequence[Tile], digests: dict[int, bytes], drop: bool) -> tuple[list[Tile], list[list[str]]]:
    """Note which tiles show the same image, and return the keys of each such image.

    With `drop`, a tile is proposed as `duplicate` if one before it with the same image is kept.
    """
    tiles, same = list(tiles), {}
    for i, digest in digests.items():
        if digest:
            same.setdefault(digest, []).append(i)
    same = [places for places in same.values() if len(places) > 1]
    for first, *others in same:
        for i in others:
            tiles[i] = replace(tiles[i], reason=f"same image as {tiles[first].key}")
    for places in same if drop else []:
        for i in [i for i in places if not tiles[i].proposed][1:]:
            tiles[i] = replace(tiles[i], proposed="duplicate")
    return tiles, [[tiles[i].key for i in places] for places in same]


def propose_split(tiles: Sequence[Tile], test_fraction: float, seed: int) -> list[Tile]:
    """The tiles with train or test proposed for all that nothing speaks against."""
    tiles = list(tiles)
    kept = [i for i, tile in enumerate(tiles) if not tile.proposed]
    splits = split_by_group([tiles[i] for i in kept], test_fraction, seed) if kept else []
    for i, split in zip(kept, splits, strict=True):
        tiles[i] = replace(tiles[i], proposed=split)
    return tiles
