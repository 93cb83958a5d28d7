"""What is compared: trained models, and label images that any other tool made."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from common.config import Config
from common.config_files import apply_overrides, leaves, load_config
from common.console import UserError
from common.devices import choose_device, choose_precision, memory_format
from common.files import file_name
from common.pictures import picture_size, read_mask, read_mask_values
from dataset import Statistics, Tile, composed, files_by_key
from evaluation.arguments import MAY_CHANGE
from evaluation.inference import Predictor
from training import checkpoints, run_folder
from training.batches import normalise
from unet import UNet

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Candidate:
    """A competitor; everything that can be refused has been looked at."""

    name: str
    config: Config
    source: Path  # the checkpoint, or the folder or pattern of label images
    device: torch.device
    trained_on: str | None = None  # the identity of the list of tiles that a model was trained with
    predictor: Predictor | None = None
    model: UNet | None = None  # what the predictor runs
    statistics: Statistics | None = None  # of the tiles it was trained with
    flips: bool = False  # the predictor averages over the symmetries
    precision: torch.dtype = torch.float32  # in which it computes
    run: Path | None = None  # the folder of the trained model
    epoch: int | None = None  # of the checkpoint
    history: tuple[dict, ...] = ()  # the rows of metrics.csv
    labels: dict[str, Path] | None = None  # label image of each tile's key

    @property
    def beside(self) -> Path:
        """The folder in which the run or the folder of label images stands."""
        parts = (self.run or self.source).parts
        fixed = next((i for i, part in enumerate(parts) if "{key}" in part), len(parts) - 1)
        return Path(*parts[:fixed])

    @property
    def is_best(self) -> bool:
        """Whether these are the weights that a run is known by."""
        return self.run is not None and self.source.resolve() == (self.run / "checkpoints/best.pt").resolve()

    def answer(self, images: Tensor, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor | None]:
        """Classes (B, H, W) int64 and, of a model, logits (B, K, H, W) for images (B, H, W, 3) uint8."""
        if self.predictor:
            logits = self.predictor.logits(images)
            return logits.argmax(1), logits
        masks = [read_mask(self.labels[tile.key], self.config.data.mask_values) for tile in tiles]
        return torch.from_numpy(np.stack(masks)).to(images.device).long(), None

    def facts(self) -> dict:
        """How the model came about: what tables 1 and 2 of the report list; nothing of another tool's."""
        if not self.predictor:
            return {}
        best = min(self.history, key=lambda row: row["val_loss"], default=None)
        seconds = [row["seconds"] for row in self.history]
        return {"loss": self.config.loss.name, "levels": len(self.config.model.widths),
                "dropout": self.config.model.dropout, "epochs": len(self.history) or None,
                "best_epoch": best and best["epoch"], "seconds_per_epoch": median(seconds) if seconds else None,
                "tested_epoch": self.epoch, "flips": self.flips,
                "precision": str(self.precision).removeprefix("torch.")}

    def for_many(self) -> "Candidate":
        """The same, compiled where it is a model in bfloat16 on a CPU: for a thousand tiles or more, of one size."""
        if not self.predictor or self.precision != torch.bfloat16 or self.device.type != "cpu":
            return self
        return replace(self, predictor=predictor_of(self.model, self.statistics, self.flips, self.precision, True))


def predictor_of(model: UNet, statistics: Statistics, flips: bool, precision: torch.dtype, many: bool) -> Predictor:
    return Predictor.of(model, lambda images: normalise(images, statistics), flips, precision, many)


def candidate_of_run(path: Path, which: str, overrides: Sequence[str], flips: bool,
                     precision: str = "auto") -> Candidate:
    """The model of a run folder, or of a checkpoint file; `which` is best, last or the path of a checkpoint."""
    def run_of(file: Path) -> Path:
        return file.parent.parent if file.parent.name == "checkpoints" else file.parent

    if path.suffix == ".pt":
        file, folder = path, run_of(path)
    else:
        file = path / "checkpoints" / f"{which}.pt" if which in ("best", "last") else Path(which)
        folder = path
        other = run_of(file.resolve())
        if other != folder.resolve() and (other / "config.yaml").exists():
            raise UserError(f"{file} is a checkpoint of another run than {folder}: python evaluate.py {file}")
    checkpoint = checkpoints.load_checkpoint(file)
    settings = folder / "config.yaml"  # knows where the data lies, should they have moved since the checkpoint
    current = load_config(settings) if settings.exists() else checkpoint.config
    same = re.compile(r"name|loss|model|data\.(classes|mask_values)")
    may_change = [name for name, _ in leaves(current) if not same.match(name)]
    checkpoints.reject_other_settings(current, checkpoint, may_change)
    config = apply_overrides(checkpoint.config, [f"data.root={current.data.root}", f"device={current.device}",
                                                 *overrides], allowed=MAY_CHANGE)
    device = choose_device(config.device)
    model = checkpoints.build_model(config)
    checkpoints.load_weights(model, checkpoint)
    model = model.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    dtype = choose_precision(precision, device)
    predictor = predictor_of(model, checkpoint.statistics, flips, dtype, many=False)
    name = (folder.resolve() if folder == path else folder).name or config.name
    of_run = run_of(file.resolve()) == folder.resolve()
    history = run_folder.read_metrics(folder) if of_run else ()
    return Candidate(name if file.name == "best.pt" and of_run else f"{name} ({file.stem})", config, file, device,
                 checkpoint.tiles, predictor, model, checkpoint.statistics, flips, dtype, folder,
                 checkpoint.epoch, tuple(history or checkpoint.history))


