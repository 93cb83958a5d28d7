"""Predict every test tile with a candidate, and count what the scores need."""

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.console import Progress
from common.workers import cores
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet
from losses import soft_dice

PIXELS_AT_ONCE = 1024 * 1024  # a batch of four 512 x 512 tiles
MANY = 1000  # from this number of tiles on, compiling a network saves time


def score(candidate: Candidate, test_set: TestSet, tolerance: float,
          folder: Path) -> tuple[metrics.Tally, dict[str, Path]]:
    """Predict and count every tile. Return the counts, and the label image of each tile by its key.

    The predictions of a model are written into `folder`; the label images of another tool stay where they are.
    """
    classes, mask_values = len(test_set.config.data.classes), test_set.config.data.mask_values
    batch_size = tiles_at_once(*test_set.store.shape[1:3])
    paths = candidate.label_images or {tile.key: folder / f"{tile.key}.png" for tile in test_set.tiles}
    if candidate.predictor:
        folder.mkdir(parents=True)
    if len(test_set.tiles) >= MANY:
        candidate = candidate.for_many()
    confusions, surfaces, soft, calibration = [], [], [], []
    with (Progress(f"evaluate {candidate.name}", len(test_set.tiles), "tile") as progress,
          ThreadPoolExecutor(cores()) as pool):
        for start in range(0, len(test_set.tiles), batch_size):
            part = slice(start, start + batch_size)
            tiles, pixels = test_set.tiles[part], test_set.store[test_set.rows[part]]
            batch = torch.from_numpy(pixels).to(candidate.device)                    # (B, H, W, 4) uint8
            target = batch[..., 3].long()                                            # (B, H, W)
            labels, logits = candidate.predict(batch[..., :3], tiles)                # (B, H, W), (B, K, H, W)
            confusions += metrics.confusion(labels, target, classes).tolist()
            if logits is not None:
                soft += soft_dice(logits, target).tolist()
                calibration += metrics.calibration(logits, target).tolist()
            predicted = labels.to(torch.uint8).cpu().numpy()
            surfaces += pool.map(lambda labels, truth: metrics.surfaces(labels, truth, classes, tolerance),
                                 predicted, pixels[..., 3])
            if candidate.predictor:
                save_labels(predicted, [paths[tile.key] for tile in tiles], mask_values, pool)
            progress.advance(len(tiles))
    return metrics.Tally(np.array(confusions), np.array(surfaces), np.array(soft) if soft else None,
                         np.array(calibration) if calibration else None), paths


def tiles_at_once(height: int, width: int) -> int:
    return max(1, PIXELS_AT_ONCE // (height * width))


def save_labels(labels: np.ndarray, paths: Sequence[Path], mask_values: Sequence[int], pool: Executor) -> None:
    """Write class indices (B, H, W) as label images with the mask values of the data."""
    images = np.array(mask_values, np.uint8)[labels]
    list(pool.map(lambda image, path: Image.fromarray(image).save(path), images, paths))
