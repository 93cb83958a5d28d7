"""Time the filter: Algorithm 1 alone, and all steps from files to verdicts, against the report's code.

The report has no registration, so `filter_register` compares with a plain search over the same moves.
"""

import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import affine_transform, gaussian_filter

from common.config import Config, Data, Filter
from common.store import read_pair
from dataset import Tile, find_pairs
from filtering import pipeline, registration
from filtering.audit import find_glass, inverted_grey
from tools.benchmark.race import Lap, Race, Setting, alone, plain_row

MASK_VALUES = (26, 51, 77)
REPORT = Filter()


def literal_check(image: np.ndarray, tissue: np.ndarray, limits: Filter = REPORT) -> bool:
    """Return whether Algorithm 1 as printed keeps the tile, but with the divisor that is meant."""
    grey = np.abs(np.mean(image, axis=2) - 255.0)
    tissue_pixels = gaussian_filter(grey, sigma=limits.sigma)[tissue]
    empty = tissue_pixels[tissue_pixels < limits.blank_intensity]
    return len(empty) / np.count_nonzero(tissue) < limits.max_blank


def our_check(image: np.ndarray, tissue: np.ndarray, limits: Filter = REPORT) -> bool:
    glass = find_glass(inverted_grey(image), limits)
    return np.count_nonzero(glass & tissue) / np.count_nonzero(tissue) < limits.max_blank


def our_search(image: np.ndarray, labels: np.ndarray) -> registration.Move:
    """Return the move that fits best on the coarse grid."""
    cell = registration.cell_size(labels.shape, registration.COARSE)
    classes = np.unique(labels)
    shares = registration.cell_means(np.stack([labels == k for k in classes], -1), cell)
    return registration.search(registration.Colours(image, REPORT.sigma), shares, classes, cell)[1][0][1]


def plain_search(image: np.ndarray, labels: np.ndarray) -> registration.Move:
    """Return the same by loops over all rotations and shifts, which compare both maps on their overlap."""
    cell, best = registration.cell_size(labels.shape, registration.COARSE), (np.inf, registration.Move())
    classes = np.unique(labels)
    shares = registration.cell_means(np.stack([labels == k for k in classes], -1), cell)
    colours = registration.Colours(image, REPORT.sigma).grids[registration.COARSE]
    height, width = shares.shape[:2]
    most_down, most_right = int(registration.FARTHEST * height), int(registration.FARTHEST * width)
    for angle in registration.ANGLES:
        move = registration.Move(clockwise=float(angle))
        offset = move.of_points(np.zeros(2), (height, width))
        turned = np.stack([affine_transform(of_class, move.matrix, offset, order=1)
                           for of_class in np.moveaxis(shares, -1, 0)], axis=-1)
        for down in range(-most_down, most_down + 1):
            for right in range(-most_right, most_right + 1):
                rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
                cut = turned[max(-down, 0):height - max(down, 0), max(-right, 0):width - max(right, 0)].reshape(
                    -1, len(classes))
                if cut.sum() < registration.MIN_OVERLAP * shares.sum():
                    continue
                under, weights = colours[rows, columns].reshape(-1, 3), cut.sum(1)
                mean = weights @ under / weights.sum()
                deviations = under - mean
                sums, counts = cut.T @ deviations, cut.sum(0)
                between = (sums[counts > 0.5]**2 / counts[counts > 0.5, None]).sum()
                cost = 1 - between / (weights @ deviations**2).sum() + registration.penalty(
                    np.hypot(down, right) / min(height, width), angle)
                if cost < best[0]:
                    y, x = -move.matrix @ (down, right) * cell
                    best = cost, registration.Move(x, y, move.clockwise)
    return best[1]


def original_pass(root: Path, tiles: Sequence[Tile], out: Path | None) -> None:
    """Decode a mask, apply the 1 % rule, decode the image, check it; write both as compressed npz if `out` is given."""
    for tile in tiles:
        mask = np.array(Image.open(root / tile.mask))
        for label, value in enumerate(MASK_VALUES):
            mask[mask == value] = label
        if np.count_nonzero(mask) / mask.size < REPORT.min_foreground:
            continue
        image = np.array(Image.open(root / tile.image))
        if literal_check(image, np.logical_or(mask == 1, mask == 2)) and out:
            np.savez_compressed(out / f"mask{tile.key}", mask)
            np.savez_compressed(out / f"frame{tile.key}", image)


