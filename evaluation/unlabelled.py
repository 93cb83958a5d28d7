"""What a trained model says of images that have no masks: one folder, replaced whole.

    labels/NAME.png      the class of every pixel, in the data's own greys
    overlays/NAME.jpg    the image with the classes' colours over it, to look at
    areas.csv            pixels and shares of each class in each image
    legend.png           which colour is which class
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
from common.pictures import read_image
from common.result_folders import replacing_folder
from evaluation import figures
from evaluation.candidates import Candidate

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MAX_PIXELS = 2**28  # 16,384 x 16,384: an image and its answer are held in memory
OVERLAY = 4096  # pixels, the longer side of an overlay at most


def find_images(folder: Path) -> list[Path]:
    """The images of a folder, all of them decoded once: none is to fail after hours of computing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file' if folder.exists() else 'no such folder'}; --images takes a folder of "
                        "images")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not images:
        raise UserError(f"{folder}: no images found ({', '.join(SUFFIXES)})")
    stem, count = Counter(path.stem for path in images).most_common(1)[0]
    if count > 1:
        raise UserError(f"{folder}: {count} images are called '{stem}', and their results would be too; rename one")
    problems = []
    with Progress("check images", len(images), "image") as progress:
        for path in images:
            try:
                read_image(path, MAX_PIXELS)
            except UserError as error:
                problems.append((path.name, error))
            progress.advance()
    if problems:
        others = ", ".join(name for name, _ in problems[1:6]) + ", …" * (len(problems) > 6)
        raise UserError(f"{problems[0][1]}" + (f" ({len(problems)} of {len(images)} images cannot be used; the others "
                                               f"are {others})" if others else ""))
    return images


def predict_folder(candidate: Candidate, images: Sequence[Path], out: Path, sources: Sequence[Path] = ()) -> list[dict]:
    """Predict every image, replace the folder `out`; returns the rows of areas.csv."""
    data, rows = candidate.config.data, []
    mask_values = np.array(data.mask_values, np.uint8)
    with replacing_folder(out, sources) as partial, Progress("predict", len(images), "image") as progress:
        for name in ("labels", "overlays"):
            (partial / name).mkdir()
        for path in images:
            image = np.array(read_image(path, MAX_PIXELS))
            labels = candidate.predictor.labels(torch.from_numpy(image).to(candidate.device))
            Image.fromarray(mask_values[labels]).save(partial / "labels" / f"{path.stem}.png")
            step = -(-max(labels.shape) // OVERLAY)
            small = np.asarray(Image.fromarray(image).reduce(step))
            overlay = figures.overlay(small, labels[::step, ::step], len(mask_values))
            Image.fromarray(overlay).save(partial / "overlays" / f"{path.stem}.jpg", quality=90, subsampling=0)
            pixels = [int((labels == k).sum()) for k in range(len(mask_values))]  # bincount would take 8 bytes a pixel
            rows.append({"image": path.name, "height": labels.shape[0], "width": labels.shape[1]}
                        | {f"pixels_{name}": count for name, count in zip(data.classes, pixels, strict=True)}
                        | {f"share_{name}": round(count / labels.size, 6)
                           for name, count in zip(data.classes, pixels, strict=True)})
            progress.advance()
        write_csv(partial / "areas.csv", rows)
        palette.save(palette.legend(data.classes), partial / "legend.png")
    return rows


def summary(rows: Sequence[dict], classes: Sequence[str]) -> str:
    """The classes' share of all pixels, and of the image that has least and most of them."""
    pixels = {name: sum(row[f"pixels_{name}"] for row in rows) for name in classes}
    shares = {name: [row[f"share_{name}"] for row in rows] for name in classes}
    return table([f"{len(rows)} image{'s' * (len(rows) > 1)}", "of all pixels", "least", "most"],
                 [[name, f"{pixels[name] / sum(pixels.values()):.2%}", f"{min(shares[name]):.2%}",
                   f"{max(shares[name]):.2%}"] for name in classes])
