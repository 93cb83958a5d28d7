"""Clean a folder of tiles: judge every image-mask pair, split what is kept, write tiles.csv (report, section 3.2).

    python data_filter.py --config configs/demo.yaml
    python data_filter.py --config configs/dice_ce.yaml data.root=data/mine "data.group=^(slide\\d+)"

A tile is dropped as `sparse` if less than filter.min_foreground of its mask is not background, and as `misregistered`
if Algorithm 1 finds glass under too much of its annotated tissue. Beyond the report, and off unless a limit is set:
`unmarked` (filter.max_unmarked: the mask calls tissue background), `shifted` (filter.max_shift: the mask lies off by so
many pixels), `duplicate` (filter.drop_duplicates: an image seen before). Every tile stays in tiles.csv with its
measurements (filtering/audit.py). A look at DATA/filter/ shows what was kept and dropped, in numbers and pictures.

To overrule a verdict, edit the column `split` of tiles.csv: train and test keep a tile, `excluded` drops it. Run again,
the filter keeps every verdict that was set by hand.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from common.config import Config, Filter, load_config
from common.console import Progress, UserError, argument_parser, command, run, warn
from common.files import LOCK, locked, names, refuse_loss, replacing_folder
from common.workers import Map, cores, spread
from dataset import (
    SPLITS,
    TILE_LIST,
    Tile,
    count_classes,
    find_pairs,
    groups_are_missing,
    picture_size,
    read_greys,
    read_pair,
    refuse_different_sizes,
    split_by_group,
    write_tiles,
)
from filtering import audit, manual_edits, report
from filtering.report import Filtered

TILES_A_PROCESS = 64  # fewer are judged sooner than another process starts


# ---------------------------------------------------------------------------------------------- one tile, in a worker

@dataclass(frozen=True)
class Look:
    """What the mask and the image's header tell: size (height, width), pixels of each grey (256,); or the problem."""

    size: tuple[int, int] | None = None
    greys: np.ndarray | None = None
    problem: str = ""


def look(root: Path, tile: Tile) -> Look:
    """Decode the mask alone: most of what can be wrong is seen before an image is decoded."""
    try:
        mask, size = read_greys(root / tile.mask), picture_size(root / tile.image)
        refuse_different_sizes(root, tile, size, mask.shape)
        return Look(size, np.bincount(mask.ravel(), minlength=256))
    except UserError as error:
        return Look(problem=str(error))


def judge(root: Path, greys: Sequence[int], limits: Filter, tile: Tile) -> tuple[Tile, bytes]:
    """The tile with its measurements and verdict, and a digest of its image, which is decoded here."""
    try:
        image, mask = read_pair(root, tile, greys)
    except UserError as error:
        return replace(tile, proposed="corrupt", reason=str(error)), b""
    tile = replace(tile, **audit.measure(image, mask > 0, limits))
    return replace(tile, proposed=audit.verdict(tile, limits)), sha256(image).digest()


# ---------------------------------------------------------------------------------------------- all tiles

