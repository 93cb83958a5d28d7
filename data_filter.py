r"""Clean a folder of tiles: judge every image-mask pair, split what is kept, write tiles.csv (report, section 3.2).

    python data_filter.py --config configs/demo.yaml
    python data_filter.py --config configs/dice_ce.yaml data.root=data/mine "data.group=^(slide\d+)"

A tile is dropped as `sparse` if less than filter.min_foreground of its mask is not background, and as `misregistered`
if Algorithm 1 finds glass under too much of its annotated tissue. Beyond the report, and off unless a limit is set:
`unmarked` (filter.max_unmarked: the mask calls tissue background), `shifted` (filter.max_shift: the mask lies off by so
many pixels), `duplicate` (filter.drop_duplicates: an image seen before). Every tile stays in tiles.csv with its
measurements (filtering/audit.py). A look at DATA/filter/ shows what was kept and dropped, in numbers and pictures.

To overrule a verdict, edit the column `split` of tiles.csv: train and test keep a tile, `excluded` drops it. Run again,
the filter keeps every verdict that was set by hand.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.config import Config
from common.config_files import load_config
from common.console import UserError, argument_parser, command, run, warn
from common.files import LOCK, locked
from common.result_folders import check_replaceable, names_in, replacing_folder
from dataset import SPLITS, TILE_LIST, Tile, groups_are_missing, write_tiles
from filtering import manual_edits, report
from filtering.pipeline import FilterResult, filter_tiles


def reject_corrupt(tiles: Sequence[Tile], skip: bool) -> None:
    """List the corrupt tiles with their reasons; a `UserError` counts them unless they are to be skipped."""
    corrupt = [tile for tile in tiles if tile.split == "corrupt"]
    for tile in corrupt:
        warn(tile.reason)
    if corrupt and not skip:
        raise UserError(f"corrupt tiles, see above: {len(corrupt)} of {len(tiles)}; {TILE_LIST} was not written. Fix "
                        "or remove them, or go on without them by --skip-corrupt")


def announce(surveyed: FilterResult, config: Config) -> None:
    """Preflight: what lies in the folder, before the images are judged."""
    print(report.preflight(surveyed, config), flush=True)
    if groups_are_missing(surveyed.tiles):
        reason = "finds another group in every key" if config.data.group else "is not set"
        warn(f"data.group {reason}, so tiles are split one by one: tiles of one slide or patient can fall into both "
             "train and test, and scores then flatter. Give a pattern that finds the slide in the key if you can")
    if min(surveyed.size) < config.data.crop:
        warn(f"the tiles are smaller than data.crop={config.data.crop}; train.py needs a smaller one")


def warn_of(result: FilterResult, config: Config) -> None:
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
    check_replaceable(folder)
    text = path.read_bytes() if path.exists() else b""
    before = manual_edits.read_earlier_list(path)
    result = filter_tiles(config, args.workers, before, partial(announce, config=config))
    reject_corrupt(result.tiles, args.skip_corrupt)
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
    print(f"\nwrote {path}, and {folder} to look at: {names_in(folder)}\n"
          f"next:  {command('python', 'train.py', '--config', args.config, *args.overrides)}")


if __name__ == "__main__":
    run(main)