def candidate_of_labels(pattern: str, config: Config, tiles: Sequence[Tile]) -> Candidate:
    """The label images of another tool: a folder, or a pattern such as other/{key}_labels.png.

    In a folder the image of a tile bears the name of its mask, of its image, or of its key, as PNG, TIFF or BMP.
    """
    folder = Path(pattern.partition("{key}")[0] + "x").parent if "{key}" in pattern else Path(pattern)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of label images; give a folder, or a pattern with {{key}} in it")
    labels = _labels_by_pattern(pattern, tiles) if "{key}" in pattern else _labels_in(folder, tiles)
    for tile in tiles:
        _reject_unfit(labels[tile.key], tile, config)
    name = Path(pattern).stem.replace("{key}", "") if "{key}" in pattern else Path(pattern).name
    name = name.strip("-_#. ") or folder.resolve().name
    return Candidate(name, config, Path(pattern), choose_device(config.device), labels=labels)


def _labels_by_pattern(pattern: str, tiles: Sequence[Tile]) -> dict[str, Path]:
    """The label image of each tile's key that a pattern such as other/{key}_labels.png names."""
    anchor = Path(Path(pattern).anchor)
    by_key = files_by_key(anchor, Path(pattern).relative_to(anchor).as_posix())
    for tile in tiles:
        if tile.key not in by_key:
            _reject_missing(pattern.replace("{key}", tile.key), tile)
    return {tile.key: anchor / by_key[tile.key] for tile in tiles}


def _labels_in(folder: Path, tiles: Sequence[Tile]) -> dict[str, Path]:
    """The label image in a folder of each tile's key."""
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in LABEL_SUFFIXES:
            by_stem.setdefault(composed(path.stem), []).append(path)
    if not by_stem:
        inside = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")[:5])
        raise UserError(f"{folder}: no label images in it ({', '.join(LABEL_SUFFIXES)})"
                        + (f"; did you mean one of its folders {inside}?" if inside else ""))
    labels = {}
    for tile in tiles:
        names = dict.fromkeys(composed(name) for name in (Path(tile.mask).stem, Path(tile.image).stem, tile.key))
        found = [path for name in names for path in by_stem.get(name, ())]
        if len(found) > 1:
            raise UserError(f"{folder}: both {found[0].name} and {found[1].name} may be the labels of tile "
                            f"'{tile.key}'; keep one, or give a pattern with {{key}} in it")
        if not found:
            _reject_missing(f"{folder}/{' or '.join(f'{name}.png' for name in names)}", tile)
        labels[tile.key] = found[0]
    return labels


def _reject_missing(expected: str, tile: Tile) -> NoReturn:
    raise UserError(f"{expected}: no label image for tile '{tile.key}'; every tile that is scored needs one")


def _reject_unfit(path: Path, tile: Tile, config: Config) -> None:
    """A `UserError` if a label image has another size than the tile's mask, or other values than masks have."""
    data = config.data
    size, expected = picture_size(path), picture_size(Path(data.root) / tile.mask)
    if size != expected:
        raise UserError(f"{path}: {size[0]} x {size[1]} pixels (height x width), but the mask of tile '{tile.key}' has "
                        f"{expected[0]} x {expected[1]}; they must agree")
    strange = np.setdiff1d(read_mask_values(path), data.mask_values)
    if strange.size:
        wanted = ", ".join(f"{grey} for {name}" for grey, name in zip(data.mask_values, data.classes, strict=True))
        raise UserError(f"{path}: holds {', '.join(map(str, strange[:5]))}; label images must hold the greys of the "
                        f"masks: {wanted}")


def with_distinct_names(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The entries, those of one name called by their folders; a `UserError` if that is not enough."""
    def namesakes(candidate: Candidate) -> list[Candidate]:
        return [other for other in candidates if file_name(other.name) == file_name(candidate.name)]

    candidates = [replace(candidate, name=f"{candidate.beside}/{candidate.name}") if len(namesakes(candidate)) > 1
                  else candidate for candidate in candidates]
    for same in filter(lambda same: len(same) > 1, map(namesakes, candidates)):
        raise UserError(f"{' and '.join(str(candidate.source) for candidate in same)} would have the same name, "
                        f"{same[0].name}; name every run and every folder of predictions once, under different names")
    return candidates
