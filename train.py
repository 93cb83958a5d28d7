"""Train a U-Net by k-fold-per-epoch cross validation (report, section 5).

    python train.py --config configs/dice_ce.yaml
    python train.py --config configs/dice_ce.yaml name=lr3 optim.lr=1e-3 data.root=data/demo
    python train.py --resume runs/dice_ce

One epoch: deal the slides into k folds and draw train.images_per_epoch / k from each. From the same start, train k
models, each on k - 1 folds, and validate each on its remaining fold. The model with the lowest validation loss
survives: its weights and Adam state start the next epoch. The moving average of its training loss drives the learning
rate. A resumed run equals an uninterrupted one bit for bit (same machine, same number of threads), because randomness
depends only on seed, epoch, fold and purpose. train.scheme=plain trains one model, which a fixed fold validates.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common import palette
from common.config import Config
from common.config_files import apply_overrides, load_config
from common.console import UserError, argument_parser, command, run
from common.devices import peak_memory_mb
from common.files import WriteError, write_csv
from common.memory import enough_memory, reuse_memory
from training import checkpoints, figures, run_folder
from training.epochs import moving_average, run_epoch
from training.learner import Learner, build_learner
from training.training_set import TrainingSet, prepare_data

RESUME_MAY_CHANGE = ("device", "data.root", "data.cache", "train.epochs", "train.early_stop")
SECONDS_BETWEEN_FIGURES = 60
LESS_MEMORY = ("start a new run with a smaller train.batch_size (half of it needs half the memory), a smaller "
               "data.crop (half of it needs a quarter) or smaller model.widths")


def start(config: Config) -> None:
    """Start a run in a new folder, which is created only after the data and the settings were checked."""
    folder = Path("runs") / config.name
    run_folder.reject_existing(folder)
    data = prepare_data(config)
    learner = build_learner(config, data.statistics)
    run_folder.create_run(folder, config, data.tiles)
    with run_folder.locked_run(folder), explained_errors(folder):
        run_folder.record_start(folder, config, learner.device, learner.precision)
        train(learner, data, config, folder, [])


def resume(folder: Path, overrides: list[str]) -> None:
    """Continue a run after its last finished epoch, as if it had not been interrupted."""
    with run_folder.locked_run(folder):
        path = folder / "checkpoints" / "last.pt"
        checkpoint = checkpoints.load_checkpoint(path) if path.exists() else None
        config = apply_overrides(load_config(folder / "config.yaml"), overrides, allowed=RESUME_MAY_CHANGE)
        if checkpoint:
            checkpoints.reject_other_settings(config, checkpoint, RESUME_MAY_CHANGE)
            if config.train.epochs < checkpoint.epoch:
                raise UserError(f"train.epochs={config.train.epochs} is less than the {checkpoint.epoch} epochs that "
                                f"{path} has done; a run can be made longer, not shorter")
        data = prepare_data(config)
        learner = build_learner(config, data.statistics)
        if checkpoint:
            if not (data.tiles_identity == checkpoint.tiles_identity
                    and data.statistics.equals(checkpoint.statistics)):
                raise UserError(f"{config.data.root}: the kept tiles, their groups or their split changed since this "
                                "run began, so it cannot be continued; restore them, or start a new run with name=NAME")
            learner.restore_checkpoint(checkpoint)
        run_folder.record_start(folder, config, learner.device, learner.precision)
        with explained_errors(folder):
            train(learner, data, config, folder, checkpoint.history if checkpoint else [])


def train(learner: Learner, data: TrainingSet, config: Config, folder: Path, history: list[dict]) -> None:
    """Run epochs until training ends. After each epoch, everything that `--resume` needs is on disk."""
    if history:
        write_csv(folder / "metrics.csv", history)  # its last row is missing if the run was killed before writing it
    if config.train.compile and not reason_to_end(history, config):
        print("train.compile: the first steps are slow, because the network is compiled", flush=True)
    drawn = time.monotonic()
    while not reason_to_end(history, config):
        row = run_next_epoch(learner, data, config, history)
        is_best = row["val_loss"] < min((earlier["val_loss"] for earlier in history), default=math.inf)
        history.append(row)
        # best.pt comes first: a run that is killed between the two repeats the epoch and writes the same best.pt again
        for name in ("best", "last") if is_best else ("last",):
            checkpoints.save_checkpoint(
                folder / "checkpoints" / f"{name}.pt", config=config, statistics=data.statistics, history=history,
                tiles_identity=data.tiles_identity, model=learner.model.state_dict(),
                optimizer=learner.optimizer.state_dict(), scheduler=learner.scheduler.state_dict())
        write_csv(folder / "metrics.csv", history)
        if time.monotonic() - drawn > SECONDS_BETWEEN_FIGURES:
            palette.save(figures.losses(history, config.train.models, config.name), folder / "figures" / "losses.png")
            drawn = time.monotonic()
        survivor = f"  survivor {row['survivor']}" if config.train.models > 1 else ""
        print(f"epoch {row['epoch']}/{config.train.epochs}  train {row['train_loss']:.4f} (EMA {row['train_ema']:.4f})"
              f"  validation {row['val_loss']:.4f} (EMA {row['val_ema']:.4f}){survivor}"
              f"  lr {row['lr']:.1e}  {row['seconds']:.1f} s{'  best' if is_best else ''}", flush=True)
    palette.save(figures.losses(history, config.train.models, config.name), folder / "figures" / "losses.png")
    print(f"\n{reason_to_end(history, config)}\nwrote {folder}/checkpoints/best.pt, metrics.csv, figures/losses.png\n"
          f"next:  {command('python', 'evaluate.py', str(folder))}")


def run_next_epoch(learner: Learner, data: TrainingSet, config: Config, history: list[dict]) -> dict:
    """Run the next epoch and step the scheduler. Return the epoch's row of metrics.csv."""
    started, epoch, lr = time.monotonic(), len(history) + 1, learner.optimizer.param_groups[0]["lr"]
    row = {"epoch": epoch, **run_epoch(learner, data, config, epoch)}
    for name in ("train", "val"):
        previous = history[-1][f"{name}_ema"] if history else None
        row[f"{name}_ema"] = moving_average(previous, row[f"{name}_loss"], config.optim.ema)
    learner.scheduler.step(row["train_ema"])
    seconds = time.monotonic() - started
    return row | {"lr": lr, "seconds": round(seconds, 3),
                  "images_per_second": round(config.train.images / seconds, 1),
                  "peak_memory_mb": round(peak_memory_mb(learner.device))}


