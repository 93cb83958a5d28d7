r"""Clean a folder of tiles: judge every image and its mask, split what is kept, write tiles.csv (report, section 3.2).

    python data_filter.py --config configs/demo.yaml
    python data_filter.py --config configs/dice_ce.yaml data.root=data/mine "data.group=^(slide\d+)"
    python data_filter.py --config configs/demo.yaml filter.repair=true
    python data_filter.py --config configs/demo.yaml filter.repair=true --model runs/demo.part*

A tile is dropped as `sparse` by the report's 1 % rule and as `misregistered` by its Algorithm 1. Settings can add the
verdicts `unmarked`, `shifted`, `disputed` and `duplicate` (docs/filtering.md). filter.repair gives a tile a new mask in
DATA/repaired/ instead of dropping it, where possible. Every tile stays in tiles.csv with its measurements, and
DATA/filter/ shows what was kept, repaired and dropped. To overrule a verdict, edit the column `split` of tiles.csv:
train and test keep a tile, `excluded` drops it. Later runs keep every verdict that was set by hand.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from common.config import Config
from common.config_files import load_config
from common.console import UserError, argument_parser, command, run, warn
from common.files import LOCK, locked
from common.result_folders import check_replaceable, names_in, replacing_folder
from dataset import (
    FILTER_FOLDER,
    NEW_MASKS,
    SPLITS,
    TILE_LIST,
    Tile,
    check_list_folder,
    claim_list_folder,
    groups_are_missing,
    make_list_folder,
    warn_about_small_tiles,
    write_tiles,
)
from filtering import manual_edits, new_masks, report
from filtering.audit import verdict
from filtering.pipeline import FilterResult, Model, filter_tiles

MOST_DISAGREEMENT = 0.05  # of a model that is good enough to repair masks


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment, for example configs/demo.yaml")
    parser.add_argument("--skip-corrupt", action="store_true",
                        help="list tiles that cannot be read as `corrupt` and continue (default: stop after judging)")
    parser.add_argument("--model", nargs="+", default=[], metavar="RUN", help="also measure every mask against trained "
                        "models. Each tile is asked of a model that did not learn from it; python -m tools.cross_fit "
                        "trains such models")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core, or fewer)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    after_model = [word for word in args.model if "=" in word and not Path(word).exists()]  # --model takes all words
    args.model = [word for word in args.model if word not in after_model]
    args.overrides += after_model
    config = load_config(args.config, args.overrides)
    root, lists = Path(config.data.root), config.data.list_folder
    path, folder = lists / TILE_LIST, lists / FILTER_FOLDER
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1; it is {args.workers}")
    if config.filter.relabel and not args.model:
        raise UserError("filter.relabel needs --model RUN ...: the models whose predictions become masks")
    if config.filter.max_disagreement is not None and not args.model:
        raise UserError("filter.max_disagreement needs --model RUN ...: the models that may disagree")
    existing = next(folder for folder in (lists, *lists.absolute().parents) if folder.exists())
    if root.is_dir() and not os.access(existing, os.W_OK):
        raise UserError(f"{lists}: {TILE_LIST} cannot be written there; allow writing, or set data.cache to a folder "
                        "of yours for it")
    check_list_folder(config.data)
    check_replaceable(folder)
    text, before = _contents(path), manual_edits.read_earlier_list(path, root)
    if not args.model and any(tile.quality is not None for tile in before):
        warn("the last run asked models. Without --model, the verdicts and masks that came from them are given up")
    result = filter_tiles(config, args.workers, before, partial(announce, config=config),
                          partial(load_models, args.model, config, before))
    reject_corrupt(result.tiles, args.skip_corrupt)
    changes = manual_edits.differences(before, text, result.tiles)
    make_list_folder(config.data)
    with locked(lists / LOCK, path, f"{lists}: another process writes {TILE_LIST} or packs its tiles", wait=True):
        with replacing_folder(folder) as partial_folder:
            report.write(partial_folder, result, config, changes, path)
            if text != _contents(path):
                raise UserError(f"{path}: was changed while the tiles were judged. It and {folder} stay as they are; "
                                "run data_filter.py again")
        if not result.kept:
            raise UserError(f"{root}: none of {len(result.tiles)} tiles passes the filter; look at {folder}, then fix "
                            "the masks or relax filter.min_foreground and filter.max_blank")
        claim_list_folder(config.data)
        new_masks.write(result.new_masks, config.data)
        write_tiles(path, result.tiles)
        new_masks.remove_others(result.new_masks, config.data)
    print(*report.remarks(result), *changes, "", report.verdicts(result, config.data.classes), sep="\n")
    warn_about(result, config)
    print(f"\nwrote {path}. To check it, look at {folder}: {names_in(folder)}\n"
          f"next:  {command('python', 'train.py', '--config', args.config, *args.overrides)}")


def load_models(runs: Sequence[str], config: Config, before: Sequence[Tile], tiles: Sequence[Tile]) -> Model | None:
    """Load the networks that are asked about the tiles; this is the only part of the filter that needs torch."""
    if not runs:
        return None
    from evaluation.unseen import UnseenTiles

    return UnseenTiles.of_runs([Path(run) for run in runs], config, tiles, before)


def _contents(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def announce(surveyed: FilterResult, config: Config) -> None:
    """Print what lies in the folder, before the images are judged."""
    print(report.preflight(surveyed, config), flush=True)
    if surveyed.contradiction:
        warn(f"the palettes of masks differ, so an index may mean different classes: {surveyed.contradiction}. To read "
             "the colours instead, set data.colours, or for greys data.masks_by=colour")
    if groups_are_missing(surveyed.tiles):
        reason = "data.group is not set"
        if config.data.group or "{group}" in config.data.images:
            reason = f"{'data.group' if config.data.group else '{group}'} gives every tile a group of its own"
        warn(f"{reason}, so every tile is split on its own. Tiles of one slide or patient can be in both train and "
             "test, which makes scores too high. If you can, give a pattern that finds the slide or patient")
    warn_about_small_tiles(surveyed.sizes[surveyed.sizes[:, 0] > 0], config)


def reject_corrupt(tiles: Sequence[Tile], skip: bool) -> None:
    """Warn about each corrupt tile; raise a `UserError` if there are any, unless they are skipped."""
    corrupt = [tile for tile in tiles if tile.split == "corrupt"]
    for tile in corrupt:
        warn(tile.reason)
    if corrupt and not skip:
        raise UserError(f"{len(corrupt)} of {len(tiles)} tiles are corrupt, see above; {TILE_LIST} was not written. "
                        "Fix or remove them, or continue without them by --skip-corrupt")


def warn_about(result: FilterResult, config: Config) -> None:
    """Warn about what harms training: copies, a split without tiles, a class without pixels."""
    disagreements = [tile.disagreement for tile in result.tiles
                     if tile.disagreement is not None and not verdict(tile, config.filter)]
    if disagreements and np.mean(disagreements) > MOST_DISAGREEMENT:
        warn(f"the model is sure of another class in {np.mean(disagreements):.1%} of the masks that pass all limits. "
             "Most of these masks should be right, so the model may be poor, and so may repairs by it: train it longer")
    if result.by_hand and not config.filter.makes_masks:
        warn(f"masks in {NEW_MASKS}/ that were made or edited by hand are not used without filter.repair=true: "
             f"{len(result.by_hand)}, for example {min(result.by_hand)}")
    if result.refused:
        warn(f"masks in {NEW_MASKS}/ that were made or edited by hand are not used, because the list keeps the given "
             f"mask: {len(result.refused)}, for example {min(result.refused)}. To use one, set mask_from to repaired "
             "and split to what is proposed")
    strange = new_masks.without_tile(result.tiles, config.data)
    if strange:
        warn(f"{NEW_MASKS}/ holds pictures that are the mask of no tile: {len(strange)}, for example {strange[0]}. "
             f"Name a mask KEY.png, with the key of its tile in {TILE_LIST}")
    splits = {tile.key: tile.split for tile in result.tiles}
    kept_keys = [[key for key in keys if splits[key] in SPLITS] for keys in result.copies]
    copies = [keys for keys in kept_keys if len(keys) > 1]
    if copies:
        in_both = sum(len({splits[key] for key in keys}) > 1 for keys in copies)
        warn(f"kept images with several keys: {len(copies)}, for example {' = '.join(copies[0][:4])}. Of these, "
             f"{in_both} are in both train and test, which makes scores too high; filter.drop_duplicates=true keeps "
             "one tile of each")
    pixels = {split: result.pixels[[tile.split == split for tile in result.tiles]].sum(axis=0) for split in SPLITS}
    for split in SPLITS:
        if not pixels[split].any():
            warn(f"no tile has split = {split}; train.py and evaluate.py need both, so fix {TILE_LIST}")
    for name, *counts in zip(config.data.classes, *pixels.values(), strict=True):
        if not any(counts):
            warn(f"no pixel of {name} in the tiles that are kept")
        elif not all(counts):
            warn(f"no pixel of {name} in the {SPLITS[counts.index(0)]} tiles; "
                 + ("name other slides or patients in data.test_groups" if config.data.test_groups else
                    "another seed=N gives another split"))


if __name__ == "__main__":
    run(main)
