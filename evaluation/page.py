"""report.html: an evaluation as one page that needs nothing but itself, with a gallery of the tiles.

Everything is embedded, pictures as data: addresses. The page's own rules (Content-Security-Policy) forbid requests.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from common import palette
from common.console import Progress
from evaluation import report, results
from evaluation.results import Evaluation

TEMPLATES = Path(__file__).parent
MOST_TILES = 500  # in the gallery
MOST_BYTES = 18 * 2**20  # of all thumbnails
SIDES = (320, 256, 192, 128, 96, 64)  # pixels, the longer side of a thumbnail: the largest that fits
WITHOUT_CLASSES = ("soft_dice", "pixel_accuracy", "ece")
LOWER_IS_BETTER = ("ece", "hausdorff", "hd95")
LABELS = {"soft_dice": "soft Dice", "pixel_accuracy": "accuracy", "ece": "calibration error", "dice": "Dice",
          "iou": "IoU", "precision": "precision", "recall": "recall", "hausdorff": "Hausdorff distance, px",
          "hd95": "HD95, px", "surface_dice": "surface Dice"}


def write(folder: Path, evaluation: Evaluation, contents: dict) -> None:
    """Write report.html beside the pictures that it embeds."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    header, rows = report.readable_rows(contents)
    places = gallery_places(evaluation)
    html = environment.get_template("report.html").render(
        contents=contents, header=header, rows=rows,
        remarks=[*report.about_tiles(contents), *report.about_models(contents),
                 *report.about_scores(contents)],
        class_tables=[class_table(candidate, evaluation.classes) for candidate in contents["entries"]],
        confusions=[confusion_table(candidate) for candidate in contents["entries"]],
        pictures={name: png_address((folder / f"{name}.png").read_bytes()) for name in ("losses", "reliability")
                  if (folder / f"{name}.png").exists()},
        gallery=gallery(evaluation, places), shown=len(places), total=len(evaluation.test_set.tiles),
        colours=[f"#{bytes(colour).hex()}" for colour in palette.class_colours(len(evaluation.classes))],
        error_colour=palette.ERROR)
    (folder / "report.html").write_text(html, encoding="utf-8")


def class_table(candidate: dict, classes: Sequence[str]) -> list[tuple[str, list[str], list[str]]]:
    """Rows (score, cells of each class and of their mean, the same of the differences to the first entry or none)."""
    rows = []
    for name in candidate["scores"]:
        measure = name.removeprefix("tile_")
        cells, differences = (
            [_cell(score, f"{sign}.{_digits(measure)}f") for score in
             ([None] * len(classes) + [scores] if name in WITHOUT_CLASSES else
              [scores[column] for column in (*classes, "mean")])] if scores else []
            for sign, scores in (("", candidate["scores"][name]), ("+", candidate["difference_to_first"].get(name))))
        rows.append((LABELS[measure] + ", mean over tiles" * (name != measure), cells, differences))
    return rows + [(label, [*map(str, candidate[name].values()), ""], []) for name, label in (
        ("tiles_behind_means", "tiles behind the means"), ("tiles_where_missed", "tiles where it is missed altogether"),
        ("tiles_where_invented", "tiles where it is invented: predicted, not there"))]


def _digits(score: str) -> int:
    return 1 if "px" in LABELS[score] else 3


def _cell(score: dict | None, form: str) -> str:
    if score is None:
        return ""
    if score["value"] is None:
        return "–"
    return f"{score['value']:{form}}" + ("" if score["low"] is None else
                                         f" ({score['low']:{form}} to {score['high']:{form}})")


def confusion_table(candidate: dict) -> list[list[tuple[int, float | None]]]:
    """Pixels, and share of the true class's pixels, by true class and predicted class."""
    return [[(count, count / sum(row) if sum(row) else None) for count in row] for row in candidate["confusion"]]


# ---------------------------------------------------------------------------------------------- the gallery

def gallery_places(evaluation: Evaluation) -> list[int]:
    """Numbers of the tiles in the gallery: all, or so many evenly spaced from the worst to the best."""
    order, _ = evaluation.ranked()
    return order[np.unique(np.linspace(0, len(order) - 1, min(len(order), MOST_TILES)).round().astype(int))].tolist()


def gallery(evaluation: Evaluation, places: list[int]) -> dict:
    """What the page's script shows: names, scores and thumbnails of the tiles `places`."""
    scores = [results.tile_columns(evaluation, candidate) for candidate in range(len(evaluation.candidates))]
    names = list(max(scores, key=len))
    _, spread = evaluation.ranked()
    side = _side(evaluation, places)
    tiles = []
    with Progress("draw gallery", len(places), "tile") as progress:
        for i in places:
            tile = evaluation.test_set.tiles[i]
            tiles.append({"key": tile.key, "group": tile.group, "spread": _json_number(spread[i]),
                          "scores": [[_json_number(columns[name][i]) if name in columns else None for name in names]
                                     for columns in scores]} | thumbnails(evaluation, i, side))
            progress.advance()
    return {"entries": [candidate.name for candidate in evaluation.candidates], "tiles": tiles,
            "scale": min(1, side / max(evaluation.test_set.store.shape[1:3])),
            "scores": [_described(name) for name in names]}


def _described(column: str) -> dict:
    """What the page must know of a column of tiles.csv: label, decimals, and whether lower is better."""
    measure = next(name for name in LABELS if column == name or column.startswith(f"{name}_"))
    of = column.removeprefix(measure).removeprefix("_")
    return {"name": column, "label": LABELS[measure] + (of and f": {of}"), "digits": _digits(measure),
            "lower": measure in LOWER_IS_BETTER}


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def _side(evaluation: Evaluation, places: list[int]) -> int:
    """The largest thumbnail with which all tiles fit into `MOST_BYTES`, by a sample of them."""
    sample = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, 24).round().astype(int))]
    for side in SIDES:
        sizes = [sum(len(text) for value in thumbnails(evaluation, i, side).values()
                     for text in ([value] if isinstance(value, str) else value)) for i in sample]
        if 1.1 * np.mean(sizes) * len(places) <= MOST_BYTES:
            return side
    return SIDES[-1]


def thumbnails(evaluation: Evaluation, i: int, side: int) -> dict:
    """Addresses of image, truth, and of each entry's prediction and errors, the longer side of at most `side` px."""
    image, target = evaluation.tile(i)
    scale = min(1, side / max(target.shape))
    size = tuple(max(1, round(length * scale)) for length in target.shape[::-1])     # (width, height)
    colours = palette.class_colours(len(evaluation.classes))

    def shrunk(labels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))

    photo = io.BytesIO()
    Image.fromarray(image).resize(size, Image.Resampling.BOX).save(photo, "JPEG", quality=80)
    truth = shrunk(target)
    predictions = [shrunk(evaluation.predicted(candidate, i)) for candidate in range(len(evaluation.candidates))]
    wrong = np.array([[255, 255, 255], palette.rgb(palette.ERROR)])
    return {"image": _address("jpeg", photo.getvalue()), "truth": palette_address(truth, colours),
            "predictions": [palette_address(answer, colours) for answer in predictions],
            "errors": [palette_address((answer != truth).astype(np.uint8), wrong, transparent=0)
                       for answer in predictions]}


def palette_address(labels: np.ndarray, colours: np.ndarray, transparent: int | None = None) -> str:
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette(colours.astype(np.uint8).tobytes())
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, **({} if transparent is None else {"transparency": transparent}))
    return png_address(file.getvalue())


def png_address(contents: bytes) -> str:
    return _address("png", contents)


def _address(kind: str, contents: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(contents).decode()}"
