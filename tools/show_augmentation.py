"""Draw some forms in which training shows a tile, image and mask, to judge the settings `augment` by eye.

    python -m tools.show_augmentation --config configs/augmented.yaml data.root=data/demo
    python -m tools.show_augmentation --config configs/ebhi.yaml augment.stain=0.2 --tile GT2001838-1-400-002

Writes augmentation.png, a sheet of one tile: a crop as it is, then 15 training crops. Pixels without a
class, which a turn brings in from outside the tile, are hatched.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from common import palette
from common.config import Config
from common.config_files import load_config
from common.console import UserError, argument_parser, percent, run
from common.masks import IGNORE
from common.store import Store, read_pair
from dataset import SPLITS, TILE_LIST, Tile, read_tiles
from training.batches import batches_on
from training.crops import training_crops, validation_crops

FORMS, COLUMNS = 16, 8  # the first is the tile as it is
MUCH = 0.1  # from this share of pixels without a class on, a smaller crop is advised


def find_tile(config: Config, key: str) -> Tile:
    """Return the kept tile with this key; without a key, the training tile in the middle of the list."""
    path = config.data.list_folder / TILE_LIST
    tiles = [tile for tile in read_tiles(config.data) if tile.split in SPLITS]
    found = [tile for tile in tiles if tile.key == key] if key else [tile for tile in tiles if tile.split == "train"]
    if not found:
        raise UserError(f"{path}: no kept tile has the key '{key}'" if key else f"{path}: no tile has split = train")
    return found[len(found) // 2]


def forms_of(tile: Tile, config: Config, count: int) -> np.ndarray:
    """Return a crop without augmentation and `count` - 1 augmented ones, (count, size, size, 4) uint8."""
    image, labels = read_pair(tile.pair, config.data)
    pixels = np.dstack([image, labels]).reshape(-1, 4)
    store = Store(pixels, np.array([labels.shape]), np.zeros((1, 6 + len(config.data.classes))))
    rows, size = [np.zeros(count - 1, int), np.zeros(1, int)], config.data.crop
    crops = (validation_crops(rows, 1, store.sizes, size, config.seed, 1),
             training_crops(rows, 1, store.sizes, size, config.seed, 1, config.augment))
    device = torch.device("cpu")
    return np.concatenate([batch.numpy() for part in crops for batch in batches_on(device, part, store, count)])


def sheet(forms: np.ndarray, title: str, classes: tuple[str, ...]) -> Figure:
    """Draw forms (N, H, W, 4) uint8 in rows of `COLUMNS`, each image above its mask."""
    lines = -(-len(forms) // COLUMNS)
    figure = Figure(figsize=(1.65 * COLUMNS, 3.35 * lines + 0.8), dpi=100, layout="constrained")
    grid = figure.subplots(2 * lines, COLUMNS, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for i, form in enumerate(forms):
        line, column = divmod(i, COLUMNS)
        grid[2 * line, column].imshow(form[..., :3])
        grid[2 * line, column].set_title("" if i else "as it is", fontsize=9)
        grid[2 * line + 1, column].imshow(palette.colour_mask(form[..., 3], len(classes)), interpolation="nearest")
    figure.suptitle(title, fontsize=11)
    handles = palette.class_patches(classes)
    if (forms[..., 3] == IGNORE).any():
        handles.append(palette.ignored_patch())
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def describe(config: Config) -> str:
    """Return the settings that differ from no augmentation."""
    return ", ".join(f"{name} {value:g}" if type(value) is float else name
                     for name, value in vars(config.augment).items() if value) or "no augmentation"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="the experiment, e.g. configs/augmented.yaml")
    parser.add_argument("--tile", default="", metavar="KEY", help="(default: a training tile)")
    parser.add_argument("--out", type=Path, default=Path("augmentation.png"), metavar="FILE",
                        help="(default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: the picture is a PNG; give a name that ends in .png")
    config = load_config(args.config, args.overrides)
    tile = find_tile(config, args.tile)
    forms = forms_of(tile, config, FORMS)
    palette.save(sheet(forms, f"{tile.key}: {describe(config)}", config.data.classes), args.out)
    outside = (forms[1:, ..., 3] == IGNORE).mean()
    print(f"wrote {args.out}: tile {tile.key} as it is, and in {FORMS - 1} forms of training; {percent(outside)} of "
          "their pixels have no class")
    if outside > MUCH:
        print(f"a data.crop smaller than {config.data.crop} shows less of what is outside the tile")


if __name__ == "__main__":
    run(main)
