"""What a person looks at after filtering: DATA/filter/ with a summary in Markdown, histograms and contact sheets.

    summary.md                what was found before judging; tiles, class shares and groups by verdict; settings
    histograms.png            every measurement of every tile, with its threshold
    kept_near_threshold.png   the kept tiles that came nearest to being dropped
    kept_most_NAME.png        the kept tiles with the most of a measurement that has no threshold, to choose one by
    dropped_REASON.png        from the nearest to the threshold to the farthest
    settings.yaml             the filter's part of the config
    tiles_before.csv          the list that this run replaced, if there was one
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml

from common import palette
from common.config import Config, Filter
from common.config_files import to_dict
from common.console import Progress, markdown_table, table
from common.files import write_text
from dataset import DROPPED, SPLITS, Tile, read_pair
from filtering import audit, figures
from filtering.pipeline import FilterResult

FOLDER = "filter"
SHEET = 24  # tiles on a contact sheet
MEASURED = {  # column: (label, its threshold in config.Filter)
    "foreground": ("share of the mask that is not background", "min_foreground"),
    "blank": ("share of the annotated tissue that shows glass", "max_blank"),
    "unmarked": ("share of the tile that is tissue called background", "max_unmarked"),
    "shift": ("certain shift of the mask, px", "max_shift"),
}


def measured(tile: Tile, name: str, limits: Filter) -> float | None:
    """A measurement as verdicts use it: an uncertain shift counts as none."""
    uncertain = name == "shift" and (tile.confidence or 0) < limits.min_confidence
    return 0.0 if uncertain and tile.shift is not None else getattr(tile, name)


Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def preflight(result: FilterResult, config: Config) -> str:
    """What lies in the folder, in a few lines."""
    tiles, data = result.tiles, config.data
    groups = Counter(tile.group for tile in tiles if tile.group)
    counts = sorted({0, *groups.values()})[1:]
    shares = result.mask_values / result.mask_values.sum()
    census = [f"{grey} {name} {shares[grey]:.2%}" for name, grey in zip(data.classes, data.mask_values, strict=True)]
    strange = np.setdiff1d(np.flatnonzero(result.mask_values), data.mask_values)
    if strange.size:
        census.append(f"of no class {', '.join(map(str, strange[:8]))}{', …' * (strange.size > 8)} "
                      f"{shares[strange].sum():.2%}")
    corrupt = sum(tile.proposed == "corrupt" for tile in tiles)
    many = len(groups) > 1
    return "\n".join([
        f"pairs: {len(tiles)}, of {result.size[0]} x {result.size[1]} pixels (height x width)"
        + (f"; {corrupt} of them corrupt" if corrupt else ""),
        f"groups: {len(groups)}, of {' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))} tiles"
        + ("; none will be in both train and test" * many) if groups else "groups: none, since data.group is not set",
        f"greys of the masks: {', '.join(census)}",
    ])


def copies(result: FilterResult) -> list[str]:
    """One line on the images that stand under several keys, if there are any."""
    groups = {tile.key: tile.group for tile in result.tiles}
    across = sum(len({groups[key] for key in keys}) > 1 for keys in result.copies)
    images = f"{len(result.copies)} image{'s' * (len(result.copies) > 1)}"
    return [f"copies: {images} under more than one key, {across} in more than one group"] if result.copies else []


def verdicts(result: FilterResult, classes: Sequence[str], as_table: Table = table) -> str:
    """Tiles, groups and class shares by verdict."""
    tiles, rows = result.tiles, []
    for name, wanted in (*((split, (split,)) for split in SPLITS), ("kept", SPLITS),
                         *((reason, (reason,)) for reason in DROPPED), ("all", SPLITS + DROPPED)):
        chosen = [i for i, tile in enumerate(tiles) if tile.split in wanted]
        if not chosen and name not in (*SPLITS, "kept", "sparse", "misregistered"):
            continue
        groups = len({tiles[i].group for i in chosen} - {""})
        rows.append([name, str(len(chosen)), f"{len(chosen) / len(tiles):.1%}", str(groups or "-"),
                     *_shares(result.pixels[chosen])])
    return as_table(["verdict", "tiles", "share", "groups", *classes], rows)


def _shares(pixels: np.ndarray) -> list[str]:
    """Class shares of the pixels (n, K)."""
    total = pixels.sum(axis=0)
    return [f"{share:.1%}" for share in total / total.sum()] if total.any() else ["-"] * pixels.shape[1]


def _by_group(result: FilterResult, classes: Sequence[str]) -> str:
    """A row a group, those that lost the largest share first."""
    members: dict[str, list[int]] = {}
    for i, tile in enumerate(result.tiles):
        members.setdefault(tile.group, []).append(i)
    reasons = [reason for reason in DROPPED if any(tile.split == reason for tile in result.tiles)]
    rows = []
    for name, places in members.items():
        counts = Counter(result.tiles[i].split for i in places)
        kept = [i for i in places if result.tiles[i].split in SPLITS]
        side = next((split for split in SPLITS if counts[split]), "-")
        rows.append((len(kept) / len(places), [name, side, str(len(places)), f"{len(kept) / len(places):.0%}",
                                               *(str(counts[reason]) for reason in reasons),
                                               *_shares(result.pixels[kept])]))
    rows.sort(key=lambda row: row[0])
    return markdown_table(["group", "split", "tiles", "kept", *reasons, *(f"{name} (kept)" for name in classes)],
                          [row for _, row in rows])


def summary(result: FilterResult, config: Config, changes: Sequence[str], pictures: Sequence[str]) -> str:
    """The Markdown of summary.md; `changes` are sentences on verdicts set by hand."""
    tiles, limits = result.tiles, config.filter
    settings = [[name, "off" if value is None else str(value)] for name, value in to_dict(limits).items()]
    hand = [[tile.key, tile.proposed, tile.split, tile.note] for tile in tiles if tile.by_hand]
    corrupt = [[tile.key, tile.reason] for tile in tiles if tile.split == "corrupt"]
    split = {tile.key: tile.split for tile in tiles}
    same = [[keys[0], ", ".join(keys[1:]), ", ".join(sorted({split[key] for key in keys}))] for keys in result.copies]
    parts = [
        f"# Filter of {config.data.root}",
        f"{len(result.kept)} of {len(tiles)} tiles are kept. What the columns mean: filtering/audit.py. To overrule a "
        "verdict, edit the column `split` of tiles.csv.",
        "## What lies in the folder\n\n" + "\n".join(f"- {line}" for line in [*preflight(result, config).splitlines(),
                                                                           *(copies(result) or ["copies: none"])]),
        "## Verdicts\n\nClass shares are those of all pixels; the row `all` is before filtering, `kept` after.\n\n"
        + verdicts(result, config.data.classes, markdown_table),
        "## Settings\n\n" + markdown_table(["filter", "value"], settings),
        "## Measurements\n\n![Histograms of the measurements with their thresholds](histograms.png)",
        *(f"## {title}\n\n" + text for title, text in (
            ("Set by hand", markdown_table(["key", "proposed", "in force", "note"], hand) if hand else ""),
            ("Since the last run", "\n".join(f"- {change}" for change in changes)),
            ("Corrupt", markdown_table(["key", "reason"], corrupt) if corrupt else ""),
            ("Copies", markdown_table(["image", "same image", "verdicts"], same) if same else ""),
            ("Groups", _by_group(result, config.data.classes) if any(tile.group for tile in tiles) else ""),
        ) if text),
        "## Pictures\n\n" + "\n\n".join(f"![{name}]({name})" for name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def histograms(result: FilterResult, limits: Filter) -> figures.Figure:
    panels = []
    for name, (label, limit) in MEASURED.items():
        values = [[value for tile in result.tiles if (tile.split in SPLITS) == kept
                   and (value := measured(tile, name, limits)) is not None] for kept in (True, False)]
        panels.append((label, *map(np.array, values), getattr(limits, limit)))
    return figures.histograms(panels)


def sheets(result: FilterResult, limits: Filter) -> dict[str, tuple[str, list[Tile]]]:
    """File name: (title, tiles) of every contact sheet."""
    kept = [result.tiles[i] for i in result.kept]
    found = {}
    near = sorted(kept, key=lambda tile: -nearness(tile, limits))
    found["kept_near_threshold.png"] = "kept, the nearest to a threshold first", near[:SHEET]
    for name, (label, limit) in MEASURED.items():
        most = sorted((tile for tile in kept if measured(tile, name, limits)),
                      key=lambda tile: -measured(tile, name, limits))
        if getattr(limits, limit) is None and most:
            found[f"kept_most_{name}.png"] = f"kept, no threshold set: largest {label}", most[:SHEET // 2]
    for reason in DROPPED:
        tiles = sorted((tile for tile in result.tiles if tile.split == reason and tile.proposed != "corrupt"),
                       key=lambda tile: nearness(tile, limits))
        chosen = np.unique(np.linspace(0, len(tiles) - 1, min(SHEET, len(tiles))).round().astype(int))
        if tiles:
            found[f"dropped_{reason}.png"] = (f"dropped as {reason}: {len(chosen)} of {len(tiles)}, "
                                              "the nearest to the threshold first"), [tiles[i] for i in chosen]
    return {name: sheet for name, sheet in found.items() if sheet[1]}


def nearness(tile: Tile, limits: Filter) -> float:
    """The largest of a tile's measurements in units of their thresholds: 1 and more is dropped."""
    ratios = [0.0]
    for name, (_, limit) in MEASURED.items():
        value, threshold = measured(tile, name, limits), getattr(limits, limit)
        if value is not None and threshold:
            ratios.append(threshold / max(value, 1e-9) if name == "foreground" else value / threshold)
    return max(ratios)


