"""How good is the filter? Its verdicts against the defects that were planted in demo tiles.

    python -m tools.filter_accuracy data/demo
    python -m tools.filter_accuracy data/demo filter.max_unmarked=0.1 filter.max_shift=off

Reads DATA/truth.csv (tools/make_demo_data.py), DATA/tiles.csv and DATA/filter/settings.yaml (data_filter.py); the
verdicts follow from the measurements in tiles.csv, with the filter's limits or others. Prints and writes
DATA/filter_accuracy/accuracy.md, and draws precision and recall over each threshold in accuracy.png.

Precision: of the tiles that a rule drops, the share that has a defect it is to find. Recall: of the tiles with such a
defect, the share that it drops. The 1 % rule is to find `empty` tiles, the other rules the defects of masks. A tile to
which filter.repair gave a new mask counts as dropped by its rule. A defect can be `seen` if at least 2 % of the mask's
pixels are wrong about what is background. Errors of moves are given for masks in place (`none`), too.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import palette
from common.config import Data, Filter
from common.config_files import apply_overrides, load_config
from common.console import UserError, argument_parser, markdown_table, run, table
from common.files import write_text
from common.masks import IGNORE, read_mask
from common.pictures import picture_size
from common.result_folders import replacing_folder
from common.store import read_pair
from dataset import DROPPED, FILTER_FOLDER, MEASUREMENTS, SPLITS, Tile, read_tiles
from filtering.audit import verdict
from filtering.registration import Move
from filtering.report import MEASURED, measured
from tools.make_demo_data import DEFECTS

OF_MASKS = tuple(defect for defect in DEFECTS if defect != "empty")
LIMITS = ("min_foreground", "max_blank", "max_unmarked", "max_shift", "min_confidence", "max_disagreement")
NONE, REPORT, ALL = "none (only empty masks drop)", "the report: 1 % rule, Algorithm 1", "all rules"
BY_MODEL = ("quality", "disagreement", *(name for name in MEASUREMENTS if name.startswith("model_")))
VISIBLE = 0.02  # share of a mask's pixels
THRESHOLDS = {"blank": (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
              "unmarked": (0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.3),
              "shift": (5, 10, 20, 30, 40, 60, 80, 120)}


@dataclass(frozen=True)
class Kept:
    """What is left of the tiles that have tissue, and how right the masks in use are."""

    tiles: float  # share of the tiles
    pixels: float  # share of their pixels
    wrong: float  # share of the pixels that have a class
    moved_dropped: float  # share of the shifted and rotated tiles

    @classmethod
    def of(cls, root: Path, data: Data, min_foreground: float = 0.01) -> "Kept":
        """Compare the masks in use with the clean ones in root/truth/; tiles that are sparse in truth do not count.

        `data` says where the list lies and how masks are read.
        """
        truth, moved, in_use = read_truth(root), [], 0
        pixels = labelled = wrong = 0
        for tile in read_tiles(data):
            row, is_kept = truth[tile.key], tile.split in SPLITS
            if float(row["foreground"]) < min_foreground:
                continue
            if row["defect"] in ("shifted", "rotated"):
                moved.append(not is_kept)
            clean = read_mask(root / "truth" / f"mask#{tile.key}.png", data)
            pixels += clean.size
            if is_kept:
                labels = read_pair(tile.pair, data)[1]
                in_use += 1
                labelled += np.count_nonzero(labels != IGNORE)
                wrong += np.count_nonzero((labels != clean) & (labels != IGNORE))
        total = sum(float(row["foreground"]) >= min_foreground for row in truth.values())
        return cls(in_use / total, labelled / pixels, wrong / max(labelled, 1), float(np.mean(moved)) if moved else 0.0)


@dataclass(frozen=True)
class Planted:
    """A tile as the filter judged it, and what was done to it."""

    tile: Tile  # without what a model said, if its group is tested
    defect: str  # none, or one of DEFECTS
    wrong: float  # share of the mask's pixels that are wrong
    visible: float  # share of them that are wrong about what is background
    move: Move | None  # of a shifted or rotated mask
    shape: tuple[int, int] = (0, 0)  # height and width
    asked: Tile | None = None  # with what a model said, if that differs


def read_truth(folder: Path) -> dict[str, dict[str, str]]:
    """Read truth.csv, a row for each key."""
    path = folder / "truth.csv"
    if not path.is_file():
        raise UserError(f"{path}: missing; only tiles of tools.make_demo_data or tools.move_masks have planted defects")
    with path.open(newline="") as file:
        truth = {row["key"]: row for row in csv.DictReader(file)}
    if any("visible" not in row for row in truth.values()):
        raise UserError(f"{path}: written by an older version, without the column `visible`; make the tiles again")
    return truth


def read(folder: Path) -> list[Planted]:
    truth, tiles = read_truth(folder), read_tiles(Data(root=str(folder)))
    strange = [tile.key for tile in tiles if tile.key not in truth]
    if strange or len(tiles) != len(truth):
        raise UserError(f"{folder}: tiles.csv and truth.csv are not of the same tiles; run data_filter.py again")
    planted, tested = [], {tile.group for tile in tiles if tile.split == "test" and tile.group}
    for tile in tiles:
        row = truth[tile.key]
        move = Move(float(row["dx"]), float(row["dy"]), float(row["angle"])) if row["dx"] else None
        is_tested = tile.split == "test" or tile.group in tested
        judged = replace(tile, **dict.fromkeys(BY_MODEL)) if is_tested else tile
        planted.append(Planted(judged, row["defect"], float(row["wrong"]), float(row["visible"]), move,
                               picture_size(folder / tile.image), tile))
    return planted


def score(planted: Sequence[Planted], limits: Filter, defects: Sequence[str]) -> tuple[int, float, float]:
    """Return tiles dropped, precision and recall against `defects`; NaN if none is dropped, or none is to be found."""
    dropped = [one.defect in defects for one in planted if verdict(one.tile, limits)]
    there = sum(one.defect in defects for one in planted)
    return len(dropped), sum(dropped) / len(dropped) if dropped else np.nan, sum(dropped) / there if there else np.nan


def only(limits: Filter, *names: str) -> Filter:
    """Return the limits with all but those named switched off; a mask without any tissue is still dropped."""
    off = {"min_foreground": 0.0, "max_blank": None, "max_unmarked": None, "max_shift": None, "max_disagreement": None}
    return replace(limits, **{name: value for name, value in off.items() if name not in names})


def rules(limits: Filter) -> dict[str, tuple[Filter, Sequence[str]]]:
    """Return every rule alone and together: its limits, and the defects that it should find."""
    found = {f"foreground < {limits.min_foreground:g}": (only(limits, "min_foreground"), ("empty",))}
    for name in THRESHOLDS:
        limit = MEASURED[name][1]
        if getattr(limits, limit) is not None:
            found[f"{name} >= {getattr(limits, limit):g}"] = only(limits, limit), OF_MASKS
    found[REPORT] = only(limits, "min_foreground", "max_blank"), tuple(DEFECTS)
    found[ALL] = limits, tuple(DEFECTS)
    return found


def tables(planted: Sequence[Planted], limits: Filter) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of each table."""
    counts = {defect: Counter(verdict(one.tile, limits) or "kept" for one in planted if one.defect == defect)
              for defect in ("none", *DEFECTS)}
    names = ["kept", *(name for name in DROPPED if any(name in count for count in counts.values()))]
    caught = []
    for defect in OF_MASKS:
        chosen = [one for one in planted if one.defect == defect and one.tile.foreground]
        for label, group in (("seen", [one for one in chosen if one.visible >= VISIBLE]),
                             ("unseen", [one for one in chosen if one.visible < VISIBLE])):
            missed = [one for one in group if not verdict(one.tile, limits)]
            caught.append([f"{defect}, {label}", str(len(group)), str(len(group) - len(missed)),
                           f"{np.mean([one.wrong for one in missed]):.2%}" if missed else "-"])
    found = []
    for rule, (settings, defects) in rules(limits).items():
        # a tile without annotated tissue is sparse at any threshold and says nothing of the other rules
        judged = planted if "empty" in defects else [one for one in planted if one.tile.foreground]
        number, precision, recall = score(judged, settings, defects)
        found.append([rule, str(number), _share(precision), _share(recall)])
    wrong = []
    for name, settings in ((NONE, only(limits)), *((name, rules(limits)[name][0]) for name in (REPORT, ALL))):
        left = [one for one in planted if not verdict(one.tile, settings)]
        wrong.append([name, str(len(left)), str(sum(one.defect != "none" for one in left)),
                      f"{np.mean([one.wrong for one in left]):.2%}" if left else "-"])
    sources = {"image": ""}
    if any((one.asked or one.tile).model_confidence is not None for one in planted):
        sources["model"] = "model_"
    return [("Defects that can be seen, and others", ["defect", "tiles", "found", "wrong pixels of the rest"], caught),
            ("Verdict by planted defect", ["defect", "tiles", *names],
             [[defect, str(count.total()), *(str(count[name]) for name in names)] for defect, count in counts.items()]),
            ("Precision and recall", ["rule", "drops", "precision", "recall"], found),
            ("What is left", ["rules", "tiles", "with a defect", "wrong pixels"], wrong),
            ("Measured moves", ["by", "defect", "tiles", "certain", "median error", "largest error"],
             [[by, defect, *_errors_of_moves([one for one in planted if one.defect == defect], limits, prefix)]
              for by, prefix in sources.items()
              for defect in ("shifted", "rotated", "none")])]


