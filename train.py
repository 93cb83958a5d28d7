"""Train a U-Net by k-fold-per-epoch cross validation (report, section 5).

    python train.py --config configs/dice_ce.yaml
    python train.py --config configs/dice_ce.yaml name=lr3 optim.lr=1e-3 data.root=data/demo
    python train.py --resume runs/dice_ce

One epoch: deal the tiles into k folds and draw train.images_per_epoch / k of each. From the same start, train k
models, each on k - 1 folds, and validate each on its own. The one with the lowest validation loss survives: its weights
and Adam state start the next epoch. Its losses' moving averages drive the learning rate. A resumed run equals an
uninterrupted one bit for bit (same machine, same number of threads), for all randomness is a function of seed, epoch,
fold and a tile's place in the fold.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common import figures
from common.config import Config, apply_overrides, load_config
from common.console import Progress, UserError, argument_parser, command, run, warn
from common.devices import (
    autocast,
    choose_device,
    choose_precision,
    compile_by_shape,
    memory_format,
    peak_memory_mb,
)
from common.files import WriteError
from common.memory import enough_memory, reuse_memory
from dataset import (
    SPLITS,
    TILE_LIST,
    Crops,
    Statistics,
    Tile,
    draw_folds,
    group_of,
    groups_are_missing,
    identity,
    measure,
    normalise,
    open_store,
    picture_size,
    read_tiles,
    store_on,
    torch_seed,
    training_crops,
    validation_crops,
)
from losses import make_loss
from training import runs
from training.snapshots import Snapshot, copy_state, snapshot_of
from unet import UNet

RESUME_MAY_CHANGE = ("device", "data.root", "train.epochs", "train.early_stop")
SECONDS_BETWEEN_FIGURES = 60
LESS_MEMORY = ("start a new run with a smaller train.batch_size (half of it needs half the memory), a smaller "
               "data.crop (half of it needs a quarter) or smaller model.widths")


@dataclass(frozen=True)
class TrainingSet:
    """The packed tiles, which of them train, and what is known of those."""

    store: np.ndarray | Tensor  # (N, H, W, 4) uint8: mapped into memory, or on the GPU
    rows: np.ndarray  # (training tiles,) rows of the store
    groups: list[str]  # one for each of `rows`
    statistics: Statistics
    tiles: str  # the identity of the list that was read


@dataclass(frozen=True)
class Learner:
    """What training changes, and how it computes."""

    model: UNet
    optimizer: torch.optim.Optimizer
    scheduler: ReduceLROnPlateau
    loss: Callable[[Tensor, Tensor], Tensor]  # of the network's answer to images (B, 3, H, W), given targets (B, H, W)
    device: torch.device
    precision: torch.dtype

    @property
    def state(self) -> Snapshot:
        """Weights and Adam state: the tensors themselves, which training changes."""
        return self.model.state_dict(), self.optimizer.state_dict()

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """A copy of weights and Adam state, in the place of an earlier one where there is one."""
        return snapshot_of(self.state, into)

    def restore(self, snapshot: Snapshot) -> None:
        copy_state(snapshot, self.state)


def prepare_data(config: Config) -> TrainingSet:
    """Read the cleaned list, pack its tiles where needed, measure the training split."""
    root = Path(config.data.root)
    tiles = [tile for tile in read_tiles(root) if tile.split in SPLITS]
    for split in SPLITS:
        if all(tile.split != split for tile in tiles):
            raise UserError(f"{root / TILE_LIST}: no tile has split = {split}; run data_filter.py again or fix it")
    rows = np.array([i for i, tile in enumerate(tiles) if tile.split == "train"])
    groups = [tiles[i].group for i in rows]
    warn_of_groups(config, tiles)
    warn_of_repeats(draw_folds(groups, config.train.folds, config.train.images_per_epoch, config.seed, epoch=1))
    height, width = picture_size(root / tiles[0].image)
    if config.data.crop > min(height, width):
        multiple = config.model.multiple
        raise UserError(f"data.crop ({config.data.crop}) does not fit the tiles of {root}, {height} x {width} pixels: "
                        f"set data.crop={min(height, width) // multiple * multiple} or a smaller multiple of "
                        f"{multiple}")
    store = open_store(root, tiles, config.data.greys)
    return TrainingSet(store_on(choose_device(config.device), store.pixels), rows, groups, measure(store.sums[rows]),
                       identity(tiles))


def warn_of_repeats(folds: list[np.ndarray]) -> None:
    """Say where a fold has so few tiles of its own that it repeats them more than twice on average."""
    scarce = min(folds, key=lambda fold: len(np.unique(fold)))
    tiles = len(np.unique(scarce))
    if len(scarce) > 2 * tiles:
        warn(f"a fold of the first epoch has {tiles} tiles for the {len(scarce)} images it needs, so each is drawn "
             f"{len(scarce) / tiles:.1f} times an epoch (with other crops): tiles of small slides or patients count "
             "for more than others. A smaller train.images_per_epoch, fewer train.folds or more tiles help")


def warn_of_groups(config: Config, tiles: list[Tile]) -> None:
    """The groups are those of tiles.csv; say so where data.group asks for others, or where there are none."""
    path = Path(config.data.root) / TILE_LIST
    try:
        agree = all(group_of(tile.key, config.data.group) in ("", tile.group) for tile in tiles)
    except UserError:  # the pattern finds no group in a key: made for other tiles
        agree = False
    if groups_are_missing(tiles):
        warn(f"{path} has no group of two tiles, so tiles of one slide or patient may be in train, test and several "
             "folds; run data_filter.py with a data.group that finds the slide in the key")
    elif not agree:
        warn(f"data.group '{config.data.group}' finds other groups than {path} holds; the list counts. Run "
             "data_filter.py again to change it")


def build_learner(config: Config, statistics: Statistics) -> Learner:
    """The network with its first weights, Adam, scheduler and loss of a config."""
    device = choose_device(config.device)
    torch.manual_seed(torch_seed(config.seed, 0, 0, "weights"))
    model = runs.build_model(config).to(device, memory_format=memory_format(device))
    optim = config.optim
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=fused)
    for weight in model.parameters():  # what its first step would make; from the start, so that there is all to copy
        optimizer.state[weight] = {"step": torch.zeros((), device=device if fused else None),
                                   "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    # a relative threshold takes the worsening of a negative loss for progress, and the Dice losses are negative
    scheduler = ReduceLROnPlateau(optimizer, factor=optim.factor, patience=optim.patience, min_lr=optim.min_lr,
                                  threshold_mode="abs")
    try:
        loss = make_loss(config.loss.name, torch.tensor(statistics.frequencies, device=device))
    except ValueError as error:
        raise UserError(f"loss.name=wce: {error} (classes {', '.join(config.data.classes)})") from None
    precision = choose_precision(config.train.precision, device)

    def loss_of_answer(images: Tensor, target: Tensor) -> Tensor:
        with autocast(device, precision):
            logits = model(images)                                                   # (B, K, H, W)
        return loss(logits, target)

    if config.train.compile:
        mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs: one launch for all of a pass
        loss_of_answer = compile_by_shape(loss_of_answer, mode=mode)
    return Learner(model, optimizer, scheduler, loss_of_answer, device, precision)


def pass_over(learner: Learner, data: TrainingSet, crops: Crops, batch_size: int, training: bool,
              progress: Progress) -> float:
    """One pass over `crops`, with weight updates if `training`; the mean loss over its images."""
    learner.model.train(training)
    total, seen = torch.zeros((), device=learner.device), 0
    shown = torch.zeros((), pin_memory=learner.device.type == "cuda")  # the mean so far, read without waiting for a GPU
    with torch.set_grad_enabled(training):
        for batch in crops.batches_on(learner.device, data.store, batch_size):       # (B, size, size, 4) uint8
            images = normalise(batch[..., :3], data.statistics)                      # (B, 3, size, size)
            loss = learner.loss(images, batch[..., 3].long())
            if training:
                loss.backward()
                learner.optimizer.step()
                learner.optimizer.zero_grad()
            total += loss.detach() * len(batch)
            seen += len(batch)
            shown.copy_(total / seen, non_blocking=True)
            progress.advance(len(batch), note=f"loss {shown:.4f}")
    return total.item() / seen


def run_epoch(learner: Learner, data: TrainingSet, config: Config, epoch: int) -> dict:
    """Train and validate the k models of an epoch; keep the survivor, return its and all folds' losses."""
    plan, keys = config.train, (data.store.shape[1:3], config.data.crop, config.seed, epoch)
    folds = [data.rows[fold] for fold in
             draw_folds(data.groups, plan.folds, plan.images_per_epoch, config.seed, epoch)]
    start, best, survivor, kept, val_losses = learner.snapshot(), math.inf, None, None, []
    with Progress("", plan.folds * plan.images_per_epoch, "image") as progress:
        for fold in range(plan.folds):
            progress.title = f"epoch {epoch}/{plan.epochs} fold {fold + 1}/{plan.folds}"
            learner.restore(start)
            torch.manual_seed(torch_seed(config.seed, epoch, fold, "dropout"))
            train_loss = pass_over(learner, data, training_crops(folds, fold, *keys), plan.batch_size, True, progress)
            val_loss = pass_over(learner, data, validation_crops(folds, fold, *keys), plan.batch_size, False, progress)
            val_losses.append(val_loss)
            if val_loss < best:  # false for NaN, which argmin would keep
                best = val_loss
                survivor = {"survivor": fold, "train_loss": train_loss, "val_loss": val_loss}
                kept = learner.snapshot(into=kept)
    if survivor is None:
        raise UserError(f"epoch {epoch}: no fold has a finite validation loss ({val_losses}); what earlier epochs "
                        "wrote is kept. Start a new run with a lower optim.lr, or with train.precision=float32")
    learner.restore(kept)
    return survivor | {f"val_loss_{fold}": loss for fold, loss in enumerate(val_losses)}


