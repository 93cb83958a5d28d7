"""Compute the numbers of receptive fields from measured gradients: fields.csv, paths.csv and fields.json.

    inside    the true class of the measured pixels, or "all", where each class counts by its share in the tiles
    logit     the class whose logit is differentiated, or "all" of them
    sample    a weight for each pixel or tile: first one that takes all as they are, then R bootstrap samples of whole
              slides or patients (common/bootstrap.py)
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

from common import bootstrap, geometry
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.results import count_groups
from evaluation.test_set import TestSet
from fields import theory
from fields.borders import DISTANCES, Border
from fields.gradients import RINGS, TRAINED, Condition, Field

ENERGIES = {"r50": 0.5, "r90": 0.9, "r95": 0.95}
FAINT = 1e-6  # of the norm of the gradient
NEAR = 16  # pixels from a crop's border, one of DISTANCES
ALL = "all"


@dataclass(frozen=True)
class MeasuredRun:
    """A run and what was measured."""

    candidate: Candidate
    test_set: TestSet
    fields: dict[Condition, Field]
    border: Border

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def levels(self) -> int:
        return len(self.candidate.config.model.widths)

    @property
    def class_names(self) -> dict[int | None, str]:
        """The values of `inside` and `logit` with their names; None is all classes."""
        return {None: ALL, **dict(enumerate(self.candidate.config.data.classes))}

    def classes_measured(self, condition: Condition) -> list[int | None]:
        """Return None for all pixels, then the classes that some pixels have; zeros and noise have no classes."""
        classes = np.unique(self.fields[condition].pixels.classes).tolist()
        return [None, *classes] if condition.input == "tiles" else [None]


def contents(runs: Sequence[MeasuredRun]) -> dict:
    """Return the contents of fields.json; `plain` turns NaN into null."""
    return {"radii": "smallest disc that holds 50, 90 and 95 % of the squared gradient, in steps of a quarter pixel",
            "area_share": "the disc of r95 as a share of the theoretical field's area, mean over alignments",
            "intervals": f"95 %, bootstrap of {bootstrap.RESAMPLES} samples of groups",
            "runs": [_run_contents(run) for run in runs]}


def _run_contents(run: MeasuredRun) -> dict:
    candidate, test_set, levels, paths = run.candidate, run.test_set, run.levels, path_rows(run)
    return {
        "name": run.name, "source": str(candidate.source), "epoch": candidate.epoch,
        "loss": candidate.config.loss.name, "widths": list(candidate.config.model.widths),
        "data_root": test_set.config.data.root, "split": test_set.split,
        "tiles_identity": test_set.tiles_identity, "doubts": test_set.caveats,
        "precision": str(candidate.precision).removeprefix("torch."), "device": str(candidate.device),
        "theory": {
            "alignments": [{"r": members, "first": first, "last": last}
                           for members, first, last in geometry.alignments(levels)],
            "area": geometry.area(levels),
            "paths": {name: theory.sizes(levels, path)
                      for path, name in enumerate(theory.path_names(levels), start=1)},
            "padded_share": {str(n): geometry.padded_share(levels, n, n) for n in theory.PADDED_SIZES}},
        "fields": field_rows(run), "paths": paths, "dead": describe_dead_paths(run, paths),
        "without_pixels": [f"{run.name}: no pixel of {name} lies far enough from the borders of its tile."
                           for k, name in run.class_names.items() if k not in run.classes_measured(TRAINED)],
        "border": border_numbers(run),
    }


def plain(value):
    """Return the value for JSON and CSV: without NumPy, floats with six digits, None where they are not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def field_rows(run: MeasuredRun) -> list[dict]:
    """Return the rows of fields.csv."""
    rows = []
    for condition in run.fields:
        for inside in run.classes_measured(condition):
            samples, groups = _samples(run, condition, inside)
            rows += [_field_row(run, condition, inside, logit, samples, groups) for logit in run.class_names]
    return rows


