"""Checkpoints: everything that training needs to continue, and evaluation to predict.

A checkpoint holds model, optimizer, scheduler, history (the rows of metrics.csv), config, statistics and the identity
of the list of tiles: tensors, numbers and strings only.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.config import Config
from common.config_files import from_dict, leaves, to_dict
from common.console import UserError
from common.files import replacing
from dataset import Statistics
from unet import UNet

FORMAT = "crc-unet checkpoint 2"
KEYS = {"format", "model", "optimizer", "scheduler", "history", "config", "statistics", "tiles"}


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


def reject_other_settings(config: Config, checkpoint: Checkpoint, may_change: Sequence[str]) -> None:
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
