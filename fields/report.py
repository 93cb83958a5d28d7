"""What the measurement of receptive fields leaves on disk: one folder, replaced whole.

    fields.csv      a row for each run, weights, input, class of the pixel and class of the logit: radii, fit, share
    paths.csv       a row for each run, class of the pixel and path: what comes by it, what is left without it
    fields.json     both, and the exact theory, padding and borders of each run, and what was measured how
    fields.png      figure 12 of the report: the maps of the runs side by side on one scale
    profiles.png    the maps along both axes through the pixel, with the Gaussian and the untrained network
    inputs.png      each run inside each class, on zeros, on noise, and before training
    paths.png       what each skip and the bottleneck carry
    border.png      accuracy by the distance to the tile's border
"""

import csv
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import OptimizeWarning, curve_fit

from common import figures, geometry
from common.console import percent, table
from common.files import write_text
from evaluation import metrics
from evaluation.entries import Entry, Questions
from fields.measurement import DISTANCES, RINGS, TRAINED, UNTRAINED, Border, Field, Kind, as_published
from unet import UNet

ENERGIES = {"r50": 0.5, "r90": 0.9, "r95": 0.95}
FAINT = 1e-6  # of the norm of the gradient
NEAR = 16  # pixels from a crop's border, one of DISTANCES
ALL = "all"


@dataclass(frozen=True)
class Run:
    """A run and what was measured of it."""

    entry: Entry
    questions: Questions
    fields: dict[Kind, Field]
    border: Border
    precision: torch.dtype  # of the gradients

    @property
    def levels(self) -> int:
        return len(self.entry.config.model.widths)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.entry.config.data.classes

    def regions(self, kind: Kind) -> list[int | None]:
        """All pixels, and each class that some have; inputs that are no tiles have no classes."""
        return [None, *np.unique(self.fields[kind].pixels.classes).tolist()] if kind[1] == "tiles" else [None]

    def name_of(self, k: int | None) -> str:
        return ALL if k is None else self.classes[k]


# ---------------------------------------------------------------------------------------------- numbers

def resampled(run: Run, kind: Kind, region: int | None) -> tuple[np.ndarray, int]:
    """Weights (1 + R, S) of the pixels: as they are, then samples of whole slides or patients; and how many of these.

    Inputs that are no tiles come from no slide: they have the first row only.
    """
    pixels = run.fields[kind].pixels
    weights = pixels.weights(region)[None]
    if kind[1] != "tiles":
        return weights, 0
    tiles = [run.questions.tiles[i] for i in pixels.tiles]
    groups = [tile.group or f"tile {tile.key}" for tile in tiles]
    samples = weights * metrics.resampled_weights(groups)
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
    low, high = metrics.interval(samples, groups) or (math.nan, math.nan)
    return {"value": samples[0], "low": low, "high": high}


