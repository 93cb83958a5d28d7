"""Compute the numbers of an evaluation: the contents of scores.json, and the columns of tiles.csv."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import bootstrap
from common.masks import read_mask
from dataset import Tile
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.metrics import Tally
from evaluation.test_set import TestSet


@dataclass(frozen=True)
class Evaluation:
    """Candidates and their predictions on a test set: everything that is written follows from it."""

    test_set: TestSet
    candidates: list[Candidate]
    tallies: list[Tally]  # of each candidate
    label_images: list[dict[str, Path]]  # of each candidate, by the keys of the tiles
    tolerance: float  # pixels, of the surface Dice

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
    return {
        "data_root": test_set.config.data.root, "tiles_identity": test_set.tiles_identity, "split": test_set.split,
        "tiles": len(test_set.tiles), "groups": evaluation.groups, "classes": list(evaluation.classes),
        "doubts": test_set.caveats, "surface_dice_tolerance_px": evaluation.tolerance, "intervals": intervals,
        "best_constant": {"class": evaluation.classes[constant], "dice_mean": json_number(dice)},
        "entries": [_candidate_results(evaluation, scores, i) for i in range(len(evaluation.candidates))],
    }


def _candidate_results(evaluation: Evaluation, scores: list[dict[str, np.ndarray]], i: int) -> dict:
    """Return what scores.json says about candidate i; `scores` are the samples (R, ...) of every candidate."""
    candidate, tally = evaluation.candidates[i], evaluation.tallies[i]
    truth, predicted = tally.confusion.sum(2) > 0, tally.confusion.sum(1) > 0        # (N, K) tiles that have a class
    present = truth | predicted
    present_in_either = present | (evaluation.tallies[0].confusion.sum(1) > 0)
    differences = {name: samples - scores[0][name] for name, samples in scores[i].items() if name in scores[0]}

    def by_class(tiles: np.ndarray) -> dict[str, int]:
        return dict(zip(evaluation.classes, tiles.sum(0).tolist(), strict=True))

    reliability = None
    if tally.calibration is not None:
        reliability = dict(zip(("pixels", "confidence", "right"), tally.calibration.sum(0).tolist(), strict=True))
    return {
        "name": candidate.name, "source": str(candidate.source), **candidate.model_facts(),
        "scores": _with_intervals(scores[i], evaluation, present),
        "difference_to_first": _with_intervals(differences, evaluation, present_in_either) if i > 0 else {},
        "tiles_behind_means": by_class(present),
        "tiles_where_missed": by_class(truth & ~predicted),
        "tiles_where_invented": by_class(predicted & ~truth),
        "confusion": tally.confusion.sum(0).tolist(), "reliability": reliability,
    }


def _with_intervals(scores: dict[str, np.ndarray], evaluation: Evaluation, present: np.ndarray) -> dict:
    """Return value and interval of each score (R,), and of the classes and their mean for a score (R, K + 1).

    `present` (N, K) says which tiles have a class: only their groups are behind the interval of the class.
    """
    tiles = evaluation.test_set.tiles
    groups = {name: count_groups(tile for tile, has in zip(tiles, column, strict=True) if has)
              for name, column in zip(evaluation.classes, present.T, strict=True)} | {"mean": count_groups(tiles)}
    found = {}
    for name, samples in scores.items():
        if samples.ndim == 1:
            found[name] = _with_interval(samples, groups["mean"])
        else:
            found[name] = {column: _with_interval(samples[:, k], groups[column]) for k, column in enumerate(groups)}
    return found


def _with_interval(samples: np.ndarray, groups: int) -> dict:
    low, high = bootstrap.interval(samples, groups)
    return {"value": json_number(samples[0]), "low": json_number(low), "high": json_number(high)}


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
