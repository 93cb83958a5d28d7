"""Compute the numbers of an evaluation: the contents of scores.json, and the columns of tiles.csv."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from common import bootstrap
from common.masks import read_mask
from dataset import Tile, found_in
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.experiments import (
    Experiment,
    Samples,
    experiments_of,
    mean_samples,
    seed_margins,
    seed_margins_of_difference,
)
from evaluation.metrics import Tally
from evaluation.test_set import TestSet

FACTS_OF_TABLES = ("loss", "levels", "dropout", "epochs", "best_epoch", "flips")


@dataclass(frozen=True)
class Merge:
    """Classes that are scored as one, against the rest."""

    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Candidates and their predictions on a test set: everything that is written follows from it."""

    test_set: TestSet
    candidates: list[Candidate]
    tallies: list[Tally]  # of each candidate
    label_images: list[dict[str, Path]]  # of each candidate, by the keys of the tiles
    tolerance: float  # pixels, of the surface Dice
    merges: tuple[Merge, ...] = ()
    part_of: str = ""  # regular expression that finds the part of a key by which merged classes are scored

    @cached_property
    def experiments(self) -> list[Experiment]:
        return experiments_of(self.candidates)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.test_set.config.data.classes

    @property
    def groups(self) -> int:
        """The number of slides or patients; 0 if no tile has one."""
        tiles = self.test_set.tiles
        return count_groups(tiles) if any(tile.group for tile in tiles) else 0

    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tiles (N,) by mean accuracy, lowest first, and the range of the accuracies of each tile (N,)."""
        accuracy = np.stack([metrics.pixel_accuracy(tally.confusion) for tally in self.tallies])
        return np.argsort(accuracy.mean(0), kind="stable"), np.ptp(accuracy, axis=0)

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of the tiles (N, 2)."""
        return self.test_set.store.sizes[self.test_set.rows]

    def tile(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image (H, W, 3) and classes (H, W), uint8."""
        pixels = self.test_set.store.tile(self.test_set.rows[i])
        return pixels[..., :3], pixels[..., 3]

    def predicted(self, candidate: int, tile: int) -> np.ndarray:
        """Return class indices (H, W) uint8."""
        path = self.label_images[candidate][self.test_set.tiles[tile].key]
        return read_mask(path, self.test_set.config.data)


def count_groups(tiles: Iterable[Tile]) -> int:
    """Count slides or patients; a tile without one counts as one."""
    return len({tile.group or tile for tile in tiles})


def results(evaluation: Evaluation) -> dict:
    """Return the contents of scores.json; a score that does not exist is None."""
    test_set = evaluation.test_set
    weights = bootstrap.resampled_weights([tile.group for tile in test_set.tiles])
    scores = [metrics.scores(tally, weights) for tally in evaluation.tallies]
    constant, dice = metrics.best_constant(evaluation.tallies[0].confusion.sum(0))
    unit = "groups" if evaluation.groups else "tiles"
    intervals = (f"95 %, bootstrap of {bootstrap.RESAMPLES} samples of {unit}" if len(weights) > 1
                 else f"none, since they need {bootstrap.FEWEST_GROUPS} {unit}")
    entries = [_candidate_results(evaluation, scores, i) for i in range(len(evaluation.candidates))]
    return {
        "data_root": test_set.config.data.root, "tiles_identity": test_set.tiles_identity, "split": test_set.split,
        "tiles": len(test_set.tiles), "groups": evaluation.groups, "classes": list(evaluation.classes),
        "doubts": test_set.caveats, "surface_dice_tolerance_px": evaluation.tolerance, "intervals": intervals,
        "best_constant": {"class": evaluation.classes[constant], "dice_mean": json_number(dice)},
        "experiments": _experiment_results(evaluation, scores, entries),
        "merged": merged_results(evaluation, weights),
        "entries": entries,
    }


def _candidate_results(evaluation: Evaluation, scores: list[Samples], i: int) -> dict:
    """Return what scores.json says about candidate i; `scores` are the samples of every candidate."""
    candidate, tally = evaluation.candidates[i], evaluation.tallies[i]
    truth, predicted = tally.confusion.sum(2) > 0, tally.confusion.sum(1) > 0        # (N, K) tiles that have a class
    differences = _differences(scores[0], scores[i]) if i > 0 else {}

    def by_class(tiles: np.ndarray) -> dict[str, int]:
        return dict(zip(evaluation.classes, tiles.sum(0).tolist(), strict=True))

    reliability = None
    if tally.calibration is not None:
        reliability = dict(zip(("pixels", "confidence", "right"), tally.calibration.sum(0).tolist(), strict=True))
    return {
        "name": candidate.name, "source": " + ".join(map(str, candidate.sources)), **candidate.model_facts(),
        "scores": _with_intervals(scores[i], evaluation, _present(evaluation, [i])),
        "difference_to_first": _with_intervals(differences, evaluation, _present(evaluation, [0, i])),
        "tiles_behind_means": by_class(truth | predicted),
        "tiles_where_missed": by_class(truth & ~predicted),
        "tiles_where_invented": by_class(predicted & ~truth),
        "confusion": tally.confusion.sum(0).tolist(), "reliability": reliability,
    }


def _experiment_results(evaluation: Evaluation, scores: list[Samples], entries: list[dict]) -> list[dict]:
    """Return what scores.json says about the experiments; nothing if each of them is a single candidate."""
    experiments = evaluation.experiments
    if not any(experiment.seeds for experiment in experiments):
        return []
    found = []
    for experiment in experiments:
        first, samples = experiments[0], [scores[i] for i in experiment.members]
        differences, margins = {}, {}
        if experiment is not first:
            of_first, are_pairs = [scores[i] for i in first.members], first.seeds == experiment.seeds != ()
            differences = _differences(mean_samples(of_first), mean_samples(samples))
            are_runs = all(evaluation.candidates[other.members[0]].run for other in (first, experiment))
            margins = seed_margins_of_difference(of_first, samples, are_pairs, are_runs)
        facts = [entries[i] for i in experiment.members]
        shared = {name: value for name, value in facts[0].items() if name in FACTS_OF_TABLES
                  and all(entry[name] == value for entry in facts)}
        found.append({
            "name": experiment.name, "runs": [entry["name"] for entry in facts], "seeds": list(experiment.seeds),
            **shared,
            "scores": _with_intervals(mean_samples(samples), evaluation, _present(evaluation, experiment.members),
                                      seed_margins(samples)),
            "difference_to_first": _with_intervals(
                differences, evaluation, _present(evaluation, [*first.members, *experiment.members]), margins,
                are_differences=True),
        })
    return found


def _differences(first: Samples, other: Samples) -> Samples:
    return {name: samples - first[name] for name, samples in other.items() if name in first}


def _present(evaluation: Evaluation, candidates: Iterable[int]) -> np.ndarray:
    """Return which tiles have a class (N, K), in the truth or in the prediction of one of these candidates."""
    tallies = [evaluation.tallies[i].confusion for i in candidates]
    return np.any([counts.sum(axis) > 0 for counts in tallies for axis in (1, 2)], axis=0)


def _with_intervals(scores: Samples, evaluation: Evaluation, present: np.ndarray,
                    seed_margins: Samples | None = None, are_differences: bool = False) -> dict:
    """Return value and interval of each score (R,), and of the classes and their mean for a score (R, K + 1).

    `present` (N, K) says which tiles have a class: only their groups are behind the interval of the class.
    """
    tiles = evaluation.test_set.tiles
    groups = {name: count_groups(tile for tile, has in zip(tiles, column, strict=True) if has)
              for name, column in zip(evaluation.classes, present.T, strict=True)} | {"mean": count_groups(tiles)}
    found = {}
    for name, samples in scores.items():
        margins = seed_margins[name] if seed_margins else np.zeros(samples.shape[1:])
        most = math.inf if name.endswith(("hausdorff", "hd95")) else 1.0
        bounds = (-most if are_differences else 0.0), most
        if samples.ndim == 1:
            found[name] = with_interval(samples, groups["mean"], margins, bounds)
        else:
            found[name] = {column: with_interval(samples[:, k], groups[column], margins[k], bounds)
                           for k, column in enumerate(groups)}
    return found


def with_interval(samples: np.ndarray, groups: int, seed_margin: float = 0.0,
                  bounds: tuple[float, float] = (0.0, 1.0)) -> dict:
    """Return value and interval of a score (R,) between `bounds`. Margins of slides and seeds add in squares."""
    value = samples[0]
    low, high = bootstrap.interval(samples, groups)
    if seed_margin:
        low = max(value - math.hypot(value - low, seed_margin), bounds[0])
        high = min(value + math.hypot(high - value, seed_margin), bounds[1])
    return {"value": json_number(value), "low": json_number(low), "high": json_number(high)}


def merged_results(evaluation: Evaluation, weights: np.ndarray) -> list[dict]:
    """Return the scores of merged classes by part of the test set; "" is the whole set.

    dice and iou are pooled over pixels, tile_dice and tile_iou are means over the tiles that have one of the classes in
    truth or prediction, as papers on binary segmentation report them.
    """
    found, tiles = [], evaluation.test_set.tiles
    parts = [found_in(tile.key, evaluation.part_of) for tile in tiles]
    for merge in evaluation.merges:
        chosen = [evaluation.classes.index(name) for name in merge.classes]
        counts = [metrics.merged(tally.confusion, chosen) for tally in evaluation.tallies]  # (N, 2, 2) each
        for part in ["", *sorted(set(parts) - {""})]:
            inside = np.array([part in ("", own) for own in parts])
            samples = [metrics.binary_scores(of_candidate, weights * inside) for of_candidate in counts]
            groups = count_groups(tile for tile, is_inside in zip(tiles, inside, strict=True) if is_inside)
            rows = []
            for experiment in evaluation.experiments:
                of_runs = [samples[i] for i in experiment.members]
                means, margins = mean_samples(of_runs), seed_margins(of_runs)
                rows.append({"name": experiment.name, "seeds": list(experiment.seeds)} | {
                    name: with_interval(means[name], groups, margins[name]) for name in means})
            found.append({"merge": merge.name, "classes": list(merge.classes), "part": part,
                          "tiles": int(inside.sum()), "groups": groups, "rows": rows})
    return found


def evenly_spaced(values: Sequence, count: int) -> list:
    """Return `count` of the values, the first, the last and others at equal distances, or all if there are fewer."""
    places = np.linspace(0, len(values) - 1, min(len(values), count)).round().astype(int)
    return [values[place] for place in np.unique(places)]


def json_number(value: float) -> float | None:
    """Return the number with six decimals; None for NaN, which JSON does not have."""
    return None if math.isnan(value) else round(float(value), 6)


def tile_columns(evaluation: Evaluation) -> list[dict[str, np.ndarray]]:
    """Return the columns (N,) of tiles.csv for each candidate; NaN for a score that does not exist."""
    found = []
    for tally in evaluation.tallies:
        columns = {}
        for name, values in metrics.tile_scores(tally).items():
            if values.ndim == 2:
                columns[f"{name}_mean"] = metrics.mean_present(values)
                columns |= {f"{name}_{label}": values[:, k] for k, label in enumerate(evaluation.classes)}
            else:
                columns[name] = values
        found.append(columns)
    absent = np.full(len(evaluation.test_set.tiles), np.nan)
    return [{name: columns.get(name, absent) for name in max(found, key=len)} for columns in found]
