"""Clean a folder of tiles: judge every image-mask pair, split what is kept, write tiles.csv (report, section 3.2).

    python data_filter.py --config configs/demo.yaml
    python data_filter.py --config configs/dice_ce.yaml data.root=data/mine data.group='^(slide\\d+)'

A tile is dropped as `sparse` if less than filter.min_foreground of its mask is not background, and as `misregistered`
if Algorithm 1 finds glass under too much of its annotated tissue. It stays in the list with its numbers and the reason.
"""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from config import Config, Filter, load_config
from console import Progress, UserError, run, table, warn
from dataset import (
    DROPPED,
    SPLITS,
    TILE_LIST,
    Tile,
    find_pairs,
    groups_are_missing,
    picture_size,
    read_mask,
    read_pair,
    split_by_group,
    write_tiles,
)


def blank_share(image: np.ndarray, tissue: np.ndarray, sigma: float, blank_intensity: float) -> float:
    """Algorithm 1: the share of the annotated tissue (H, W) bool where the image (H, W, 3) uint8 shows glass.

    Glass is where the inverted mean of red, green and blue, smoothed by a Gaussian of `sigma` pixels, stays below
    `blank_intensity` (of 255). Line 8 of the report divides by the number of glass pixels, which gives 1 always; meant,
    and done here, is the number of tissue pixels. NaN without any tissue.
    """
    inverted = 255.0 - image.mean(axis=-1)
    smooth = gaussian_filter(inverted, sigma)
    return float(np.mean(smooth[tissue] < blank_intensity)) if tissue.any() else float("nan")


def judge(root: Path, tile: Tile, greys: Sequence[int], limits: Filter) -> tuple[Tile, np.ndarray]:
    """The tile with its measurements and, if it is dropped, the reason; and its pixels of each class (K,)."""
    mask = read_mask(root / tile.mask, greys)
    pixels = np.bincount(mask.ravel(), minlength=len(greys))
    foreground = float(1 - pixels[0] / mask.size)
    if foreground < limits.min_foreground or foreground == 0:
        size = picture_size(root / tile.image)
        if size != mask.shape:
            raise UserError(f"{root / tile.mask}: the mask is {mask.shape[0]} x {mask.shape[1]} pixels (height x "
                            f"width), its image {root / tile.image} is {size[0]} x {size[1]}; they must agree")
        return replace(tile, foreground=foreground, split="sparse"), pixels
    image, mask = read_pair(root, tile, greys)
    blank = blank_share(image, mask > 0, limits.sigma, limits.blank_intensity)
    return replace(tile, foreground=foreground, blank=blank,
                   split="misregistered" if blank >= limits.max_blank else ""), pixels


def filter_tiles(config: Config) -> tuple[list[Tile], np.ndarray]:
    """Every tile of the root with its verdict, and the pixels (N, K) of each class."""
    root = Path(config.data.root)
    tiles = find_pairs(root, config.data.images, config.data.masks, config.data.group)
    judged, pixels, size = [], [], picture_size(root / tiles[0].mask)
    with Progress("filter", len(tiles), "tile") as progress:
        for tile in tiles:
            tile, counts = judge(root, tile, config.data.greys, config.filter)
            if picture_size(root / tile.mask) != size:
                raise UserError(f"{root / tile.mask}: {picture_size(root / tile.mask)} pixels (height, width), but "
                                f"{root / tiles[0].mask} has {size}; tiles must be of one size")
            judged.append(tile)
            pixels.append(counts)
            progress.advance()
    kept = [i for i, tile in enumerate(judged) if tile.split not in DROPPED]
    if not kept:
        raise UserError(f"{root}: none of {len(judged)} tiles passes the filter; look at the masks, or relax "
                        "filter.min_foreground and filter.max_blank")
    splits = split_by_group([judged[i] for i in kept], config.data.test_fraction, config.seed)
    for i, split in zip(kept, splits, strict=True):
        judged[i] = replace(judged[i], split=split)
    return judged, np.array(pixels)


def summary(tiles: Sequence[Tile], pixels: np.ndarray, classes: Sequence[str]) -> str:
    """Counts and class shares by verdict, as a table."""
    rows = []
    for verdict in (*SPLITS, *DROPPED, "all"):
        chosen = [i for i, tile in enumerate(tiles) if verdict in (tile.split, "all")]
        total = pixels[chosen].sum(axis=0)
        shares = [f"{share:.1%}" for share in total / total.sum()] if chosen else ["-"] * len(classes)
        groups = len({tiles[i].group for i in chosen} - {""})
        rows.append([verdict, str(len(chosen)), f"{len(chosen) / len(tiles):.1%}", str(groups or "-"), *shares])
    return table(["verdict", "tiles", "share", "groups", *classes], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    tiles, pixels = filter_tiles(config)
    if groups_are_missing(tiles):
        reason = "finds another group in every key" if config.data.group else "is not set"
        warn(f"data.group {reason}, so tiles are split one by one: tiles of one slide or patient can fall into both "
             "train and test, and scores then flatter. Give a pattern that finds the slide in the key if you can")
    path = Path(config.data.root) / TILE_LIST
    write_tiles(path, tiles)
    print(summary(tiles, pixels, config.data.classes))
    print(f"\nwrote {path}\nnext:  python train.py "
          f"{shlex.join(['--config', args.config, *args.overrides])}")


if __name__ == "__main__":
    run(main)