def moving_average(previous: float | None, value: float, alpha: float) -> float:
    """Equation 1."""
    return value if previous is None else (1 - alpha) * value + alpha * previous


def ending(history: list[dict], config: Config) -> str:
    """Why training is over, or "" while it is not."""
    if len(history) >= config.train.epochs:
        return f"all {config.train.epochs} epochs (train.epochs) are done"
    best = min(history, key=lambda row: row["val_loss"], default={"epoch": 0})
    if len(history) - best["epoch"] >= config.train.early_stop:
        return f"stopped early: no lower validation loss for {config.train.early_stop} epochs (train.early_stop)"
    return ""


def next_row(learner: Learner, data: TrainingSet, config: Config, history: list[dict]) -> dict:
    """Run the next epoch and step the scheduler; a row of metrics.csv."""
    started, epoch, lr = time.monotonic(), len(history) + 1, learner.optimizer.param_groups[0]["lr"]
    row = {"epoch": epoch, **run_epoch(learner, data, config, epoch)}
    for name in ("train", "val"):
        previous = history[-1][f"{name}_ema"] if history else None
        row[f"{name}_ema"] = moving_average(previous, row[f"{name}_loss"], config.optim.ema)
    learner.scheduler.step(row["train_ema"])
    seconds = time.monotonic() - started
    return row | {"lr": lr, "seconds": round(seconds, 3),
                  "images_per_second": round(config.train.folds * config.train.images_per_epoch / seconds, 1),
                  "peak_memory_mb": round(peak_memory_mb(learner.device))}


