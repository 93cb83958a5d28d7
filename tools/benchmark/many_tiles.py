"""Measure how time and memory of filter, packing and start grow with the number of tiles, on small synthetic ones."""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.config import Config, Data, Model
from common.console import Progress
from dataset import TILE_LIST, write_tiles
from filtering import pipeline
from tools.benchmark.filtering import MASK_VALUES, own_peak_memory
from tools.benchmark.race import Setting, in_new_process, plain_row

COUNTS, QUICK_COUNTS = (1000, 10_000, 100_000), (100, 200)
SIDE, TILES_OF_A_SLIDE = 64, 10


def write(root: Path, count: int) -> Config:
    """Write pairs of images and masks, no two images alike; return a config that reads them."""
    config = Config(data=Data(root=str(root), group=r"^(s\d+)", crop=SIDE), model=Model(widths=(4, 8)))
    random = np.random.default_rng(0)
    images = random.integers(60, 200, (100, SIDE, SIDE, 3)).astype(np.uint8)
    masks = np.array(MASK_VALUES, np.uint8)[np.kron(random.integers(0, 3, (100, 8, 8)), np.ones((1, 8, 8), int))]
    for pattern in (config.data.images, config.data.masks):
        (root / pattern).parent.mkdir(parents=True)
    with Progress("write tiles", count, "tile") as progress:
        for i in range(count):
            image, key = images[i % 100].copy(), f"s{i // TILES_OF_A_SLIDE}-{i}"
            image[0, 0] = i % 256, i // 256 % 256, i // 65536
            for pattern, pixels in ((config.data.images, image), (config.data.masks, masks[7 * i % 100])):
                Image.fromarray(pixels).save(root / pattern.format(key=key), compress_level=1)
            progress.advance()
    return config


def run_filter(config: Config) -> None:
    result = pipeline.filter_tiles(config)
    write_tiles(config.data.list_folder / TILE_LIST, result.tiles)


def prepare(config: Config) -> None:
    """Do what train.py does before its first step; the first time it packs the tiles."""
    from training.training_set import prepare_data

    prepare_data(config)


def seconds_and_memory(task: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds and the peak memory in MB of a task in this process."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start, own_peak_memory()


def many_tiles(setting: Setting) -> Iterator[dict]:
    for count in QUICK_COUNTS if setting.quick else COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            config = write(Path(folder) / "tiles", count)
            for name, task in (("filter", run_filter), ("pack", prepare), ("start", prepare)):
                seconds, memory = in_new_process(seconds_and_memory, partial(task, config))
                yield {"name": f"many_tiles_{count}_{name}", **plain_row(1000 * seconds / count, None, "ms a tile",
                                                                          seconds=seconds, peak_memory_mb=memory)}


MEASUREMENTS = {"many_tiles": many_tiles}
