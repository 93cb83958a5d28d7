"""Predict every test tile with a candidate, and count what the scores need.

Rank r of n predicts the batches r, r + n, ... (common/ranks.py), and the first rank writes the label images of all.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common import ranks
from common.masks import label_image
from common.pictures import encoded
from common.workers import cores
from dataset import places_by_group
from evaluation import metrics
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet
from losses import soft_dice

PIXELS_AT_ONCE = 1024 * 1024  # a batch of four 512 x 512 tiles
MANY = 1000  # from this number of tiles on, compiling a network saves time


def score(candidate: Candidate, test_set: TestSet, tolerance: float,
          folder: Path) -> tuple[metrics.Tally, dict[str, Path]]:
    """Predict and count every tile. Return the counts, and the label image of each tile by its key.

    The first rank writes the predictions of a model into `folder`; the label images of another tool stay where they
    are. The counts are those of all ranks on the first rank alone.
    """
    data, count = test_set.config.data, len(test_set.tiles)
    classes = len(data.classes)
    paths = candidate.label_images or {tile.key: folder / f"{tile.key}.png" for tile in test_set.tiles}
    if candidate.predictor and ranks.is_first():
        folder.mkdir(parents=True)
    sizes = test_set.store.sizes[test_set.rows]
    if len(places_by_size(sizes)[0]) >= MANY:
        candidate = candidate.for_many()
    confusion = np.zeros((count, classes, classes), np.int64)
    surfaces, soft, calibration = np.zeros((count, classes, 3)), np.zeros(count), np.zeros((count, 3, metrics.BINS))
    images: dict[str, bytes] = {}  # PNG files that another rank than the first one has made
    ranks.begin(f"the evaluation of {candidate.name}")
    with (ranks.SharedProgress(f"evaluate {candidate.name}", count, "tile") as progress,
          ThreadPoolExecutor(cores()) as pool):
        for places in batches_of_one_size(sizes)[ranks.rank()::ranks.count()]:
            tiles = [test_set.tiles[i] for i in places]
            pixels = np.stack([test_set.store.tile(test_set.rows[i]) for i in places])
            batch = torch.from_numpy(pixels).to(candidate.device)                    # (B, H, W, 4) uint8
            target = batch[..., 3].long()                                            # (B, H, W)
            labels, logits = candidate.predict(batch[..., :3], tiles)                # (B, H, W), (B, K, H, W)
            confusion[places] = metrics.confusion(labels, target, classes).cpu()
            if logits is not None:
                soft[places] = soft_dice(logits, target).cpu()
                calibration[places] = metrics.calibration(logits, target)
            predicted = labels.to(torch.uint8).cpu().numpy()
            surfaces[places] = list(pool.map(
                lambda labels, truth: metrics.surfaces(labels, truth, classes, tolerance), predicted, pixels[..., 3]))
            if candidate.predictor and ranks.is_first():
                list(pool.map(lambda labels, tile: label_image(labels, data).save(paths[tile.key]), predicted, tiles))
            elif candidate.predictor:
                files = pool.map(lambda labels: encoded(label_image(labels, data), "PNG"), predicted)
                images |= zip([tile.key for tile in tiles], files, strict=True)
            progress.advance(len(tiles))
        ranks.meet(progress.look)
    for *arrays, files in ranks.to_first((confusion, surfaces, soft, calibration, images))[1:]:
        for total, part in zip((confusion, surfaces, soft, calibration), arrays, strict=True):
            total += part  # which is 0 for tiles of other ranks
        for key, file in files.items():
            paths[key].write_bytes(file)
    if candidate.predictor:
        return metrics.Tally(confusion, surfaces, soft, calibration), paths
    return metrics.Tally(confusion, surfaces), paths


def batches_of_one_size(sizes: np.ndarray) -> list[list[int]]:
    """Divide tiles of these sizes (N, 2) into batches of at most about `PIXELS_AT_ONCE` pixels and of one size."""
    batches = []
    for places in places_by_size(sizes):
        step = tiles_at_once(*sizes[places[0]])
        batches += [places[start:start + step] for start in range(0, len(places), step)]
    return batches


def tiles_at_once(height: int, width: int) -> int:
    return max(1, int(PIXELS_AT_ONCE // (height * width)))


def places_by_size(sizes: np.ndarray) -> list[list[int]]:
    """Return the places of each size, the most frequent first: networks are compiled for the size they see first."""
    return sorted(places_by_group(list(map(tuple, sizes.tolist()))), key=len, reverse=True)
