"""How fast is it? Ours against the plain way, side by side in one run.

    python -m tools.benchmark                                # on data/demo (tools/make_demo_data.py)
    python -m tools.benchmark --quick --json speed.json

Machines are shared and noisy: the two sides take turns, and the table quotes medians and the range of the ratios.

    filter_check     Algorithm 1 on a decoded tile, one core: scipy's float64 Gaussian, line by line
    filter_pass      a tile from files to verdict, one core: the original's path of decoding, check and compressed npz
                     of what is kept; ours writes no npz, and measures the other direction and the mask's shift besides
    filter_judge     the same, with no npz on either side
    filter_workers   judging all tiles on one process and on two, start of the processes included
    filter_memory    peak memory of the largest process that judges, for a tenth of the tiles and for all
    filter_verdicts  verdicts of Algorithm 1 on borderline variants of the tiles that differ from the literal ones
    field_map        d logit / d input of one pixel of the report's network: on the smallest input that holds the field,
                     with a decoder that computes the centre only, channels last, bfloat16 where the hardware has it;
                     against float32 on a 256 x 256 input
    field_maps       the same for 64 pixels, several in one backward pass against one each
    field_float32    field_maps with float32 on both sides
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

import data_filter
from audit import find_glass, sum_inverted
from config import Config, Data, Filter
from console import Progress, UserError, run, table
from dataset import Tile, find_pairs, read_pair
from files import write_text
from parallel import ONE_THREAD, cores

GREYS = (26, 51, 77)
REPORT = Filter()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a new process whose libraries use one thread."""
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def race(ours: Callable[[], Any], baseline: Callable[[], Any], items: int, rounds: int) -> dict:
    """Milliseconds an item of both sides, which take turns."""
    for warm_up in (ours, baseline):
        warm_up()
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
    for _ in range(rounds):
        for name, side in (("ours", ours), ("baseline", baseline)):
            start = time.perf_counter()
            side()
            seconds[name].append((time.perf_counter() - start) / items * 1e3)
    ratios = sorted(plain / fast for fast, plain in zip(seconds["ours"], seconds["baseline"], strict=True))
    return {"ours": statistics.median(seconds["ours"]), "baseline": statistics.median(seconds["baseline"]),
            "unit": "ms a tile", "ratio": statistics.median(ratios), "ratio_range": [ratios[0], ratios[-1]]}


# ---------------------------------------------------------------------------------------------- the filter

def literal_check(image: np.ndarray, tissue: np.ndarray, limits: Filter = REPORT) -> bool:
    """Algorithm 1 as printed, with the divisor that is meant: whether the tile is kept."""
    grey = np.abs(np.mean(image, axis=2) - 255.0)
    tissue_pixels = gaussian_filter(grey, sigma=limits.sigma)[tissue]
    empty = tissue_pixels[tissue_pixels < limits.blank_intensity]
    return len(empty) / np.count_nonzero(tissue) < limits.max_blank


def our_check(image: np.ndarray, tissue: np.ndarray, limits: Filter = REPORT) -> bool:
    glass = find_glass(sum_inverted(image), limits)
    return np.count_nonzero(glass & tissue) / np.count_nonzero(tissue) < limits.max_blank


def original_pass(root: Path, tiles: Sequence[Tile], out: Path | None) -> None:
    """Decode a mask, apply the 1 % rule, decode the image, check, write both as compressed npz below `out`, if any."""
    for tile in tiles:
        mask = np.array(Image.open(root / tile.mask))
        for label, grey in enumerate(GREYS):
            mask[mask == grey] = label
        if np.count_nonzero(mask) / mask.size < REPORT.min_foreground:
            continue
        image = np.array(Image.open(root / tile.image))
        if literal_check(image, np.logical_or(mask == 1, mask == 2)) and out:
            np.savez_compressed(out / f"mask{tile.key}", mask)
            np.savez_compressed(out / f"frame{tile.key}", image)


