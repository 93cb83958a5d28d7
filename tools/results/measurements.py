"""What a comparison may show beside its scores: receptive fields, and what becomes of blank spots in tissue."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import copyfile

import numpy as np

from common.config import Config
from common.console import UserError
from common.masks import IGNORE, read_mask
from common.store import open_store
from evaluation.test_set import tiles_of_split
from tools.results.plan import Plan, Run
from tools.results.runs import CODE

ALL = "all"


def receptive_fields(plan: Plan, runs: Mapping[str, Sequence[Run]], folder: Path, picture: Path) -> dict[str, dict]:
    """Measure our network of the first seed of each row by receptive_field.py.

    Return the numbers of these runs, and write their maps to the file `picture`.
    """
    ours = [str(of_row[0].folder) for of_row in runs.values() if not of_row[0].network]
    words = [str(CODE / "receptive_field.py"), *ours, *plan.test_words, "--out", str(folder)]
    if subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the receptive fields of {folder.name} were not measured, see above")
    copyfile(folder / "fields.png", picture)
    contents = json.loads((folder / "fields.json").read_text(encoding="utf-8"))
    return {run["name"]: _numbers_of_fields(run) for run in contents["runs"]}


def _numbers_of_fields(run: dict) -> dict:
    """Return the radii r95, with all pixels equal, and the share of each path, from a run of fields.json."""
    rows = [row for row in run["fields"] if row["logit"] == ALL and row["input"] == "tiles"]
    return {
        "theory_px": sorted({size["last"] - size["first"] + 1 for size in run["theory"]["alignments"]}),
        "r95": {row["inside"]: row["r95_even"] for row in rows if row["weights"] == "trained"},
        "r95_untrained": next(row["r95_even"] for row in rows if row["weights"] != "trained" and row["inside"] == ALL),
        "paths": {row["path"]: row["gradient_x_activation"] for row in run["paths"] if row["inside"] == ALL},
    }


def blank_spots(config: Config, split: str, predictions: Mapping[str, Path]) -> dict[str, float | None]:
    """Return which share of the blank pixels in tissue each run calls background (report, section 6.3.3).

    A pixel is blank if its inverted grey level, without blur, lies below filter.blank_intensity; it is in tissue if the
    truth calls it so. `predictions` are the folders of label images of the runs.
    """
    tiles, places = tiles_of_split(config, split)
    store = open_store([tile.pair for tile in tiles], config.data)
    counts = {name: np.zeros(2, int) for name in predictions}
    for place in places:
        pixels = store.tile(place)
        truth = pixels[..., 3]
        blank = (255 - pixels[..., :3].mean(-1) < config.filter.blank_intensity) & (truth > 0) & (truth != IGNORE)
        for name, count in counts.items():
            labels = read_mask(predictions[name] / f"{tiles[place].key}.png", config.data)
            count += blank.sum(), (labels[blank] == 0).sum()
    return {name: round(float(background / pixels), 4) if pixels else None
            for name, (pixels, background) in counts.items()}
