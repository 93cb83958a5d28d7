"""Copy tiles and move some of their masks by known shifts and rotations, to see what the filter makes of them.

    python -m tools.move_masks --config configs/ebhi.yaml data/ebhi_moved
    python data_filter.py --config configs/ebhi.yaml data.root=data/ebhi_moved filter.max_shift=15 filter.repair=true
    python -m tools.filter_accuracy data/ebhi_moved

The given masks count as clean. The outer sixth of each side is cut off, so that a mask can be moved without an empty
part. Every fourth mask is moved, one half by a shift of 8 to 16 % of the tile's side, the other half by a rotation of 8
to 25 degrees. OUT has the layout of tools.make_demo_data, with truth/ and truth.csv.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from common.config_files import load_config
from common.console import Progress, UserError, argument_parser, run
from common.files import writing
from common.masks import IGNORE, label_image
from common.randomness import generator
from common.store import read_pair
from dataset import find_pairs
from filtering.registration import Move
from tools.make_demo_data import COLUMNS

CUT = 6  # the part of a side that is cut off at each end is 1 / CUT
MOVED = 4  # every so many tiles


def random_move(random: np.random.Generator, side: int, turn: bool) -> Move:
    if turn:
        return Move(clockwise=round(float(random.uniform(8, 25) * random.choice([-1, 1])), 1))
    angle, length = random.uniform(0, 2 * np.pi), random.uniform(0.08, 0.16) * side
    return Move(round(float(length * np.cos(angle))), round(float(length * np.sin(angle))))


def moved(labels: np.ndarray, move: Move, top: int, left: int, shape: tuple[int, int]) -> np.ndarray:
    """Return the part (h, w) of classes (H, W) that begins at top and left, as a mask that lies off by a move."""
    places = np.stack(np.meshgrid(*(np.arange(length, dtype=float) for length in shape), indexing="ij"), axis=-1)
    centre = (np.array(shape) - 1) / 2
    came_from = (places - centre - (move.down, move.right)) @ move.matrix + centre + (top, left)
    y, x = np.moveaxis(np.rint(came_from).astype(int), -1, 0)
    return labels[y.clip(0, labels.shape[0] - 1), x.clip(0, labels.shape[1] - 1)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="says where the tiles lie and how to read them")
    parser.add_argument("out", type=Path, help="the folder to write, e.g. data/ebhi_moved")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    if args.out.exists():
        raise UserError(f"{args.out} exists; remove it or choose another folder")
    tiles, rows = find_pairs(config.data), []
    with writing(args.out), Progress("move masks", len(tiles), "tile") as progress:
        for name in ("frames", "masks", "truth"):
            (args.out / name).mkdir(parents=True)
        for i, tile in enumerate(tiles):
            image, labels = read_pair(tile.pair, config.data)
            if (labels == IGNORE).any():
                raise UserError(f"{config.data.root}/{tile.mask}: some pixels have no class; this tool needs masks "
                                "without data.ignore")
            top, left = (length // CUT for length in labels.shape)
            shape = labels.shape[0] - 2 * top, labels.shape[1] - 2 * left
            move, defect = Move(), "none"
            if i % MOVED == 1:
                defect = "rotated" if i % (2 * MOVED) == 1 else "shifted"
                move = random_move(generator(config.seed, 0, i, "move masks"), min(shape), defect == "rotated")
            clean, given = (moved(labels, one, top, left, shape) for one in (Move(), move))
            Image.fromarray(image[top:top + shape[0], left:left + shape[1]]).save(
                args.out / "frames" / f"frame#{tile.key}.png")
            label_image(given, config.data).save(args.out / "masks" / f"mask#{tile.key}.png")
            label_image(clean, config.data).save(args.out / "truth" / f"mask#{tile.key}.png")
            row = dict.fromkeys(COLUMNS, "") | {"key": tile.key, "slide": tile.group, "defect": defect}
            if defect != "none":
                row |= {"dx": move.right, "dy": move.down, "angle": move.clockwise}
            rows.append(row | {"foreground": f"{np.mean(clean > 0):.6f}", "wrong": f"{np.mean(given != clean):.6f}",
                               "visible": f"{np.mean((given > 0) != (clean > 0)):.6f}"})
            progress.advance()
        with (args.out / "truth.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"wrote {args.out}: {len(tiles)} tiles, {sum(row['defect'] != 'none' for row in rows)} with a moved mask")


if __name__ == "__main__":
    run(main)
