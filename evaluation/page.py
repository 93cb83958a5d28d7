"""Write report.html: an evaluation as one page, with a gallery of the tiles.

Its pictures are embedded as `data:` URLs, and its Content-Security-Policy forbids every request.
"""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from common import palette
from common.console import Progress
from common.masks import IGNORE
from common.pictures import encoded
from evaluation import report
from evaluation.results import Evaluation, evenly_spaced, json_number, tile_columns

TEMPLATES = Path(__file__).parent
MOST_TILES = 500  # in the gallery
MOST_BYTES = 18 * 2**20  # of all thumbnails
SIDES = (320, 256, 192, 128, 96, 64)  # pixels, the longer side of a thumbnail; the largest that fits is used
LOWER_IS_BETTER = ("ece", "hausdorff", "hd95")
LABELS = {"soft_dice": "soft Dice", "pixel_accuracy": "accuracy", "ece": "calibration error", "dice": "Dice",
          "iou": "IoU", "precision": "precision", "recall": "recall", "hausdorff": "Hausdorff distance, px",
          "hd95": "HD95, px", "surface_dice": "surface Dice"}
TILE_COUNTS = {"tiles_behind_means": "tiles behind the means", "tiles_where_missed": "tiles where the class is missed",
               "tiles_where_invented": "tiles where the class is falsely predicted"}


def write(folder: Path, evaluation: Evaluation, contents: dict) -> None:
    """Write report.html beside the pictures that it contains; `contents` are those of scores.json."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    places = gallery_places(evaluation)
    tiles, data = evaluation.test_set.tiles, evaluation.test_set.config.data
    may_ignore = data.ignore or any(tile.has_new_mask for tile in tiles)
    html = environment.get_template("report.html").render(
        contents=contents, tables=report.tables(contents), remarks=report.remarks(contents),
        shown=[{"seeds": []} | candidate | {"rows": class_table(candidate, evaluation.classes)} for candidate in
               [*(row for row in contents["experiments"] if row["seeds"]), *contents["entries"]]],
        pictures={name: _address("png", (folder / f"{name}.png").read_bytes()) for name in ("losses", "reliability")
                  if (folder / f"{name}.png").exists()},
        gallery=gallery(evaluation, places), in_gallery=len(places), total=len(evaluation.test_set.tiles),
        colours=[f"#{bytes(colour).hex()}" for colour in palette.class_colours(len(evaluation.classes))],
        error_colour=palette.ERROR, ignored_colour=palette.IGNORED if may_ignore else "")
    (folder / "report.html").write_text(html, encoding="utf-8")


# ---------------------------------------------------------------------------------------------- tables

def class_table(candidate: dict, classes: Sequence[str]) -> list[tuple[str, list[str], list[str]]]:
    """Return rows (label, cells of the classes and of their mean, the same cells of the difference to the first)."""
    rows = []
    for name, score in candidate["scores"].items():
        measure = name.removeprefix("tile_")
        label = LABELS[measure] if name == measure else f"{LABELS[measure]}, mean over tiles"
        form, difference = f".{_digits(measure)}f", candidate["difference_to_first"].get(name)
        differences = _cells(difference, classes, f"+{form}") if difference else []
        rows.append((label, _cells(score, classes, form), differences))
    return rows + [(label, [*map(str, candidate[name].values()), ""], []) for name, label in TILE_COUNTS.items()
                   if name in candidate]


def _cells(score: dict, classes: Sequence[str], form: str) -> list[str]:
    """Return cells for the classes and for their mean; a score without classes stands in the last one."""
    if "mean" not in score:
        return [""] * len(classes) + [_cell(score, form)]
    return [_cell(score[name], form) for name in (*classes, "mean")]


def _cell(score: dict, form: str) -> str:
    interval = report.interval_cell(score, form)
    return (report.cell(score, "value", form) or "–") + (f" ({interval})" if interval else "")


def _digits(measure: str) -> int:
    return 1 if "px" in LABELS[measure] else 3


# ---------------------------------------------------------------------------------------------- the gallery

def gallery_places(evaluation: Evaluation) -> list[int]:
    """Return the tiles of the gallery: all of them, or `MOST_TILES` evenly spaced from the worst to the best."""
    order, _ = evaluation.ranked()
    return evenly_spaced(order.tolist(), MOST_TILES)


def gallery(evaluation: Evaluation, places: list[int]) -> dict:
    """Return the data of the page's script: names, scores and thumbnails of the tiles `places`."""
    scores = tile_columns(evaluation)
    _, spread = evaluation.ranked()
    side = _thumbnail_side(evaluation, places)
    tiles = []
    with Progress("draw gallery", len(places), "tile") as progress:
        for i in places:
            tile = evaluation.test_set.tiles[i]
            tiles.append({"key": tile.key, "group": tile.group, "spread": json_number(spread[i]),
                          "scores": [[json_number(values[i]) for values in columns.values()] for columns in scores],
                          **thumbnails(evaluation, i, side)})
            progress.advance()
    return {"entries": [candidate.name for candidate in evaluation.candidates], "tiles": tiles,
            "scale": min(1, side / evaluation.sizes[places].max()),
            "several_sizes": len(np.unique(evaluation.sizes, axis=0)) > 1,
            "scores": [_describe_column(name) for name in scores[0]]}


