"""Verdicts that a person set in tiles.csv, and what becomes of them when the filter runs again.

A person sets a verdict by editing `split`. The filter writes what it would say itself into `proposed`, and what the
person said into `by_hand`, so that neither is forgotten when for a while they agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from common.console import UserError
from dataset import SPLITS, Tile, read_tiles, rows_of

SHOWN = 10  # of a long list on the terminal


def apply_manual_edits(tiles: Sequence[Tile], before: Sequence[Tile]) -> list[Tile]:
    """Put verdicts in force: those set by hand in the list `before`, else the proposed ones; notes are kept.

    A group stays on one side: that of a tile for which a person chose one, else that of the tiles which the filter
    keeps, and a tile which a person kept although the filter drops it joins them. A corrupt tile cannot be kept.
    """
    was, judged = _finder(before), []
    for tile in tiles:
        old = was(tile)
        hand = old.hand if old else ""
        lost = tile.proposed == "corrupt" and hand in SPLITS
        judged.append(replace(tile, split=tile.proposed if lost or not hand else hand, by_hand=hand,
                              note=old.note if old else ""))

    def rank(tile: Tile) -> int:
        return 2 if tile.proposed not in SPLITS else 0 if tile.by_hand else 1

    sides: dict[str, str] = {}
    for tile in sorted(judged, key=rank):
        if tile.group and tile.split in SPLITS:
            sides.setdefault(tile.group, tile.split)
    for i, tile in enumerate(judged):
        if tile.split in SPLITS and tile.group in sides:
            side = sides[tile.group]
            judged[i] = replace(tile, split=side, by_hand=side if tile.by_hand else "",
                                proposed=side if rank(tile) == 1 else tile.proposed)
    return judged


def _finder(before: Sequence[Tile]) -> Callable[[Tile], Tile | None]:
    """What finds a tile in the list `before`: by its image, else by its key, which spreadsheets like to change."""
    images, keys = {tile.image: tile for tile in before}, {tile.key: tile for tile in before}
    return lambda tile: images.get(tile.image) or keys.get(tile.key)


def read_earlier_list(path: Path) -> list[Tile]:
    """The list of an earlier run; empty where there is none."""
    if not path.exists():
        return []
    try:
        return read_tiles(path.parent)
    except UserError as error:
        if not str(error).startswith(str(path)):  # a tile is at fault, not the list
            raise
        raise UserError(f"{error}. Verdicts set by hand are kept, so the old list is read first: fix it, or delete it "
                        "to judge all tiles afresh") from None


def differences(before: Sequence[Tile], text: bytes, after: Sequence[Tile]) -> list[str]:
    """What becomes of the list `before`, whose file held `text`: a line for all that is kept, lost or new."""
    if not before:
        return []
    was, still = _finder(before), _finder(after)
    pairs = [(was(tile), tile) for tile in after]
    hand = [(old, tile) for old, tile in pairs if old and old.hand]
    sides = [{tile.group: tile.split for tile in tiles if tile.group and tile.split in SPLITS}
             for tiles in (before, after)]
    columns = rows_of(text.decode("utf-8-sig")).fieldnames
    lists = {
        "set by hand and kept": [f"{tile.key} ({tile.proposed} -> {tile.split})" for old, tile in hand
                                 if _kept(old, tile)],
        "set by hand, but not in force": [f"{tile.key} ({old.hand}, now {tile.split})" for old, tile in hand
                                          if not _kept(old, tile)],
        "set by hand, but gone from the folder": [old.key for old in before if old.hand and not still(old)],
        "new in the list, since their files were added or their rows deleted": [tile.key for old, tile in pairs
                                                                                if not old],
        "now in another group": [f"{tile.key} ({old.group or 'none'} -> {tile.group or 'none'})"
                                 for old, tile in pairs if old and old.group != tile.group],
        "groups that change sides": [f"{group} ({sides[0][group]} -> {side})" for group, side in sides[1].items()
                                     if sides[0].get(group, side) != side],
        "columns that are not the filter's and are dropped; words belong into `note`": [
            name for name in columns if name and name not in {f.name for f in fields(Tile)}],
    }
    if not any(tile.proposed for tile in before):
        lists["with another verdict than in the old list, which has no column `proposed` to tell those set by hand"] = [
            f"{tile.key} ({old.split} -> {tile.split})" for old, tile in pairs if old and old.split != tile.split]
    return [f"{what} ({len(found)}): {', '.join(found[:SHOWN])}{', …' if len(found) > SHOWN else ''}"
            for what, found in lists.items() if found]


def _kept(was: Tile, now: Tile) -> bool:
    """Whether a verdict set by hand is in force; a tile kept against the filter may have followed its group."""
    followed = now.proposed not in SPLITS and {was.hand, now.split} <= set(SPLITS)
    return was.hand == now.split or followed
