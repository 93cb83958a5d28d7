"""Clean a folder of tiles: judge every image-mask pair, split what is kept, write tiles.csv (report, section 3.2).

    python data_filter.py --config configs/demo.yaml
    python data_filter.py --config configs/dice_ce.yaml data.root=data/mine data.group='^(slide\\d+)'

A tile is dropped as `sparse` if less than filter.min_foreground of its mask is not background, and as `misregistered`
if Algorithm 1 finds glass under too much of its annotated tissue. Beyond the report, and off unless a limit is set:
`unmarked` (filter.max_unmarked: the mask calls tissue background), `shifted` (filter.max_shift: the mask lies off by so
many pixels), `duplicate` (filter.drop_duplicates: an image seen before). Every tile stays in tiles.csv with its
measurements (audit.py). A look at DATA/filter/ shows what was kept and dropped, in numbers and pictures.

To overrule a verdict, edit the column `split` of tiles.csv: train and test keep a tile, `excluded` drops it. Run again,
the filter keeps every verdict that was set by hand.
"""

import argparse
import csv
import io
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

import audit
import filter_report
from config import Config, Filter, load_config
from console import Progress, UserError, run, warn
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
    read_tiles,
    refuse_different_sizes,
    split_by_group,
    write_tiles,
)
from files import held
from filter_report import Filtered
from parallel import Map, cores, spread

TILES_A_PROCESS = 64  # fewer are judged sooner than another process starts
SHOWN = 10  # of a long list on the terminal


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
        return replace(tile, proposed="corrupt", note=str(error)), b""
    tile = replace(tile, **audit.measure(image, mask > 0, limits))
    return replace(tile, proposed=audit.verdict(tile, limits)), sha256(image).digest()


# ---------------------------------------------------------------------------------------------- all tiles

