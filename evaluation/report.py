"""What an evaluation leaves on disk: one folder, replaced whole.

    scores.json       every score of every entry with its 95 % interval, its difference to the first entry, confusion
                      matrix and reliability
    tiles.csv         every score of every tile, a row for each entry and tile
    table.md .csv     tables 1 and 2 of the report
    losses.png        figures 6 and 8: loss curves over each other
    tiles.png         figures 9 to 11: image, truth and predictions of some tiles
    reliability.png   how often the entries are right, by how sure they are
    report.html       all of it in one page, with a gallery of the tiles
    predictions/      label images of each model, in the data's own greys
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import figures
from common.console import UserError, markdown_table, table
from common.files import write_text
from dataset import read_mask
from evaluation import metrics
from evaluation.entries import Entry, Questions
from evaluation.metrics import Tally

FEW_GROUPS = 10  # with fewer, intervals are rough
DIFFERING = 3  # tiles on which the entries differ most, in tiles.png


@dataclass(frozen=True)
class Evaluation:
    """What the entries answered: everything that is written follows from it."""

    questions: Questions
    entries: list[Entry]
    tallies: list[Tally]
    labels: list[dict[str, Path]]  # of each entry, the label image of each tile's key
    tolerance: float  # pixels, of the surface Dice

    @property
    def classes(self) -> tuple[str, ...]:
        return self.questions.config.data.classes

    @property
    def groups(self) -> int:
        """How many slides or patients the tiles come from, a tile without one being its own; 0 where none is known."""
        tiles = self.questions.tiles
        return len({tile.group or tile for tile in tiles}) if any(tile.group for tile in tiles) else 0

    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (N,) of the tiles from the lowest mean accuracy to the highest, and how far the entries differ."""
        accuracy = np.stack([metrics.pixel_accuracy(tally.confusion) for tally in self.tallies])
        return np.argsort(accuracy.mean(0), kind="stable"), np.ptp(accuracy, axis=0)

    def predicted(self, entry: int, tile: int) -> np.ndarray:
        """Class indices (H, W) uint8."""
        return read_mask(self.labels[entry][self.questions.tiles[tile].key], self.questions.config.data.greys)

    def tile(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and class indices (H, W), uint8."""
        pixels = self.questions.store[self.questions.rows[i]]
        return pixels[..., :3], pixels[..., 3]


# ---------------------------------------------------------------------------------------------- numbers

def results(evaluation: Evaluation) -> dict:
    """The contents of scores.json; a score that does not exist is null."""
    asked, classes = evaluation.questions, evaluation.classes
    weights = metrics.resampled_weights([tile.group for tile in asked.tiles])
    units = evaluation.groups or len(asked.tiles)
    scores = [metrics.scores(tally, weights) for tally in evaluation.tallies]
    present = [(tally.confusion.sum(1) > 0) | (tally.confusion.sum(2) > 0) for tally in evaluation.tallies]  # (N, K)

    def groups_with(having: np.ndarray) -> list[int]:
        """How many groups have each class, by the tiles (N, K) that have it."""
        return [len({tile.group or tile for tile, has in zip(asked.tiles, column, strict=True) if has})
                for column in having.T]

    def named(values: np.ndarray, groups: Sequence[int]) -> dict:
        """Value and interval of samples (R,), or of each class, which so many groups have, and of their mean."""
        def number(samples: np.ndarray, units: int) -> dict:
            low, high = metrics.interval(samples, units) or (math.nan, math.nan)
            return {"value": _number(samples[0]), "low": _number(low), "high": _number(high)}

        if values.ndim == 1:
            return number(values, units)
        return {name: number(values[:, k], of) for k, (name, of) in
                enumerate(zip([*classes, "mean"], [*groups, units], strict=True))}

    constant, dice = metrics.best_constant(evaluation.tallies[0].confusion.sum(0))
    rows = []
    for entry, tally, found, having in zip(evaluation.entries, evaluation.tallies, scores, present, strict=True):
        truth, predicted = tally.confusion.sum(2) > 0, tally.confusion.sum(1) > 0    # (N, K) both
        shared = [name for name in found if name in scores[0]]
        groups, of_either = groups_with(having), groups_with(having | present[0])
        rows.append({
            "name": entry.name, "source": str(entry.source), **entry.facts(),
            "scores": {name: named(values, groups) for name, values in found.items()},
            "difference_to_first": {} if entry is evaluation.entries[0] else
            {name: named(found[name] - scores[0][name], of_either) for name in shared},
            **{what: dict(zip(classes, which.sum(0).tolist(), strict=True)) for what, which in
               (("tiles_behind_means", having), ("tiles_where_missed", truth & ~predicted),
                ("tiles_where_invented", predicted & ~truth))},
            "confusion": tally.confusion.sum(0).tolist(),
            "reliability": None if tally.calibration is None else
            dict(zip(("pixels", "confidence", "right"), tally.calibration.sum(0).tolist(), strict=True)),
        })
    return {
        "data_root": asked.config.data.root, "tiles_identity": asked.identity, "split": asked.split,
        "tiles": len(asked.tiles), "groups": evaluation.groups, "classes": list(classes), "doubts": asked.doubts,
        "surface_dice_tolerance_px": evaluation.tolerance,
        "intervals": f"95 %, bootstrap of {metrics.RESAMPLES} samples of {'groups' if evaluation.groups else 'tiles'}"
        if len(weights) > 1 else f"none, since they need {metrics.FEWEST_GROUPS} "
        f"{'groups' if evaluation.groups else 'tiles'}",
        "best_constant": {"class": classes[constant], "dice_mean": _number(dice)},
        "entries": rows,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def tile_scores(evaluation: Evaluation, entry: int) -> dict[str, np.ndarray]:
    """Every score of every tile, (N,) each, by the columns of tiles.csv."""
    columns = {}
    for name, values in metrics.tile_scores(evaluation.tallies[entry]).items():
        if values.ndim == 2:
            columns[f"{name}_mean"] = metrics.mean_present(values)
            columns |= {f"{name}_{label}": values[:, k] for k, label in enumerate(evaluation.classes)}
        else:
            columns[name] = values
    return columns


def write_tile_scores(path: Path, evaluation: Evaluation) -> None:
    scores = [tile_scores(evaluation, entry) for entry in range(len(evaluation.entries))]
    names = max(scores, key=len)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["entry", "key", "group", "split", *names])
        for entry, columns in zip(evaluation.entries, scores, strict=True):
            for i, tile in enumerate(evaluation.questions.tiles):
                values = [columns[name][i] if name in columns else math.nan for name in names]
                writer.writerow([entry.name, tile.key, tile.group, tile.split,
                                 *("" if math.isnan(value) else f"{value:.6f}" for value in values)])


# ---------------------------------------------------------------------------------------------- tables 1 and 2

COLUMNS = {  # heading: where it stands in an entry of scores.json, format
    "run": (("name",), "{}"),
    "loss": (("loss",), "{}"),
    "soft Dice": (("scores", "soft_dice", "value"), "{:.4f}"),
    "accuracy": (("scores", "pixel_accuracy", "value"), "{:.4f}"),
    "Dice": (("scores", "dice", "mean", "value"), "{:.4f}"),
    "Dice low": (("scores", "dice", "mean", "low"), "{:.4f}"),
    "Dice high": (("scores", "dice", "mean", "high"), "{:.4f}"),
    "Dice - first": (("difference_to_first", "dice", "mean", "value"), "{:+.4f}"),
    "difference low": (("difference_to_first", "dice", "mean", "low"), "{:+.4f}"),
    "difference high": (("difference_to_first", "dice", "mean", "high"), "{:+.4f}"),
    "HD95 px": (("scores", "tile_hd95", "mean", "value"), "{:.1f}"),
    "epochs": (("epochs",), "{}"),
    "best epoch": (("best_epoch",), "{}"),
    "s/epoch": (("seconds_per_epoch",), "{:.3g}"),
    "levels": (("levels",), "{}"),
    "dropout": (("dropout",), "{:g}"),
}


def table_rows(contents: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of table.csv, a row for each entry; what does not exist is empty."""
    rows = []
    for entry in contents["entries"]:
        values = []
        for path, form in COLUMNS.values():
            value = entry
            for step in path:
                value = (value or {}).get(step)
            values.append("" if value is None else form.format(value))
        rows.append(values)
    return list(COLUMNS), rows


def readable_rows(contents: dict) -> tuple[list[str], list[list[str]]]:
    """The same for people: intervals in one cell, and no column without a value."""
    header, rows = table_rows(contents)
    pairs = {"Dice low": "95 % interval", "difference low": "95 % interval of it"}
    drop = {"Dice high", "difference high"} | {name for i, name in enumerate(header) if not any(row[i] for row in rows)}
    shown = []
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        for low in pairs:
            high = cells[low.replace("low", "high")]
            cells[low] = f"{cells[low]} to {high}" if high else ""
        shown.append([cells[name] or "-" for name in header if name not in drop])
    return [pairs.get(name, name) for name in header if name not in drop], shown


def about_tiles(contents: dict) -> list[str]:
    """Of what and how many tiles the scores are, and how far they and their intervals can be trusted."""
    groups = contents["groups"]
    of = f" of {groups} group{'s' * (groups > 1)}" if groups else ""
    lines = [*contents["doubts"], f"{contents['tiles']} tile{'s' * (contents['tiles'] > 1)}{of} (split: "
             f"{contents['split']}) of {contents['data_root']}. Intervals: {contents['intervals']}."]
    if not groups and contents["tiles"] >= metrics.FEWEST_GROUPS:
        lines.append("Slides or patients are not known (data.group), so the intervals take every tile for independent "
                     "and are too narrow if tiles share a slide.")
    elif metrics.FEWEST_GROUPS <= groups < FEW_GROUPS:
        lines.append(f"With {groups} groups the intervals are rough.")
    if any(entry.get("loss") for entry in contents["entries"]):
        lines.append("Scores, intervals and differences are of these weights: training the same config with another "
                     "seed can change them by as much.")
    return lines


def about_distances(contents: dict) -> str:
    """How much of HD95 is no distance."""
    counts = ", ".join(f"{sum(entry['tiles_where_missed'].values())} and {sum(entry['tiles_where_invented'].values())} "
                       f"times by {entry['name']}" for entry in contents["entries"])
    return ("HD95 is the mean over tiles, then over classes; where a class of a tile is missed or invented it is the "
            f"tile's diagonal: {counts}.")


def about_scores(contents: dict) -> list[str]:
    """What the main scores mean."""
    constant = contents["best_constant"]
    lines = ["Dice, the hard Dice, is pooled over all pixels and averaged over classes; predicting "
             f"{constant['class']} everywhere has {constant['dice_mean']:.4f}.",
             about_distances(contents),
             f"Surface Dice is the share of both outlines that lie within {contents['surface_dice_tolerance_px']:g} px "
             "of the other."]
    if any(entry.get("loss") for entry in contents["entries"]):
        lines.append("Soft Dice is the report's equation 9, in which a perfect prediction of a tile without one of "
                     "three classes has 0.667.")
    return lines


def about_models(contents: dict) -> list[str]:
    """Which weights gave the answers, and how."""
    return [f"{entry['name']}: {entry['source']} of epoch {entry['tested_epoch']}"
            f"{', averaged over the 8 flips and turns' * entry['flips']}. Computed in {entry['precision']}."
            for entry in contents["entries"] if entry.get("tested_epoch")]


def summary(contents: dict) -> str:
    """The main scores, and those of the best constant prediction, as a table, and what they are of."""
    classes = contents["classes"]
    header = ["run", "soft Dice", "accuracy", "Dice", "95 % interval", *classes, "HD95 px"]
    several = len(contents["entries"]) > 1
    rows = []
    for entry in contents["entries"]:
        scores = entry["scores"]
        dice = scores["dice"]
        rows.append([entry["name"], _shown(scores.get("soft_dice")), _shown(scores["pixel_accuracy"]),
                     _shown(dice["mean"]), _span(dice["mean"]), *(_shown(dice[name]) for name in classes),
                     _shown(scores["tile_hd95"]["mean"], ".1f")])
        if several:
            change = entry["difference_to_first"].get("dice", {}).get("mean")
            rows[-1] += [_shown(change, "+.3f"), _span(change, "+.3f")]
    constant = contents["best_constant"]
    rows.append([f"all {constant['class']}", "-", "-", f"{constant['dice_mean']:.3f}"])
    header += ["Dice - first", "95 % interval"] * several
    return "\n".join([table(header, [row + [""] * (len(header) - len(row)) for row in rows]), *about_tiles(contents),
                      about_distances(contents)])


def _shown(score: dict | None, form: str = ".3f") -> str:
    return "-" if score is None or score["value"] is None else f"{score['value']:{form}}"


def _span(score: dict | None, form: str = ".3f") -> str:
    return "-" if score is None or score["low"] is None else f"{score['low']:{form}} to {score['high']:{form}}"


# ---------------------------------------------------------------------------------------------- pictures

def choose_tiles(evaluation: Evaluation, keys: Sequence[str], count: int) -> list[tuple[int, str]]:
    """(number, why) of tiles to draw: those named, else `count` from worst to best and where the entries differ most.

    By accuracy: one false pixel of a class that a tile lacks halves its mean Dice, and there is nothing to see.
    """
    if keys:
        places = {tile.key: i for i, tile in enumerate(evaluation.questions.tiles)}
        return [(places[key], "") for key in keys]
    order, spread = evaluation.ranked()
    places = np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))
    names = {0: "worst", len(order) - 1: "best"}
    chosen = [(int(order[place]), names.get(place, f"rank {place + 1} of {len(order)}")) for place in places]
    differing = [int(i) for i in np.argsort(-spread) if spread[i] > 0 and i not in {j for j, _ in chosen}]
    return chosen + [(i, "models differ") for i in differing[:DIFFERING]]


