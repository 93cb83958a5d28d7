"""Score trained models on tiles they have not seen, compare them, and show where they err (report, section 6).

    python evaluate.py runs/dice_ce
    python evaluate.py runs/ce runs/wce runs/dice runs/dice_ce --flips
    python evaluate.py runs/dice_ce --predictions other_tool/labels
    python evaluate.py --predictions other_tool/labels --config configs/dice_ce.yaml
    python evaluate.py runs/dice_ce --images FOLDER

Tiles are mirrored up to the size that the network takes and cropped back, and computed in bfloat16 where the hardware
has it; --precision float32 is the exact mode (docs/performance.md compares). Scores, tables, pictures and a page to
look at (evaluation/report.py lists them) go to RUN/evaluation, those of several runs to runs/comparison-A-B-C. --images
needs no masks: label images, overlays and the areas of the classes go to RUN/predictions-FOLDER.
"""

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.config import load_config
from common.console import Progress, UserError, argument_parser, run
from common.files import names, refuse_loss, replacing_folder
from common.memory import enough_memory, reuse_memory
from common.workers import cores
from evaluation import metrics, page, report, unlabelled
from evaluation.entries import MAY_CHANGE, Entry, Questions, ask, distinct, given, in_file_names, listed, trained
from evaluation.report import Evaluation
from losses import soft_dice

PIXELS_AT_ONCE = 1024 * 1024  # a batch of four 512 x 512 tiles
TOLERANCE = 3.0  # pixels
PICTURES = 5
MOST_PICTURES = 50  # rows of tiles.png
MANY = 1000  # tiles for which compiling a network pays
LESS_MEMORY = "close other programs, give smaller images (--images), or compute on the CPU (--device cpu)"


