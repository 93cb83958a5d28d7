"""Save and load checkpoints: files with all that training needs to continue and evaluation needs to predict.

A checkpoint holds model, optimizer, scheduler, history (the rows of metrics.csv), config, statistics and the identity
of the list of tiles. It consists of tensors, numbers and strings only.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from common.config import Config
from common.config_files import from_dict, leaves, to_dict
from common.console import UserError
from common.files import replacing
from common.statistics import Statistics
from unet import UNet

FORMAT = "crc-unet checkpoint 2"
KEYS = {"format", "model", "optimizer", "scheduler", "history", "config", "statistics", "tiles"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and checked; its tensors are on the CPU."""

    path: Path
    config: Config
    statistics: Statistics
    model: dict
    optimizer: dict
    scheduler: dict
    history: list[dict]
    tiles_identity: str  # dataset.identity of the list of tiles that it was trained with

    @property
    def epoch(self) -> int:
        return len(self.history)


def build_model(config: Config) -> UNet:
    """Build the network of a config, with random weights."""
    return UNet(classes=len(config.data.classes), **asdict(config.model))


def save_checkpoint(path: Path, *, config: Config, statistics: Statistics, history: Sequence[dict],
                    tiles_identity: str, **states: dict) -> None:
    """Write a checkpoint whole or not at all; `states` are model, optimizer and scheduler."""
    contents = io.BytesIO()  # torch.save into a file does not tell that a disk is full
    torch.save({"format": FORMAT, "config": to_dict(config), "statistics": asdict(statistics),
                "history": list(history), "tiles": tiles_identity, **states}, contents)
    with replacing(path) as temporary, contents.getbuffer() as buffer, temporary.open("wb") as file:
        file.write(buffer)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint. A damaged or foreign file is rejected before anything is computed."""
    if not path.is_file():
        others = ", ".join(str(other) for other in sorted(path.parent.glob("*.pt"))) or "none"
        raise UserError(f"{path}: no such checkpoint (there: {others}); is this the folder of a run that was trained?")
    contents = _read(path)
    found = contents.get("format") if isinstance(contents, dict) else None
    if found != FORMAT or not contents.keys() >= KEYS:
        raise UserError(f"{path}: not a checkpoint of this version (expected format '{FORMAT}', found {found!r}); use "
                        "the program that wrote it, or train again")
    try:
        values = {key: contents[key] for key in KEYS - {"format"}}
        values["tiles_identity"] = values.pop("tiles")
        values["config"] = from_dict(dict(values["config"]), str(path))
        values["statistics"] = Statistics(**values["statistics"])
        lengths = {"mean": 3, "std": 3, "frequencies": len(values["config"].data.classes)}
        for name, value in asdict(values["statistics"]).items():
            if len(value) != lengths[name] or not all(map(math.isfinite, value)) or (name == "std" and 0 in value):
                raise ValueError(f"its {name} is {value}")
        values["history"] = [dict(row) for row in values["history"]]
        if not all(map(torch.is_tensor, values["model"].values())):
            raise TypeError("its weights are not tensors")
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint of this repository ({error}); restore the file") from None
    return Checkpoint(path=path, **values)


def _read(path: Path) -> object:
    """Read what torch saved, if its checksums are correct: torch.load does not check them."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = f"the checksum of its part {damaged} is wrong"
    except Exception as error:  # zipfile, pickle and torch raise many kinds of exceptions for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path}: not a readable checkpoint ({reason}); restore the file")


def reject_other_settings(config: Config, checkpoint: Checkpoint, may_change: Sequence[str]) -> None:
    """Raise a `UserError` if a setting that may not change differs between a config and a checkpoint."""
    current, saved = dict(leaves(config)), dict(leaves(checkpoint.config))
    for name in current:
        if current[name] != saved[name] and name not in may_change:
            raise UserError(f"{checkpoint.path}: was trained with {name}={saved[name]}, but the run's config.yaml "
                            f"says {current[name]}; restore the one that changed, or start a new run with name=NAME")


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's weights into `model`. Raise a `UserError` that names the first weight that does not fit."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in checkpoint.model.items()}
    if expected != saved:
        name = min(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name))
        raise UserError(f"{checkpoint.path}: '{name}' is {saved.get(name, 'missing')} in the file and "
                        f"{expected.get(name, 'missing')} in a network with model.widths="
                        f"{list(checkpoint.config.model.widths)}; restore the file")
    for name, value in checkpoint.model.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{checkpoint.path}: '{name}' holds numbers that are not finite; use another checkpoint")
    model.load_state_dict(checkpoint.model)