def draw_tiles(evaluation: Evaluation, keys: Sequence[str], count: int) -> figures.Figure:
    """Figures 9 to 11: image, truth, and each entry's prediction with its scores; of a single entry the errors too."""
    rows = []
    for i, why in choose_tiles(evaluation, keys, count):
        image, target = evaluation.tile(i)
        answers = []
        for number, tally in enumerate(evaluation.tallies):
            accuracy = metrics.pixel_accuracy(tally.confusion[i])
            answers.append((f"Dice {tally.dice[i]:.3f}  accuracy {accuracy:.3f}", evaluation.predicted(number, i)))
        rows.append((evaluation.questions.tiles[i].key, why, image, target, answers))
    return figures.tiles(rows, [entry.name for entry in evaluation.entries], evaluation.classes)


def refuse_unknown_keys(questions: Questions, keys: Sequence[str]) -> None:
    known = {tile.key for tile in questions.tiles}
    for key in keys:
        if key not in known:
            some = ", ".join(sorted(known)[:5])
            raise UserError(f"--tiles {key}: no such tile in {questions.config.data.root} (split: {questions.split}; "
                            f"{len(known)} keys, such as {some}); options go behind the runs")


# ---------------------------------------------------------------------------------------------- the folder

def write(folder: Path, evaluation: Evaluation, keys: Sequence[str], count: int) -> dict:
    """Write everything but predictions and page into `folder`; returns the contents of scores.json."""
    contents = results(evaluation)
    write_text(folder / "scores.json", json.dumps(contents, indent=2, allow_nan=False) + "\n")
    write_tile_scores(folder / "tiles.csv", evaluation)
    header, rows = table_rows(contents)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    paragraphs = [markdown_table(*readable_rows(contents)), *about_tiles(contents), *about_models(contents),
                  *about_scores(contents)]
    write_text(folder / "table.md", "\n\n".join(paragraphs) + "\n")
    figures.save(draw_tiles(evaluation, keys, count), folder / "tiles.png")
    histories = {f"{entry.name}: {entry.config.loss.name}": entry.history for entry in evaluation.entries
                 if entry.history}
    if histories:
        figures.save(figures.compared_losses(histories), folder / "losses.png")
    bins = {entry.name: tally.calibration.sum(0) for entry, tally in
            zip(evaluation.entries, evaluation.tallies, strict=True) if tally.calibration is not None}
    if bins:
        figures.save(figures.reliability(bins), folder / "reliability.png")
    return contents