def our_pass(config: Config) -> None:
    data_filter.filter_tiles(config, workers=1)


def with_tissue(root: Path, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and annotated tissue of the first tiles that the 1 % rule lets pass."""
    pairs = []
    for tile in demo_tiles(root):
        image, mask = read_pair(root, tile, GREYS)
        if np.mean(mask > 0) >= REPORT.min_foreground:
            pairs.append((image, mask > 0))
        if len(pairs) == count:
            break
    return pairs


def demo_tiles(root: Path) -> list[Tile]:
    return find_pairs(root, Data.images, Data.masks)


def multiply(root: Path, out: Path, count: int) -> Config:
    """`count` tiles in `out`, each a hard link to one of the folder `root`; the config that filters them."""
    tiles = demo_tiles(root)
    for folder in ("frames", "masks"):
        (out / folder).mkdir(parents=True)
    for i in range(count):
        tile = tiles[i % len(tiles)]
        for source, target in ((tile.image, f"frames/frame#{i}.png"), (tile.mask, f"masks/mask#{i}.png")):
            try:
                os.link(root / source, out / target)
            except OSError:  # another file system
                shutil.copyfile(root / source, out / target)
    return Config(data=Data(root=str(out)))


def filter_check(root: Path, quick: bool) -> dict:
    pairs = with_tissue(root, 20 if quick else 60)
    return race(lambda: [our_check(*pair) for pair in pairs], lambda: [literal_check(*pair) for pair in pairs],
                len(pairs), 5 if quick else 9)


def filter_pass(root: Path, quick: bool, npz: bool = True) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config = multiply(root, Path(folder) / "tiles", 60 if quick else len(demo_tiles(root)))
        tiles, out = demo_tiles(Path(config.data.root)), Path(folder) / "npz"
        out.mkdir()
        plain = partial(original_pass, Path(config.data.root), tiles, out if npz else None)
        return race(partial(our_pass, config), plain, len(tiles), 3 if quick else 5)


def seconds_of_filter(config: Config, workers: int) -> float:
    start = time.perf_counter()
    data_filter.filter_tiles(config, workers)
    return time.perf_counter() - start


def filter_workers(root: Path, quick: bool) -> dict:
    """Each side is a process of its own, so that both pay for their start and no worker has a second thread."""
    count = 600 if quick else 4000
    with tempfile.TemporaryDirectory() as folder:
        config = multiply(root, Path(folder) / "tiles", count)
        rounds = [[alone(seconds_of_filter, config, workers) / count * 1e3 for workers in (2, 1)]
                  for _ in range(1 if quick else 3)]
    ratios = sorted(one / two for two, one in rounds)
    two, one = (statistics.median(side) for side in zip(*rounds, strict=True))
    return {"ours": two, "baseline": one, "unit": "ms a tile", "ratio": statistics.median(ratios),
            "ratio_range": [ratios[0], ratios[-1]], "tiles": count}


def peak_memory(config: Config, workers: int) -> float:
    """MB of the largest process of a filter run: this one or a worker."""
    import resource

    data_filter.filter_tiles(config, workers)
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def filter_memory(root: Path, quick: bool) -> dict:
    count = 600 if quick else 4000
    with tempfile.TemporaryDirectory() as folder:
        few, many = (alone(peak_memory, multiply(root, Path(folder) / str(number), number), 2)
                     for number in (count // 10, count))
    return {"ours": many, "baseline": few, "unit": f"MB for {count} and {count // 10} tiles", "ratio": few / many}


def filter_verdicts(root: Path, quick: bool) -> dict:
    """Tiles made borderline: the limit of blank is put onto, just below or just above what the tile has."""
    pairs, count, changed = with_tissue(root, 200), 200 if quick else 2000, 0
    with Progress("verdicts", count, "tile") as progress:
        for number in range(count):
            image, tissue = pairs[number % len(pairs)]
            random = np.random.default_rng(number)
            # another tile: other brightness, the mask moved; then a limit within a few pixels of its share of glass
            image = np.clip(image.astype(int) + random.integers(-12, 13), 0, 255).astype(np.uint8)
            tissue = np.roll(tissue, random.integers(-60, 61, 2), (0, 1))
            share = np.count_nonzero(find_glass(sum_inverted(image), REPORT) & tissue) / np.count_nonzero(tissue)
            nudge = random.integers(-2, 3) / np.count_nonzero(tissue)
            limits = replace(REPORT, max_blank=min(1.0, max(0.0, share + nudge)))
            changed += our_check(image, tissue, limits) != literal_check(image, tissue, limits)
            progress.advance()
    return {"ours": int(changed), "baseline": 0, "unit": f"changed of {count} borderline verdicts", "ratio": None}


# ---------------------------------------------------------------------------------------------- receptive fields

def field_maps(root: Path, quick: bool, count: int = 64, precision: str = "auto") -> dict:
    """Gradients of one class's logit at `count` pixels of as many images, by an untrained network of full width."""
    import torch

    from field_measurement import batches, gradients
    from field_theory import smallest_cut
    from hardware import autocast, choose_precision
    from unet import UNet

    torch.manual_seed(0)
    plain_model = UNet().eval()
    model = UNet().eval().to(memory_format=torch.channels_last).requires_grad_(False)
    model.load_state_dict(plain_model.state_dict())
    cut, device = smallest_cut(len(model.encoder)), torch.device("cpu")
    images = torch.randn(count, 3, 256, 256)
    cuts, places = images[..., :cut.size, :cut.size].contiguous(), torch.full((count, 2), cut.origin)

    def ours() -> None:
        with autocast(device, choose_precision(precision, device)):
            for start, stop in batches(count, len(model.encoder)):
                next(gradients(model, cuts[start:stop].clone(), places[start:stop], by_path=False))

    def plain() -> None:
        for image in images[:, None]:
            image = image.clone().requires_grad_()
            torch.autograd.grad(plain_model(image)[0, 0, 128, 128], image)

    return race(ours, plain, count, (3 if quick else 9) if count == 1 else 1 if quick else 3) | {"unit": "ms a map"}


BENCHMARKS = {  # name: (function, in a process of one thread)
    "filter_check": (filter_check, True),
    "filter_pass": (filter_pass, True),
    "filter_judge": (partial(filter_pass, npz=False), True),
    "filter_workers": (filter_workers, False),
    "filter_memory": (filter_memory, False),
    "filter_verdicts": (filter_verdicts, True),
    "field_map": (partial(field_maps, count=1), False),
    "field_maps": (field_maps, False),
    "field_float32": (partial(field_maps, precision="float32"), False),
}


def measure(name: str, root: Path, quick: bool) -> dict:
    function, single = BENCHMARKS[name]
    return {"name": name, **(alone(function, root, quick) if single else function(root, quick))}


def describe(row: dict) -> list[str]:
    span = f"{row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f}" if "ratio_range" in row else ""
    return [row["name"], f"{row['ours']:.3g}", f"{row['baseline']:.3g}", row["unit"],
            "" if row["ratio"] is None else f"{row['ratio']:.2f}", span]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), metavar="DIR",
                        help="folder of demo tiles (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME",
                        help=f"some of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer tiles and rounds: a first impression")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    if not (args.data / "truth.csv").is_file():
        raise UserError(f"{args.data}: no demo tiles; `python -m tools.make_demo_data {args.data}` makes them")
    print(f"{platform.processor() or platform.machine()}, {cores()} cores, Python {platform.python_version()}, "
          + ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "pillow")), flush=True)
    rows = [measure(name, args.data.resolve(), args.quick) for name in args.only]
    print(table(["benchmark", "ours", "baseline", "unit", "baseline / ours", "range"], [describe(row) for row in rows]))
    if args.json:
        write_text(args.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
