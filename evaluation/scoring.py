"""Predict every test tile with a candidate, and count."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.console import Progress
from common.workers import cores
from dataset import Tile
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet
from losses import soft_dice

PIXELS_AT_ONCE = 1024 * 1024  # a batch of four 512 x 512 tiles
MANY = 1000  # tiles for which compiling a network pays


def tiles_at_once(height: int, width: int) -> int:
    return max(1, PIXELS_AT_ONCE // (height * width))


def score(candidate: Candidate, test_set: TestSet, tolerance: float,
          folder: Path) -> tuple[metrics.Tally, dict[str, Path]]:
    """Predict every tile and count; also return where each tile's label image lies.

    The label images of a model are written into `folder`, those of another tool stay where they are.
    """
    classes = len(test_set.config.data.classes)
    paths = candidate.labels or {tile.key: folder / f"{tile.key}.png" for tile in test_set.tiles}
    if candidate.predictor:
        folder.mkdir(parents=True)
    if len(test_set.tiles) >= MANY:
        candidate = candidate.for_many()
    confusions, surfaces, soft, calibration = [], [], [], []
    with (Progress(f"evaluate {candidate.name}", len(test_set.tiles), "tile") as progress,
          ThreadPoolExecutor(cores()) as pool):
        for tiles, pixels in batches(test_set):                                      # (B, H, W, 4)
            batch = torch.from_numpy(pixels).to(candidate.device)
            target = batch[..., 3].long()                                            # (B, H, W)
            labels, logits = candidate.answer(batch[..., :3], tiles)                 # (B, H, W), (B, K, H, W)
            confusions += metrics.confusion(labels, target, classes).tolist()
            if logits is not None:
                soft += soft_dice(logits, target).tolist()
                calibration += metrics.calibration(logits, target).tolist()
            predicted = labels.to(torch.uint8).cpu().numpy()
            surfaces += pool.map(lambda labels, truth: metrics.surfaces(labels, truth, classes, tolerance),
                                 predicted, pixels[..., 3])
            if candidate.predictor:
                save_labels(predicted, [paths[tile.key] for tile in tiles], test_set.config.data.mask_values, pool)
            progress.advance(len(tiles))
    return metrics.Tally(np.array(confusions), np.array(surfaces), np.array(soft) if soft else None,
                         np.array(calibration) if calibration else None), paths


def batches(test_set: TestSet) -> Iterator[tuple[list[Tile], np.ndarray]]:
    """Some tiles at a time, with their pixels (B, H, W, 4) uint8."""
    batch_size = tiles_at_once(*test_set.store.shape[1:3])
    for start in range(0, len(test_set.tiles), batch_size):
        part = slice(start, start + batch_size)
        yield test_set.tiles[part], test_set.store[test_set.rows[part]]


def save_labels(labels: np.ndarray, paths: Sequence[Path], mask_values: Sequence[int], pool: Executor) -> None:
    """Write class indices (B, H, W) as label images with the data's own mask values."""
    values = np.array(mask_values, np.uint8)[labels]
    list(pool.map(lambda image, path: Image.fromarray(image).save(path), values, paths))