def with_tissue(root: Path, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return images and annotated tissue of the first tiles that pass the 1 % rule."""
    return [(image, labels > 0) for image, labels in with_labels(root, count)]


def with_labels(root: Path, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return images and classes of the first tiles that pass the 1 % rule."""
    pairs = []
    for tile in demo_tiles(root):
        image, mask = read_pair(tile.pair, Data(root=str(root)))
        if np.mean(mask > 0) >= REPORT.min_foreground:
            pairs.append((image, mask))
        if len(pairs) == count:
            break
    return pairs


def demo_tiles(root: Path) -> list[Tile]:
    return find_pairs(Data(root=str(root)))


def multiply(root: Path, out: Path, count: int) -> Config:
    """Fill `out` with `count` tiles that are hard links to those in `root`; return the config that filters them."""
    tiles = demo_tiles(root)
    for folder in ("frames", "masks"):
        (out / folder).mkdir(parents=True)
    for i in range(count):
        tile = tiles[i % len(tiles)]
        for source, target in ((tile.image, f"frames/frame#{i}.png"), (tile.mask, f"masks/mask#{i}.png")):
            try:
                os.link(root / source, out / target)
            except OSError:  # for example on another file system
                shutil.copyfile(root / source, out / target)
    return Config(data=Data(root=str(out)))


def check(setting: Setting, keep: Callable[[np.ndarray, np.ndarray], bool]) -> Lap:
    pairs = with_tissue(setting.root, 20 if setting.quick else 60)
    return Lap(lambda: [keep(*pair) for pair in pairs], len(pairs))


def register(setting: Setting, search: Callable[[np.ndarray, np.ndarray], registration.Move]) -> Lap:
    pairs = [(image, labels) for image, labels in with_labels(setting.root, 2 if setting.quick else 6)]
    return Lap(lambda: [search(*pair) for pair in pairs], len(pairs))


def our_pass(setting: Setting) -> Lap:
    folder = tempfile.TemporaryDirectory()
    config = multiply(setting.root, Path(folder.name) / "tiles", tiles_of_a_pass(setting))

    def run() -> None:
        assert folder  # this reference keeps the folder as long as the lap exists
        pipeline.filter_tiles(config, workers=1)

    return Lap(run, tiles_of_a_pass(setting))


def plain_pass(setting: Setting, npz: bool) -> Lap:
    folder = tempfile.TemporaryDirectory()
    root, out = Path(folder.name) / "tiles", Path(folder.name) / "npz"
    multiply(setting.root, root, tiles_of_a_pass(setting))
    tiles = demo_tiles(root)
    out.mkdir()

    def run() -> None:
        assert folder  # see our_pass
        original_pass(root, tiles, out if npz else None)

    return Lap(run, len(tiles))


def tiles_of_a_pass(setting: Setting) -> int:
    return 60 if setting.quick else len(demo_tiles(setting.root))


def seconds_of_filter(config: Config, workers: int) -> float:
    start = time.perf_counter()
    pipeline.filter_tiles(config, workers)
    return time.perf_counter() - start


def workers(setting: Setting) -> dict:
    """Time the filter with two workers and one. Each run starts a new process, whose workers use one thread."""
    count = 300 if setting.quick else 4000
    with tempfile.TemporaryDirectory() as folder:
        config = multiply(setting.root, Path(folder) / "tiles", count)
        rounds = [[alone(seconds_of_filter, config, workers) / count * 1e3 for workers in (2, 1)]
                  for _ in range(1 if setting.quick else 3)]
    two, one = (statistics.median(side) for side in zip(*rounds, strict=True))
    return plain_row(two, one, "ms a tile", [one / two for two, one in rounds], tiles=count)


def peak_memory(config: Config, workers: int) -> float:
    """Return the MB of the largest process of a filter run: this one or a worker."""
    import resource

    pipeline.filter_tiles(config, workers)
    return max(own_peak_memory(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def own_peak_memory() -> float:
    """Return the MB that this process used at most; RUSAGE_SELF includes those of the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def memory(setting: Setting) -> dict:
    count = 300 if setting.quick else 4000
    with tempfile.TemporaryDirectory() as folder:
        few, many = (alone(peak_memory, multiply(setting.root, Path(folder) / str(number), number), 2)
                     for number in (count // 10, count))
    return plain_row(many, few, f"MB for {count} and {count // 10} tiles", [few / many])


RACES = {
    name: Race(ours, plain, one_thread=True, keeps_memory=False) for name, ours, plain in (
        ("filter_check", partial(check, keep=our_check), partial(check, keep=literal_check)),
        ("filter_register", partial(register, search=our_search), partial(register, search=plain_search)),
        ("filter_pass", our_pass, partial(plain_pass, npz=True)),
        ("filter_judge", our_pass, partial(plain_pass, npz=False)))
}
MEASUREMENTS = {"filter_workers": workers, "filter_memory": memory}