def _describe_column(column: str) -> dict:
    """Return label and decimals of a column of tiles.csv, and whether lower is better."""
    measure = next(name for name in LABELS if column == name or column.startswith(f"{name}_"))
    part = column.removeprefix(measure).removeprefix("_")  # a class or the mean
    return {"name": column, "label": f"{LABELS[measure]}: {part}" if part else LABELS[measure],
            "digits": _digits(measure), "lower": measure in LOWER_IS_BETTER}


def _thumbnail_side(evaluation: Evaluation, places: list[int]) -> int:
    """Return the largest side with which all thumbnails fit into `MOST_BYTES`, estimated from some tiles."""
    for side in SIDES:
        sizes = []
        for i in evenly_spaced(places, 24):
            pictures = thumbnails(evaluation, i, side)
            addresses = [pictures["image"], pictures["truth"], *pictures["predictions"], *pictures["errors"]]
            sizes.append(sum(map(len, addresses)))
        if 1.1 * np.mean(sizes) * len(places) <= MOST_BYTES:
            return side
    return SIDES[-1]


def thumbnails(evaluation: Evaluation, i: int, side: int) -> dict:
    """Return the addresses of image, truth, and each candidate's prediction and errors, at most `side` px a side."""
    image, target = evaluation.tile(i)
    scale = min(1, side / max(target.shape))
    size = tuple(max(1, round(length * scale)) for length in target.shape[::-1])     # (width, height)
    colours = palette.class_colours(len(evaluation.classes))

    def shrunk(labels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))

    photo = encoded(Image.fromarray(image).resize(size, Image.Resampling.BOX), "JPEG", quality=80)
    truth = shrunk(target)
    ignored = truth == IGNORE
    predictions = [shrunk(evaluation.predicted(candidate, i)) for candidate in range(len(evaluation.candidates))]
    lines, hatched = palette.rgb(palette.IGNORED), palette.hatch(ignored)
    error_colours = np.array([[255, 255, 255], palette.rgb(palette.ERROR), lines])
    truth_colours = np.array([*colours, [255, 255, 255], lines])
    shown = np.where(ignored, len(colours) + hatched, truth).astype(np.uint8)
    return {"image": _address("jpeg", photo), "truth": _labels_address(shown, truth_colours),
            "predictions": [_labels_address(prediction, colours) for prediction in predictions],
            "errors": [_labels_address(np.where(ignored, 2 * hatched, prediction != truth).astype(np.uint8),
                                       error_colours, transparency=0) for prediction in predictions]}


def _labels_address(labels: np.ndarray, colours: np.ndarray, **options: int) -> str:
    """Return class indices (H, W) as a PNG with a palette; `options` are Pillow's."""
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette(colours.astype(np.uint8).tobytes())
    return _address("png", encoded(picture, "PNG", optimize=True, **options))


def _address(format_name: str, contents: bytes) -> str:
    return f"data:image/{format_name};base64,{base64.b64encode(contents).decode()}"
