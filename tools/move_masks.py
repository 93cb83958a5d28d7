"""Copy tiles and move some of their masks by known shifts and rotations, to see what the filter makes of them.

    python -m tools.move_masks --config configs/ebhi.yaml data/ebhi_moved
    python data_filter.py --config configs/ebhi.yaml data.root=data/ebhi_moved filter.max_shift=15 filter.repair=true
    python -m tools.filter_accuracy data/ebhi_moved

The given masks count as clean. The outer sixth of each side is cut off, so that a mask can be moved without an empty
part. Every fourth mask is moved, one half by a shift of 8 to 16 % of the shorter side, the other half by a rotation of
8 to 25 degrees, or less if a tile is far from square. OUT has the layout of tools.make_demo_data, with truth/ and
truth.csv, and a folder for each {group} of data.images.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from common.config_files import load_config
from common.console import Progress, UserError, argument_parser, command, run
from common.files import new_folder, write_csv
from common.masks import IGNORE, label_image
from common.randomness import generator
from common.store import read_pair
from dataset import find_pairs
from filtering.registration import Move
from tools.make_demo_data import COLUMNS

CUT = 6  # the part of a side that is cut off at each end is 1 / CUT
MOVED = 4  # every so many tiles


def random_move(random: np.random.Generator, shape: tuple[int, int], margin: tuple[int, int], turn: bool) -> Move:
    """Return a shift, or a rotation after which a tile (h, w) still shows only what lies in its margin."""
    if turn:
        most = largest_angle(shape, margin)
        return Move(clockwise=round(float(random.uniform(min(8, most / 2), most) * random.choice([-1, 1])), 1) + 0.0)
    angle, length = random.uniform(0, 2 * np.pi), random.uniform(0.08, 0.16) * min(shape)
    return Move(round(float(length * np.cos(angle))), round(float(length * np.sin(angle))))


def largest_angle(shape: tuple[int, int], margin: tuple[int, int]) -> float:
    """Return the largest rotation, at most 25 degrees, that turns no corner of a tile (h, w) out of its margin."""
    half = (np.array(shape) - 1) / 2
    angles = np.radians(np.arange(0, 25.1, 0.1))
    reach = np.abs(half[:, None] * np.cos(angles)) + half[::-1, None] * np.sin(angles)  # (2, n), of the corners
    return float(np.degrees(angles[(reach <= (half + margin)[:, None]).all(0)].max()))


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
    data, (tiles, rows) = config.data, (find_pairs(config.data), [])
    by_group = "{group}" in data.images
    with new_folder(args.out) as folder, Progress("move masks", len(tiles), "tile") as progress:
        (folder / "truth").mkdir()
        for i, tile in enumerate(tiles):
            image, labels = read_pair(tile.given_pair, data)
            if (labels == IGNORE).any():
                raise UserError(f"{data.root}/{tile.mask}: some pixels have no class; this tool needs masks without "
                                "data.ignore")
            margin = top, left = labels.shape[0] // CUT, labels.shape[1] // CUT
            shape = labels.shape[0] - 2 * top, labels.shape[1] - 2 * left
            move, defect = Move(), "none"
            if i % MOVED == 1:
                defect = "rotated" if i % (2 * MOVED) == 1 else "shifted"
                move = random_move(generator(config.seed, 0, i, "move masks"), shape, margin, defect == "rotated")
            clean, given = (moved(labels, one, top, left, shape) for one in (Move(), move))
            if (given == clean).all():  # of one class, or a few pixels large
                defect = "none"
            group, name = (tile.group, tile.key.removeprefix(f"{tile.group}-")) if by_group else ("", tile.key)
            for kind, picture in (("frame", Image.fromarray(image[top:top + shape[0], left:left + shape[1]])),
                                  ("mask", label_image(given, data))):
                path = folder / f"{kind}s" / group / f"{kind}#{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            label_image(clean, data).save(folder / "truth" / f"mask#{tile.key}.png")
            row = dict.fromkeys(COLUMNS, "") | {"key": tile.key, "slide": tile.group, "defect": defect}
            if defect != "none":
                row |= {"dx": move.right, "dy": move.down, "angle": move.clockwise}
            rows.append(row | {"foreground": f"{np.mean(clean > 0):.6f}", "wrong": f"{np.mean(given != clean):.6f}",
                               "visible": f"{np.mean((given > 0) != (clean > 0)):.6f}"})
            progress.advance()
        write_csv(folder / "truth.csv", rows, COLUMNS)
    layout = {"root": str(args.out)} | {kind: f"{part}s/{'{group}/' * by_group}{part}#{{key}}.png"
                                        for kind, part in (("images", "frame"), ("masks", "mask"))}
    of_file = load_config(args.config).data
    settings = [f"data.{name}={value}" for name, value in layout.items() if getattr(of_file, name) != value]
    others = [one for one in args.overrides if one.partition("=")[0] not in {f"data.{name}" for name in layout}]
    print(f"wrote {args.out}: {len(tiles)} tiles, {sum(row['defect'] != 'none' for row in rows)} with a moved mask\n"
          f"next:  {command('python', 'data_filter.py', '--config', args.config, *others, *settings)}")


if __name__ == "__main__":
    run(main)
