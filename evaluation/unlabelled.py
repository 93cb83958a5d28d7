"""Predict a folder of images that have no masks, and write one folder, which is replaced as a whole.

    labels/NAME.png      the class of every pixel, in the mask values or colours of the data
    overlays/NAME.jpg    the image with the colours of the classes over it
    areas.csv            pixels and shares of each class in each image
    legend.png           the colour of each class
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import palette, ranks
from common.console import Progress, UserError, table
from common.files import write_csv
from common.masks import label_image
from common.patterns import SUFFIXES
from common.pictures import encoded, read_image
from common.result_folders import replacing_folder
from evaluation import figures
from evaluation.candidates import Candidate

MAX_PIXELS = 2**28  # 16,384 x 16,384: an image and its prediction are held in memory
OVERLAY = 4096  # pixels, the longest side of an overlay


def find_images(folder: Path) -> list[Path]:
    """List the images of a folder. Each one is read once, so that no bad file ends hours of computing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file' if folder.exists() else 'no such folder'}; --images takes a folder")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not images:
        raise UserError(f"{folder}: no images found ({', '.join(SUFFIXES)})")
    stem, count = Counter(path.stem for path in images).most_common(1)[0]
    if count > 1:
        raise UserError(f"{folder}: {count} images are called '{stem}', and so would be their results; rename them")
    problems = []
    with Progress("check images", len(images), "image") as progress:
        for path in images:
            try:
                read_image(path, MAX_PIXELS)
            except UserError as error:
                problems.append((path.name, error))
            progress.advance()
    if problems:
        names = ", ".join(name for name, _ in problems[:6]) + (", …" if len(problems) > 6 else "")
        raise UserError(f"{problems[0][1]} ({len(problems)} of {len(images)} images cannot be used: {names})")
    return images


def predict_folder(candidate: Candidate, images: Sequence[Path], out: Path, sources: Sequence[Path] = ()) -> list[dict]:
    """Predict every image, replace the folder `out`, and return the rows of areas.csv.

    The ranks predict an image each, then the first one writes what they found, and so on.
    """
    classes, rows = candidate.config.data.classes, []
    with (replacing_folder(out, sources) if ranks.is_first() else nullcontext() as partial,
          ranks.SharedProgress("predict", len(images), "image") as progress):
        for start in range(0, len(images), ranks.count()):
            ranks.begin(f"an image of {images[start].parent}")
            own = images[start + ranks.rank():start + ranks.rank() + 1]  # none for some ranks in the end
            found = [predicted(candidate, path) for path in own]
            progress.advance(len(own))
            for row, files in chain.from_iterable(ranks.to_first(found)):
                rows.append(row)
                for name, contents in files.items():
                    (partial / name).parent.mkdir(exist_ok=True)
                    (partial / name).write_bytes(contents)
        if ranks.is_first():
            write_csv(partial / "areas.csv", rows)
            palette.save(palette.legend(classes), partial / "legend.png")
    return rows


def predicted(candidate: Candidate, path: Path) -> tuple[dict, dict[str, bytes]]:
    """Predict an image. Return its row of areas.csv, and its files by their names."""
    data = candidate.config.data
    image = np.array(read_image(path, MAX_PIXELS))
    labels = candidate.predictor.labels(torch.from_numpy(image).to(candidate.device))
    step = -(-max(labels.shape) // OVERLAY)
    small = np.asarray(Image.fromarray(image).reduce(step))
    overlay = figures.overlay(small, labels[::step, ::step], len(data.classes))
    pixels = {name: int((labels == k).sum()) for k, name in enumerate(data.classes)}
    row = ({"image": path.name, "height": labels.shape[0], "width": labels.shape[1]}
           | {f"pixels_{name}": count for name, count in pixels.items()}
           | {f"share_{name}": round(count / labels.size, 6) for name, count in pixels.items()})
    return row, {f"labels/{path.stem}.png": encoded(label_image(labels, data), "PNG"),
                 f"overlays/{path.stem}.jpg": encoded(Image.fromarray(overlay), "JPEG", quality=90, subsampling=0)}


def summary(rows: Sequence[dict], classes: Sequence[str]) -> str:
    """Return a table of each class's share of all pixels, and of its smallest and largest share of an image."""
    pixels = {name: sum(row[f"pixels_{name}"] for row in rows) for name in classes}
    shares = {name: [row[f"share_{name}"] for row in rows] for name in classes}
    return table([f"{len(rows)} image{'s' if len(rows) > 1 else ''}", "of all pixels", "least", "most"],
                 [[name, f"{pixels[name] / sum(pixels.values()):.2%}", f"{min(shares[name]):.2%}",
                   f"{max(shares[name]):.2%}"] for name in classes])
