"""Create, lock and read the folder of a run. Its files appear whole or not at all, even if a process is killed:

    runs/NAME/config.yaml            every setting of the run
              trained_on.csv         the tiles from which it learns
              environment.json       for each start: command, commit, versions, device, sha256 of tiles.csv
              metrics.csv            a row for each epoch
              checkpoints/last.pt    written after every epoch; `train.py --resume` continues from it
              checkpoints/best.pt    the lowest validation loss of a survivor; `evaluate.py` uses it
              figures/losses.png     the loss curves
              .lock                  held by the process that trains the run
"""

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch

from common import ranks
from common.config import Config
from common.config_files import to_yaml
from common.console import UserError
from common.devices import device_name
from common.files import LOCK, locked, remove_leftovers, write_csv, write_text, writing
from dataset import TILE_LIST, Tile

TRAINED_ON, COLUMNS = "trained_on.csv", ("key", "image", "group", "mask_from", "digest")
NEEDED_METRICS = {"epoch", "survivor", "seconds", "train_loss", "train_ema", "val_loss", "val_ema"}
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "matplotlib", "pyyaml", "tqdm")


def reject_existing(folder: Path) -> None:
    """Raise a `UserError` if the folder exists: a run is never overwritten."""
    if folder.exists():
        raise UserError(f"{folder} exists and is not overwritten: continue it with `python train.py --resume {folder}`"
                        ", choose another name with name=NAME, or remove the folder")


def create_run(folder: Path, config: Config, tiles: Sequence[Tile]) -> None:
    """Create the folder of a run with its config.yaml and the list of its training tiles.

    They appear together, so that the run can be resumed at any time.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with writing(folder):
        try:
            for name in ("checkpoints", "figures"):
                (partial / name).mkdir(parents=True)
            write_text(partial / "config.yaml", to_yaml(config))
            write_csv(partial / TRAINED_ON, [{name: getattr(tile, name) for name in COLUMNS} for tile in tiles])
            reject_existing(folder)  # another process may have created it in the meantime
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Lock a run, and clean up after killed processes. A folder that is empty in the end is removed with its lock."""
    _reject_missing(folder)
    try:
        with locked(folder / LOCK, folder, f"{folder} is being trained by another process"):
            _reject_missing(folder)  # again: another process may have removed it before the lock
            for part in (folder, folder / "checkpoints", folder / "figures"):
                remove_leftovers(part)
            yield
    finally:
        with suppress(OSError):  # the folder is gone, or another process has locked it
            if {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()


def _reject_missing(folder: Path) -> None:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no such run (it has no config.yaml)")


def clear_if_untrained(folder: Path) -> bool:
    """Empty the folder of a run that has no checkpoint; `locked_run` then removes it. Return whether it had none."""
    if any((folder / "checkpoints").glob("*.pt")):
        return False
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:  # which is open in this process, and Windows cannot remove open files
            path.unlink()
    return True


def record_start(folder: Path, config: Config, device: torch.device, precision: torch.dtype) -> None:
    """Write config.yaml, and add to environment.json what results depend on besides: a run may be resumed elsewhere."""
    write_text(folder / "config.yaml", to_yaml(config))
    path = folder / "environment.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); fix or remove it") from None
    start = {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": ranks.count(),
        "packages": {name: version(name) for name in PACKAGES},
        "tiles_sha256": hashlib.sha256((config.data.list_folder / TILE_LIST).read_bytes()).hexdigest(),
    }
    write_text(path, json.dumps([*starts, start], indent=2) + "\n")


def _commit() -> str | None:
    """Return the commit of this code, with a + if files differ from it; None outside a git checkout."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_trained_on(folder: Path) -> list[dict[str, str]]:
    """Read the list of the tiles from which a run learned: key, image, group, mask_from and digest of each."""
    path = folder / TRAINED_ON
    if not path.is_file():
        raise UserError(f"{path}: missing, so nobody knows from which tiles this run learned; train it again")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {*COLUMNS} <= rows[0].keys():
        raise UserError(f"{path}: not the list of a run's training tiles; restore the file, or train again")
    return rows


def read_metrics(folder: Path) -> list[dict]:
    """Read the rows of a run's metrics.csv as numbers; return no rows if there is no such file."""
    path = folder / "metrics.csv"
    return read_metrics_file(path) if path.is_file() else []


def read_metrics_file(path: Path) -> list[dict]:
    """Read the rows of a metrics.csv as numbers."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = NEEDED_METRICS - {*(reader.fieldnames or ())}
            if missing:
                raise ValueError(f"no column {min(missing)}")
            rows = [{name: float(value) for name, value in row.items()} for row in reader]
        return [row | {name: int(row[name]) for name in ("epoch", "survivor")} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the metrics of a run ({error}); restore the file or remove it") from None