def field_rows(run: Run) -> list[dict]:
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
                row = {"run": run.entry.name, "weights": kind[0], "input": kind[1], "inside": run.name_of(region),
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


def path_rows(run: Run) -> list[dict]:
    """The rows of paths.csv, over the logits of all classes."""
    field, rows = run.fields[TRAINED], []
    for region in run.regions(TRAINED):
        weights, groups = resampled(run, TRAINED, region)
        whole = weights @ field.energy.sum((1, 2))                                   # (1 + R,)
        important = weights @ field.importance.sum(1)                                # (1 + R, P)
        left = weights @ field.without.sum(1)                                        # (1 + R, P)
        for path, name in enumerate(geometry.path_names(run.levels)):
            by_ring = weights[:1] @ field.path_energy[:, :, path].sum(1)             # (1, rings)
            alone = by_ring.sum() / whole[0] if whole[0] else math.nan
            row = {"run": run.entry.name, "inside": run.name_of(region), "path": name,
                   "field": geometry.sizes(run.levels, path + 1)}
            with np.errstate(invalid="ignore"):
                for column, values in (("gradient_x_activation", important[:, path] / important.sum(1)),
                                       ("energy_without", left[:, path] / whole)):
                    number = _interval(values, groups)
                    row |= {column: number["value"], f"{column}_low": number["low"], f"{column}_high": number["high"]}
            rows.append(row | {"energy_alone": alone, "r95_alone": float(radii(by_ring, 0.95)[0]),
                               "dead": bool(not alone > 0)})
    return rows


def dead_lines(run: Run, rows: Sequence[dict]) -> list[str]:
    """A sentence for each path that no gradient passes, or hardly any."""
    shares = [row["energy_alone"] for row in rows if row["inside"] == ALL]
    names, lines = geometry.path_names(run.levels), []
    alive = [path for path, share in enumerate(shares, start=1) if share > 0]
    if not alive:
        return [f"{run.entry.name}: no gradient reaches the input at all."]
    for path, share in enumerate(shares, start=1):
        if path not in alive:
            lines.append(f"{run.entry.name}: the {names[path - 1]} is dead, no gradient passes it.")
        elif share < FAINT**2:
            lines.append(f"{run.entry.name}: the {names[path - 1]} is as good as dead, only {math.sqrt(share):.0e} of "
                         "the gradient passes it.")
    if max(alive) < run.levels:
        lines[-1] += (f" What is left is the field of the {names[max(alive) - 1]}, "
                      f"{geometry.sizes(run.levels, max(alive))} px in the place of "
                      f"{geometry.sizes(run.levels)}.")
    return lines


def border_numbers(run: Run) -> dict:
    """Scores of pixels whose field leaves the tile and of the others, and of a crop's border alone and within its tile;
    None where there are no such pixels."""
    border, levels = run.border, run.levels
    groups = [run.questions.tiles[i].group for i in border.tiles]
    weights = metrics.resampled_weights(groups)
    units = len({group or i for i, group in enumerate(groups)})
    height, width = run.questions.store.shape[1:3]
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


def contents(runs: Sequence[Run]) -> dict:
    """What fields.json holds; a number that does not exist is null."""
    found = []
    for run in runs:
        levels, paths = run.levels, path_rows(run)
        found.append({
            "name": run.entry.name, "source": str(run.entry.source), "epoch": run.entry.epoch,
            "loss": run.entry.config.loss.name, "widths": list(run.entry.config.model.widths),
            "data_root": run.questions.config.data.root, "split": run.questions.split,
            "tiles_identity": run.questions.identity, "doubts": run.questions.doubts,
            "precision": str(run.precision).removeprefix("torch."), "device": str(run.entry.device),
            "theory": {"alignments": [{"r": members, "first": first, "last": last} for members, first, last in
                                      geometry.alignments(levels)],
                       "area": geometry.area(levels),
                       "paths": {name: geometry.sizes(levels, path) for path, name in
                                 enumerate(geometry.path_names(levels), start=1)},
                       "padded_share": {str(n): geometry.padded_share(levels, n, n)
                                        for n in geometry.PADDED_SIZES}},
            "fields": field_rows(run), "paths": paths, "dead": dead_lines(run, paths),
            "without_pixels": [f"{run.entry.name}: no pixel of {name} lies far enough from the borders of its tile."
                               for k, name in enumerate(run.classes) if k not in run.regions(TRAINED)],
            "border": border_numbers(run),
        })
    return {"radii": "smallest disc that holds 50, 90 and 95 % of the squared gradient, in steps of a quarter pixel",
            "area_share": "the disc of r95 as a share of the theoretical field's area, mean over alignments",
            "intervals": f"95 %, bootstrap of {metrics.RESAMPLES} samples of groups", "runs": found}


def _plain(value):
    """For JSON: no NaN, no numpy."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return (None if not math.isfinite(value) else float(f"{value:.6g}")) if isinstance(value, float) else value


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in _plain(row).items()} for row in rows)


# ---------------------------------------------------------------------------------------------- said to a person

def _shown(number: float | None, form: str) -> str:
    return "-" if number is None or not math.isfinite(number) else f"{number:{form}}"


def _with_span(number: dict, form: str = ".1%") -> str:
    shown = _shown(number["value"], form)
    return shown if not math.isfinite(number["low"]) else f"{shown} ({number['low']:{form}} to {number['high']:{form}})"


def summary(found: dict) -> str:
    """The main numbers of all runs as tables."""
    fields = []
    for run in found["runs"]:
        for row in run["fields"]:
            if row["logit"] == ALL and (row["weights"] == "trained" or row["inside"] == ALL):
                span = f"{_shown(row['r95_low'], '.2f')} to {_shown(row['r95_high'], '.2f')}"
                fields.append([row["run"], row["weights"], row["input"], row["inside"],
                               f"{_shown(row['effective_pixels'], '.0f')} of {row['pixels']}",
                               *(_shown(row[name], ".2f") for name in ENERGIES),
                               span if math.isfinite(row["r95_low"]) else "-",
                               f"{_shown(row['sigma'], '.2f')} +- {_shown(row['sigma_error'], '.3f')}",
                               _shown(row["misfit"], ".0%"), _shown(row["area_share"], ".2%"),
                               _shown(row["r95_even"], ".2f")])
    paths = [[row["run"], row["path"], row["field"],
              *(percent(row[name]) for name in ("gradient_x_activation", "energy_alone", "energy_without")),
              _shown(row["r95_alone"], ".2f")]
             for run in found["runs"] for row in run["paths"] if row["inside"] == ALL]
    header = ["run", "weights", "input", "inside", "eff. pixels", "r50", "r90", "r95 px", "95 % interval", "sigma px",
              "misfit", "of theory", "even r95"]
    lines = [table(header, fields), "",
             "Effective pixels: so many equal ones would carry the energy as evenly; are they few, raise --pixels.",
             "Even r95: with every pixel's energy scaled to the same sum, so that none counts for more than another.",
             "", table(["run", "path by the", "exact px", "gradient x act.", "energy alone", "left without",
                        "r95 alone"], paths), ""]
    for run in found["runs"]:
        lines += [*run["without_pixels"], *run["dead"], *about_border(run)]
    return "\n".join(lines)


def about_border(run: dict) -> list[str]:
    border, name = run["border"], run["name"]
    if border["share"] == 1:
        lines = [f"{name}: the field of every pixel leaves its tile, so there is no interior to compare with."]
    else:
        accuracy = border["accuracy"]
        change, dice = (_with_span(border[score]["difference"], "+.4f") for score in ("accuracy", "dice"))
        lines = [f"{name}: accuracy is {accuracy['border']['value']:.4f} where the field leaves the tile "
                 f"({border['share']:.0%} of the pixels) and {accuracy['interior']['value']:.4f} elsewhere, on other "
                 f"tissue: {change}; Dice {dice}."]
    if "crop" in border:
        crop = border["crop"]
        lines.append(f"{name}: the same pixels, within {crop['nearer_than_px']} px of the border of {crop['size']} "
                     f"x {crop['size']} crops, have {crop['alone']['value']:.4f} if the crop is all that is seen and "
                     f"{crop['within']['value']:.4f} in the whole tile: {_with_span(crop['difference'], '+.4f')}.")
    return lines


def published(models: dict[str, UNet]) -> str:
    """What the report's procedure says of these networks, whole and with the bottleneck cut, and why."""
    rows, remarks = [], []
    for name, model in models.items():
        levels = len(model.encoder)
        for path, label in ((levels, name), (levels - 1, "  with the bottleneck cut"))[:2 if levels > 1 else 1]:
            printed, position = as_published(model, bottleneck=path == levels)
            tied = {depth: geometry.size(levels, position, depth, ties=True) for depth in range(path, 0, -1)}
            rows.append([label, str(printed), str(printed + 1), str(tied[path]),
                         str(geometry.size(levels, position, path)), geometry.sizes(levels, path)])
            if printed + 1 != tied[path]:
                alike = [depth for depth, size in tied.items() if size == printed + 1]
                why = (f"just what the {geometry.path_names(levels)[alike[0] - 1]} gives: no gradient passes what "
                       "lies below it" if alike else "so further gradients are exactly 0 in float32, by weights that "
                       "vanish or by their product")
                remarks.append(f"{label.strip()} ({name}): {printed + 1} pixels are not 0, {tied[path]} were expected; "
                               f"{why}.")
    return "\n".join([
        table(["network", "as published", "+ 1", "first of ties", "exact here", "exact, by position"], rows), "",
        "as published        zeros in, one output pixel, one class, one channel; last row that is not 0, - the first.",
        "                    The report prints 172 (5 levels), 84 (4 levels) and 116 (5 levels, trained on Dice)",
        "+ 1                 how many rows that are: from row 34 to row 206 there are 173",
        "first of ties       by arithmetic, if every pooling passes the gradient to the first of its pixels alone: so",
        "                    it does on a constant input, where they are equally large",
        "exact here          what this output pixel depends on",
        "exact, by position  what any output pixel depends on, by its position (--theory)", "",
        "So 172 and 84 need no rounding of small gradients, by which the report explains its sizes. 116 is what the",
        "skip of level 4 gives, which is consistent with a model whose bottleneck passes no gradient.", *remarks])


# ---------------------------------------------------------------------------------------------- the folder

def shares(strength: np.ndarray) -> np.ndarray:
    """A map with sum 1, so that models whose logits have other scales can be compared; or without anything in it."""
    return strength / (strength.sum() or 1)


def panels(run: Run) -> list[tuple[str, np.ndarray]]:
    """(title, share of the gradient at each pixel (D, D)) of a run inside each class and on each input."""
    shown = []
    for kind, field in run.fields.items():
        for region in run.regions(kind) if kind[0] == "trained" else [None]:
            strength = field.map(region, None)
            what = kind[1] if region is None else run.name_of(region)
            shown.append((what if kind[0] == "trained" else "before training", shares(strength)))
    return shown


def write(folder: Path, runs: Sequence[Run], formats: Sequence[str]) -> dict:
    """Write everything into `folder`; returns the contents of fields.json."""
    found = contents(runs)
    write_text(folder / "fields.json", json.dumps(_plain(found), indent=2, allow_nan=False) + "\n")
    write_csv(folder / "fields.csv", [row for run in found["runs"] for row in run["fields"]])
    write_csv(folder / "paths.csv", [row for run in found["runs"] for row in run["paths"]])
    maps, profiles = [], []
    for run, numbers in zip(runs, found["runs"], strict=True):
        trained, untrained = (shares(run.fields[kind].map(None, None)) for kind in (TRAINED, UNTRAINED))
        row = next(row for row in numbers["fields"] if (row["weights"], row["input"]) == TRAINED
                   and row["inside"] == row["logit"] == ALL)
        boxes = [(first - members[-1], last - members[0]) for members, first, last in
                 geometry.alignments(run.levels)]
        box = min(low for low, _ in boxes), max(high for _, high in boxes)
        theory = f"{run.levels} levels: {geometry.sizes(run.levels)} px"
        maps.append((run.entry.name, theory, trained, box, [row[name] for name in ENERGIES]))
        height, sigma, *_ = fit_gaussian(trained)
        profiles.append((run.entry.name, trained, untrained, box, (height, sigma)))
    drawn = {
        "fields": figures.fields(maps, list(ENERGIES)),
        "profiles": figures.profiles(profiles, gaussian),
        "inputs": figures.field_panels([(run.entry.name, panels(run)) for run in runs]),
        "paths": figures.path_shares([(run["name"], [row for row in run["paths"] if row["inside"] == ALL])
                                      for run in found["runs"]]),
        "border": figures.border_accuracy({run["name"]: run["border"] for run in found["runs"]}),
    }
    for name, figure in drawn.items():
        for kind in formats:
            figures.save(figure, folder / f"{name}.{kind}")
    return found
