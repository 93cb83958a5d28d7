"""Write the results of an evaluation into one folder, which is replaced as a whole.

    scores.json       every score of every candidate with its 95 % interval, its difference to the first candidate,
                      confusion matrix and reliability
    tiles.csv         every score of every tile, a row for each candidate and tile
    table.md .csv     tables 1 and 2 of the report; runs that differ only in their seed also have a row together
    merged.csv        scores of classes taken together (--merge)
    losses.png        figures 6 and 8: the loss curves of all runs
    tiles.png         figures 9 to 11: image, truth and predictions of some tiles
    reliability.png   how often the candidates are right, by their confidence
    report.html       all of this in one page, with a gallery of the tiles (evaluation/page.py)
    predictions/      the label images of each model, in the mask values of the data
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
from evaluation.results import Evaluation, evenly_spaced, results, tile_columns
from evaluation.test_set import TestSet

FEW_GROUPS = 10  # with fewer, intervals are rough
MERGED = {"dice": "Dice", "tile_dice": "tile Dice", "iou": "IoU", "tile_iou": "tile IoU"}
DIFFERING = 3  # tiles on which the candidates differ most, in tiles.png


def reject_unknown_keys(test_set: TestSet, keys: Sequence[str]) -> None:
    known = {tile.key for tile in test_set.tiles}
    for key in keys:
        if key not in known:
            raise UserError(f"--tiles {key}: no such tile in {test_set.config.data.root} (split: {test_set.split}; "
                            f"{len(known)} keys, such as {', '.join(sorted(known)[:5])}); write runs before --tiles")


def write(folder: Path, evaluation: Evaluation, keys: Sequence[str], count: int) -> dict:
    """Write everything but predictions and page into `folder`; return the contents of scores.json."""
    contents = results(evaluation)
    write_text(folder / "scores.json", json.dumps(contents, indent=2, allow_nan=False) + "\n")
    write_tile_scores(folder / "tiles.csv", evaluation)
    write_csv(folder / "table.csv", [{name: text for name, text in row.items() if "interval" not in name} for row in
                                     map(table_row, [*contents["experiments"], *contents["entries"]])])
    if contents["merged"]:
        write_csv(folder / "merged.csv", merged_rows(contents, digits=4))
    paragraphs = [part for title, header, rows in tables(contents)
                  for part in (title, markdown_table(header, rows)) if part]
    paragraphs += remarks(contents)
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


def write_tile_scores(path: Path, evaluation: Evaluation) -> None:
    rows = []
    for candidate, columns in zip(evaluation.candidates, tile_columns(evaluation), strict=True):
        for i, tile in enumerate(evaluation.test_set.tiles):
            scores = {name: None if math.isnan(values[i]) else f"{values[i]:.6f}" for name, values in columns.items()}
            rows.append({"entry": candidate.name, "key": tile.key, "group": tile.group, "split": tile.split} | scores)
    write_csv(path, rows)


# ---------------------------------------------------------------------------------------------- tables

def cell(numbers: dict | None, name: str, form: str = "") -> str:
    """Return a number of a part of scores.json as text; "" if it does not exist."""
    value = (numbers or {}).get(name)
    return "" if value is None else format(value, form)


def interval_cell(score: dict | None, form: str) -> str:
    """Return the interval of a score as "LOW to HIGH"; "" if it does not exist."""
    return f"{cell(score, 'low', form)} to {cell(score, 'high', form)}" if cell(score, "low") else ""


def table_row(candidate: dict, digits: int = 4) -> dict[str, str]:
    """Return the cells of a candidate of scores.json by column. Intervals are there twice: as text, and as two ends."""
    scores, dice = candidate["scores"], candidate["scores"]["dice"]["mean"]
    difference = candidate["difference_to_first"].get("dice", {}).get("mean")
    form, signed = f".{digits}f", f"+.{digits}f"
    return {
        "run": candidate["name"], "seeds": str(len(candidate["seeds"]) or 1) if "seeds" in candidate else "",
        "loss": cell(candidate, "loss"),
        "soft Dice": cell(scores.get("soft_dice"), "value", form),
        "accuracy": cell(scores["pixel_accuracy"], "value", form),
        "Dice": cell(dice, "value", form), "95 % interval": interval_cell(dice, form),
        "Dice low": cell(dice, "low", form), "Dice high": cell(dice, "high", form),
        "Dice - first": cell(difference, "value", signed), "its 95 % interval": interval_cell(difference, signed),
        "difference low": cell(difference, "low", signed), "difference high": cell(difference, "high", signed),
        "HD95 px": cell(scores["tile_hd95"]["mean"], "value", ".1f"),
        "epochs": cell(candidate, "epochs"), "best epoch": cell(candidate, "best_epoch"),
        "s/epoch": cell(candidate, "seconds_per_epoch", ".3g"),
        "levels": cell(candidate, "levels"), "dropout": cell(candidate, "dropout", "g"),
    }


def merged_rows(contents: dict, digits: int) -> list[dict[str, str]]:
    """Return the cells of the scores of merged classes by column; intervals are there as text."""
    form, rows = f".{digits}f", []
    for part in contents["merged"]:
        for row in part["rows"]:
            cells = {"merge": part["merge"], "part": part["part"] or "all", "tiles": str(part["tiles"]),
                     "groups": str(part["groups"]), "run": row["name"],
                     "seeds": str(len(row["seeds"]) or 1) if contents["experiments"] else ""}
            for name, label in MERGED.items():
                cells |= {label: cell(row[name], "value", form), f"{label} 95 %": interval_cell(row[name], form)}
            rows.append(cells)
    return rows


def readable(rows: Sequence[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table for people: no column without a value, and "-" for what does not exist."""
    header = [name for name in rows[0] if not name.endswith((" low", " high")) and any(row[name] for row in rows)]
    return header, [[row[name] or "-" for name in header] for row in rows]


