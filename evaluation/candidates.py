"""Load what is compared: trained models, and label images that another tool made."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from common.config import MASK_SETTINGS, Config
from common.config_files import apply_overrides, leaves, load_config
from common.console import UserError
from common.devices import choose_device, choose_precision, memory_format
from common.files import file_name
from common.masks import IGNORE, read_mask
from common.patterns import TOKEN, composed, find_files, joins_folders
from common.pictures import picture_size
from common.statistics import Statistics
from dataset import Tile, by_key
from evaluation.arguments import MAY_CHANGE, run_folder_of
from evaluation.inference import Predictor, averaged, most_likely
from training import checkpoints, run_folder
from training.batches import normalise
from unet import UNet

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
MUST_AGREE = re.compile(  # settings of config.yaml and of a checkpoint
    rf"name|loss|model|data\.(classes|{'|'.join(MASK_SETTINGS)})")


@dataclass(frozen=True)
class Candidate:
    """A model, or label images of another tool, that is compared with others. Its files have been checked.

    The first four fields belong to every candidate, `label_images` to label images, and the rest to models. An ensemble
    has only some of these.
    """

    name: str
    config: Config
    source: Path  # the checkpoint, or the folder or pattern of the label images
    device: torch.device

    # of a model
    tiles_identity: str | None = None  # dataset.identity of the list of tiles that it was trained with
    predictor: Predictor | None = None
    model: UNet | None = None  # the network that the predictor runs
    statistics: Statistics | None = None  # of its training tiles
    flips: bool = False  # whether the predictor averages over the eight flips and turns
    precision: torch.dtype = torch.float32  # in which the predictor computes
    run: Path | None = None  # the run folder
    epoch: int | None = None  # of the checkpoint
    history: tuple[dict, ...] = ()  # the rows of metrics.csv

    # of an ensemble
    members: tuple["Candidate", ...] = ()  # models whose probabilities are averaged

    # of label images
    label_images: dict[str, Path] | None = None  # by the keys of the tiles

    @property
    def parent_folder(self) -> Path:
        """The folder that contains the run (of an ensemble the first one) or the label images' folder."""
        if self.members:
            return self.members[0].parent_folder
        parts = (self.run or self.source).parts
        fixed = next((i for i, part in enumerate(parts) if TOKEN.search(part)), len(parts) - 1)
        return Path(*parts[:fixed])

    @property
    def sources(self) -> list[Path]:
        """The checkpoint, several of an ensemble, or the folder or pattern of the label images."""
        return [member.source for member in self.members or (self,)]

    @property
    def is_best(self) -> bool:
        """Whether this is the best checkpoint of its run."""
        return self.run is not None and self.source.resolve() == (self.run / "checkpoints/best.pt").resolve()

    def predict(self, images: Tensor, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor | None]:
        """Return classes (B, H, W) int64 and, of a model, logits (B, K, H, W) for images (B, H, W, 3) uint8.

        Label images are read by the keys of the `tiles`, one for each image.
        """
        if self.predictor:
            logits = self.predictor.logits(images)
            return most_likely(logits), logits
        masks = [read_mask(self.label_images[tile.key], self.config.data) for tile in tiles]
        return torch.from_numpy(np.stack(masks)).to(images.device).long(), None

    def model_facts(self) -> dict:
        """Return how the model was made, as in tables 1 and 2 of the report; nothing for label images."""
        if not self.predictor:
            return {}
        if self.members:
            losses, levels = ({member.model_facts()[name] for member in self.members} for name in ("loss", "levels"))
            return {"loss": "+".join(sorted(losses)), "levels": levels.pop() if len(levels) == 1 else None,
                    "dropout": None, "epochs": None, "best_epoch": None, "seconds_per_epoch": None,
                    "tested_epoch": None, "flips": self.flips, "members": [member.name for member in self.members],
                    "precision": str(self.precision).removeprefix("torch.")}
        best = min(self.history, key=lambda row: row["val_loss"], default=None)
        seconds = [row["seconds"] for row in self.history]
        return {"loss": self.config.loss.name, "levels": len(self.config.model.widths),
                "dropout": self.config.model.dropout, "epochs": len(self.history) or None,
                "best_epoch": best and best["epoch"], "seconds_per_epoch": median(seconds) if seconds else None,
                "tested_epoch": self.epoch, "flips": self.flips,
                "precision": str(self.precision).removeprefix("torch.")}

    def for_many(self) -> "Candidate":
        """Return the candidate for a thousand tiles or more of one size: compiled if it is bfloat16 on a CPU."""
        if self.members:
            return ensemble_of([member.for_many() for member in self.members])
        if not self.predictor or self.precision != torch.bfloat16 or self.device.type != "cpu":
            return self
        return replace(self, predictor=predictor_of(self.model, self.statistics, self.flips, self.precision, True))