def _field_row(run: MeasuredRun, condition: Condition, inside: int | None, logit: int | None,
               samples: np.ndarray, groups: int) -> dict:
    field, chosen, on_tiles = run.fields[condition], samples[0] > 0, condition.input == "tiles"
    energy = field.energy.sum(1) if logit is None else field.energy[:, logit]        # (S, rings)
    sums = energy.sum(-1, keepdims=True)
    parts = samples[0] * sums[:, 0]                                                  # (S,)
    row = {"run": run.name, "weights": condition.weights, "input": condition.input,
           "inside": run.class_names[inside], "logit": run.class_names[logit], "pixels": int(chosen.sum()),
           "effective_pixels": parts.sum() ** 2 / (parts**2).sum() if parts.any() else math.nan,
           "tiles": len(set(field.pixels.tiles[chosen])) if on_tiles else 0, "groups": groups}
    even_energy = energy / np.maximum(sums, 1e-300)
    numbers = {name: radii(samples @ energy, share) for name, share in ENERGIES.items()}
    numbers |= {f"{name}_even": radii(samples @ even_energy, share) for name, share in ENERGIES.items()}
    numbers["area_share"] = math.pi * numbers["r95"] ** 2 / geometry.area(run.levels)
    for name, values in numbers.items():                                             # (1 + R,)
        row |= _with_interval(name, values, groups)
    strength = field.map(inside, logit)
    _, row["sigma"], row["sigma_error"], row["misfit"] = fit_gaussian(strength)
    row["first_row"], row["last_row"], row["first_column"], row["last_column"] = extent(strength) or ("",) * 4
    return row


def _samples(run: MeasuredRun, condition: Condition, inside: int | None) -> tuple[np.ndarray, int]:
    """Return samples (1 + R, S) of the pixels of a class, and their number of slides or patients; zeros have none."""
    pixels = run.fields[condition].pixels
    weights = pixels.weights(inside)
    if condition.input != "tiles":
        return weights[None], 0
    tiles = [run.test_set.tiles[i] for i in pixels.tiles]
    groups = [tile.group or f"tile {tile.key}" for tile in tiles]
    used = {group for group, weight in zip(groups, weights, strict=True) if weight}
    return weights * bootstrap.resampled_weights(groups), len(used)


def _interval(values: np.ndarray, groups: int) -> dict:
    """Return value and 95 % interval of the values (1 + R,) of the samples."""
    low, high = bootstrap.interval(values, groups)
    return {"value": values[0], "low": low, "high": high}


def _with_interval(name: str, values: np.ndarray, groups: int) -> dict:
    """Return value and 95 % interval as three columns of a table."""
    number = _interval(values, groups)
    return {name: number["value"], f"{name}_low": number["low"], f"{name}_high": number["high"]}


def radii(energy: np.ndarray, share: float) -> np.ndarray:
    """Return the smallest radius (...) in pixels whose disc contains this share of the energies (..., rings)."""
    inside = energy.cumsum(-1)
    total = inside[..., -1:]
    radius = (inside >= share * total * (1 - 1e-12)).argmax(-1) / RINGS
    return np.where(total[..., 0] > 0, radius, math.nan)


def gaussian(distance: np.ndarray, height: float, sigma: float) -> np.ndarray:
    return height * np.exp(-(distance**2) / (2 * sigma**2))


def fit_gaussian(strength: np.ndarray) -> tuple[float, float, float, float]:
    """Fit a round Gaussian around the centre of a map by least squares: height, sigma, sigma's error and the misfit.

    Sigma and its standard error are in pixels. The misfit is the norm of the residual as a share of the map's norm.
    All are NaN if no fit is found.
    """
    steps = np.arange(len(strength)) - len(strength) // 2
    distance = np.hypot.outer(steps, steps).ravel()
    highest = strength.max()
    if not highest > 0:
        return (math.nan,) * 4
    scaled = (strength / highest).ravel()
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore", category=OptimizeWarning):
            (height, sigma), covariance = curve_fit(gaussian, distance, scaled, p0=(scaled.max(), 2.0))
    except RuntimeError:  # it does not converge
        return (math.nan,) * 4
    residual = scaled - gaussian(distance, height, sigma)
    return height * highest, abs(sigma), math.sqrt(covariance[1, 1]), np.linalg.norm(residual) / np.linalg.norm(scaled)


