"""Write what the measurement of receptive fields leaves on disk: one folder, replaced whole.

    fields.csv      a row for each run, weights, input, class of the pixel and class of the logit: radii, fit, share
    paths.csv       a row for each run, class of the pixel and path: what comes by the path, what is left without it
    fields.json     both, the theory, padding and borders of each run, and how everything was measured
    fields.png      figure 12 of the report: the maps of the runs side by side on one scale
    profiles.png    the maps along both axes through the pixel, with the Gaussian fit and the untrained network
    inputs.png      the maps of each run inside each class, on zeros, on noise, and before training
    paths.png       what each skip and the bottleneck carry
    border.png      accuracy by the distance to the tile's border
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from common import palette
from common.console import percent, table
from common.files import write_csv, write_text
from fields import figures
from fields.gradients import TRAINED
from fields.numbers import ALL, ENERGIES, MeasuredRun, contents, plain


def write(folder: Path, runs: Sequence[MeasuredRun], formats: Sequence[str]) -> dict:
    """Write everything into `folder`, and return the contents of fields.json."""
    found = contents(runs)
    write_text(folder / "fields.json", json.dumps(plain(found), indent=2, allow_nan=False) + "\n")
    write_csv(folder / "fields.csv", [plain(row) for run in found["runs"] for row in run["fields"]])
    write_csv(folder / "paths.csv", [plain(row) for run in found["runs"] for row in run["paths"]])
    radii = [[row[name] for name in ENERGIES] for run in found["runs"] for row in run["fields"]
             if (row["weights"], row["input"]) == TRAINED and row["inside"] == row["logit"] == ALL]
    drawn = {
        "fields": figures.fields(runs, radii),
        "profiles": figures.profiles(runs),
        "inputs": figures.inputs(runs),
        "paths": figures.path_shares([(run["name"], [row for row in run["paths"] if row["inside"] == ALL])
                                      for run in found["runs"]]),
        "border": figures.border_accuracy({run["name"]: run["border"] for run in found["runs"]}),
    }
    for name, figure in drawn.items():
        for suffix in formats:
            palette.save(figure, folder / f"{name}.{suffix}")
    return found


def summary(found: dict) -> str:
    """Return the main numbers of all runs as tables and sentences; `found` is what `write` returns."""
    fields = [_field_cells(row) for run in found["runs"] for row in run["fields"]
              if row["logit"] == ALL and (row["weights"] == "trained" or row["inside"] == ALL)]
    paths = [[row["run"], row["path"], row["field"],
              *(percent(row[name]) for name in ("gradient_x_activation", "energy_alone", "energy_without")),
              _shown(row["r95_alone"], ".2f")]
             for run in found["runs"] for row in run["paths"] if row["inside"] == ALL]
    lines = [table(["run", "weights", "input", "inside", "eff. pixels", "r50", "r90", "r95 px", "95 % interval",
                    "sigma px", "misfit", "of theory", "even r95"], fields), "",
             "Eff. pixels: how many equally contributing pixels this corresponds to. If it is small, raise --pixels.",
             "Even r95: with the energy of every pixel scaled to the same sum, so that all pixels count equally.",
             "", table(["run", "path", "exact px", "gradient x act.", "energy alone", "energy without", "r95 alone"],
                       paths), ""]
    for run in found["runs"]:
        lines += [*run["without_pixels"], *run["dead"], *_border_sentences(run["name"], run["border"])]
    return "\n".join(lines)


def _field_cells(row: dict) -> list[str]:
    interval = "-"
    if math.isfinite(row["r95_low"]):
        interval = f"{row['r95_low']:.2f} to {row['r95_high']:.2f}"
    return [row["run"], row["weights"], row["input"], row["inside"],
            f"{_shown(row['effective_pixels'], '.0f')} of {row['pixels']}",
            *(_shown(row[name], ".2f") for name in ENERGIES), interval,
            f"{_shown(row['sigma'], '.2f')} +- {_shown(row['sigma_error'], '.3f')}",
            _shown(row["misfit"], ".0%"), _shown(row["area_share"], ".2%"), _shown(row["r95_even"], ".2f")]


def _border_sentences(name: str, border: dict) -> list[str]:
    sentences = [f"{name}: the field of every pixel leaves its tile, so there is no interior to compare with."]
    if border["share"] < 1:
        near, elsewhere = (border["accuracy"][where]["value"] for where in ("border", "interior"))
        change, dice = (_with_interval(border[score]["difference"]) for score in ("accuracy", "dice"))
        sentences = [f"{name}: accuracy is {near:.4f} where the field leaves the tile ({border['share']:.0%} of the "
                     f"pixels) and {elsewhere:.4f} elsewhere, on other tissue: {change}; Dice {dice}."]
    if "crop" in border:
        crop = border["crop"]
        sentences.append(f"{name}: pixels within {crop['nearer_than_px']} px of the border of {crop['size']} x "
                         f"{crop['size']} crops have accuracy {crop['alone']['value']:.4f} if the model sees only the "
                         f"crop and {crop['within']['value']:.4f} if it sees the tile: "
                         f"{_with_interval(crop['difference'])}.")
    return sentences


def _shown(number: float, form: str) -> str:
    return f"{number:{form}}" if math.isfinite(number) else "-"


def _with_interval(number: dict) -> str:
    shown = _shown(number["value"], "+.4f")
    return f"{shown} ({number['low']:+.4f} to {number['high']:+.4f})" if math.isfinite(number["low"]) else shown
