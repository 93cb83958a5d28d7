"""Score trained models on the tiles they have not seen, and show where they err (report, section 6).

    python evaluate.py runs/dice_ce
    python evaluate.py runs/dice_ce runs/wce --checkpoint last data.root=data/demo

Whole tiles, mirrored up to the size that the network takes and cropped back. Writes RUN/evaluation/:

    scores.json       soft Dice (equation 9) and pixel accuracy (equation 8) as the mean over tiles; hard Dice and IoU
                      of each class pooled over all pixels, Dice also as the mean over tiles; the confusion matrix
    tiles.csv         the scores of every tile
    predictions.png   image, truth, prediction and errors, from the worst tile to the best
"""

import argparse
import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import figures
import metrics
import runs
from config import Config, apply_overrides, load_config
from console import Progress, UserError, run, table, warn
from dataset import SPLITS, TILE_LIST, Tile, normalise, open_store, read_tiles
from files import replacing_folder, write_text
from hardware import choose_device
from inference import mirrored_logits
from losses import soft_dice

MAY_CHANGE = ("device", "data.root")
PIXELS_AT_ONCE = 1024 * 1024  # a batch of four 512 x 512 tiles

Predict = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """What one model did on n tiles."""

    tiles: list[Tile]
    confusions: np.ndarray  # (n, K, K)
    soft_dice: np.ndarray  # (n,)

    @property
    def dice_by_tile(self) -> np.ndarray:
        """(n,) mean hard Dice over the classes that a tile's truth or prediction has."""
        return metrics.mean_present(metrics.dice(self.confusions))


