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

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import bootstrap, palette
from common.console import UserError, markdown_table, table
from common.files import write_csv, write_text
from evaluation import figures, metrics
from evaluation.results import Evaluation, results, tile_columns
from evaluation.test_set import TestSet

FEW_GROUPS = 10  # with fewer, intervals are rough
DIFFERING = 3  # tiles on which the entries differ most, in tiles.png


def write_tile_scores(path: Path, evaluation: Evaluation) -> None:
    scores = [tile_columns(evaluation, candidate) for candidate in range(len(evaluation.candidates))]
    names = max(scores, key=len)
    rows = []
    for candidate, columns in zip(evaluation.candidates, scores, strict=True):
        for i, tile in enumerate(evaluation.test_set.tiles):
            values = {name: columns[name][i] if name in columns else math.nan for name in names}
            rows.append({"entry": candidate.name, "key": tile.key, "group": tile.group, "split": tile.split}
                        | {name: None if math.isnan(value) else f"{value:.6f}" for name, value in values.items()})
    write_csv(path, rows)


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
    for candidate in contents["entries"]:
        values = []
        for path, form in COLUMNS.values():
            value = candidate
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
    if not groups and contents["tiles"] >= bootstrap.FEWEST_GROUPS:
        lines.append("Slides or patients are not known (data.group), so the intervals take every tile for independent "
                     "and are too narrow if tiles share a slide.")
    elif bootstrap.FEWEST_GROUPS <= groups < FEW_GROUPS:
        lines.append(f"With {groups} groups the intervals are rough.")
    if any(candidate.get("loss") for candidate in contents["entries"]):
        lines.append("Scores, intervals and differences are of these weights: training the same config with another "
                     "seed can change them by as much.")
    return lines


def about_distances(contents: dict) -> str:
    """How much of HD95 is no distance."""
    def total(row: dict, what: str) -> int:
        return sum(row[what].values())

    counts = ", ".join(f"{total(row, 'tiles_where_missed')} and {total(row, 'tiles_where_invented')} times by "
                       f"{row['name']}" for row in contents["entries"])
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
    if any(candidate.get("loss") for candidate in contents["entries"]):
        lines.append("Soft Dice is the report's equation 9, in which a perfect prediction of a tile without one of "
                     "three classes has 0.667.")
    return lines


def about_models(contents: dict) -> list[str]:
    """Which weights gave the answers, and how."""
    return [f"{candidate['name']}: {candidate['source']} of epoch {candidate['tested_epoch']}"
            f"{', averaged over the 8 flips and turns' * candidate['flips']}. Computed in {candidate['precision']}."
            for candidate in contents["entries"] if candidate.get("tested_epoch")]


def summary(contents: dict) -> str:
    """The main scores, and those of the best constant prediction, as a table, and what they are of."""
    classes = contents["classes"]
    header = ["run", "soft Dice", "accuracy", "Dice", "95 % interval", *classes, "HD95 px"]
    several = len(contents["entries"]) > 1
    rows = []
    for candidate in contents["entries"]:
        scores = candidate["scores"]
        dice = scores["dice"]
        rows.append([candidate["name"], _shown(scores.get("soft_dice")), _shown(scores["pixel_accuracy"]),
                     _shown(dice["mean"]), _span(dice["mean"]), *(_shown(dice[name]) for name in classes),
                     _shown(scores["tile_hd95"]["mean"], ".1f")])
        if several:
            change = candidate["difference_to_first"].get("dice", {}).get("mean")
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


def choose_tiles(evaluation: Evaluation, keys: Sequence[str], count: int) -> list[tuple[int, str]]:
    """(number, why) of tiles to draw: those named, else `count` from worst to best and where the entries differ most.

    By accuracy: one false pixel of a class that a tile lacks halves its mean Dice, and there is nothing to see.
    """
    if keys:
        places = {tile.key: i for i, tile in enumerate(evaluation.test_set.tiles)}
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
        rows.append((evaluation.test_set.tiles[i].key, why, image, target, answers))
    return figures.tiles(rows, [candidate.name for candidate in evaluation.candidates], evaluation.classes)


def reject_unknown_keys(test_set: TestSet, keys: Sequence[str]) -> None:
    known = {tile.key for tile in test_set.tiles}
    for key in keys:
        if key not in known:
            some = ", ".join(sorted(known)[:5])
            raise UserError(f"--tiles {key}: no such tile in {test_set.config.data.root} (split: {test_set.split}; "
                            f"{len(known)} keys, such as {some}); options go behind the runs")


def write(folder: Path, evaluation: Evaluation, keys: Sequence[str], count: int) -> dict:
    """Write everything but predictions and page into `folder`; returns the contents of scores.json."""
    contents = results(evaluation)
    write_text(folder / "scores.json", json.dumps(contents, indent=2, allow_nan=False) + "\n")
    write_tile_scores(folder / "tiles.csv", evaluation)
    header, rows = table_rows(contents)
    write_csv(folder / "table.csv", [dict(zip(header, row, strict=True)) for row in rows])
    paragraphs = [markdown_table(*readable_rows(contents)), *about_tiles(contents), *about_models(contents),
                  *about_scores(contents)]
    write_text(folder / "table.md", "\n\n".join(paragraphs) + "\n")
    palette.save(draw_tiles(evaluation, keys, count), folder / "tiles.png")
    histories = {f"{candidate.name}: {candidate.config.loss.name}": candidate.history
                 for candidate in evaluation.candidates if candidate.history}
    if histories:
        palette.save(figures.compared_losses(histories), folder / "losses.png")
    bins = {candidate.name: tally.calibration.sum(0) for candidate, tally in
            zip(evaluation.candidates, evaluation.tallies, strict=True) if tally.calibration is not None}
    if bins:
        palette.save(figures.reliability(bins), folder / "reliability.png")
    return contents