def tables(contents: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of the tables of table.md and report.html."""
    found = [("", *readable([table_row(candidate) for candidate in contents["entries"]]))]
    if contents["experiments"]:
        of_experiments = readable([table_row(experiment) for experiment in contents["experiments"]])
        found = [("Means over seeds", *of_experiments), ("Each run", *found[0][1:])]
    if contents["merged"]:
        merges = "; ".join(dict.fromkeys(f"{part['merge']} is {' or '.join(part['classes'])}"
                                         for part in contents["merged"]))
        title = f"Classes taken together, against the rest ({merges})"
        found.append((title, *readable(merged_rows(contents, digits=4))))
    return found


def summary(contents: dict) -> str:
    """Return the main scores as a table for the terminal, with the best constant prediction, and what they are of.

    Runs of one config that differ only in their seed are one row.
    """
    left, classes, right = ["run", "soft Dice", "accuracy", "Dice", "95 % interval"], contents["classes"], ["HD95 px"]
    candidates = contents["experiments"] or contents["entries"]
    if contents["experiments"]:
        left.insert(1, "seeds")
    if len(candidates) > 1:
        right += ["Dice - first", "its 95 % interval"]
    rows = []
    for candidate in candidates:
        row, dice = table_row(candidate, digits=3), candidate["scores"]["dice"]
        cells = [*(row[name] for name in left), *(cell(dice[name], "value", ".3f") for name in classes),
                 *(row[name] for name in right)]
        rows.append([text or "-" for text in cells])
    constant = contents["best_constant"]
    cells = [f"all {constant['class']}", *["-"] * (left.index("Dice") - 1), f"{constant['dice_mean']:.3f}"]
    rows.append(cells + [""] * (len(rows[0]) - len(cells)))
    parts = [table([*left, *classes, *right], rows)]
    if contents["merged"]:
        header, merged = readable(merged_rows(contents, digits=3))
        shown = [i for i, name in enumerate(header) if name not in ("IoU 95 %", "tile IoU 95 %")]
        parts += ["", table([header[i] for i in shown], [[row[i] for i in shown] for row in merged]), ""]
    return "\n".join([*parts, *about_tiles(contents), about_distances(contents)])


# ---------------------------------------------------------------------------------------------- remarks

def remarks(contents: dict) -> list[str]:
    """Return the sentences below the table of table.md and report.html."""
    constant, sentences = contents["best_constant"], about_tiles(contents)
    for candidate in contents["entries"]:
        if "loss" in candidate:
            flips = ", averaged over the 8 flips and turns" if candidate["flips"] else ""
            origin = (f"mean probability of {', '.join(candidate['members'])}" if "members" in candidate else
                      f"{candidate['source']} of epoch {candidate['tested_epoch']}")
            sentences.append(f"{candidate['name']}: {origin}{flips}. Computed in {candidate['precision']}.")
    sentences += ["Dice, the hard Dice, is pooled over all pixels and averaged over classes. Predicting "
                  f"{constant['class']} everywhere has {constant['dice_mean']:.4f}.", about_distances(contents),
                  f"Surface Dice is the share of both outlines within {contents['surface_dice_tolerance_px']:g} px of "
                  "the other outline."]
    if any("loss" in candidate for candidate in contents["entries"]):
        sentences.append("Soft Dice is the report's equation 9. A perfect prediction of a tile without one of three "
                         "classes has 0.667.")
    return sentences


def about_tiles(contents: dict) -> list[str]:
    """Say which tiles are behind the scores, and how far scores and intervals can be trusted."""
    groups, tiles = contents["groups"], contents["tiles"]
    of_groups = f" of {groups} group{'s' if groups > 1 else ''}" if groups else ""
    sentences = [*contents["doubts"], f"{tiles} tile{'s' if tiles > 1 else ''}{of_groups} (split: {contents['split']}) "
                 f"of {contents['data_root']}. Intervals: {contents['intervals']}."]
    if not groups and tiles >= bootstrap.FEWEST_GROUPS:
        sentences.append("Slides or patients are not known (data.group). The intervals assume independent tiles and "
                         "are too narrow if tiles share a slide.")
    elif bootstrap.FEWEST_GROUPS <= groups < FEW_GROUPS:
        sentences.append(f"With {groups} groups the intervals are rough.")
    if contents["experiments"]:
        sentences.append("Rows of several seeds are means over the runs. Their intervals hold the chance of slides and "
                         "of seeds; differences compare the same slides, and the same seeds if both rows have just "
                         "these.")
        if any(len(experiment["seeds"]) in (2, 3) for experiment in contents["experiments"]):
            sentences.append("Two or three seeds say little about others, so such intervals are wide.")
    if any("loss" in candidate for candidate in contents["entries"]) and not all(
            experiment["seeds"] for experiment in contents["experiments"] or [{"seeds": []}]):
        single = "Scores, intervals and differences of one run" if contents["experiments"] else (
            "Scores, intervals and differences")
        sentences.append(f"{single} describe these weights: training the same config with another seed can change them "
                         "by as much.")
    return sentences


def about_distances(contents: dict) -> str:
    """Say in how many tiles HD95 is the tile's diagonal and not a distance."""
    counts = "; ".join(f"{candidate['name']}: {sum(candidate['tiles_where_missed'].values())} missed, "
                       f"{sum(candidate['tiles_where_invented'].values())} falsely predicted"
                       for candidate in contents["entries"])
    return ("HD95 is the mean over tiles, then over classes. If a class is missed or falsely predicted in a tile, the "
            f"tile's diagonal is used ({counts}).")


# ---------------------------------------------------------------------------------------------- tiles.png

def draw_tiles(evaluation: Evaluation, keys: Sequence[str], count: int) -> figures.Figure:
    """Draw figures 9 to 11: image, truth, and each candidate's prediction; the errors too if there is one candidate.

    Of runs that differ only in their seed, the first one is drawn.
    """
    rows, shown = [], [experiment.members[0] for experiment in evaluation.experiments]
    for i, why in choose_tiles(evaluation, keys, count):
        predictions = []
        for candidate in shown:
            tally = evaluation.tallies[candidate]
            dice, accuracy = metrics.dice(tally.confusion[i]), metrics.pixel_accuracy(tally.confusion[i])
            predictions.append((f"Dice {metrics.mean_present(dice):.3f}  accuracy {accuracy:.3f}",
                                evaluation.predicted(candidate, i)))
        rows.append((evaluation.test_set.tiles[i].key, why, *evaluation.tile(i), predictions))
    return figures.tiles(rows, [evaluation.candidates[candidate].name for candidate in shown], evaluation.classes)


def choose_tiles(evaluation: Evaluation, keys: Sequence[str], count: int) -> list[tuple[int, str]]:
    """Choose tiles and say why: those named, else `count` from the worst to the best, and where candidates differ most.

    They are ranked by accuracy, because one false pixel of a class that is absent from a tile halves the tile's Dice.
    """
    if keys:
        places = {tile.key: i for i, tile in enumerate(evaluation.test_set.tiles)}
        return [(places[key], "") for key in keys]
    order, spread = evaluation.ranked()
    names = {0: "worst", len(order) - 1: "best"}
    chosen = {int(order[rank]): names.get(rank, f"rank {rank + 1} of {len(order)}")
              for rank in evenly_spaced(range(len(order)), count)}
    differing = [int(i) for i in np.argsort(-spread) if spread[i] > 0 and i not in chosen]
    return [*chosen.items(), *((i, "models differ") for i in differing[:DIFFERING])]