def score(predict: Predict, store: np.ndarray, rows: Sequence[int], tiles: list[Tile], classes: int,
          device: torch.device) -> Scores:
    """Predict the tiles at `rows` of the store, and count."""
    batch_size = max(1, PIXELS_AT_ONCE // (store.shape[1] * store.shape[2]))
    confusions, soft = [], []
    with Progress("evaluate", len(rows), "tile") as progress:
        for start in range(0, len(rows), batch_size):
            batch = torch.from_numpy(store[rows[start:start + batch_size]]).to(device)       # (B, H, W, 4) uint8
            logits = predict(batch[..., :3])                                                 # (B, K, H, W)
            soft += soft_dice(logits, batch[..., 3].long()).tolist()
            for predicted, target in zip(logits.argmax(1).cpu().numpy(), batch[..., 3].cpu().numpy(), strict=True):
                confusions.append(metrics.confusion(predicted, target, classes))
            progress.advance(len(batch))
    return Scores(tiles, np.array(confusions), np.array(soft))


def predictor(checkpoint: runs.Checkpoint, device: torch.device) -> Predict:
    """The checkpoint's network as a function from images (B, H, W, 3) uint8 to float32 logits (B, K, H, W)."""
    model = runs.build_model(checkpoint.config)
    runs.load_weights(model, checkpoint)
    model = model.to(device, memory_format=torch.channels_last).eval()
    torch.backends.cudnn.allow_tf32 = False  # on by default, and 10 bits of mantissa are not float32

    @torch.no_grad()
    def predict(images: torch.Tensor) -> torch.Tensor:
        return mirrored_logits(model, normalise(images, checkpoint.statistics))

    return predict


def report(scores: Scores, classes: Sequence[str]) -> dict:
    """The contents of scores.json; a score that does not exist is None."""
    pooled = scores.confusions.sum(0)
    by_tile = metrics.dice(scores.confusions)                                                # (n, K)
    constant, constant_dice = metrics.best_constant(pooled)

    def by_class(values: np.ndarray) -> dict:
        return dict(zip([*classes, "mean"], map(_number, [*values, metrics.mean_present(values)]), strict=True))

    return {
        "tiles": len(scores.tiles),
        "groups": len({tile.group for tile in scores.tiles} - {""}),
        "soft_dice": _number(scores.soft_dice.mean()),
        "pixel_accuracy": _number(metrics.pixel_accuracy(scores.confusions).mean()),
        "dice": by_class(metrics.dice(pooled)),
        "iou": by_class(metrics.iou(pooled)),
        "dice_mean_over_tiles": by_class(metrics.mean_present(by_tile, axis=0)),
        "tiles_with_class": dict(zip(classes, (~np.isnan(by_tile)).sum(0).tolist(), strict=True)),
        "best_constant": {"class": classes[constant], "dice_mean": _number(constant_dice)},
        "confusion": pooled.tolist(),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def tile_rows(scores: Scores, classes: Sequence[str]) -> list[dict]:
    """A row for each tile: the rows of evaluation/tiles.csv."""
    dice, iou = metrics.dice(scores.confusions), metrics.iou(scores.confusions)              # (n, K) both
    accuracy = metrics.pixel_accuracy(scores.confusions)
    rows = []
    for i, tile in enumerate(scores.tiles):
        row = {"key": tile.key, "group": tile.group, "soft_dice": scores.soft_dice[i], "pixel_accuracy": accuracy[i],
               "dice_mean": scores.dice_by_tile[i]}
        row |= {f"dice_{name}": value for name, value in zip(classes, dice[i], strict=True)}
        row |= {f"iou_{name}": value for name, value in zip(classes, iou[i], strict=True)}
        rows.append({key: value if isinstance(value, str) else "" if math.isnan(value) else f"{value:.6f}"
                     for key, value in row.items()})
    return rows


def write_evaluation(folder: Path, contents: dict, rows: list[dict], picture: figures.Figure) -> None:
    """Replace the folder whole: an evaluation is never half an old one."""
    with replacing_folder(folder) as partial:
        write_text(partial / "scores.json", json.dumps(contents, indent=2) + "\n")
        with (partial / "tiles.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        figures.save(picture, partial / "predictions.png")


def draw_predictions(predict: Predict, scores: Scores, store: np.ndarray, rows: Sequence[int], classes: Sequence[str],
                     count: int, device: torch.device) -> figures.Figure:
    """The picture of `count` tiles, evenly spaced from the worst mean Dice to the best."""
    order = np.argsort(scores.dice_by_tile)
    panels = []
    for i in order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]:
        tile = store[[rows[i]]]                                                              # (1, H, W, 4) uint8
        predicted = predict(torch.from_numpy(tile[..., :3]).to(device)).argmax(1)[0].cpu().numpy()
        caption = f"{scores.tiles[i].key}\nDice {scores.dice_by_tile[i]:.3f}"
        panels.append((caption, tile[0, ..., :3], tile[0, ..., 3], predicted))
    return figures.predictions(panels, classes)


@dataclass(frozen=True)
class Job:
    """A run that can be evaluated: everything that can be refused has been looked at."""

    folder: Path
    checkpoint: runs.Checkpoint
    config: Config
    tiles: list[Tile]  # those of the store
    store: np.ndarray  # (N, H, W, 4) uint8
    rows: list[int]  # of the store: the test tiles
    predict: Predict
    device: torch.device


def plan(folder: Path, which: str, overrides: Sequence[str]) -> Job:
    """Read and check the checkpoint and the list of tiles of one run."""
    checkpoint = runs.load_checkpoint(folder / "checkpoints" / f"{which}.pt")
    settings = folder / "config.yaml"  # knows where the data lies, should they have moved since the checkpoint
    current = load_config(settings) if settings.exists() else checkpoint.config
    config = apply_overrides(checkpoint.config, [f"data.root={current.data.root}", f"device={current.device}",
                                                 *overrides], allowed=MAY_CHANGE)
    path = Path(config.data.root) / TILE_LIST
    tiles = [tile for tile in read_tiles(path.parent) if tile.split in SPLITS]
    rows = [i for i, tile in enumerate(tiles) if tile.split == "test"]
    if not rows:
        raise UserError(f"{path}: no tile has split = test; run data_filter.py again or mend the list")
    if runs.tiles_sha256(config) != checkpoint.tiles_sha256:
        warn(f"{path} is not the list that {folder} was trained with: some of its test tiles may have been training "
             "tiles")
    device = choose_device(config.device)
    return Job(folder, checkpoint, config, tiles, open_store(path.parent, tiles, config.data.greys), rows,
               predictor(checkpoint, device), device)


def evaluate(job: Job, which: str, pictures: int) -> dict:
    """Evaluate one run, write its evaluation folder, return the contents of scores.json."""
    data, store, rows, device = job.config.data, job.store, job.rows, job.device
    scores = score(job.predict, store, rows, [job.tiles[i] for i in rows], len(data.classes), device)
    contents = {"run": job.folder.resolve().name, "checkpoint": which, "epoch": job.checkpoint.epoch, "split": "test",
                "data_root": data.root, "tiles_sha256": runs.tiles_sha256(job.config), **report(scores, data.classes)}
    picture = draw_predictions(job.predict, scores, store, rows, data.classes, pictures, device)
    write_evaluation(job.folder / "evaluation", contents, tile_rows(scores, data.classes), picture)
    return contents


def comparisons(results: Sequence[dict]) -> list[str]:
    """A table for each test set: scores of different tiles are not compared."""
    by_set: dict[tuple, list[dict]] = {}
    for result in results:
        by_set.setdefault((result["tiles_sha256"], *result["dice"]), []).append(result)
    return [comparison(group) for group in by_set.values()]


def comparison(results: Sequence[dict]) -> str:
    """The main scores of runs on one test set, and of the best constant prediction there, as a table."""
    header = ["run", "epoch", "tiles", "soft Dice", "accuracy", "Dice", *(f"Dice {name}" for name in results[0]["dice"]
                                                                          if name != "mean")]
    rows = []
    for result in results:
        scores = [result["soft_dice"], result["pixel_accuracy"], result["dice"]["mean"],
                  *(score for name, score in result["dice"].items() if name != "mean")]
        rows.append([result["run"], str(result["epoch"]), str(result["tiles"]),
                     *("-" if score is None else f"{score:.3f}" for score in scores)])
    constant = results[0]["best_constant"]
    rows.append([f"all {constant['class']}", "-", str(results[0]["tiles"]), "-", "-", f"{constant['dice_mean']:.3f}",
                 *[""] * (len(header) - 6)])
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, e.g. runs/dice_ce; and overrides, of "
                        f"which only {', '.join(MAY_CHANGE)} may be given")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="(default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=6, metavar="N", help="tiles to draw (default: %(default)s)")
    args = parser.parse_intermixed_args()
    folders = [Path(argument) for argument in args.runs if "=" not in argument or Path(argument).is_dir()]
    overrides = [argument for argument in args.runs if Path(argument) not in folders]
    if not folders:
        raise UserError("no run given: name at least one run folder, e.g. runs/dice_ce")
    if args.pictures < 1:
        raise UserError(f"--pictures must be at least 1; it is {args.pictures}")
    jobs = [plan(folder, args.checkpoint, overrides) for folder in folders]
    tables = comparisons([evaluate(job, args.checkpoint, args.pictures) for job in jobs])
    if len(tables) > 1:
        warn("the runs were tested on different tiles or classes; their scores cannot be compared across tables")
    print("\n\n".join(tables))
    for folder in folders:
        print(f"wrote {folder}/evaluation: scores.json, tiles.csv, predictions.png")


if __name__ == "__main__":
    run(main)
