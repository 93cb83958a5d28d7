"""Measure the cost of training: an epoch of the report, and how time and memory grow with crop, batch, width and tiles.

Each size is measured in a new process, so that its peak memory is not that of another size.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from common.config import Config, Model, Train
from common.console import Progress
from common.devices import peak_memory_mb
from dataset import Tile
from tools.benchmark.network import STATISTICS, random_crops, random_tiles, store_of, trainer
from tools.benchmark.race import Setting, in_new_process, plain_row
from training import epochs, training_set
from training.batches import batches_on, store_on
from training.learner import build_learner

SIZES: dict[str, list[dict[str, Any]]] = {  # of a training step; sizes that are not listed are the report's
    "crop": [{"size": size} for size in (128, 192, 256, 384, 512)],
    "batch": [{"batch": batch} for batch in (1, 4, 8, 16, 32)],
    "widths": [{"widths": tuple(first * 2**level for level in range(levels))}
               for first, levels in ((8, 5), (16, 5), (32, 4), (32, 5), (64, 5))],
}
TILES = (100, 1000, 4000)
REPORT = {"size": 256, "batch": 16, "widths": Model.widths}


def timed(task: Callable[[], Any], setting: Setting, rounds: int) -> float:
    """Return the median time in seconds; the first call does not count."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        task()
        setting.wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def step_row(setting: Setting, size: int, batch: int, widths: tuple[int, ...]) -> dict:
    """Measure the time per image in ms, and the peak memory in MB: of the GPU, or of the whole process on a CPU."""
    steps = 20 if setting.device == "cuda" else 1
    task = trainer(setting.device, batch, steps, size, widths, compiled=setting.device == "cuda")
    seconds = timed(task, setting, 1 if setting.quick else 3)
    images = batch * steps
    return plain_row(1000 * seconds / images, None, "ms an image", images_per_second=round(images / seconds, 1),
                     peak_memory_mb=round(peak_memory_mb(torch.device(setting.device))),
                     crop=size, batch=batch, widths=list(widths))


def crops_row(setting: Setting, tiles: int) -> dict:
    """Measure the time per crop in ms, in a store of `tiles` tiles."""
    device = torch.device(setting.device)
    store, crops = store_on(device, store_of(random_tiles(tiles))), random_crops(1600, tiles)
    seconds = timed(lambda: [None for _ in batches_on(device, crops, store, Train.batch_size)], setting, 3)
    return plain_row(1000 * seconds / len(crops), None, "ms a crop", tiles=tiles,
                     where="GPU" if isinstance(store.pixels, torch.Tensor) and device.type == "cuda" else "memory")


def scaling(setting: Setting) -> Iterator[dict]:
    cases = [(f"scaling_{what}_{'_'.join(map(str, np.ravel(list(case.values()))))}", step_row,
              tuple((REPORT | case).values())) for what, cases in SIZES.items() for case in cases]
    cases += [(f"scaling_tiles_{tiles}", crops_row, (tiles,)) for tiles in TILES]
    measured: dict[tuple, dict] = {}  # the report's sizes belong to three of the curves
    with Progress("scaling", len(cases), "size") as progress:
        for name, function, arguments in cases:
            if arguments not in measured:
                measured[arguments] = in_new_process(function, setting, *arguments)
            yield {"name": name, **measured[arguments]}
            progress.advance()


def epoch(setting: Setting, plan: Train, model: Model, tiles: int) -> dict:
    """Measure the time of an epoch of train.py in s; the first epoch, which compiles, does not count."""
    config = Config(device=setting.device, model=model, train=replace(plan, compile=setting.device == "cuda"))
    learner = build_learner(config, STATISTICS)
    store = store_on(learner.device, store_of(random_tiles(tiles)))
    data = training_set.TrainingSet(store, np.arange(tiles), [Tile("", "", "")] * tiles, STATISTICS, "")
    numbers = itertools.count(1)
    seconds = timed(lambda: epochs.run_epoch(learner, data, config, next(numbers)), setting, 1 if setting.quick else 3)
    images = plan.images
    return plain_row(seconds, None, f"s an epoch of {images} images", images_per_second=round(images / seconds, 1),
                     peak_memory_mb=round(peak_memory_mb(learner.device)))


def epoch_of_the_report(setting: Setting) -> dict:
    return in_new_process(epoch, setting, Train(), Model(), 1000)


MEASUREMENTS = {"epoch": epoch_of_the_report, "scaling": scaling}
