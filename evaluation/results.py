"""The numbers of an evaluation: scores.json, and the columns of tiles.csv."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import bootstrap
from common.pictures import read_mask
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.metrics import Tally
from evaluation.test_set import TestSet


@dataclass(frozen=True)
class Evaluation:
    """What the entries answered: everything that is written follows from it."""

    test_set: TestSet
    candidates: list[Candidate]
    tallies: list[Tally]
    labels: list[dict[str, Path]]  # of each entry, the label image of each tile's key
    tolerance: float  # pixels, of the surface Dice

    @property
    def classes(self) -> tuple[str, ...]:
        return self.test_set.config.data.classes

    @property
    def groups(self) -> int:
        """How many slides or patients the tiles come from, a tile without one being its own; 0 where none is known."""
        tiles = self.test_set.tiles
        return len({tile.group or tile for tile in tiles}) if any(tile.group for tile in tiles) else 0

    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (N,) of the tiles from the lowest mean accuracy to the highest, and how far the entries differ."""
        accuracy = np.stack([metrics.pixel_accuracy(tally.confusion) for tally in self.tallies])
        return np.argsort(accuracy.mean(0), kind="stable"), np.ptp(accuracy, axis=0)

    def predicted(self, candidate: int, tile: int) -> np.ndarray:
        """Class indices (H, W) uint8."""
        return read_mask(self.labels[candidate][self.test_set.tiles[tile].key], self.test_set.config.data.mask_values)

    def tile(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and class indices (H, W), uint8."""
        pixels = self.test_set.store[self.test_set.rows[i]]
        return pixels[..., :3], pixels[..., 3]


def results(evaluation: Evaluation) -> dict:
    """The contents of scores.json; a score that does not exist is null."""
    asked, classes = evaluation.test_set, evaluation.classes
    weights = bootstrap.resampled_weights([tile.group for tile in asked.tiles])
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
            low, high = bootstrap.interval(samples, units) or (math.nan, math.nan)
            return {"value": _number(samples[0]), "low": _number(low), "high": _number(high)}

        if values.ndim == 1:
            return number(values, units)
        return {name: number(values[:, k], of) for k, (name, of) in
                enumerate(zip([*classes, "mean"], [*groups, units], strict=True))}

    constant, dice = metrics.best_constant(evaluation.tallies[0].confusion.sum(0))
    rows = []
    for candidate, tally, found, having in zip(evaluation.candidates, evaluation.tallies, scores, present, strict=True):
        truth, predicted = tally.confusion.sum(2) > 0, tally.confusion.sum(1) > 0    # (N, K) both
        shared = [name for name in found if name in scores[0]]
        groups, of_either = groups_with(having), groups_with(having | present[0])
        rows.append({
            "name": candidate.name, "source": str(candidate.source), **candidate.facts(),
            "scores": {name: named(values, groups) for name, values in found.items()},
            "difference_to_first": {} if candidate is evaluation.candidates[0] else
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
        "tiles": len(asked.tiles), "groups": evaluation.groups, "classes": list(classes), "doubts": asked.caveats,
        "surface_dice_tolerance_px": evaluation.tolerance,
        "intervals": f"95 %, bootstrap of {bootstrap.RESAMPLES} samples of {'groups' if evaluation.groups else 'tiles'}"
        if len(weights) > 1 else f"none, since they need {bootstrap.FEWEST_GROUPS} "
        f"{'groups' if evaluation.groups else 'tiles'}",
        "best_constant": {"class": classes[constant], "dice_mean": _number(dice)},
        "entries": rows,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def tile_columns(evaluation: Evaluation, candidate: int) -> dict[str, np.ndarray]:
    """Every score of every tile, (N,) each, by the columns of tiles.csv."""
    columns = {}
    for name, values in metrics.tile_scores(evaluation.tallies[candidate]).items():
        if values.ndim == 2:
            columns[f"{name}_mean"] = metrics.mean_present(values)
            columns |= {f"{name}_{label}": values[:, k] for k, label in enumerate(evaluation.classes)}
        else:
            columns[name] = values
    return columns