def reason_to_end(history: list[dict], config: Config) -> str:
    """Return why training ends here, or "" if it goes on."""
    if len(history) >= config.train.epochs:
        return f"all {config.train.epochs} epochs (train.epochs) are done"
    best = min(history, key=lambda row: row["val_loss"], default={"epoch": 0})
    if len(history) - best["epoch"] >= config.train.early_stop:
        return f"stopped early: no lower validation loss for {config.train.early_stop} epochs (train.early_stop)"
    return ""


@contextmanager
def explained_errors(folder: Path) -> Iterator[None]:
    """Turn errors of training into advice. Remove the files of a run that has no checkpoint, except after Ctrl-C."""
    advice = f"continue with: {command('python', 'train.py', '--resume', str(folder))}"
    try:
        with enough_memory(LESS_MEMORY):  # here too, so that the files are removed after this error
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice) from None
    except UserError as error:
        if not run_folder.clear_if_untrained(folder) and isinstance(error, WriteError):
            raise UserError(f"{error}; then {advice}") from error
        raise
    except torch._dynamo.exc.TorchDynamoException as error:
        run_folder.clear_if_untrained(folder)
        raise UserError(f"train.compile: the network cannot be compiled here ({str(error).strip().splitlines()[0]}). "
                        "Compiling needs a C++ compiler, or on a GPU Triton; set train.compile=false") from None


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
