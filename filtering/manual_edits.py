"""Keep the verdicts and notes that a person wrote into tiles.csv when the filter runs again.

A person sets a verdict by editing `split`. The filter writes its own verdict into `proposed` and the person's into
`by_hand`, so that both survive runs in which they agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from common.console import UserError
from common.patterns import reject_outside
from dataset import SPLITS, Tile, read_list, rows_of

SHOWN = 10  # items of a long list on the terminal


def read_earlier_list(path: Path, root: Path) -> list[Tile]:
    """Read the list of an earlier run on the data folder `root`; it is empty if there is none."""
    if not path.exists():
        return []
    try:
        tiles = read_list(path)
    except UserError as error:
        raise UserError(f"{error}. Manual verdicts are read from this list before it is replaced; fix it, or delete it "
                        "to judge all tiles anew") from None
    reject_outside(root, [file for tile in tiles for file in (tile.image, tile.mask)])
    return tiles


def refused_masks(tiles: Sequence[Tile], before: Sequence[Tile]) -> set[str]:
    """Return the keys of the tiles for which a person set `mask_from` back to `given` in the list `before`."""
    return {tile.key for tile, earlier in zip(tiles, _match(tiles, before), strict=True)
            if earlier and refuses_mask(earlier)}


def refuses_mask(tile: Tile) -> bool:
    """Return whether a person keeps the given mask although the filter made another, or dropped the tile."""
    disagrees = tile.ignored is not None or tile.proposed not in ("", *SPLITS)
    return disagrees and tile.split in SPLITS and not tile.has_new_mask


def apply_manual_edits(tiles: Sequence[Tile], before: Sequence[Tile],
                       known_sides: Mapping[str, str] | None = None) -> list[Tile]:
    """Give each tile the verdict in force: the one set by hand in the list `before`, else the proposed one.

    Notes are kept. A corrupt tile cannot be kept. All kept tiles of a group go to one side: the one that a person
    chose, else the one that the filter proposes. A person who keeps a tile that the filter drops chooses no side. With
    `known_sides`, these groups stay on theirs.
    """
    judged = [_with_edits(tile, earlier) for tile, earlier in zip(tiles, _match(tiles, before), strict=True)]
    side_of = sides(judged) | dict(known_sides or {})
    return [_on_side(tile, side_of[tile.group]) if tile.group and tile.split in SPLITS else tile for tile in judged]


def _match(tiles: Sequence[Tile], others: Sequence[Tile]) -> list[Tile | None]:
    """Find each tile in `others` by its image, else by its key, which some spreadsheets change (001 becomes 1)."""
    by_image, by_key = {other.image: other for other in others}, {other.key: other for other in others}
    return [by_image.get(tile.image) or by_key.get(tile.key) for tile in tiles]


def _with_edits(tile: Tile, earlier: Tile | None) -> Tile:
    if earlier is None:
        return replace(tile, split=tile.proposed, by_hand="", note="")
    manual = earlier.split if refuses_mask(earlier) else earlier.manual_verdict  # who refuses a mask keeps the tile
    keeps_corrupt = tile.proposed == "corrupt" and manual in SPLITS
    in_force = manual if manual and not keeps_corrupt else tile.proposed
    return replace(tile, split=in_force, by_hand=manual, note=earlier.note)


def sides(judged: Sequence[Tile]) -> dict[str, str]:
    """Return the side of each group with kept tiles: train or test.

    Tiles that a person moved decide first, then tiles that nobody edited, then tiles kept against the filter.
    """
    kept = [tile for tile in judged if tile.group and tile.split in SPLITS]
    found: dict[str, str] = {}
    for tile in sorted(kept, key=lambda tile: (tile.proposed not in SPLITS, not tile.by_hand)):
        found.setdefault(tile.group, tile.split)
    return found


def _on_side(tile: Tile, side: str) -> Tile:
    if tile.by_hand:
        return replace(tile, split=side, by_hand=side)
    return replace(tile, split=side, proposed=side)  # else the next run would take the side for a manual verdict


def differences(before: Sequence[Tile], text: bytes, after: Sequence[Tile]) -> list[str]:
    """Say what became of the list `before`, whose file held `text`: a line for each kind of change."""
    if not before:
        return []
    pairs = list(zip(_match(after, before), after, strict=True))
    known = [(old, new) for old, new in pairs if old]
    manual = [(old, new) for old, new in known if old.manual_verdict]
    gone = [old for old, new in zip(before, _match(before, after), strict=True) if not new]
    side_before, side_after = ({tile.group: tile.split for tile in tiles if tile.group and tile.split in SPLITS}
                               for tiles in (before, after))
    columns = rows_of(text.decode("utf-8-sig")).fieldnames
    changes = {
        "set by hand and kept": [
            f"{new.key} ({new.proposed} -> {new.split})" for old, new in manual if _is_in_force(old, new)],
        "given masks kept by hand": [
            new.key for old, new in known if refuses_mask(old) and not old.manual_verdict],
        "set by hand, but not in force": [
            f"{new.key} ({old.manual_verdict}, now {new.split})" for old, new in manual if not _is_in_force(old, new)],
        "set by hand, but gone from the folder": [old.key for old in gone if old.manual_verdict],
        "new in the list (files added or rows deleted)": [new.key for old, new in pairs if not old],
        "now in another group": [
            f"{new.key} ({old.group or 'none'} -> {new.group or 'none'})"
            for old, new in known if old.group != new.group],
        "groups that change sides": [
            f"{group} ({side_before[group]} -> {side})"
            for group, side in side_after.items() if side_before.get(group, side) != side],
        "unknown columns that are dropped; write notes into `note`": [
            name for name in columns if name and name not in {f.name for f in fields(Tile)}],
    }
    if not any(old.proposed for old in before):
        changes["another verdict than in the old list, in which manual verdicts cannot be told without `proposed`"] = [
            f"{new.key} ({old.split} -> {new.split})" for old, new in known if old.split != new.split]
    return [f"{title} ({len(items)}): {', '.join(items[:SHOWN])}{', …' if len(items) > SHOWN else ''}"
            for title, items in changes.items() if items]


def _is_in_force(old: Tile, new: Tile) -> bool:
    """Return whether a manual verdict holds. A tile kept against the filter may have followed its group."""
    followed_group = new.proposed not in SPLITS and {old.manual_verdict, new.split} <= set(SPLITS)
    return old.manual_verdict == new.split or followed_group
