"""Write the folder DATA/filter/, in which a person checks the work of the filter.

    summary.md                what lies in the folder; tiles, class shares and groups by verdict; settings
    histograms.png            every measurement of every tile, with its threshold
    kept_near_threshold.png   the kept tiles that came nearest to being dropped
    kept_most_NAME.png        the kept tiles with the largest values of a measurement without threshold
    repaired.png              tiles with a new mask, each with the given mask before it; relabelled.png likewise
    dropped_REASON.png        dropped tiles, the nearest to the threshold first
    settings.yaml             the parts `data` and `filter` of the config
    tiles_before.csv          the list that this run replaced, if there was one
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from common import palette
from common.config import Config, Data, Filter
from common.config_files import to_dict
from common.console import Progress, markdown_table, table
from common.files import write_text
from common.masks import code_of, name_of
from common.store import read_pair
from dataset import DROPPED, GIVEN, NEW_MASKS, REPAIRED, SPLITS, Tile, places_by_group
from filtering import audit, figures
from filtering.new_masks import decode
from filtering.pipeline import FilterResult, describe_palette
from filtering.registration import Move

SHEET = 24  # tiles on a contact sheet
SHOWN = 8  # unknown mask values in a line
MEASURED = {  # column: (label, its threshold in config.Filter)
    "foreground": ("share of the mask that is not background", "min_foreground"),
    "blank": ("share of the annotated tissue that shows glass", "max_blank"),
    "unmarked": ("share of the tile that is tissue called background", "max_unmarked"),
    "shift": ("certain shift of the mask's worst corner, px", "max_shift"),
    "disagreement": ("share of the mask where a model is sure of another class", "max_disagreement"),
}


def measured(tile: Tile, name: str, limits: Filter) -> float | None:
    """Return a measurement as verdicts use it: an uncertain shift counts as no shift."""
    if name != "shift":
        return getattr(tile, name)
    return max(audit.certain_shifts(tile, limits), default=None)


def preflight(result: FilterResult, config: Config) -> str:
    """Return one line each on the pairs, the groups and the mask values in the folder."""
    pairs = f"pairs: {len(result.tiles)}, of {describe_sizes(result.sizes)}"
    corrupt = sum(tile.proposed == "corrupt" for tile in result.tiles)
    if corrupt:
        pairs += f"; {corrupt} of them corrupt"
    groups = "groups: none, because neither data.group nor {group} in data.images is set"
    sizes = Counter(tile.group for tile in result.tiles if tile.group).values()
    if sizes:
        groups = f"groups: {len(sizes)}, of {' to '.join(map(str, sorted({min(sizes), max(sizes)})))} tiles"
    if len(sizes) > 1:
        groups += "; none will be in both train and test"
    by_index = [f"{describe_palette(result.palette)} (masks are read by index)"] if result.palette else []
    return "\n".join([pairs, groups, describe_codes(result, config.data), *by_index])


def describe_sizes(sizes: np.ndarray) -> str:
    """Return the size that all tiles (N, 2) have, or the smallest and the largest; zeros stand for no size."""
    found = Counter(map(tuple, sizes[sizes[:, 0] > 0].tolist()))
    texts = [f"{height} x {width}" for height, width in sorted(found, key=lambda size: (math.prod(size), size))]
    if len(texts) == 1:
        return f"{texts[0]} pixels (height x width)"
    (height, width), count = found.most_common(1)[0]
    return (f"{len(texts)} sizes from {texts[0]} to {texts[-1]} pixels (height x width); {count} have {height} x "
            f"{width}")


def describe_codes(result: FilterResult, data: Data) -> str:
    """Return a line on the values or colours in the masks, and what they stand for."""
    pixels = result.sizes.prod(axis=1).sum()

    def share(codes: Iterable[int]) -> str:
        return f"{sum(result.codes[code] for code in codes) / pixels:.2%}"

    if data.threshold is not None:
        below = [code for code in result.codes if code < data.threshold]
        between = [code for code in result.codes if code not in data.mask_values]
        above = [code for code in result.codes if code >= data.threshold]
        low, high = data.mask_values
        return (f"mask values: below {data.threshold} {data.classes[0]} {share(below)}, from {data.threshold} "
                f"{data.classes[1]} {share(above)}; {share(between)} of the pixels are neither {low} nor {high}")
    names = data.colours or data.mask_values
    parts = [f"{name} {label} {share([code_of(name)])}" for label, name in zip(data.classes, names, strict=True)]
    parts += [f"{name} ignored {share([code_of(name)])}" for name in data.ignore]
    unknown = sorted(result.codes.keys() - {*map(code_of, (*names, *data.ignore))})
    if unknown:
        shown = ", ".join(map(name_of, unknown[:SHOWN])) + (", …" if len(unknown) > SHOWN else "")
        parts.append(f"unknown {shown} {share(unknown)}")
    return f"mask {'colours' if data.colours else 'values'}: {', '.join(parts)}"


def remarks(result: FilterResult) -> list[str]:
    """Return lines on images that have several keys and on tiles of nothing but background, if there are any."""
    groups = {tile.key: tile.group for tile in result.tiles}
    across = sum(len({groups[key] for key in keys}) > 1 for keys in result.copies)
    empty = sum(result.pixels[i, 0] > 0 and not result.pixels[i, 1:].any() for i in result.kept)
    lines = {f"images with several keys: {len(result.copies)}, in several groups: {across}": result.copies,
             f"kept tiles with nothing but background: {empty}": empty}
    return [*(line for line, count in lines.items() if count), *describe_new_masks(result)]


def describe_new_masks(result: FilterResult) -> list[str]:
    """Return lines on the tiles that are kept with another mask than the given one, if there are any."""
    lines = []
    for name in dict.fromkeys(tile.mask_from for tile in result.tiles if tile.has_new_mask):
        chosen = [i for i in result.kept if result.tiles[i].mask_from == name]
        if chosen:
            areas = result.sizes[chosen].prod(axis=1)
            share = sum(areas * [result.tiles[i].ignored or 0.0 for i in chosen]) / areas.sum()
            reasons = Counter(result.tiles[i].reason.partition(":")[0] for i in chosen)
            lines.append(f"masks {'repaired' if name == REPAIRED else f'from {name}'}: {len(chosen)} ("
                         + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
                         + f"); {share:.1%} of their pixels are ignored")
    if result.by_hand and any(tile.has_new_mask for tile in result.tiles):
        lines.append(f"masks in {NEW_MASKS}/ that were made or edited by hand and stay as they are: "
                     f"{len(result.by_hand)}, for example {min(result.by_hand)}")
    return lines


def verdicts(result: FilterResult, classes: Sequence[str], as_table: Callable[..., str] = table) -> str:
    """Return a table of tiles, groups and class shares by verdict."""
    selections = {name: (name,) for name in SPLITS} | {"kept": SPLITS} | {name: (name,) for name in DROPPED}
    rows = []
    for name, splits in (selections | {"all": SPLITS + DROPPED}).items():
        chosen = [i for i, tile in enumerate(result.tiles) if tile.split in splits]
        if chosen or name in (*SPLITS, "kept", "sparse", "misregistered"):
            groups = len({result.tiles[i].group for i in chosen} - {""})
            rows.append([name, str(len(chosen)), f"{len(chosen) / len(result.tiles):.1%}", str(groups or "-"),
                         *_class_shares(result.pixels[chosen])])
    return as_table(["verdict", "tiles", "share", "groups", *classes], rows)


def _class_shares(pixels: np.ndarray) -> list[str]:
    """Return the share of each class in the pixels (n, K)."""
    total = pixels.sum(axis=0)
    return [f"{share:.1%}" for share in total / total.sum()] if total.any() else ["-"] * pixels.shape[1]


def _by_group(result: FilterResult, classes: Sequence[str]) -> str:
    """Return a table with a row for each group; those that lost the largest share come first."""
    reasons = [reason for reason in DROPPED if any(tile.split == reason for tile in result.tiles)]
    rows = []
    for places in places_by_group([tile.group for tile in result.tiles]):
        counts = Counter(result.tiles[i].split for i in places)
        kept = [i for i in places if result.tiles[i].split in SPLITS]
        side = next((split for split in SPLITS if counts[split]), "-")
        share = len(kept) / len(places)
        rows.append((share, [result.tiles[places[0]].group, side, str(len(places)), f"{share:.0%}",
                             *(str(counts[reason]) for reason in reasons), *_class_shares(result.pixels[kept])]))
    rows.sort(key=lambda row: row[0])
    return markdown_table(["group", "split", "tiles", "kept", *reasons, *(f"{name} (kept)" for name in classes)],
                          [cells for _, cells in rows])


def summary(result: FilterResult, config: Config, changes: Sequence[str], pictures: Sequence[str]) -> str:
    """Return the text of summary.md; `changes` are the lines of `manual_edits.differences`."""
    tiles, split = result.tiles, {tile.key: tile.split for tile in result.tiles}
    settings = [[name, "off" if value is None else str(value)] for name, value in to_dict(config.filter).items()]
    manual = [[tile.key, tile.proposed, tile.split, tile.note] for tile in tiles if tile.by_hand]
    new_masks = [[tile.key, tile.split, tile.mask_from, tile.reason, f"{tile.ignored or 0:.1%}"]
                 for tile in tiles if tile.has_new_mask]
    corrupt = [[tile.key, tile.reason] for tile in tiles if tile.split == "corrupt"]
    same = [[keys[0], ", ".join(keys[1:]), ", ".join(sorted({split[key] for key in keys}))] for keys in result.copies]
    folder = [*preflight(result, config).splitlines(), *remarks(result)]
    if not result.copies:
        folder.append("images with several keys: none")
    sections = {
        "What lies in the folder": "\n".join(f"- {line}" for line in folder),
        "Verdicts": "The row `all` is before filtering, `kept` is after. Class shares are shares of pixels.\n\n"
                    + verdicts(result, config.data.classes, markdown_table),
        "Settings": markdown_table(["filter", "value"], settings),
        "Measurements": "![Histograms of the measurements with their thresholds](histograms.png)",
        "New masks": markdown_table(["key", "split", "mask from", "why, and what was done", "ignored"], new_masks)
        if new_masks else "",
        "Manual verdicts": markdown_table(["key", "proposed", "in force", "note"], manual) if manual else "",
        "Since the last run": "\n".join(f"- {change}" for change in changes),
        "Corrupt": markdown_table(["key", "reason"], corrupt) if corrupt else "",
        "Copies": markdown_table(["image", "same image", "verdicts"], same) if same else "",
        "Groups": _by_group(result, config.data.classes) if any(tile.group for tile in tiles) else "",
        "Pictures": "\n\n".join(f"![{name}]({name})" for name in pictures),
    }
    return "\n\n".join([
        f"# Filter of {config.data.root}",
        f"{len(result.kept)} of {len(tiles)} tiles are kept. To overrule a verdict, edit the column `split` of "
        "tiles.csv. docs/filtering.md explains the measurements.",
        *(f"## {title}\n\n{text}" for title, text in sections.items() if text)]) + "\n"


def histograms(result: FilterResult, limits: Filter) -> figures.Figure:
    panels = []
    for name, (label, limit) in MEASURED.items():
        values = [(tile.split in SPLITS, measured(tile, name, limits)) for tile in result.tiles]
        kept, dropped = ([value for is_kept, value in values if is_kept == wanted and value is not None]
                         for wanted in (True, False))
        if kept or dropped or name != "disagreement":
            panels.append((label, kept, dropped, getattr(limits, limit)))
    return figures.histograms(panels)


def sheets(result: FilterResult, limits: Filter) -> dict[str, tuple[str, list[Tile]]]:
    """Return title and tiles of every contact sheet by file name."""
    kept = [result.tiles[i] for i in result.kept]
    found = {}
    if kept:
        nearest = sorted(kept, key=lambda tile: -nearness(tile, limits))
        found["kept_near_threshold.png"] = "kept, the nearest to a threshold first", nearest[:SHEET]
    for name, (label, limit) in MEASURED.items():
        most = sorted((tile for tile in kept if measured(tile, name, limits)),
                      key=lambda tile: -measured(tile, name, limits))
        if getattr(limits, limit) is None and most:
            found[f"kept_most_{name}.png"] = f"kept, no threshold set: largest {label}", most[:SHEET // 2]
    for name, chosen in (("repaired", [tile for tile in kept if tile.mask_from == REPAIRED]),
                         ("relabelled", [tile for tile in kept if tile.is_relabelled])):
        if chosen:
            shown = _spread(chosen, SHEET // 2)
            found[f"{name}.png"] = (f"{name}: {len(shown)} of {len(chosen)}, each with its given mask and then its new "
                                    "mask", [version for tile in shown for version in (given_of(tile), tile)])
    for reason in DROPPED:
        tiles = sorted((tile for tile in result.tiles if tile.split == reason and tile.proposed != "corrupt"),
                       key=lambda tile: nearness(tile, limits))
        if tiles:
            chosen = _spread(tiles, SHEET)
            title = f"dropped as {reason}: {len(chosen)} of {len(tiles)}, the nearest to the threshold first"
            found[f"dropped_{reason}.png"] = title, chosen
    return found


def _spread(tiles: Sequence[Tile], most: int) -> list[Tile]:
    """Return at most so many tiles, evenly spread over the list."""
    return [tiles[i] for i in np.unique(np.linspace(0, len(tiles) - 1, min(most, len(tiles))).round().astype(int))]


def nearness(tile: Tile, limits: Filter) -> float:
    """Return the largest measurement in units of its threshold; from 1 on a tile is dropped."""
    ratios = [0.0]
    for name, (_, limit) in MEASURED.items():
        value, threshold = measured(tile, name, limits), getattr(limits, limit)
        if value is not None and threshold:
            ratios.append(threshold / max(value, 1e-9) if name == "foreground" else value / threshold)
    return max(ratios)


def given_of(tile: Tile) -> Tile:
    """Return the tile with its given mask in use."""
    return replace(tile, mask_from=GIVEN)


def draw(tile: Tile, result: FilterResult, config: Config) -> tuple[str, np.ndarray]:
    """Return caption and thumbnail of a tile with the mask in use."""
    is_made = tile.has_new_mask and tile.key in result.new_masks  # the files are written after the report
    image, mask = read_pair(tile.given_pair if is_made else tile.pair, config.data)
    if is_made:
        mask = decode(result.new_masks[tile.key])
    glass = audit.find_glass(audit.inverted_grey(image), config.filter)
    lines = [tile.key if len(tile.key) <= 26 else "…" + tile.key[-25:], "no pixel has a class"]
    if tile.foreground is not None:
        lines[1] = f"foreground {tile.foreground:.1%}"
    if tile.has_new_mask:
        found = re.search(r"moved by (\S+), (\S+) px(?:, turned by (\S+) degrees)?", tile.reason)
        lines[1:] = [f"now: {tile.ignored or 0:.1%} ignored"]
        if found:
            lines.append(f"moved {in_words(Move(*(float(value or 0) for value in found.groups())))}")
        return "\n".join(lines), figures.annotated(image, mask, glass, len(config.data.classes))
    if tile.blank is not None:
        lines[1] = f"blank {tile.blank:.1%}  unmarked {tile.unmarked:.1%}"
    moves = audit.certain_moves(tile, config.filter)
    if moves:
        lines.append(f"off by {in_words(moves[0])}")
    elif tile.ignored is None and (tile.reason or tile.note):
        lines.append((tile.reason or tile.note)[:40])
    return "\n".join(lines), figures.annotated(image, mask, glass, len(config.data.classes))


def in_words(move: Move) -> str:
    """Describe a move without what is less than half a pixel or degree."""
    right, down, clockwise = (round(value) for value in (move.right, move.down, move.clockwise))
    parts = [f"{abs(right)} px {'right' if right > 0 else 'left'}" * bool(right),
             f"{abs(down)} px {'down' if down > 0 else 'up'}" * bool(down), f"{clockwise}°" * bool(clockwise)]
    return ", ".join(filter(None, parts)) or "less than 1 px"


def write(folder: Path, result: FilterResult, config: Config, changes: Sequence[str], before: Path) -> None:
    """Fill an empty folder; `before` is the list that this run replaces."""
    contents = sheets(result, config.filter)
    with Progress("draw sheets", sum(len(tiles) for _, tiles in contents.values()), "tile") as progress:
        for name, (title, tiles) in contents.items():
            cells = []
            for tile in tiles:
                cells.append(draw(tile, result, config))
                progress.advance()
            figure = figures.contact_sheet(cells, title, config.data.classes,
                                           bool(config.data.ignore) or any(tile.has_new_mask for tile in tiles))
            palette.save(figure, folder / name)
    palette.save(histograms(result, config.filter), folder / "histograms.png")
    write_text(folder / "summary.md", summary(result, config, changes, list(contents)))
    write_text(folder / "settings.yaml", yaml.safe_dump(
        {"data": to_dict(config.data), "filter": to_dict(config.filter)}, sort_keys=False))
    if before.exists():
        shutil.copyfile(before, folder / "tiles_before.csv")
