"""Predict a folder of images that have no masks, and write one folder, which is replaced as a whole.

    labels/NAME.png      the class of every pixel, in the mask values or colours of the data
    overlays/NAME.jpg    the image with the colours of the classes over it
    areas.csv            pixels and shares of each class in each image
    legend.png           the colour of each class
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import palette
from common.console import Progress, UserError, table
from common.files import write_csv
from common.masks import label_image
from common.patterns import SUFFIXES
from common.pictures import read_image
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
    """Predict every image, replace the folder `out`, and return the rows of areas.csv."""
    data, rows = candidate.config.data, []
    with replacing_folder(out, sources) as partial, Progress("predict", len(images), "image") as progress:
        for name in ("labels", "overlays"):
            (partial / name).mkdir()
        for path in images:
            image = np.array(read_image(path, MAX_PIXELS))
            labels = candidate.predictor.labels(torch.from_numpy(image).to(candidate.device))
            label_image(labels, data).save(partial / "labels" / f"{path.stem}.png")
            step = -(-max(labels.shape) // OVERLAY)
            small = np.asarray(Image.fromarray(image).reduce(step))
            overlay = figures.overlay(small, labels[::step, ::step], len(data.classes))
            Image.fromarray(overlay).save(partial / "overlays" / f"{path.stem}.jpg", quality=90, subsampling=0)
            pixels = {name: int((labels == k).sum()) for k, name in enumerate(data.classes)}
            rows.append({"image": path.name, "height": labels.shape[0], "width": labels.shape[1]}
                        | {f"pixels_{name}": count for name, count in pixels.items()}
                        | {f"share_{name}": round(count / labels.size, 6) for name, count in pixels.items()})
            progress.advance()
        write_csv(partial / "areas.csv", rows)
        palette.save(palette.legend(data.classes), partial / "legend.png")
    return rows


def summary(rows: Sequence[dict], classes: Sequence[str]) -> str:
    """Return a table of each class's share of all pixels, and of its smallest and largest share of an image."""
    pixels = {name: sum(row[f"pixels_{name}"] for row in rows) for name in classes}
    shares = {name: [row[f"share_{name}"] for row in rows] for name in classes}
    return table([f"{len(rows)} image{'s' if len(rows) > 1 else ''}", "of all pixels", "least", "most"],
                 [[name, f"{pixels[name] / sum(pixels.values()):.2%}", f"{min(shares[name]):.2%}",
                   f"{max(shares[name]):.2%}"] for name in classes])