def predictor_of(model: UNet, statistics: Statistics, flips: bool, precision: torch.dtype, many: bool) -> Predictor:
    return Predictor.of(model, lambda images: normalise(images, statistics), flips, precision, many)


def ensemble_of(members: Sequence[Candidate]) -> Candidate:
    """Return the candidate that averages the probabilities of several models of the same classes."""
    first = members[0]
    for other in members[1:]:
        if other.config.data.classes != first.config.data.classes:
            raise UserError(f"--ensemble: {other.name} knows the classes {list(other.config.data.classes)}, "
                            f"{first.name} {list(first.config.data.classes)}; average models of the same classes")
    predictor = averaged([member.predictor for member in members])
    return Candidate("ensemble", first.config, first.source, first.device, predictor=predictor, flips=first.flips,
                     precision=first.precision, members=tuple(members))


def with_distinct_names(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Put the parent folder before names that occur twice; raise a `UserError` if names are still equal."""
    counts = Counter(file_name(candidate.name) for candidate in candidates)
    candidates = [replace(candidate, name=f"{candidate.parent_folder}/{candidate.name}")
                  if counts[file_name(candidate.name)] > 1 else candidate for candidate in candidates]
    for candidate in candidates:
        same = [other for other in candidates if file_name(other.name) == file_name(candidate.name)]
        if len(same) > 1:
            raise UserError(f"{' and '.join(str(other.source) for other in same)} have the same name, "
                            f"{candidate.name}; give each run and folder once, and rename folders of the same name")
    return candidates


def candidate_of_run(path: Path, which: str, overrides: Sequence[str], flips: bool,
                     precision: str = "auto") -> Candidate:
    """Load the model of a run folder, or of a checkpoint file; `which` is best, last or the path of a checkpoint."""
    folder, file = _find_checkpoint(path, which)
    checkpoint = checkpoints.load_checkpoint(file)
    config = _config_of_run(folder, checkpoint, overrides)
    device = choose_device(config.device)
    model = checkpoints.build_model(config)
    checkpoints.load_weights(model, checkpoint)
    model = model.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    dtype = choose_precision(precision, device)
    name = (folder.resolve() if folder == path else folder).name or config.name
    in_run_folder = run_folder_of(file.resolve()) == folder.resolve()
    if not in_run_folder or file.name != "best.pt":
        name = f"{name} ({file.stem})"
    history = run_folder.read_metrics(folder) if in_run_folder else []
    return Candidate(name, config, file, device, tiles_identity=checkpoint.tiles_identity,
                     predictor=predictor_of(model, checkpoint.statistics, flips, dtype, many=False), model=model,
                     statistics=checkpoint.statistics, flips=flips, precision=dtype, run=folder,
                     epoch=checkpoint.epoch, history=tuple(history or checkpoint.history))


def _find_checkpoint(path: Path, which: str) -> tuple[Path, Path]:
    """Return the run folder and the checkpoint file."""
    if path.suffix == ".pt":
        return run_folder_of(path), path
    file = path / "checkpoints" / f"{which}.pt" if which in ("best", "last") else Path(which)
    other = run_folder_of(file.resolve())
    if other != path.resolve() and (other / "config.yaml").exists():
        raise UserError(f"{file} is a checkpoint of another run than {path}: python evaluate.py {file}")
    return path, file


def _config_of_run(folder: Path, checkpoint: checkpoints.Checkpoint, overrides: Sequence[str]) -> Config:
    """Return the checkpoint's config with the run's data folders and device, which may have changed, and overrides.

    Raise a `UserError` if config.yaml and the checkpoint do not belong together.
    """
    path = folder / "config.yaml"
    current = load_config(path) if path.exists() else checkpoint.config
    may_differ = [name for name, _ in leaves(current) if not MUST_AGREE.match(name)]
    checkpoints.reject_other_settings(current, checkpoint, may_differ)
    data = replace(checkpoint.config.data, root=current.data.root, cache=current.data.cache)
    config = replace(checkpoint.config, data=data, device=current.device)
    return apply_overrides(config, overrides, allowed=MAY_CHANGE)


def candidate_of_labels(pattern: str, config: Config, tiles: Sequence[Tile]) -> Candidate:
    """Find and check the label images of another tool: a folder, or a pattern such as other/{key}_labels.png.

    In a folder, the label image of a tile has the name of its mask, of its image or of its key, as PNG, TIFF or BMP. If
    tiles in several folders may have one name, it has the name of its key.
    """
    has_key = "{key}" in pattern
    folder = Path(TOKEN.split(pattern)[0] + "x").parent if has_key else Path(pattern)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of label images; give a folder, or a pattern with {{key}} in it")
    if has_key:
        anchor = Path(Path(pattern).anchor)
        files = find_files(anchor, Path(pattern).relative_to(anchor).as_posix())
        wanted = {tile.key for tile in tiles}
        found = by_key(anchor, [file for file in files if file.key in wanted], "label image")
        label_images = {key: anchor / file.path for key, file in found.items()}
    else:
        label_images = _match_folder(folder, tiles, by_key_alone=joins_folders(config.data.images))
    for tile in tiles:
        if tile.key not in label_images:
            raise UserError(f"{pattern}: no label image for tile '{tile.key}'; every tile that is scored needs one")
        path, mask = label_images[tile.key], Path(config.data.root) / tile.mask
        size, expected = picture_size(path), picture_size(mask)
        if size != expected:
            raise UserError(f"{path}: {size[0]} x {size[1]} pixels (height x width), but {mask} has {expected[0]} x "
                            f"{expected[1]}; both must have the same size")
        if (read_mask(path, config.data) == IGNORE).any():  # which raises a UserError for unknown values
            raise UserError(f"{path}: some pixels have a value or colour of data.ignore; a prediction must give every "
                            "pixel a class")
    name = Path(pattern).stem.replace("{key}", "") if has_key else Path(pattern).name
    name = name.strip("-_#. ") or folder.resolve().name
    return Candidate(name, config, Path(pattern), choose_device(config.device), label_images=label_images)


def _match_folder(folder: Path, tiles: Sequence[Tile], by_key_alone: bool) -> dict[str, Path]:
    """Return the label images in a folder by the keys of the tiles; tiles may lack one.

    Their names are those of masks, images or keys, or of keys alone.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in LABEL_SUFFIXES:
            by_stem.setdefault(composed(path.stem), []).append(path)
    if not by_stem:
        inside = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")[:5])
        raise UserError(f"{folder}: no label images ({', '.join(LABEL_SUFFIXES)})"
                        + (f"; did you mean one of its folders {inside}?" if inside else ""))
    label_images = {}
    for tile in tiles:
        stems = () if by_key_alone else (Path(tile.mask).stem, Path(tile.image).stem)
        names = dict.fromkeys(composed(name) for name in (*stems, tile.key))
        found = [path for name in names for path in by_stem.get(name, ())]
        if len(found) > 1:
            raise UserError(f"{folder}: both {found[0].name} and {found[1].name} may be the label image of tile "
                            f"'{tile.key}'; keep one, or give a pattern with {{key}} in it")
        if found:
            label_images[tile.key] = found[0]
    return label_images
