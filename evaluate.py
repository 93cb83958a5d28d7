"""Score trained models on tiles they have not seen, compare them, and show where they err (report, section 6).

    python evaluate.py runs/dice_ce
    python evaluate.py runs/ce runs/wce runs/dice runs/dice_ce --flips
    python evaluate.py runs/dice_ce --predictions other_tool/labels
    python evaluate.py --predictions other_tool/labels --config configs/dice_ce.yaml
    python evaluate.py runs/dice_ce --images slides/

Whole tiles in float32, mirrored up to the size that the network takes and cropped back. The first four write tables,
pictures, a page to look at and every tile's scores (evaluation_report.py lists them) to RUN/evaluation, or for several
runs to runs/comparison. The last one needs no masks: it writes label images, overlays and the areas of the classes to
RUN/predictions.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import evaluation_report
import metrics
from config import load_config
from console import Progress, UserError, run, table
from entries import MAY_CHANGE, Entry, Questions, ask, given, listed, trained
from evaluation_report import Evaluation
from files import replacing_folder
from losses import soft_dice
from parallel import cores

PIXELS_AT_ONCE = 1024 * 1024  # a batch of four 512 x 512 tiles
TOLERANCE = 3.0  # pixels


def score(entry: Entry, questions: Questions, tolerance: float, folder: Path) -> tuple[metrics.Tally, dict[str, Path]]:
    """Let an entry answer every tile, count, and keep the answers: a model's as label images in `folder`."""
    data, store = questions.config.data, questions.store
    classes, greys = len(data.classes), np.array(data.greys, np.uint8)
    batch_size = max(1, PIXELS_AT_ONCE // (store.shape[1] * store.shape[2]))
    confusions, surfaces, soft, calibration, kept = [], [], [], [], []
    if entry.predictor:
        folder.mkdir(parents=True)
    with Progress(f"evaluate {entry.name}", len(questions.rows), "tile") as progress, ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(questions.rows), batch_size):
            tiles = questions.tiles[start:start + batch_size]
            batch = torch.from_numpy(store[questions.rows[start:start + batch_size]]).to(entry.device)
            target = batch[..., 3].long()                                            # (B, H, W)
            labels, logits = entry.answer(batch[..., :3], tiles)                     # (B, H, W), (B, K, H, W)
            confusions += metrics.confusion(labels, target, classes).tolist()
            if logits is not None:
                soft += soft_dice(logits, target).tolist()
                calibration += metrics.calibration(logits, target).tolist()
            labels = labels.to(torch.uint8).cpu().numpy()
            surfaces += pool.map(lambda pair: metrics.surfaces(*pair, classes, tolerance),
                                 zip(labels, batch[..., 3].cpu().numpy(), strict=True))
            if entry.predictor:
                kept += pool.map(lambda pair: save_labels(*pair), [(folder / f"{tile.key}.png", greys[answer])
                                                                   for tile, answer in zip(tiles, labels, strict=True)])
            progress.advance(len(tiles))
    paths = entry.labels or dict(zip((tile.key for tile in questions.tiles), kept, strict=True))
    return metrics.Tally(np.array(confusions), np.array(surfaces), np.array(soft) if soft else None,
                         np.array(calibration) if calibration else None), paths
