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

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import geometry, palette
from common.console import percent, table
from common.files import write_csv, write_text
from fields import figures, theory
from fields.gradients import TRAINED, UNTRAINED
from fields.numbers import ALL, ENERGIES, MeasuredRun, contents, fit_gaussian, gaussian, plain


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


def shares(strength: np.ndarray) -> np.ndarray:
    """A map with sum 1, so that models whose logits have other scales can be compared; or without anything in it."""
    return strength / (strength.sum() or 1)


def panels(run: MeasuredRun) -> list[tuple[str, np.ndarray]]:
    """(title, share of the gradient at each pixel (D, D)) of a run inside each class and on each input."""
    shown = []
    for kind, field in run.fields.items():
        for region in run.regions(kind) if kind[0] == "trained" else [None]:
            strength = field.map(region, None)
            what = kind[1] if region is None else run.name_of(region)
            shown.append((what if kind[0] == "trained" else "before training", shares(strength)))
    return shown


def write(folder: Path, runs: Sequence[MeasuredRun], formats: Sequence[str]) -> dict:
    """Write everything into `folder`; returns the contents of fields.json."""
    found = contents(runs)
    write_text(folder / "fields.json", json.dumps(plain(found), indent=2, allow_nan=False) + "\n")
    write_csv(folder / "fields.csv", [plain(row) for run in found["runs"] for row in run["fields"]])
    write_csv(folder / "paths.csv", [plain(row) for run in found["runs"] for row in run["paths"]])
    maps, profiles = [], []
    for run, numbers in zip(runs, found["runs"], strict=True):
        trained, untrained = (shares(run.fields[kind].map(None, None)) for kind in (TRAINED, UNTRAINED))
        row = next(row for row in numbers["fields"] if (row["weights"], row["input"]) == TRAINED
                   and row["inside"] == row["logit"] == ALL)
        boxes = [(first - members[-1], last - members[0]) for members, first, last in
                 geometry.alignments(run.levels)]
        box = min(low for low, _ in boxes), max(high for _, high in boxes)
        exact = f"{run.levels} levels: {theory.sizes(run.levels)} px"
        maps.append((run.candidate.name, exact, trained, box, [row[name] for name in ENERGIES]))
        height, sigma, *_ = fit_gaussian(trained)
        profiles.append((run.candidate.name, trained, untrained, box, (height, sigma)))
    drawn = {
        "fields": figures.fields(maps, list(ENERGIES)),
        "profiles": figures.profiles(profiles, gaussian),
        "inputs": figures.field_panels([(run.candidate.name, panels(run)) for run in runs]),
        "paths": figures.path_shares([(run["name"], [row for row in run["paths"] if row["inside"] == ALL])
                                      for run in found["runs"]]),
        "border": figures.border_accuracy({run["name"]: run["border"] for run in found["runs"]}),
    }
    for name, figure in drawn.items():
        for kind in formats:
            palette.save(figure, folder / f"{name}.{kind}")
    return found