def filter_tiles(config: Config, workers: int | None = None, before: Sequence[Tile] = ()) -> Filtered:
    """Every tile of the root with its measurements and verdict; verdicts set by hand in the list `before` hold."""
    data, limits, root = config.data, config.filter, Path(config.data.root)
    tiles = find_pairs(root, data.images, data.masks, data.group)
    with spread(workers or min(cores(), len(tiles) // TILES_A_PROCESS)) as over:
        surveyed = survey(root, tiles, config, over)
        tiles, copies = list(surveyed.tiles), {}
        suspects = [i for i, tile in enumerate(tiles) if not tile.proposed]
        with Progress("judge images", len(suspects), "tile") as progress:
            judged = over(partial(judge, root, data.greys, limits), [tiles[i] for i in suspects])
            for i, (tile, digest) in zip(suspects, judged, strict=True):
                tiles[i] = tile
                if digest:
                    copies.setdefault(digest, []).append(i)
                progress.advance()
    copies = [places for places in copies.values() if len(places) > 1]
    for first, *others in copies:
        for i in others:
            dropped = limits.drop_duplicates and not tiles[i].proposed
            tiles[i] = replace(tiles[i], note=f"same image as {tiles[first].key}",
                               proposed="duplicate" if dropped else tiles[i].proposed)
    tiles = honour_hand(propose_split(tiles, data.test_fraction, config.seed), before)
    return replace(surveyed, tiles=tiles, copies=[[tiles[i].key for i in places] for places in copies])


def survey(root: Path, tiles: Sequence[Tile], config: Config, over: Map) -> Filtered:
    """The tiles with the share of their foreground, proposed as `sparse`, `corrupt` or not yet.

    Where most masks hold greys that the config does not name, or no size is that of most tiles, it is not the tiles
    that are wrong: a `UserError` says what was found.
    """
    greys, surveyed, sizes = config.data.greys, [], []
    census, holders, pixels = (np.zeros(shape, np.int64) for shape in (256, 256, (len(tiles), len(greys))))
    with Progress("look at masks", len(tiles), "tile") as progress:
        for i, (tile, seen) in enumerate(zip(tiles, over(partial(look, root), tiles), strict=True)):
            if not seen.problem:
                census += seen.greys
                holders += seen.greys > 0
                try:
                    pixels[i] = count_classes(root / tile.mask, seen.greys, greys)
                    tile = replace(tile, foreground=float(1 - pixels[i, 0] / pixels[i].sum()))
                    tile = replace(tile, proposed=audit.verdict(tile, config.filter))
                except UserError as error:
                    seen = replace(seen, problem=str(error))
            surveyed.append(replace(tile, proposed="corrupt", note=seen.problem) if seen.problem else tile)
            sizes.append(seen.size)
            progress.advance()
    known, common = Counter(size for size in sizes if size), None
    if not known:
        raise UserError(f"{root}: none of {len(tiles)} pairs can be read; the first: {surveyed[0].note}")
    _refuse_other_greys(root, census, holders, greys, known.total())
    common, count = known.most_common(1)[0]
    if 2 * count <= known.total():
        found = ", ".join(f"{size[0]} x {size[1]} ({n} tiles)" for size, n in known.most_common(5))
        raise UserError(f"{root}: tiles must be of one size (height x width); found {found}. Cut or sort them")
    for i, size in enumerate(sizes):
        if size not in (None, common) and surveyed[i].proposed != "corrupt":
            note = (f"{root / tiles[i].image}: {size[0]} x {size[1]} pixels (height x width), most tiles have "
                    f"{common[0]} x {common[1]}; tiles must be of one size")
            surveyed[i] = replace(surveyed[i], proposed="corrupt", note=note)
    pixels[[tile.proposed == "corrupt" for tile in surveyed]] = 0
    return Filtered(surveyed, pixels, census, common)


def _refuse_other_greys(root: Path, census: np.ndarray, holders: np.ndarray, greys: Sequence[int], masks: int) -> None:
    strange = np.setdiff1d(np.flatnonzero(census), greys)
    if not strange.size or 2 * holders[strange].max() <= masks:
        return
    order = np.argsort(-census)[:np.count_nonzero(census)]
    found = ", ".join(f"{grey} ({census[grey] / census.sum():.1%} of the pixels, in {holders[grey]} masks)"
                      for grey in sorted(order[:8]))
    few = len(order) <= 8
    raise UserError(f"{root}: {holders[strange].max()} of {masks} masks hold a grey that data.greys {list(greys)} does "
                    f"not name. {'All' if few else f'The 8 most frequent of {len(order)}'} greys: {found}. "
                    + (f"Try data.greys=[{','.join(map(str, sorted(order)))}] with as many data.classes, background "
                       "first" if few else "Masks must hold one grey for each class; convert them"))


def propose_split(tiles: Sequence[Tile], test_fraction: float, seed: int) -> list[Tile]:
    """The tiles with train or test proposed for all that nothing speaks against."""
    tiles = list(tiles)
    kept = [i for i, tile in enumerate(tiles) if not tile.proposed]
    splits = split_by_group([tiles[i] for i in kept], test_fraction, seed) if kept else []
    for i, split in zip(kept, splits, strict=True):
        tiles[i] = replace(tiles[i], proposed=split)
    return tiles


# ---------------------------------------------------------------------------------------------- verdicts set by hand

def honour_hand(tiles: Sequence[Tile], before: Sequence[Tile]) -> list[Tile]:
    """Put verdicts in force: those set by hand in the list `before`, else the proposed ones.

    A group stays on one side: that of a tile which a person moved, else that of the tiles which the filter keeps, and
    a tile which a person kept although the filter drops it joins them. A corrupt tile cannot be kept.
    """
    by_hand = {tile.key: tile for tile in before if tile.set_by_hand}
    judged = []
    for tile in tiles:
        hand = by_hand.get(tile.key)
        if hand and not (tile.proposed == "corrupt" and hand.split in SPLITS):
            judged.append(replace(tile, split=hand.split, note=hand.note or tile.note))
        else:
            judged.append(replace(tile, split=tile.proposed))

    def rank(tile: Tile) -> int:
        return 2 if tile.proposed not in SPLITS else 0 if tile.set_by_hand else 1

    sides: dict[str, str] = {}
    for tile in sorted(judged, key=rank):
        if tile.group and tile.split in SPLITS:
            sides.setdefault(tile.group, tile.split)
    for i, tile in enumerate(judged):
        if tile.split in SPLITS and tile.group in sides:
            follows = rank(tile) == 1
            side = sides[tile.group]
            judged[i] = replace(tile, split=side, proposed=side if follows else tile.proposed)
    return judged


def read_before(path: Path) -> tuple[list[Tile], list[str]]:
    """The list of an earlier run and the names of its columns; both empty where there is none."""
    if not path.exists():
        return [], []
    try:
        tiles = read_tiles(path.parent)
    except UserError as error:
        raise UserError(f"{error}. Verdicts set by hand are kept, so the old list is read first: mend it, or delete it "
                        "to judge all tiles afresh") from None
    first = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    return tiles, next(csv.reader(io.StringIO(first), delimiter=";" if first.startswith("key;") else ","))


def differences(before: Sequence[Tile], columns: Sequence[str], after: Sequence[Tile]) -> list[str]:
    """What becomes of the hand's work in the list `before`: one sentence for everything kept or lost."""
    if not before:
        return []
    old, new = {tile.key: tile for tile in before}, {tile.key: tile for tile in after}
    shared = [(old[key], tile) for key, tile in new.items() if key in old]
    hand = [(was, tile) for was, tile in shared if was.set_by_hand]
    known = {f.name for f in fields(Tile)}
    lists = {
        "verdicts set by hand are kept": [f"{tile.key} ({tile.proposed} -> {tile.split})" for was, tile in hand
                                          if tile.split == was.split],
        "verdicts set by hand could not be kept": [f"{tile.key} ({was.split}, now {tile.split})" for was, tile in hand
                                                   if tile.split != was.split],
        "tiles with a verdict set by hand are gone from the folder": [key for key, was in old.items()
                                                                      if was.set_by_hand and key not in new],
        "tiles are new: their files were added, or their rows deleted": [key for key in new if key not in old],
        "tiles are now in another group": [f"{tile.key} ({was.group or 'none'} -> {tile.group or 'none'})"
                                           for was, tile in shared if was.group != tile.group],
        "columns are not the filter's and are dropped (words belong into `note`)": [name for name in columns
                                                                                   if name not in known],
    }
    if "proposed" not in columns:
        lists["verdicts change; the old list has no column `proposed`, so those set by hand cannot be told"] = [
            f"{tile.key} ({was.split} -> {tile.split})" for was, tile in shared if was.split != tile.split]
    return [f"{len(found)} {what}: {', '.join(found[:SHOWN])}{', …' if len(found) > SHOWN else ''}"
            for what, found in lists.items() if found]


# ---------------------------------------------------------------------------------------------- the script

def refuse_corrupt(tiles: Sequence[Tile], skip: bool) -> None:
    """List the corrupt tiles with their reasons; a `UserError` counts them unless they are to be skipped."""
    corrupt = [tile for tile in tiles if tile.split == "corrupt"]
    for tile in corrupt:
        warn(tile.note)
    if corrupt and not skip:
        raise UserError(f"{len(corrupt)} of {len(tiles)} tiles are corrupt, see above; {TILE_LIST} was not written. "
                        "Mend or remove them, or go on without them by --skip-corrupt")


def warn_of(result: Filtered, config: Config) -> None:
    """What a person should know before training."""
    if groups_are_missing(result.tiles):
        reason = "finds another group in every key" if config.data.group else "is not set"
        warn(f"data.group {reason}, so tiles are split one by one: tiles of one slide or patient can fall into both "
             "train and test, and scores then flatter. Give a pattern that finds the slide in the key if you can")
    tiles = {tile.key: tile for tile in result.tiles}
    kept = [[key for key in keys if tiles[key].split in SPLITS] for keys in result.copies]
    kept = [keys for keys in kept if len(keys) > 1]
    if kept:
        torn = [keys for keys in kept if len({tiles[key].split for key in keys}) > 1]
        warn(f"{len(kept)} images are kept under more than one key, e.g. {' = '.join(kept[0][:4])}; {len(torn)} of "
             "them in both train and test, which flatters the scores. filter.drop_duplicates=true keeps one of each")
    for split in SPLITS:
        pixels = result.pixels[[tile.split == split for tile in result.tiles]].sum(axis=0)
        absent = [name for name, count in zip(config.data.classes, pixels, strict=True) if not count]
        if absent and pixels.any():
            warn(f"no pixel of {' and '.join(absent)} in the {split} tiles; another seed=N splits otherwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment, e.g. configs/demo.yaml")
    parser.add_argument("--skip-corrupt", action="store_true",
                        help="list tiles that cannot be read as `corrupt` and go on (default: stop after judging all)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core, fewer for few tiles)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    root = Path(config.data.root)
    path, folder = root / TILE_LIST, root / filter_report.FOLDER
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1; it is {args.workers}")
    before, columns = read_before(path)
    result = filter_tiles(config, args.workers, before)
    refuse_corrupt(result.tiles, args.skip_corrupt)
    changes = differences(before, columns, result.tiles)
    with held(root):
        filter_report.write(folder, result, config, changes, path)
        if not result.kept:
            raise UserError(f"{root}: none of {len(result.tiles)} tiles passes the filter; look at {folder}, then mend "
                            "the masks or relax filter.min_foreground and filter.max_blank")
        write_tiles(path, result.tiles)
    for line in changes:
        print(line)
    warn_of(result, config)
    print(filter_report.preflight(result, config), filter_report.verdicts(result, config.data.classes), sep="\n\n")
    print(f"\nwrote {path}, and {folder} to look at: {', '.join(sorted(file.name for file in folder.iterdir()))}\n"
          f"next:  python train.py {shlex.join(['--config', args.config, *args.overrides])}")


if __name__ == "__main__":
    run(main)
