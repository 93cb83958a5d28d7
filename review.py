"""Verdicts that a person set in tiles.csv, and what becomes of them when the filter runs again.

A verdict was set by hand where `split`, the one in force, is not what the filter `proposed`.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from console import UserError
from dataset import SPLITS, Tile, read_tiles

SHOWN = 10  # of a long list on the terminal


def honour(tiles: Sequence[Tile], before: Sequence[Tile]) -> list[Tile]:
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
        "set by hand and kept": [f"{tile.key} ({tile.proposed} -> {tile.split})" for was, tile in hand
                                 if _kept(was, tile)],
        "set by hand and lost": [f"{tile.key} ({was.split}, now {tile.split})" for was, tile in hand
                                 if not _kept(was, tile)],
        "set by hand, but gone from the folder": [key for key, was in old.items() if was.set_by_hand
                                                  and key not in new],
        "new in the list, since their files were added or their rows deleted": [key for key in new if key not in old],
        "now in another group": [f"{tile.key} ({was.group or 'none'} -> {tile.group or 'none'})"
                                 for was, tile in shared if was.group != tile.group],
        "columns that are not the filter's and are dropped; words belong into `note`": [
            name for name in columns if name not in known],
    }
    if "proposed" not in columns:
        lists["with another verdict than in the old list, which has no column `proposed` to tell those set by hand"] = [
            f"{tile.key} ({was.split} -> {tile.split})" for was, tile in shared if was.split != tile.split]
    return [f"{what} ({len(found)}): {', '.join(found[:SHOWN])}{', …' if len(found) > SHOWN else ''}"
            for what, found in lists.items() if found]


def _kept(was: Tile, now: Tile) -> bool:
    """Whether a verdict set by hand still holds; a tile kept against the filter may have followed its group."""
    followed = now.proposed not in SPLITS and {was.split, now.split} <= set(SPLITS)
    return was.split == now.split or followed
