"""Small data and calls of the scripts that several tests share."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

REPOSITORY = Path(__file__).parent.parent
GREYS = np.array([26, 51, 77], np.uint8)
TINY = ["data.group=^(s\\d+)", "data.crop=16", "model.widths=[4,8]", "train.epochs=3", "train.folds=2",
        "train.images_per_epoch=12", "train.batch_size=4", "train.precision=float32", "device=cpu"]


def script(*arguments, cwd, **environment) -> subprocess.CompletedProcess:
    """Run a script or `-m tools.x` of this repository as a user does, without a limit of time."""
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


def scene(seed, size=600):
    """Glass, tissue and tumour in smooth areas (size, size), and the colours that a microscope would show."""
    random = np.random.default_rng(seed)
    glass, tumour = (gaussian_filter(random.normal(size=(size, size)), 35) for _ in range(2))
    labels = np.where(glass > 0, 0, np.where(tumour > 0, 2, 1)).astype(np.uint8)
    colours = np.array([[240, 238, 241], [215, 150, 190], [140, 90, 160]])
    return labels, (colours[labels] + random.normal(0, 12, (size, size, 3))).clip(0, 255).astype(np.uint8)


def moved_mask(labels, move, window):
    """The part of the mask that a tile gets: pixel by pixel, what lies where the move came from."""
    top, left, height, width = window
    angle = np.radians(move.clockwise)
    y, x = np.mgrid[:height, :width]
    y, x = y - (height - 1) / 2 - move.down, x - (width - 1) / 2 - move.right
    from_y = np.cos(angle) * y - np.sin(angle) * x + (height - 1) / 2 + top  # turned back
    from_x = np.sin(angle) * y + np.cos(angle) * x + (width - 1) / 2 + left
    return labels[np.rint(from_y).astype(int), np.rint(from_x).astype(int)]


def as_store(tiles):
    """Tiles (H, W, 4) uint8 of any sizes as a store, with the pixels of each class as the only sums."""
    from common.store import Store

    counts = np.array([np.bincount(tile[..., 3].ravel(), minlength=256)[:3] for tile in tiles])
    return Store(np.concatenate([tile.reshape(-1, 4) for tile in tiles]), np.array([tile.shape[:2] for tile in tiles]),
                 np.concatenate([np.zeros((len(tiles), 6), int), counts], axis=1))


def arrays(store) -> np.ndarray:
    """The tiles of a store of one size, (N, H, W, 4)."""
    return np.stack([store.tile(i) for i in range(len(store))])


def checkpoint_contents(run: Path, name: str = "last") -> dict:
    """All that a checkpoint of a run holds, except measured times and memory."""
    import torch

    contents = torch.load(run / "checkpoints" / f"{name}.pt", weights_only=True, map_location="cpu")
    for row in contents["history"]:
        for measured in ("seconds", "images_per_second", "peak_memory_mb"):
            del row[measured]
    return contents


def assert_equal(a, b, path: str = "") -> None:
    """Assert that two trees of tensors and numbers are equal in every bit; `path` says where they differ."""
    import torch

    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def run_evaluate(*arguments) -> None:
    """Run evaluate.py in this process; errors are raised."""
    from unittest import mock

    import evaluate

    with mock.patch.object(sys, "argv", ["evaluate.py", *map(str, arguments)]):
        evaluate.main()


def read_scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def copy_run(run: Path, name: str, change=lambda weights: None) -> Path:
    """Copy a run under another name and let `change` edit the weights of its checkpoints in place."""
    import torch

    folder = shutil.copytree(run, run.parent / name, ignore=shutil.ignore_patterns("evaluation*"))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("name: tiny", f"name: {name}"))
    for path in (folder / "checkpoints").iterdir():
        contents = torch.load(path, weights_only=True)
        contents["config"]["name"] = name
        change(contents["model"])
        torch.save(contents, path)
    return folder


def always_predict(k: int):
    """A change for `copy_run`: the network predicts class k everywhere."""
    def change(weights: dict) -> None:
        weights["head.weight"][:] = 0
        weights["head.bias"][:] = 0
        weights["head.bias"][k] = 50
    return change


def numpy_batches(crops, store, batch_size: int):
    """The batches (B, size, size, 4) uint8 of crops inside their tiles, each window cut by NumPy alone."""
    for start in range(0, len(crops), batch_size):
        batch = []
        for i in range(start, min(start + batch_size, len(crops))):
            top, left = crops.top[i], crops.left[i]
            window = store.tile(crops.rows[i])[top:top + crops.size, left:left + crops.size]
            window = np.flip(window, 0) if crops.flip_vertical[i] else window
            window = np.flip(window, 1) if crops.flip_horizontal[i] else window
            batch.append(window.swapaxes(0, 1) if crops.transpose[i] else window)
        yield np.stack(batch)
