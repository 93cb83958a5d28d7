"""Train a U-Net by k-fold-per-epoch cross validation (report, section 5).

    python train.py --config configs/dice_ce.yaml
    python train.py --config configs/dice_ce.yaml name=lr3 optim.lr=1e-3 data.root=data/demo
    python train.py --config configs/dice_ce.yaml seed=0,1,2
    python train.py --resume runs/dice_ce
    python train.py --config configs/dice_ce.yaml --resume auto
    torchrun --nproc-per-node 5 train.py --config configs/dice_ce.yaml

One epoch: deal the slides into k folds and draw train.images_per_epoch / k from each. From the same start, train k
models, each on k - 1 folds, and validate each on its remaining fold. The model with the lowest validation loss
survives: its weights and Adam state start the next epoch. The moving average of its training loss drives the learning
rate. A resumed run equals an uninterrupted one bit for bit (same machine, same number of threads), because randomness
depends only on seed, epoch, fold and purpose. train.scheme=plain trains one model, which a fixed fold validates.

torchrun starts several ranks (processes), each on its own GPU or CPU cores, which share out the folds. The result does
not depend on their number.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from common import ranks
from common.config import Config
from common.config_files import apply_overrides, leaves, load_config
from common.console import UserError, argument_parser, command, run, warn
from common.devices import peak_memory_mb
from common.files import WriteError, write_csv
from common.memory import enough_memory, reuse_memory
from common.statistics import Statistics
from training import checkpoints, run_folder
from training.epochs import moving_average, run_epoch
from training.learner import Learner, build_learner
from training.training_set import TrainingSet, prepare_data
from training.watch import Watch

BuildLearner = Callable[[Config, Statistics], Learner]
RESUME_MAY_CHANGE = ("device", "data.root", "data.cache", "train.epochs", "train.early_stop")
AUTO = "auto"  # --resume auto
MACHINES_MAY_DIFFER = ("device", "data.root", "data.cache")
LESS_MEMORY = ("start a new run with a smaller train.batch_size (half of it needs half the memory), a smaller "
               "data.crop (half of it needs a quarter) or smaller model.widths")


def configs_of_seeds(path: str | Path, overrides: list[str]) -> list[Config]:
    """Load a config once for each of several seeds: seed=0,1 gives the runs NAME-seed0 and NAME-seed1."""
    others = [override for override in overrides if not override.startswith("seed=")]
    seed = next((override for override in reversed(overrides) if override.startswith("seed=")), "seed=")
    if "," not in seed:
        return [load_config(path, overrides)]
    if not re.fullmatch(r"seed=\d+(,\d+)+", seed):
        raise UserError(f"command line: {seed}: write several seeds as whole numbers, such as seed=0,1,2")
    config = load_config(path, others)
    seeds = dict.fromkeys(map(int, seed.removeprefix("seed=").split(",")))
    return [apply_overrides(config, [f"seed={seed}", f"name={config.name}-seed{seed}"]) for seed in seeds]


def start_or_resume(configs: Sequence[Config], tensorboard: bool = False) -> None:
    """Train runs after each other. One that was interrupted goes on, one that is complete stays as it is."""
    for number, config in enumerate(configs, start=1):
        folder = Path("runs") / config.name
        if len(configs) > 1:
            print(f"\nseed {config.seed}, {number} of {len(configs)}: {folder}", flush=True)
        try:
            if not ranks.on_first(folder.exists):
                start(config, tensorboard)
            else:
                ranks.on_first(partial(reject_another, config, folder))
                resume(folder, settings_of_resumption(config), tensorboard)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("give the same command again, and it goes on from here") from None


def settings_of_resumption(config: Config) -> list[str]:
    """Return the overrides with which a run goes on as this config says."""
    settings = dict(leaves(config))
    return [f"{name}={settings[name]}" for name in RESUME_MAY_CHANGE]


def reject_another(config: Config, folder: Path) -> None:
    """Raise a `UserError` if the folder holds a run with other settings."""
    if not (folder / "config.yaml").is_file():
        return
    found = dict(leaves(load_config(folder / "config.yaml")))
    different = [name for name, value in leaves(config) if found[name] != value and name not in RESUME_MAY_CHANGE
                 and not name.startswith("filter.")]  # tiles.csv says what came of those
    if different:
        name = different[0]
        raise UserError(f"{folder} was trained with {name}={found[name]}, not {dict(leaves(config))[name]}; choose "
                        "another name=NAME, or remove the folder")


def start(config: Config, tensorboard: bool = False, build: BuildLearner = build_learner) -> None:
    """Start a run in a new folder, which is created only after the data and the settings were checked."""
    folder = Path("runs") / config.name
    ranks.on_first(lambda: run_folder.reject_existing(folder))
    learner, data = prepare(config, build)
    ranks.on_first(lambda: run_folder.create_run(folder, config, data.tiles))
    with locked_run(folder), explained_errors(folder):
        ranks.on_first(lambda: run_folder.record_start(folder, config, learner.device, learner.precision))
        train(learner, data, config, folder, [], tensorboard)


def resume(folder: Path, overrides: list[str], tensorboard: bool = False, build: BuildLearner = build_learner) -> None:
    """Continue a run after its last finished epoch, as if it had not been interrupted."""
    with locked_run(folder):
        config, checkpoint = ranks.on_first(lambda: read_run(folder, overrides))
        config = apply_overrides(config, overrides)  # another machine may have the tiles in another place
        learner, data = prepare(config, build)
        if checkpoint:
            ranks.together(lambda: restore(learner, data, config, checkpoint))
        ranks.on_first(lambda: run_folder.record_start(folder, config, learner.device, learner.precision))
        with explained_errors(folder):
            train(learner, data, config, folder, checkpoint.history if checkpoint else [], tensorboard)


def locked_run(folder: Path) -> AbstractContextManager:
    return run_folder.locked_run(folder) if ranks.is_first() else nullcontext()


def read_run(folder: Path, overrides: list[str]) -> tuple[Config, checkpoints.Checkpoint | None]:
    """Read the config with which a run goes on, and its last checkpoint, if it has one."""
    path = folder / "checkpoints" / "last.pt"
    checkpoint = checkpoints.load_checkpoint(path) if path.exists() else None
    config = apply_overrides(load_config(folder / "config.yaml"), overrides, allowed=RESUME_MAY_CHANGE)
    if checkpoint:
        checkpoints.reject_other_settings(config, checkpoint, RESUME_MAY_CHANGE)
        if config.train.epochs < checkpoint.epoch:
            raise UserError(f"train.epochs={config.train.epochs} is less than the {checkpoint.epoch} epochs that "
                            f"{path} has done; a run can be made longer, not shorter")
    return config, checkpoint


def prepare(config: Config, build: BuildLearner) -> tuple[Learner, TrainingSet]:
    """Prepare tiles and network on every rank. Raise a `UserError` if two ranks have other code, settings or tiles."""
    data = ranks.one_first(lambda: prepare_data(config))
    settings = {f"setting {name}": str(value) for name, value in leaves(config) if name not in MACHINES_MAY_DIFFER}
    ranks.reject_differences(lambda: settings | {
        "list of tiles": data.tiles_identity, "statistics of the tiles": str(data.statistics)})
    return ranks.together(lambda: build(config, data.statistics)), data


def restore(learner: Learner, data: TrainingSet, config: Config, checkpoint: checkpoints.Checkpoint) -> None:
    """Set the learner to the state of a checkpoint, if it was trained on these tiles."""
    if not (data.tiles_identity == checkpoint.tiles_identity and data.statistics.equals(checkpoint.statistics)):
        raise UserError(f"{config.data.root}: the kept tiles, their groups or their split changed since this run "
                        "began, so it cannot be continued; restore them, or start a new run with name=NAME")
    learner.restore_checkpoint(checkpoint)


def train(learner: Learner, data: TrainingSet, config: Config, folder: Path, history: list[dict],
          tensorboard: bool = False) -> None:
    """Run epochs until training ends. After each epoch, everything that `--resume` needs is on disk."""
    if ranks.count() > 1 and not reason_to_end(history, config):
        say_who_trains(config)
    if not ranks.is_first():
        while not reason_to_end(history, config):
            history.append(run_next_epoch(learner, data, config, history))
        return
    if history:
        write_csv(folder / "metrics.csv", history)  # its last row is missing if the run was killed before writing it
    if config.train.compile and not reason_to_end(history, config):
        print("train.compile: the first steps are slow, because the network is compiled", flush=True)
    watch = Watch(folder, config, learner, data, history, tensorboard)
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
        watch.after_epoch(history)
        survivor = f"  survivor {row['survivor']}" if config.train.models > 1 else ""
        print(f"epoch {row['epoch']}/{config.train.epochs}  train {row['train_loss']:.4f} (EMA {row['train_ema']:.4f})"
              f"  validation {row['val_loss']:.4f} (EMA {row['val_ema']:.4f}){survivor}"
              f"  lr {row['lr']:.1e}  {row['seconds']:.1f} s{'  best' if is_best else ''}", flush=True)
    watch.end(history)
    print(f"\n{reason_to_end(history, config)}\nwrote {folder}/checkpoints/best.pt, metrics.csv, figures/", flush=True)


def say_who_trains(config: Config) -> None:
    """Print which rank trains which fold, and warn of ranks that train none."""
    models, count = config.train.models, ranks.count()
    parts = [f"rank {rank}: {', '.join(str(fold + 1) for fold in range(rank, models, count))}"
             for rank in range(min(count, models))]
    if models > 1:
        print(f"{models} folds on {count} ranks: {'; '.join(parts)}", flush=True)
    if count > models:
        what = f"train.folds={models}" if models > 1 else "train.scheme=plain, with one model,"
        warn(f"{what} gives work to {models} of {count} ranks; start torchrun with fewer")


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
    program = ["python"] if ranks.count() == 1 else ["torchrun", "..."]
    advice = f"continue with: {command(*program, 'train.py', '--resume', str(folder))}"
    try:
        with enough_memory(LESS_MEMORY):  # here too, so that the files are removed after this error
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice) from None
    except UserError as error:
        is_kept = ranks.is_first() and not run_folder.clear_if_untrained(folder)
        if is_kept and isinstance(error, (WriteError, ranks.RankLost)):
            raise type(error)(f"{error}; then {advice}") from error
        raise
    except torch._dynamo.exc.TorchDynamoException as error:
        if ranks.is_first():
            run_folder.clear_if_untrained(folder)
        raise UserError(f"train.compile: the network cannot be compiled here ({str(error).strip().splitlines()[0]}). "
                        "Compiling needs a C++ compiler, or on a GPU Triton; set train.compile=false") from None


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--config", metavar="FILE", help="start a run of this experiment, e.g. configs/dice_ce.yaml")
    parser.add_argument("--resume", metavar="RUN", help="continue this run, e.g. runs/dice_ce; with --config, `auto` "
                        "continues the run of that experiment if it has begun, and else starts it")
    parser.add_argument("--tensorboard", action="store_true", help="also write RUN/tensorboard (needs "
                        "requirements-extra.txt; look at it with: tensorboard --logdir runs)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's; "
                        "seed=0,1,2 trains three runs")
    args = parser.parse_intermixed_args()
    if args.config is None and args.resume in (None, AUTO):
        parser.error("give --config FILE, or --resume RUN")
    if args.config is not None and args.resume not in (None, AUTO):
        parser.error(f"--config and --resume {args.resume}: give one of them, or --resume {AUTO}")
    reuse_memory()
    with ranks.started(), enough_memory(LESS_MEMORY):
        if args.config is None:
            resume(Path(args.resume), args.overrides, args.tensorboard)
            runs = [Path(args.resume)]
        else:
            configs = ranks.together(lambda: configs_of_seeds(args.config, args.overrides))
            if len(configs) == 1 and args.resume != AUTO:
                start(configs[0], args.tensorboard)
            else:
                start_or_resume(configs, args.tensorboard)
            runs = [Path("runs") / config.name for config in configs]
    print(f"next:  {command('python', 'evaluate.py', *map(str, runs))}")


if __name__ == "__main__":
    run(main)
