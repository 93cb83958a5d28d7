"""Small data and calls of the scripts that several tests share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
GREYS = np.array([26, 51, 77], np.uint8)
TINY = ["data.group=^(s\\d+)", "data.crop=16", "model.widths=[4,8]", "train.epochs=3", "train.folds=2",
        "train.images_per_epoch=12", "train.batch_size=4", "train.precision=float32", "device=cpu"]


def script(*arguments, cwd, **environment) -> subprocess.CompletedProcess:
    """Run a script or `-m tools.x` of this repository as a user does, however long this machine takes."""
    name, *rest = map(str, arguments)
    command = ["-m", name] if name.startswith("tools.") else [str(REPOSITORY / name)]
    return subprocess.run([sys.executable, *command, *rest], cwd=cwd, capture_output=True, text=True,
                          encoding="utf-8", env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment)


def write_pairs(root: Path, count: int, size: tuple[int, int] = (48, 40), seed: int = 0, slides: int = 0) -> list[str]:
    """Random tiles in the raw layout that pass the filter; keys are 0, 1, ... or s0-0, s1-1, ... with slides."""
    random = np.random.default_rng(seed)
    keys = [f"s{i % slides}-{i}" if slides else str(i) for i in range(count)]
    for folder in ("frames", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for key in keys:
        labels = random.integers(0, 3, size)
        image = random.integers(60, 160, (*size, 3)).astype(np.uint8)
        Image.fromarray(image).save(root / f"frames/frame#{key}.png")
        Image.fromarray(GREYS[labels]).save(root / f"masks/mask#{key}.png")
    return keys


def tiny_config(root: Path):
    """A config that trains in a second on the tiles in `root`, whose list is written."""
    from common import config, config_files
    from dataset import TILE_LIST, write_tiles
    from filtering import pipeline

    settings = config_files.apply_overrides(config.Config(name="tiny"), [*TINY, f"data.root={root}"])
    write_tiles(root / TILE_LIST, pipeline.filter_tiles(settings).tiles)
    return settings


def numpy_batches(crops, store: np.ndarray, batch_size: int):
    """The batches (B, size, size, 4) uint8 of crops, each window cut by NumPy alone."""
    for start in range(0, len(crops), batch_size):
        batch = []
        for i in range(start, min(start + batch_size, len(crops))):
            top, left = crops.top[i], crops.left[i]
            window = store[crops.rows[i], top:top + crops.size, left:left + crops.size]
            window = np.flip(window, 0) if crops.flip_vertical[i] else window
            batch.append(np.flip(window, 1) if crops.flip_horizontal[i] else window)
        yield np.stack(batch)
