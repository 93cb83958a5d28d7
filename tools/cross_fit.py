"""Train k models, each without one part of the slides or patients, so that each tile finds one that does not know it.

    python -m tools.cross_fit --config configs/demo.yaml
    python -m tools.cross_fit --config configs/dice_ce.yaml --parts 3 data.root=data/mine train.epochs=40

The survivor of k-fold-per-epoch training has learned from nearly all tiles, so it cannot judge their masks. These
models can: `python data_filter.py --config ... --model runs/NAME.part*` asks each only about tiles it does not know.
Part j is the run runs/NAME.partj of train.py with train.leave_out=j/k. A part that was interrupted goes on, one that is
complete is left alone. On several machines or GPUs, train the parts by train.py with that setting, one each.
"""

import subprocess
import sys
from pathlib import Path

from common.config import Config
from common.config_files import apply_overrides, load_config
from common.console import Progress, UserError, argument_parser, command, run, warn
from dataset import TILE_LIST, identity, read_tiles
from train import reason_to_end, reject_another
from training.checkpoints import Checkpoint, load_checkpoint

TRAIN = Path(__file__).parent.parent / "train.py"


def part_config(config: Config, part: int, parts: int) -> Config:
    return apply_overrides(config, [f"name={config.name}.part{part}", f"train.leave_out={part}/{parts}"])


def finished(config: Config, folder: Path) -> Checkpoint | None:
    """Return the last checkpoint of a run that is complete."""
    path = folder / "checkpoints" / "last.pt"
    checkpoint = load_checkpoint(path) if path.is_file() else None
    return checkpoint if checkpoint and reason_to_end(checkpoint.history, config) else None


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="the experiment, e.g. configs/demo.yaml")
    parser.add_argument("--parts", type=int, default=3, metavar="K", help="models to train (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    if args.parts < 2:
        raise UserError(f"--parts must be at least 2; it is {args.parts}")
    config = load_config(args.config, args.overrides)
    if config.train.leave_out:
        raise UserError("train.leave_out is what this tool sets; leave it out")
    todays_tiles = identity(read_tiles(config.data), config.data)
    with Progress("train parts", args.parts, "part") as progress:
        for part in range(1, args.parts + 1):
            own = part_config(config, part, args.parts)
            folder = Path("runs") / own.name
            reject_another(own, folder)
            checkpoint = finished(own, folder)
            if checkpoint:
                print(f"{folder}: complete", flush=True)
                if checkpoint.tiles_identity != todays_tiles:
                    warn(f"{folder} was trained with other tiles or masks than {TILE_LIST} names now. To train it "
                         "anew, remove the folder")
            else:
                settings = [f"name={own.name}", f"train.leave_out={own.train.leave_out}"]
                arguments = (["--resume", str(folder)] if folder.exists() else
                             ["--config", args.config, *args.overrides, *settings])
                print(f"\npart {part} of {args.parts}: {folder}", flush=True)
                code = subprocess.run([sys.executable, str(TRAIN), *arguments]).returncode
                if code:
                    raise UserError(f"part {part} was not trained, see above; the same command goes on from there")
            progress.advance()
    runs = [str(Path("runs") / part_config(config, part, args.parts).name) for part in range(1, args.parts + 1)]
    settings = args.overrides if config.filter.makes_masks else [*args.overrides, "filter.repair=true"]
    print("\nnext:  " + command("python", "data_filter.py", "--config", args.config, *settings, "--model", *runs))


if __name__ == "__main__":
    run(main)