def extent(strength: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return first and last row and column where a map is not zero, counted from its centre; None if nowhere."""
    radius = len(strength) // 2
    rows, columns = (np.flatnonzero(strength.any(axis)) - radius for axis in (1, 0))
    return (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])) if len(rows) else None


def path_rows(run: MeasuredRun) -> list[dict]:
    """Return the rows of paths.csv, over the logits of all classes."""
    field, rows = run.fields[TRAINED], []
    for inside in run.classes_measured(TRAINED):
        samples, groups = _samples(run, TRAINED, inside)
        whole = samples @ field.energy.sum((1, 2))                                   # (1 + R,)
        importance = samples @ field.importance.sum(1)                               # (1 + R, P)
        without = samples @ field.without.sum(1)                                     # (1 + R, P)
        with np.errstate(invalid="ignore"):
            importance_share = importance / importance.sum(1, keepdims=True)
            without_share = without / whole[:, None]
        for path, name in enumerate(theory.path_names(run.levels)):
            by_ring, = samples[:1] @ field.path_energy[:, :, path].sum(1)            # (rings,)
            alone = by_ring.sum() / whole[0] if whole[0] else math.nan
            rows.append({"run": run.name, "inside": run.class_names[inside], "path": name,
                         "field": theory.sizes(run.levels, path + 1),
                         **_with_interval("gradient_x_activation", importance_share[:, path], groups),
                         **_with_interval("energy_without", without_share[:, path], groups),
                         "energy_alone": alone, "r95_alone": float(radii(by_ring, 0.95)), "dead": not alone > 0})
    return rows


def describe_dead_paths(run: MeasuredRun, rows: Sequence[dict]) -> list[str]:
    """Return a sentence for each path that passes no gradient or hardly any; `rows` are those of paths.csv."""
    shares = {row["path"]: row["energy_alone"] for row in rows if row["inside"] == ALL}
    alive = [path for path, share in enumerate(shares.values(), start=1) if share > 0]
    if not alive:
        return [f"{run.name}: no gradient reaches the input."]
    sentences = []
    for name, share in shares.items():
        if not share > 0:
            sentences.append(f"{run.name}: the {name} is dead: it passes no gradient.")
        elif share < FAINT**2:
            sentences.append(f"{run.name}: the {name} is almost dead: it passes only {math.sqrt(share):.0e} of the "
                             "gradient.")
    deepest = max(alive)
    if deepest < run.levels:
        sentences[-1] += (f" The field is that of the {theory.path_names(run.levels)[deepest - 1]}: "
                          f"{theory.sizes(run.levels, deepest)} px instead of {theory.sizes(run.levels)}.")
    return sentences


def border_numbers(run: MeasuredRun) -> dict:
    """Return accuracy and Dice near a tile's border and elsewhere, and near a crop's border, for fields.json."""
    border = run.border
    tiles = [run.test_set.tiles[i] for i in border.tiles]
    samples = bootstrap.resampled_weights([tile.group for tile in tiles])            # (1 + R, N)
    count = count_groups(tiles)
    sizes = run.test_set.store.sizes[[run.test_set.rows[i] for i in border.tiles]]   # (N, 2)
    shares = [geometry.padded_share(run.levels, *size, canvas=False) for size in map(tuple, sizes.tolist())]
    numbers = {"tiles": len(border.tiles), "groups": count,
               "share": float(np.average(shares, weights=sizes.prod(axis=1)))}
    outer, interior = (np.tensordot(samples, counts, 1) for counts in (border.outer, border.interior))
    for name, score in {"accuracy": metrics.pixel_accuracy,
                        "dice": lambda counts: metrics.mean_present(metrics.dice(counts))}.items():
        near, elsewhere = score(outer), score(interior)                              # (1 + R,)
        numbers[name] = {"border": _interval(near, count), "interior": _interval(elsewhere, count),
                         "difference": _interval(near - elsewhere, count)}
    numbers["by_distance"] = _by_distance(samples @ border.right, samples @ border.pixels, count)
    if border.crop:
        alone, within = samples @ border.right_alone, samples @ border.right_in_tile  # (1 + R, D)
        near = np.array(DISTANCES) < NEAR
        crop_pixels = samples @ border.crop_pixels                                   # (1 + R, D)
        pixels = crop_pixels[:, near].sum(1)                                         # (1 + R,)
        with np.errstate(invalid="ignore"):  # a sample of slides may lack tiles that are large enough
            share_alone, share_within = (right[:, near].sum(1) / pixels for right in (alone, within))
        numbers["crop"] = {
            "size": border.crop, "nearer_than_px": NEAR, "alone": _interval(share_alone, count),
            "within": _interval(share_within, count), "difference": _interval(share_alone - share_within, count),
            "difference_by_distance": _by_distance(alone - within, crop_pixels, count)}
    return numbers


def _by_distance(right: np.ndarray, pixels: np.ndarray, groups: int) -> list[dict]:
    """Return shares of right pixels in the bands of tiles or crops; both (1 + R, D) count pixels of the samples."""
    with np.errstate(invalid="ignore"):  # a sample of slides may lack a band
        return [{"from_px": DISTANCES[i], **_interval(right[:, i] / pixels[:, i], groups)}
                for i in np.flatnonzero(pixels[0])]