def filter_tiles(config: Config, workers: int | None = None, before: Sequence[Tile] = (),
                 announce: Callable[[Filtered], None] = lambda surveyed: None) -> Filtered:
    """Every tile of the root with its measurements and verdict; verdicts set by hand in the list `before` hold.

    `announce` hears what the masks alone tell, before any image is decoded. With workers = None there is one for each
    core, or fewer where there are few tiles.
    """
    data, root = config.data, Path(config.data.root)
    tiles = find_pairs(root, data.images, data.masks, data.group)
    with spread(workers or min(cores(), len(tiles) // TILES_A_PROCESS)) as over:
        surveyed = survey(root, tiles, config, over)
        announce(surveyed)
        tiles, digests = list(surveyed.tiles), {}
        suspects = [i for i, tile in enumerate(tiles) if not tile.proposed]
        with Progress("judge images", len(suspects), "tile") as progress:
            judged = over(partial(judge, root, data.greys, config.filter), [tiles[i] for i in suspects])
            for i, (tile, digest) in zip(suspects, judged, strict=True):
                tiles[i], digests[i] = tile, digest
                progress.advance()
    tiles, copies = mark_copies(tiles, digests, config.filter.drop_duplicates)
    tiles = manual_edits.honour(propose_split(tiles, data.test_fraction, config.seed), before)
    surveyed.pixels[[tile.proposed == "corrupt" for tile in tiles]] = 0
    return replace(surveyed, tiles=tiles, copies=copies)


def survey(root: Path, tiles: Sequence[Tile], config: Config, over: Map) -> Filtered:
    """The tiles with the share of their foreground, proposed as `sparse`, `corrupt` or not yet.

    Where most masks hold greys that the config does not name, or no size is that of most tiles, it is not the tiles
    that are wrong: a `UserError` says what was found.
    """
    greys, surveyed, sizes, strangers = config.data.greys, [], [], 0
    census, holders, pixels = (np.zeros(shape, np.int64) for shape in (256, 256, (len(tiles), len(greys))))
    with Progress("look at masks", len(tiles), "tile") as progress:
        for i, (tile, seen) in enumerate(zip(tiles, over(partial(look, root), tiles), strict=True)):
            problem = seen.problem
            if not problem:
                census += seen.greys
                holders += seen.greys > 0
                try:
                    pixels[i] = count_classes(root / tile.mask, seen.greys, greys)
                except UserError as error:
                    problem, strangers = str(error), strangers + 1
            surveyed.append(replace(tile, proposed="corrupt", reason=problem) if problem else tile)
            sizes.append(seen.size)
            progress.advance()
    known = Counter(size for size in sizes if size)
    if not known:
        raise UserError(f"{root}: none of {len(tiles)} pairs can be read; the first: {surveyed[0].reason}")
    if 2 * strangers > known.total():
        raise UserError(f"{root}: {strangers} of {known.total()} masks hold greys that data.greys {list(greys)} does "
                        f"not name. {_census(census, holders)}")
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
    return Filtered(surveyed, pixels, census, common)


def _census(pixels: np.ndarray, holders: np.ndarray) -> str:
    """All greys of the masks with their pixels (256,) and the masks that hold them (256,), and what to do."""
    order = sorted(np.argsort(-pixels)[:min(8, np.count_nonzero(pixels))])
    found = ", ".join(f"{grey} ({pixels[grey] / pixels.sum():.1%} of the pixels, in {holders[grey]} masks)"
                      for grey in order)
    if np.count_nonzero(pixels) > 8:
        return (f"The 8 most frequent of {np.count_nonzero(pixels)}: {found}. A mask must hold one grey for each "
                "class; convert them")
    return (f"All greys: {found}. Try data.greys=[{','.join(map(str, order))}] with as many data.classes, background "
            "first")


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


# ---------------------------------------------------------------------------------------------- the script

def refuse_corrupt(tiles: Sequence[Tile], skip: bool) -> None:
    """List the corrupt tiles with their reasons; a `UserError` counts them unless they are to be skipped."""
    corrupt = [tile for tile in tiles if tile.split == "corrupt"]
    for tile in corrupt:
        warn(tile.reason)
    if corrupt and not skip:
        raise UserError(f"corrupt tiles, see above: {len(corrupt)} of {len(tiles)}; {TILE_LIST} was not written. Fix "
                        "or remove them, or go on without them by --skip-corrupt")


def announce(surveyed: Filtered, config: Config) -> None:
    """Preflight: what lies in the folder, before the images are judged."""
    print(report.preflight(surveyed, config), flush=True)
    if groups_are_missing(surveyed.tiles):
        reason = "finds another group in every key" if config.data.group else "is not set"
        warn(f"data.group {reason}, so tiles are split one by one: tiles of one slide or patient can fall into both "
             "train and test, and scores then flatter. Give a pattern that finds the slide in the key if you can")
    if min(surveyed.size) < config.data.crop:
        warn(f"the tiles are smaller than data.crop={config.data.crop}; train.py needs a smaller one")


def warn_of(result: Filtered, config: Config) -> None:
    """What a person should know before training."""
    tiles = {tile.key: tile for tile in result.tiles}
    kept = [[key for key in keys if tiles[key].split in SPLITS] for keys in result.copies]
    kept = [keys for keys in kept if len(keys) > 1]
    if kept:
        torn = [keys for keys in kept if len({tiles[key].split for key in keys}) > 1]
        warn(f"kept under more than one key: {len(kept)} image{'s' * (len(kept) > 1)}, e.g. {' = '.join(kept[0][:4])}; "
             f"in both train and test, which flatters the scores: {len(torn)}. filter.drop_duplicates=true keeps one "
             "of each")
    pixels = {split: result.pixels[[tile.split == split for tile in result.tiles]].sum(axis=0) for split in SPLITS}
    for split in SPLITS:
        if not pixels[split].any():
            warn(f"no tile has split = {split}; train.py and evaluate.py need both, so fix {TILE_LIST}")
    for name, *counts in zip(config.data.classes, *pixels.values(), strict=True):
        if not any(counts):
            warn(f"no pixel of {name} in the tiles that are kept")
        elif not all(counts):
            warn(f"no pixel of {name} in the {SPLITS[counts.index(0)]} tiles; another seed=N splits otherwise")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment, e.g. configs/demo.yaml")
    parser.add_argument("--skip-corrupt", action="store_true",
                        help="list tiles that cannot be read as `corrupt` and go on (default: stop after judging all)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core, fewer for few tiles)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    root = Path(config.data.root)
    path, folder = root / TILE_LIST, root / report.FOLDER
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1; it is {args.workers}")
    if root.is_dir() and not os.access(root, os.W_OK):
        raise UserError(f"{root}: cannot be written to, but {TILE_LIST} is to stand there; allow it or copy the tiles")
    refuse_loss(folder)
    text = path.read_bytes() if path.exists() else b""
    before = manual_edits.read_before(path)
    result = filter_tiles(config, args.workers, before, partial(announce, config=config))
    refuse_corrupt(result.tiles, args.skip_corrupt)
    changes = manual_edits.differences(before, text, result.tiles)
    with locked(root / LOCK, path, f"{root}: another process writes {TILE_LIST} or packs its tiles", wait=True):
        with replacing_folder(folder) as partial_folder:
            report.write(partial_folder, result, config, changes, path)
            if text != (path.read_bytes() if path.exists() else b""):
                raise UserError(f"{path}: was changed while the tiles were judged, by you or another process; it "
                                f"and {folder} are left as they are. Run data_filter.py again")
        if not result.kept:
            raise UserError(f"{root}: none of {len(result.tiles)} tiles passes the filter; look at {folder}, then fix "
                            "the masks or relax filter.min_foreground and filter.max_blank")
        write_tiles(path, result.tiles)
    print(*report.copies(result), *changes, "", report.verdicts(result, config.data.classes), sep="\n")
    warn_of(result, config)
    print(f"\nwrote {path}, and {folder} to look at: {names(folder)}\n"
          f"next:  {command('python', 'train.py', '--config', args.config, *args.overrides)}")


if __name__ == "__main__":
    run(main)