def tiles_at_once(height: int, width: int) -> int:
    return max(1, PIXELS_AT_ONCE // (height * width))


def score(entry: Entry, questions: Questions, tolerance: float, folder: Path) -> tuple[metrics.Tally, dict[str, Path]]:
    """Let an entry answer every tile, and count; also where its answers lie: those of a model are put into `folder`."""
    data, store = questions.config.data, questions.store
    classes, greys = len(data.classes), np.array(data.greys, np.uint8)
    paths = entry.labels or {tile.key: folder / f"{tile.key}.png" for tile in questions.tiles}
    if entry.predictor:
        folder.mkdir(parents=True)
    batch_size = tiles_at_once(*store.shape[1:3])
    confusions, surfaces, soft, calibration = [], [], [], []
    with (Progress(f"evaluate {entry.name}", len(questions.tiles), "tile") as progress,
          ThreadPoolExecutor(cores()) as pool):
        for start in range(0, len(questions.tiles), batch_size):
            tiles = questions.tiles[start:start + batch_size]
            pixels = store[questions.rows[start:start + batch_size]]                 # (B, H, W, 4)
            batch = torch.from_numpy(pixels).to(entry.device)
            target = batch[..., 3].long()                                            # (B, H, W)
            labels, logits = entry.answer(batch[..., :3], tiles)                     # (B, H, W), (B, K, H, W)
            confusions += metrics.confusion(labels, target, classes).tolist()
            if logits is not None:
                soft += soft_dice(logits, target).tolist()
                calibration += metrics.calibration(logits, target).tolist()
            answers = labels.to(torch.uint8).cpu().numpy()
            surfaces += pool.map(lambda answer, truth: metrics.surfaces(answer, truth, classes, tolerance),
                                 answers, pixels[..., 3])
            if entry.predictor:
                list(pool.map(lambda tile, answer: Image.fromarray(greys[answer]).save(paths[tile.key]),
                              tiles, answers))
            progress.advance(len(tiles))
    return metrics.Tally(np.array(confusions), np.array(surfaces), np.array(soft) if soft else None,
                         np.array(calibration) if calibration else None), paths


def evaluate(entries: Sequence[Entry], questions: Questions, out: Path, tolerance: float = TOLERANCE,
             keys: Sequence[str] = (), pictures: int = PICTURES) -> dict:
    """Score every entry, replace the folder `out`, return the contents of scores.json."""
    report.refuse_unknown_keys(questions, keys)
    with replacing_folder(out, sources_of(entries)) as partial:
        many = len(questions.tiles) >= MANY
        scored = [score(entry.for_many() if many else entry, questions, tolerance,
                        partial / "predictions" / in_file_names(entry.name)) for entry in entries]
        evaluation = Evaluation(questions, list(entries), [tally for tally, _ in scored],
                                [paths for _, paths in scored], tolerance)
        contents = report.write(partial, evaluation, keys, pictures)
        page.write(partial, evaluation, contents)
    return contents


def sources_of(entries: Sequence[Entry]) -> list[Path]:
    """What an evaluation is made of: results of the same may be replaced by it."""
    return [*(entry.source for entry in entries), Path(entries[0].config.data.root)]


def destination(entries: Sequence[Entry], args: argparse.Namespace) -> Path:
    """The folder named after what is evaluated and how."""
    kind = ["" if args.split == "test" else args.split, "flips" if args.flips else "",
            "" if args.precision == "auto" else args.precision,
            "" if args.tolerance == TOLERANCE else f"tolerance-{args.tolerance:g}"]
    first, named = entries[0], [in_file_names(entry.name.rpartition("/")[2]) for entry in entries]
    if len(entries) > 1:
        folder = first.beside / f"comparison-{'-'.join(named)}"[:120]
    elif first.predictor:
        images = args.images and in_file_names(args.images.resolve().name)
        folder = first.run / (f"predictions-{images}" if images else "evaluation")
        kind.insert(0, "" if first.is_best else first.source.stem)
    else:
        folder = first.beside / f"{named[0]}-evaluation"
    return folder.with_name("-".join(filter(None, [folder.name, *kind])))


def plan(args: argparse.Namespace, folders: Sequence[str], overrides: Sequence[str]) -> list[Entry]:
    """Every run and folder of predictions, read and checked."""
    if args.config and (folders or not args.predictions):
        raise UserError("--config goes with --predictions and without runs: a run knows its config")
    if args.predictions and not folders and not args.config:
        raise UserError("--predictions without a run needs --config: it says where the tiles lie and what greys mean")
    if not folders and not args.predictions:
        raise UserError("no run given: name at least one run folder, e.g. runs/dice_ce"
                        + (", before --tiles: what follows it are keys" if args.tiles else ""))
    if args.images and (len(folders) != 1 or args.predictions or args.tiles or args.split != "test"
                        or (args.tolerance, args.pictures) != (TOLERANCE, PICTURES)):
        raise UserError("--images takes one run, and none of --predictions, --tiles, --split, --pictures, --tolerance: "
                        "python evaluate.py RUN --images FOLDER")
    if not folders and (args.flips or args.checkpoint != "best" or args.precision != "auto"):
        raise UserError("--flips and --checkpoint go with a run, and so does --precision: label images of another tool "
                        "are scored as they are")
    if len(folders) > 1 and args.checkpoint not in ("best", "last"):
        raise UserError("--checkpoint PATH goes with one run; for several name the files in the place of the runs")
    files = [folder for folder in folders if Path(folder).suffix == ".pt"]
    if files and args.checkpoint != "best":
        raise UserError(f"--checkpoint {args.checkpoint} goes with run folders, and {files[0]} is a checkpoint already")
    entries = [trained(Path(folder), args.checkpoint, overrides, args.flips, args.precision) for folder in folders]
    if args.predictions:
        config = entries[0].config if entries else load_config(args.config, overrides)
        tiles, rows = listed(config, args.split)
        entries += [given(pattern, config, [tiles[i] for i in rows]) for pattern in args.predictions]
    return distinct(entries)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders or checkpoint files, e.g. runs/dice_ce, "
                        f"and overrides (with a run only of {' and '.join(MAY_CHANGE)})")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|PATH", help="(default: %(default)s)")
    parser.add_argument("--split", choices=("test", "train", "all"), default="test", help="(default: %(default)s)")
    parser.add_argument("--flips", action="store_true", help="average over the 8 flips and turns (8 times the time)")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto is bf16 where "
                        "the hardware has it (default: %(default)s)")
    parser.add_argument("--predictions", action="append", default=[], metavar="FOLDER",
                        help="score label images of another tool, or a pattern with {key} in it; may be given again")
    parser.add_argument("--config", metavar="YAML", help="where the tiles lie, for --predictions without a run")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="predict images that have no masks")
    parser.add_argument("--tiles", nargs="+", default=[], metavar="KEY", help="the tiles of tiles.png")
    parser.add_argument("--pictures", type=int, default=PICTURES, metavar="N", help="without --tiles: so many, from "
                        "the worst to the best, and of several runs the three on which they differ most "
                        "(default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="PX", help="of the surface Dice "
                        "(default: %(default)g)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: RUN/evaluation, "
                        "RUN/predictions-FOLDER, or for several runs comparison-A-B-C beside the first)")
    parser.add_argument("--device", help="auto, cuda, cuda:N, mps or cpu (default: the run's)")
    args = parser.parse_intermixed_args()
    reuse_memory()
    folders = [argument for argument in args.runs if "=" not in argument or Path(argument).exists()]
    overrides = [argument for argument in args.runs if argument not in folders]
    if args.device:
        overrides.append(f"device={args.device}")
    if not 1 <= max(args.pictures, len(args.tiles)) <= MOST_PICTURES or args.pictures < 1:
        raise UserError(f"--pictures and --tiles draw 1 to {MOST_PICTURES} tiles; report.html shows all of them")
    if not 0 <= args.tolerance < math.inf:
        raise UserError(f"--tolerance must be a number of pixels, 0 or more; it is {args.tolerance:g}")
    entries = plan(args, folders, overrides)
    out = args.out or destination(entries, args)
    sources = [entries[0].source, args.images] if args.images else sources_of(entries)
    reads = [*sources, *(path for entry in entries for path in (entry.labels or {}).values()),
             Path(entries[0].config.data.root), *map(Path, filter(None, [args.config]))]
    refuse_loss(out, reads, None if args.out else sources)
    with enough_memory(LESS_MEMORY):
        if args.images:
            images = unlabelled.find_images(args.images)
            rows = unlabelled.predict_folder(entries[0], images, out, sources)
            print(unlabelled.summary(rows, entries[0].config.data.classes))
        else:
            contents = evaluate(entries, ask(entries, args.split), out, args.tolerance, args.tiles, args.pictures)
            print(report.summary(contents))
    print(f"wrote {out}: {names(out)}")


if __name__ == "__main__":
    run(main)