def _share(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1%}"


def _errors_of_moves(planted: Sequence[Planted], limits: Filter, prefix: str) -> list[str]:
    """Return the tiles, those with a certain move, and how far off this puts a point, on average over a mask.

    The columns of the measurements begin with `prefix`.
    """
    errors = []
    for one in planted:
        right, down, angle, confidence = (getattr(one.asked or one.tile, f"{prefix}{name}")
                                          for name in ("shift_x", "shift_y", "angle", "confidence"))
        if confidence is not None and confidence >= limits.min_confidence:
            points = np.stack(np.meshgrid(*(np.linspace(0, side - 1, 9) for side in one.shape), indexing="ij"), -1)
            found = Move(right, down, angle).of_points(points, one.shape)
            true = (one.move or Move()).of_points(points, one.shape)
            errors.append(np.linalg.norm(found - true, axis=-1).mean())
    shown = [f"{np.median(errors):.1f} px", f"{max(errors):.1f} px"] if errors else ["-", "-"]
    return [str(len(planted)), str(len(errors)), *shown]


def curve(planted: Sequence[Planted], limits: Filter, name: str,
          thresholds: Sequence[float]) -> list[tuple[float, float, float]]:
    """Return threshold, precision and recall of one measurement alone against the defects of masks."""
    judged = [one for one in planted if one.tile.foreground]
    return [(threshold, *score(judged, replace(only(limits), **{MEASURED[name][1]: threshold}), OF_MASKS)[1:])
            for threshold in thresholds]