def train(learner: Learner, data: TrainingSet, config: Config, folder: Path, history: list[dict]) -> None:
    """Run epochs until one of the endings; after each, everything that `--resume` needs is on disk."""
    drawn = time.monotonic()
    if history:
        runs.write_metrics(folder / "metrics.csv", history)  # a kill may have come before its last row
    if config.train.compile and not ending(history, config):
        print("train.compile: the first steps are slow, for the network is compiled", flush=True)
    while not ending(history, config):
        row = next_row(learner, data, config, history)
        is_best = row["val_loss"] < min((before["val_loss"] for before in history), default=math.inf)
        history.append(row)
        # best.pt comes first: a run killed between the two repeats the epoch and writes the same again
        for name in ("best", "last") if is_best else ("last",):
            runs.save_checkpoint(folder / "checkpoints" / f"{name}.pt", config=config, statistics=data.statistics,
                                 history=history, tiles=data.tiles, model=learner.model.state_dict(),
                                 optimizer=learner.optimizer.state_dict(), scheduler=learner.scheduler.state_dict())
        runs.write_metrics(folder / "metrics.csv", history)
        if time.monotonic() - drawn > SECONDS_BETWEEN_FIGURES:
            figures.save(figures.losses(history, config.train.folds, config.name), folder / "figures" / "losses.png")
            drawn = time.monotonic()
        print(f"epoch {row['epoch']}/{config.train.epochs}  train {row['train_loss']:.4f} (EMA {row['train_ema']:.4f})"
              f"  validation {row['val_loss']:.4f} (EMA {row['val_ema']:.4f})  survivor {row['survivor']}"
              f"  lr {row['lr']:.1e}  {row['seconds']:.1f} s{'  best' if is_best else ''}", flush=True)
    figures.save(figures.losses(history, config.train.folds, config.name), folder / "figures" / "losses.png")
    print(f"\n{ending(history, config)}\nwrote {folder}/checkpoints/best.pt, metrics.csv and figures/losses.png\n"
          f"next:  {command('python', 'evaluate.py', str(folder))}")


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """On Ctrl-C say how to go on; a run that fails before its first checkpoint leaves no folder behind."""
    go_on = command("python", "train.py", "--resume", str(folder))
    try:
        with enough_memory(LESS_MEMORY):
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with: {go_on}") from None
    except UserError as error:
        cleared = runs.clear_if_empty(folder)
        if isinstance(error, WriteError) and not cleared:
            raise UserError(f"{error}; then go on with: {go_on}") from error
        raise
    except torch._dynamo.exc.TorchDynamoException as error:
        runs.clear_if_empty(folder)
        raise UserError(f"train.compile: the network cannot be compiled here ({str(error).strip().splitlines()[0]}). "
                        "It needs a C++ compiler, or on a GPU Triton; set train.compile=false") from None