def draw(tile: Tile, config: Config) -> tuple[str, np.ndarray]:
    """Caption and thumbnail of a tile."""
    image, mask = read_pair(Path(config.data.root), tile, config.data.mask_values)
    glass = audit.find_glass(audit.sum_inverted(image), config.filter)
    numbers = [f"foreground {tile.foreground:.1%}"]
    if tile.blank is not None:
        numbers = [f"blank {tile.blank:.1%}  unmarked {tile.unmarked:.1%}"]
    if tile.shift is not None and (tile.confidence or 0) >= config.filter.min_confidence:
        numbers.append(f"off by {abs(tile.shift_x):.0f} px {'right' if tile.shift_x > 0 else 'left'}, "
                       f"{abs(tile.shift_y):.0f} px {'down' if tile.shift_y > 0 else 'up'}")
    elif tile.reason or tile.note:
        numbers.append((tile.reason or tile.note)[:40])
    key = tile.key if len(tile.key) <= 26 else "…" + tile.key[-25:]
    return "\n".join([key, *numbers]), figures.annotated(image, mask, glass, len(config.data.classes))


def write(folder: Path, result: FilterResult, config: Config, changes: Sequence[str], before: Path) -> None:
    """Fill an empty folder: summary, histograms, contact sheets, settings, and the list `before` that is replaced."""
    contents = sheets(result, config.filter)
    with Progress("draw sheets", sum(len(tiles) for _, tiles in contents.values()), "tile") as progress:
        for name, (title, tiles) in contents.items():
            cells = []
            for tile in tiles:
                cells.append(draw(tile, config))
                progress.advance()
            palette.save(figures.contact_sheet(cells, title, config.data.classes), folder / name)
    palette.save(histograms(result, config.filter), folder / "histograms.png")
    write_text(folder / "summary.md", summary(result, config, changes, list(contents)))
    write_text(folder / "settings.yaml", yaml.safe_dump({"filter": to_dict(config.filter)}, sort_keys=False))
    if before.exists():
        shutil.copyfile(before, folder / "tiles_before.csv")