def draw(planted: Sequence[Planted], limits: Filter) -> Figure:
    figure = Figure(figsize=(12, 4.2), dpi=110, layout="constrained")
    for axis, name in zip(figure.subplots(1, 3), THRESHOLDS, strict=True):
        highest = max(measured(one.tile, name, limits) or 0 for one in planted)
        points = np.array(curve(planted, limits, name, np.linspace(highest / 400, highest, 400)))
        axis.plot(points[:, 0], points[:, 1], color="black", linewidth=2, label="precision")
        axis.plot(points[:, 0], points[:, 2], color="black", linewidth=2, linestyle="--", label="recall of all defects")
        for defect, colour in zip(OF_MASKS, palette.PALETTE[1:], strict=False):
            values = np.array([measured(one.tile, name, limits) or 0 for one in planted
                               if one.defect == defect and one.tile.foreground])
            if values.size:
                axis.plot(points[:, 0], [(values >= threshold).mean() for threshold in points[:, 0]], color=colour,
                          label=f"recall of {defect}")
        threshold = getattr(limits, MEASURED[name][1])
        if threshold is not None:
            axis.axvline(threshold, color="grey", linestyle=":", linewidth=2, label="threshold set")
        axis.set(xlabel=f"threshold of {name}: {MEASURED[name][0]}", ylim=(-0.02, 1.02))
        axis.xaxis.label.set_size(8)
        axis.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of demo tiles that were filtered")
    parser.add_argument("overrides", nargs="*", metavar="filter.key=value", help="other limits than the filter used")
    args = parser.parse_args()
    settings = args.data / FILTER_FOLDER / "settings.yaml"
    if not settings.is_file():
        raise UserError(f"{settings}: missing; run data_filter.py first, without data.cache")
    planted, config = read(args.data), load_config(settings)
    config = replace(config, data=replace(config.data, root=str(args.data)))
    limits = apply_overrides(config, args.overrides, [f"filter.{name}" for name in LIMITS]).filter
    parts = tables(planted, limits)
    kept = Kept.of(args.data, config.data)
    parts.append(("Masks in use, as the filter left them",
                  ["tiles kept", "pixels kept", "wrong pixels", "moved masks dropped"],
                  [[f"{kept.tiles:.1%}", f"{kept.pixels:.1%}", f"{kept.wrong:.2%}", f"{kept.moved_dropped:.0%}"]]))
    for name, thresholds in THRESHOLDS.items():
        points = curve(planted, limits, name, thresholds)
        parts.append((f"Threshold of {name}", [name, *(f"{threshold:g}" for threshold, *_ in points)],
                      [["precision", *(_share(precision) for _, precision, _ in points)],
                       ["recall", *(_share(recall) for *_, recall in points)]]))
    print("\n\n".join(f"{title}\n\n{table(header, rows)}" for title, header, rows in parts))
    text = "\n\n".join(f"## {title}\n\n{markdown_table(header, rows)}" for title, header, rows in parts)
    with replacing_folder(args.data / "filter_accuracy") as folder:
        write_text(folder / "accuracy.md", f"# Accuracy of the filter on {args.data}\n\n{text}\n\n"
                   "![Precision and recall over the thresholds](accuracy.png)\n")
        palette.save(draw(planted, limits), folder / "accuracy.png")
    print(f"\nwrote {args.data / 'filter_accuracy'}: accuracy.md, accuracy.png")


if __name__ == "__main__":
    run(main)