def start(config: Config) -> None:
    """Begin a run in a folder of its own; nothing is written there before its data is known to be good."""
    folder = runs.run_folder(config)
    runs.refuse_existing(folder)
    data = prepare_data(config)
    learner = build_learner(config, data.statistics)
    runs.create_run(folder, config)
    with runs.holding(folder), resumable(folder):
        runs.record_start(folder, config, learner.device, learner.precision)
        train(learner, data, config, folder, [])


def restore(learner: Learner, checkpoint: runs.Checkpoint) -> None:
    """Put the checkpoint's state into a new learner; how Adam computes belongs to the device, not to the state."""
    runs.load_weights(learner.model, checkpoint)
    groups = [saved | {"fused": here["fused"]} for saved, here in
              zip(checkpoint.optimizer["param_groups"], learner.optimizer.param_groups, strict=True)]
    learner.optimizer.load_state_dict(checkpoint.optimizer | {"param_groups": groups})
    learner.scheduler.load_state_dict(checkpoint.scheduler)


def resume(folder: Path, overrides: list[str]) -> None:
    """Go on after the last finished epoch, as if there had been no break."""
    with runs.holding(folder):
        path = folder / "checkpoints" / "last.pt"
        checkpoint = runs.load_checkpoint(path) if path.exists() else None
        config = apply_overrides(load_config(folder / "config.yaml"), overrides, allowed=RESUME_MAY_CHANGE)
        if checkpoint:
            runs.refuse_other(config, checkpoint, RESUME_MAY_CHANGE)
            if config.train.epochs < checkpoint.epoch:
                raise UserError(f"train.epochs={config.train.epochs} is less than the {checkpoint.epoch} epochs that "
                                f"{path} has done; a run can be made longer, not shorter")
        data = prepare_data(config)
        learner = build_learner(config, data.statistics)
        if checkpoint:
            if not (data.tiles == checkpoint.tiles and data.statistics.equals(checkpoint.statistics)):
                raise UserError(f"{config.data.root}: the tiles that are kept, their groups or their split changed "
                                "since this run began, so it cannot be continued; restore them, or start a new run "
                                "with name=NAME")
            restore(learner, checkpoint)
        runs.record_start(folder, config, learner.device, learner.precision)
        with resumable(folder):
            train(learner, data, config, folder, checkpoint.history if checkpoint else [])


def main() -> None:
    parser = argument_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="start a run of this experiment, e.g. configs/dice_ce.yaml")
    source.add_argument("--resume", metavar="RUN", type=Path, help="continue this run, e.g. runs/dice_ce")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    reuse_memory()
    with enough_memory(LESS_MEMORY):
        if args.resume:
            resume(args.resume, args.overrides)
        else:
            start(load_config(args.config, args.overrides))


if __name__ == "__main__":
    run(main)
