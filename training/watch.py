"""Show how training goes: the loss curves and the predictions of some tiles as pictures, and on request TensorBoard."""

import time
from pathlib import Path

import numpy as np
import torch

from common import palette
from common.config import Config
from common.console import UserError
from common.devices import autocast
from common.masks import IGNORE
from training import figures
from training.batches import batches_on, normalise
from training.crops import draw_folds, validation_crops
from training.learner import Learner
from training.training_set import TrainingSet

SECONDS_BETWEEN_PICTURES = 60
SHOWN, LOOKED_AT = 6, 24  # tiles in predictions.png, and of how many they are chosen
PANEL = {"kfold": "tiles that it has learned from or will", "plain": "tiles of the fold that validates"}
LEFT_OUT = ("epoch", "survivor", "seconds", "peak_memory_mb")  # columns of metrics.csv that TensorBoard does not show


class Watch:
    """Writes the pictures of a run, at most once in a minute and at the end, and sends TensorBoard every epoch."""

    def __init__(self, folder: Path, config: Config, learner: Learner, data: TrainingSet,
                 history: list[dict], tensorboard: bool):
        self.folder, self.config, self.learner, self.data = folder / "figures", config, learner, data
        self.board = open_board(folder / "tensorboard", len(history)) if tensorboard else None
        if self.board and history:  # a run may be killed after it saved an epoch and before it sent it
            self.send(history[-1])
        self.drawn_epoch, self.drawn = 0, time.monotonic()

    def send(self, row: dict) -> None:
        """Send an epoch's row of metrics.csv to TensorBoard."""
        for name, value in row.items():
            if name not in LEFT_OUT:
                self.board.add_scalar(name, value, row["epoch"])
        self.board.flush()

    def after_epoch(self, history: list[dict]) -> None:
        if self.board:
            self.send(history[-1])
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES:
            self.draw(history)

    def draw(self, history: list[dict]) -> None:
        config, epoch = self.config, history[-1]["epoch"]
        palette.save(figures.losses(history, config.train.models, config.name), self.folder / "losses.png")
        predictions = figures.predictions(*predicted_tiles(self.learner, self.data, config), config.data.classes,
                                          f"{config.name}, epoch {epoch}: {PANEL[config.train.scheme]}")
        palette.save(predictions, self.folder / "predictions.png")
        if self.board:
            self.board.add_figure("predictions", predictions, epoch)
            self.board.flush()
        self.drawn_epoch, self.drawn = epoch, time.monotonic()

    def end(self, history: list[dict]) -> None:
        if history[-1]["epoch"] != self.drawn_epoch:
            self.draw(history)
        if self.board:
            self.board.close()


def predicted_tiles(learner: Learner, data: TrainingSet,
                    config: Config) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Predict a crop of some tiles, the same in every epoch; with plain training, of tiles that validate.

    Of the first `LOOKED_AT` tiles of the first fold, those are shown whose crop has the most classes. Return keys,
    images (N, H, W, 3), truth (N, H, W) and prediction (N, H, W), uint8.
    """
    plan = config.train
    first = draw_folds(data.groups, plan.folds, plan.images_per_epoch, config.seed, 0, plan.is_plain)[0]
    places = np.array(list(dict.fromkeys(first.tolist()))[:LOOKED_AT])
    crops = validation_crops([data.rows[places]], 0, data.store.sizes, config.data.crop, config.seed, 0)
    batch = next(batches_on(learner.device, crops, data.store, len(crops)))
    classes = [len(set(np.unique(labels)) - {IGNORE}) for labels in batch[..., 3].cpu().numpy()]
    chosen = np.sort(np.argsort(classes, kind="stable")[::-1][:SHOWN])
    places, batch = places[chosen], batch[torch.from_numpy(chosen).to(batch.device)]
    learner.model.eval()
    with torch.no_grad(), autocast(learner.device, learner.precision):
        labels = learner.model(normalise(batch[..., :3], data.statistics)).argmax(1)
    return ([data.tiles[i].key for i in places], batch[..., :3].cpu().numpy(), batch[..., 3].cpu().numpy(),
            labels.to(torch.uint8).cpu().numpy())


def open_board(folder: Path, last_epoch: int):
    """Return a writer for TensorBoard, which replaces what an earlier start of the run has sent of its last epoch."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard needs a package that is missing ({error}): pip install -r "
                        "requirements-extra.txt") from None
    return SummaryWriter(folder, purge_step=last_epoch or None)
