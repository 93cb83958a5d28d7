"""The numbers of receptive fields: fields.csv, paths.csv and fields.json."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import OptimizeWarning, curve_fit

from common import bootstrap, geometry
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet
from fields import theory
from fields.borders import DISTANCES, Border
from fields.gradients import RINGS, TRAINED, Field, Kind

ENERGIES = {"r50": 0.5, "r90": 0.9, "r95": 0.95}
FAINT = 1e-6  # of the norm of the gradient
NEAR = 16  # pixels from a crop's border, one of DISTANCES
ALL = "all"


@dataclass(frozen=True)
class MeasuredRun:
    """A run and what was measured of it."""

    candidate: Candidate
    test_set: TestSet
    fields: dict[Kind, Field]
    border: Border
    precision: torch.dtype  # of the gradients

    @property
    def levels(self) -> int:
        return len(self.candidate.config.model.widths)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.candidate.config.data.classes

    def regions(self, kind: Kind) -> list[int | None]:
        """All pixels, and each class that some have; inputs that are no tiles have no classes."""
        return [None, *np.unique(self.fields[kind].pixels.classes).tolist()] if kind[1] == "tiles" else [None]

    def name_of(self, k: int | None) -> str:
        return ALL if k is None else self.classes[k]


def resampled(run: MeasuredRun, kind: Kind, region: int | None) -> tuple[np.ndarray, int]:
    """Weights (1 + R, S) of the pixels: as they are, then samples of whole slides or patients; and how many of these.

    Inputs that are no tiles come from no slide: they have the first row only.
    """
    pixels = run.fields[kind].pixels
    weights = pixels.weights(region)[None]
    if kind[1] != "tiles":
        return weights, 0
    tiles = [run.test_set.tiles[i] for i in pixels.tiles]
    groups = [tile.group or f"tile {tile.key}" for tile in tiles]
    samples = weights * bootstrap.resampled_weights(groups)
    return samples, len({group for group, weight in zip(groups, weights[0], strict=True) if weight})


def radii(energy: np.ndarray, share: float) -> np.ndarray:
    """(...) the smallest radius in pixels, a multiple of 1 / RINGS, whose disc holds this share of energies by ring."""
    inside = energy.cumsum(-1)
    total = inside[..., -1:]
    with np.errstate(invalid="ignore"):
        radius = (inside >= share * total * (1 - 1e-12)).argmax(-1) / RINGS
    return np.where(total[..., 0] > 0, radius, math.nan)


def gaussian(distance: np.ndarray, height: float, sigma: float) -> np.ndarray:
    return height * np.exp(-(distance**2) / (2 * sigma**2))


def fit_gaussian(strength: np.ndarray) -> tuple[float, float, float, float]:
    """Height, sigma in pixels, sigma's standard error and the misfit of a round Gaussian around the centre of a map.

    By least squares; the misfit is the residual's norm as a share of the map's. NaN where no fit is
    found.
    """
    steps = np.arange(len(strength)) - len(strength) // 2
    distance = np.hypot.outer(steps, steps)
    highest = strength.max()
    if not highest > 0:
        return (math.nan,) * 4
    scaled = (strength / highest).ravel()
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore", category=OptimizeWarning):
            (height, sigma), covariance = curve_fit(gaussian, distance.ravel(), scaled, p0=(scaled.max(), 2.0))
    except RuntimeError:  # it does not converge
        return (math.nan,) * 4
    residual = scaled - gaussian(distance.ravel(), height, sigma)
    return height * highest, abs(sigma), math.sqrt(covariance[1, 1]), np.linalg.norm(residual) / np.linalg.norm(scaled)


def extent(strength: np.ndarray) -> tuple[int, int, int, int] | None:
    """First and last row, first and last column, as seen from the centre, where a map is not zero."""
    radius = len(strength) // 2
    rows, columns = (np.flatnonzero(strength.any(axis)) - radius for axis in (1, 0))
    return (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])) if len(rows) else None


def _interval(samples: np.ndarray, groups: int) -> dict:
    low, high = bootstrap.interval(samples, groups) or (math.nan, math.nan)
    return {"value": samples[0], "low": low, "high": high}


def field_rows(run: MeasuredRun) -> list[dict]:
    """The rows of fields.csv."""
    rows = []
    exact = geometry.area(run.levels)
    for kind, field in run.fields.items():
        for region in run.regions(kind):
            weights, groups = resampled(run, kind, region)
            chosen = weights[0] > 0
            for logit in [None, *range(len(run.classes))]:
                energy = field.energy.sum(1) if logit is None else field.energy[:, logit]
                samples = weights @ energy                                           # (1 + R, rings)
                sizes = {name: radii(samples, share) for name, share in ENERGIES.items()}
                even = weights @ (energy / np.maximum(energy.sum(-1, keepdims=True), 1e-300))
                sizes |= {f"{name}_even": radii(even, share) for name, share in ENERGIES.items()}
                sizes["area_share"] = math.pi * sizes["r95"] ** 2 / exact
                strength = field.map(region, logit)
                _, sigma, error, misfit = fit_gaussian(strength)
                parts = weights[0] * energy.sum(-1)                                  # (S,)
                row = {"run": run.candidate.name, "weights": kind[0], "input": kind[1], "inside": run.name_of(region),
                       "logit": run.name_of(logit), "pixels": int(chosen.sum()),
                       "effective_pixels": parts.sum() ** 2 / (parts**2).sum() if parts.any() else math.nan,
                       "tiles": len(set(field.pixels.tiles[chosen])) if kind[1] == "tiles" else 0, "groups": groups}
                for name, values in sizes.items():
                    number = _interval(values, groups)
                    row |= {name: number["value"], f"{name}_low": number["low"], f"{name}_high": number["high"]}
                row |= {"sigma": sigma, "sigma_error": error, "misfit": misfit}
                seen = extent(strength) or ("",) * 4
                rows.append(row | dict(zip(("first_row", "last_row", "first_column", "last_column"), seen,
                                           strict=True)))
    return rows


def path_rows(run: MeasuredRun) -> list[dict]:
    """The rows of paths.csv, over the logits of all classes."""
    field, rows = run.fields[TRAINED], []
    for region in run.regions(TRAINED):
        weights, groups = resampled(run, TRAINED, region)
        whole = weights @ field.energy.sum((1, 2))                                   # (1 + R,)
        important = weights @ field.importance.sum(1)                                # (1 + R, P)
        left = weights @ field.without.sum(1)                                        # (1 + R, P)
        for path, name in enumerate(theory.path_names(run.levels)):
            by_ring = weights[:1] @ field.path_energy[:, :, path].sum(1)             # (1, rings)
            alone = by_ring.sum() / whole[0] if whole[0] else math.nan
            row = {"run": run.candidate.name, "inside": run.name_of(region), "path": name,
                   "field": theory.sizes(run.levels, path + 1)}
            with np.errstate(invalid="ignore"):
                for column, values in (("gradient_x_activation", important[:, path] / important.sum(1)),
                                       ("energy_without", left[:, path] / whole)):
                    number = _interval(values, groups)
                    row |= {column: number["value"], f"{column}_low": number["low"], f"{column}_high": number["high"]}
            rows.append(row | {"energy_alone": alone, "r95_alone": float(radii(by_ring, 0.95)[0]),
                               "dead": bool(not alone > 0)})
    return rows


def dead_lines(run: MeasuredRun, rows: Sequence[dict]) -> list[str]:
    """A sentence for each path that no gradient passes, or hardly any."""
    shares = [row["energy_alone"] for row in rows if row["inside"] == ALL]
    names, lines = theory.path_names(run.levels), []
    alive = [path for path, share in enumerate(shares, start=1) if share > 0]
    if not alive:
        return [f"{run.candidate.name}: no gradient reaches the input at all."]
    for path, share in enumerate(shares, start=1):
        if path not in alive:
            lines.append(f"{run.candidate.name}: the {names[path - 1]} is dead, no gradient passes it.")
        elif share < FAINT**2:
            lines.append(f"{run.candidate.name}: the {names[path - 1]} is as good as dead, only "
                         f"{math.sqrt(share):.0e} of the gradient passes it.")
    if max(alive) < run.levels:
        lines[-1] += (f" What is left is the field of the {names[max(alive) - 1]}, "
                      f"{theory.sizes(run.levels, max(alive))} px in the place of "
                      f"{theory.sizes(run.levels)}.")
    return lines


def border_numbers(run: MeasuredRun) -> dict:
    """Scores of pixels whose field leaves the tile and of the others, and of a crop's border alone and within its tile;
    None where there are no such pixels."""
    border, levels = run.border, run.levels
    groups = [run.test_set.tiles[i].group for i in border.tiles]
    weights = bootstrap.resampled_weights(groups)
    units = len({group or i for i, group in enumerate(groups)})
    height, width = run.test_set.store.shape[1:3]
    numbers = {"tiles": len(border.tiles), "groups": units,
               "share": geometry.padded_share(levels, height, width, canvas=False)}
    counts = np.einsum("rn,nsij->rsij", weights, border.confusion)                   # (1 + R, 2, K, K)
    for name, score in (("accuracy", metrics.pixel_accuracy(counts)),
                        ("dice", metrics.mean_present(metrics.dice(counts)))):
        numbers[name] = {"border": _interval(score[:, 0], units), "interior": _interval(score[:, 1], units),
                         "difference": _interval(score[:, 0] - score[:, 1], units)}
    right, pixels = np.moveaxis(np.einsum("rn,ndc->rdc", weights, border.by_distance), -1, 0)
    with np.errstate(invalid="ignore"):
        accuracy = right / pixels
    numbers["by_distance"] = [{"from_px": DISTANCES[i], **_interval(accuracy[:, i], units)}
                              for i in range(len(DISTANCES)) if pixels[0, i]]
    if border.moved is not None:
        total, alone, within = np.moveaxis(np.einsum("rn,ndc->rdc", weights, border.moved), -1, 0)
        near = np.array(DISTANCES) < NEAR
        pixels, right_alone, right_within = (some[:, near].sum(1) for some in (total, alone, within))
        numbers["crop"] = {"size": border.crop, "nearer_than_px": NEAR,
                           "alone": _interval(right_alone / pixels, units),
                           "within": _interval(right_within / pixels, units),
                           "difference": _interval((right_alone - right_within) / pixels, units),
                           "difference_by_distance": [
                               {"from_px": DISTANCES[i], **_interval((alone - within)[:, i] / total[:, i], units)}
                               for i in range(len(DISTANCES)) if total[0, i]]}
    return numbers


def contents(runs: Sequence[MeasuredRun]) -> dict:
    """What fields.json holds; a number that does not exist is null."""
    found = []
    for run in runs:
        levels, paths = run.levels, path_rows(run)
        found.append({
            "name": run.candidate.name, "source": str(run.candidate.source), "epoch": run.candidate.epoch,
            "loss": run.candidate.config.loss.name, "widths": list(run.candidate.config.model.widths),
            "data_root": run.test_set.config.data.root, "split": run.test_set.split,
            "tiles_identity": run.test_set.identity, "doubts": run.test_set.caveats,
            "precision": str(run.precision).removeprefix("torch."), "device": str(run.candidate.device),
            "theory": {"alignments": [{"r": members, "first": first, "last": last} for members, first, last in
                                      geometry.alignments(levels)],
                       "area": geometry.area(levels),
                       "paths": {name: theory.sizes(levels, path) for path, name in
                                 enumerate(theory.path_names(levels), start=1)},
                       "padded_share": {str(n): geometry.padded_share(levels, n, n)
                                        for n in theory.PADDED_SIZES}},
            "fields": field_rows(run), "paths": paths, "dead": dead_lines(run, paths),
            "without_pixels": [f"{run.candidate.name}: no pixel of {name} lies far enough from the borders of its tile."
                               for k, name in enumerate(run.classes) if k not in run.regions(TRAINED)],
            "border": border_numbers(run),
        })
    return {"radii": "smallest disc that holds 50, 90 and 95 % of the squared gradient, in steps of a quarter pixel",
            "area_share": "the disc of r95 as a share of the theoretical field's area, mean over alignments",
            "intervals": f"95 %, bootstrap of {bootstrap.RESAMPLES} samples of groups", "runs": found}


def plain(value):
    """For JSON: no NaN, no numpy."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return (None if not math.isfinite(value) else float(f"{value:.6g}")) if isinstance(value, float) else value
