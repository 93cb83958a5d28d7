"""The folder of a run.

    runs/NAME/config.yaml            the whole resolved config
              environment.json       an entry for each start: command, commit, versions, device, sha256 of tiles.csv
              metrics.csv            a row for each epoch
              checkpoints/last.pt    after every epoch; `train.py --resume` continues it
              checkpoints/best.pt    minimum of the survivor's validation loss; `evaluate.py` takes it
              figures/losses.png

Files appear whole or not at all, whenever the process is killed.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common.config import Config
from common.config_files import to_yaml
from common.console import UserError
from common.files import LOCK, locked, remove_leftovers, write_text, writing
from dataset import TILE_LIST

NEEDED_METRICS = {"epoch", "survivor", "seconds", "train_loss", "train_ema", "val_loss", "val_ema"}
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "matplotlib", "pyyaml", "tqdm")


def folder_of(config: Config) -> Path:
    return Path("runs") / config.name


def reject_existing(folder: Path) -> None:
    """Runs are never overwritten."""
    if folder.exists():
        raise UserError(f"{folder} exists and is not overwritten: continue it with `python train.py --resume {folder}`"
                        ", choose another name with name=NAME, or remove the folder")


def create_run(folder: Path, config: Config) -> None:
    """Make the run's folder; it appears at once with its config, so that it can be resumed from the first instant."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with writing(folder):
        try:
            for name in ("checkpoints", "figures"):
                (partial / name).mkdir(parents=True)
            write_text(partial / "config.yaml", to_yaml(config))
            reject_existing(folder)  # another process may have been faster
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def clear_if_empty(folder: Path) -> bool:
    """Empty the folder of a run that failed before its first checkpoint; `locked_run` then removes it.

    Returns whether it did.
    """
    if any((folder / "checkpoints").glob("*.pt")):
        return False
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:  # open in this process, and Windows removes no open file
            path.unlink()
    return True


def record_start(folder: Path, config: Config, device: torch.device, precision: torch.dtype) -> None:
    """Write the config, and add an entry to environment.json: a run may be resumed elsewhere."""
    write_text(folder / "config.yaml", to_yaml(config))
    path = folder / "environment.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); fix or remove it") from None
    write_text(path, json.dumps([*starts, environment(config, device, precision)], indent=2) + "\n")


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process. If it is empty in the end it goes, so that its name is free again."""
    def reject_missing() -> None:
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: no such run (it has no config.yaml)")

    reject_missing()
    try:
        with locked(folder / LOCK, folder, f"{folder} is being trained by another process"):
            reject_missing()  # now for certain
            for part in (folder, folder / "checkpoints", folder / "figures"):
                remove_leftovers(part)
            yield
    finally:
        with suppress(OSError):  # gone already, or another process has it
            if {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()


def environment(config: Config, device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What a result depends on beside its config."""
    is_cuda = device.type == "cuda"
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{device.type} ({platform.machine()})",
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in PACKAGES},
        "tiles_sha256": hashlib.sha256((Path(config.data.root) / TILE_LIST).read_bytes()).hexdigest(),
    }


def _commit() -> str | None:
    """The commit of this code, with a + where files differ from it; None outside a git checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.csv as numbers; none where there is no such file."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
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
