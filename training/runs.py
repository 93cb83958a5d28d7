"""What a run leaves on disk.

    runs/NAME/config.yaml            the whole resolved config
              environment.json       an entry for each start: command, commit, versions, device, sha256 of tiles.csv
              metrics.csv            a row an epoch
              checkpoints/last.pt    after every epoch; `train.py --resume` continues it
              checkpoints/best.pt    minimum of the survivor's validation loss; `evaluate.py` takes it
              figures/losses.png

A checkpoint holds model, optimizer, scheduler, history (the rows of metrics.csv), config, statistics and the identity
of the list of tiles: tensors, numbers and strings only. Files appear whole or not at all, whenever the process is
killed.
"""

import csv
import hashlib
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common.config import Config, from_dict, leaves, to_dict
from common.console import UserError
from common.files import LOCK, locked, remove_leftovers, replacing, write_text, writing
from dataset import TILE_LIST, Statistics
from unet import UNet

FORMAT = "crc-unet checkpoint 2"
KEYS = {"format", "model", "optimizer", "scheduler", "history", "config", "statistics", "tiles"}
NEEDED_METRICS = {"epoch", "survivor", "seconds", "train_loss", "train_ema", "val_loss", "val_ema"}
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "matplotlib", "pyyaml", "tqdm")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk and found whole; tensors are on the CPU."""

    path: Path
    config: Config
    statistics: Statistics
    model: dict
    optimizer: dict
    scheduler: dict
    history: list[dict]
    tiles: str  # the identity (dataset.identity) of the list that it was trained with

    @property
    def epoch(self) -> int:
        return len(self.history)


def run_folder(config: Config) -> Path:
    return Path("runs") / config.name


def refuse_existing(folder: Path) -> None:
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
            write_text(partial / "config.yaml", config.to_yaml())
            refuse_existing(folder)  # another process may have been faster
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def clear_if_empty(folder: Path) -> bool:
    """Empty the folder of a run that failed before its first checkpoint; `holding` then removes it. Whether it did."""
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
    write_text(folder / "config.yaml", config.to_yaml())
    path = folder / "environment.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); fix or remove it") from None
    write_text(path, json.dumps([*starts, environment(config, device, precision)], indent=2) + "\n")


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process. If it is empty in the end it goes, so that its name is free again."""
    def refuse_missing() -> None:
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: no such run (it has no config.yaml)")

    refuse_missing()
    try:
        with locked(folder / LOCK, folder, f"{folder} is being trained by another process"):
            refuse_missing()  # now for certain
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


def build_model(config: Config) -> UNet:
    return UNet(classes=len(config.data.classes), **asdict(config.model))


def save_checkpoint(path: Path, *, config: Config, statistics: Statistics, history: Sequence[dict],
                    tiles: str, **states: dict) -> None:
    """Write a checkpoint whole or not at all; `states` are model, optimizer and scheduler."""
    contents = io.BytesIO()  # torch.save into a file says of a full disk what nobody understands
    torch.save({"format": FORMAT, "config": to_dict(config), "statistics": asdict(statistics),
                "history": list(history), "tiles": tiles, **states}, contents)
    with replacing(path) as temporary, contents.getbuffer() as whole, temporary.open("wb") as file:
        file.write(whole)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint; a damaged or foreign file is refused before anything is computed."""
    if not path.is_file():
        near = ", ".join(str(p) for p in sorted(path.parent.glob("*.pt"))) or "none"
        raise UserError(f"{path}: no such checkpoint (there: {near}); is this the folder of a run that was trained?")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load reads altered bytes without a word, the zip's CRC sees them
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path}: damaged (its part {damaged} does not match its checksum); restore the file")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise nearly anything on a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); restore the file") from None
    written = str(contents.get("format")) if isinstance(contents, dict) else ""
    if written != FORMAT and written.startswith(FORMAT.rstrip("0123456789")):
        raise UserError(f"{path}: written by another version of this repository (it is a '{written}', expected is a "
                        f"'{FORMAT}'); use the version that wrote it, or train anew")
    if not isinstance(contents, dict) or contents.get("format") != FORMAT or not contents.keys() >= KEYS:
        raise UserError(f"{path}: not a checkpoint of this repository (expected format '{FORMAT}')")
    values = {key: value for key, value in contents.items() if key in KEYS - {"format"}}
    try:
        values["config"] = from_dict(dict(values["config"]), str(path))
        values["statistics"] = Statistics(**values["statistics"])
        lengths = {"mean": 3, "std": 3, "frequencies": len(values["config"].data.classes)}
        for name, numbers in asdict(values["statistics"]).items():
            fits = len(numbers) == lengths[name] and all(map(math.isfinite, numbers))
            if not fits or (name == "std" and 0 in numbers):
                raise ValueError(f"its {name} is {numbers}")
        values["history"] = [dict(row) for row in values["history"]]
        if not all(map(torch.is_tensor, values["model"].values())):
            raise TypeError("its weights are no tensors")
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint of this repository ({error}); restore the file") from None
    return Checkpoint(path=path, **values)


def refuse_other(config: Config, checkpoint: Checkpoint, may_change: Sequence[str]) -> None:
    """A checkpoint is used with the settings it was made with, but for those that may change."""
    ours, theirs = dict(leaves(config)), dict(leaves(checkpoint.config))
    for name in ours:
        if ours[name] != theirs[name] and name not in may_change:
            raise UserError(f"{checkpoint.path}: was trained with {name}={theirs[name]}, but the run's config.yaml "
                            f"says {ours[name]}; restore the one that changed, or start a new run with name=NAME")


def load_weights(model: UNet, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's weights into `model`, or name what does not fit."""
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint.model.items()}
    if ours != theirs:
        name = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise UserError(f"{checkpoint.path}: does not fit the network of its config, model.widths "
                        f"{list(checkpoint.config.model.widths)}: '{name}' is {theirs.get(name, 'missing')} in the "
                        f"file and {ours.get(name, 'not')} in the network")
    for name, value in checkpoint.model.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{checkpoint.path}: '{name}' holds numbers that are not finite (NaN or infinity); take "
                            "another checkpoint")
    model.load_state_dict(checkpoint.model)


def write_metrics(path: Path, history: Sequence[dict]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)


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
