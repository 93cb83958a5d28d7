"""One epoch: train and validate the k models, keep the survivor (report, section 5.1.2)."""

import math

import torch

from common.config import Config
from common.console import Progress, UserError
from common.randomness import torch_seed
from training.batches import batches_on, normalise
from training.crops import Crops, draw_folds, training_crops, validation_crops
from training.learner import Learner
from training.training_set import TrainingSet


def pass_over(learner: Learner, data: TrainingSet, crops: Crops, batch_size: int, training: bool,
              progress: Progress) -> float:
    """One pass over `crops`, with weight updates if `training`; the mean loss over its images."""
    learner.model.train(training)
    total, seen = torch.zeros((), device=learner.device), 0
    shown = torch.zeros((), pin_memory=learner.device.type == "cuda")  # the mean so far, read without waiting for a GPU
    with torch.set_grad_enabled(training):
        for batch in batches_on(learner.device, crops, data.store, batch_size):       # (B, size, size, 4) uint8
            images = normalise(batch[..., :3], data.statistics)                      # (B, 3, size, size)
            loss = learner.loss(images, batch[..., 3].long())
            if training:
                loss.backward()
                learner.optimizer.step()
                learner.optimizer.zero_grad()
            total += loss.detach() * len(batch)
            seen += len(batch)
            shown.copy_(total / seen, non_blocking=True)
            progress.advance(len(batch), note=f"loss {shown:.4f}")
    return total.item() / seen


def run_epoch(learner: Learner, data: TrainingSet, config: Config, epoch: int) -> dict:
    """Train and validate the k models of an epoch; keep the survivor, return its and all folds' losses."""
    plan, keys = config.train, (data.store.shape[1:3], config.data.crop, config.seed, epoch)
    folds = [data.rows[fold] for fold in
             draw_folds(data.groups, plan.folds, plan.images_per_epoch, config.seed, epoch)]
    start, best, survivor, kept, val_losses = learner.snapshot(), math.inf, None, None, []
    with Progress("", plan.folds * plan.images_per_epoch, "image") as progress:
        for fold in range(plan.folds):
            progress.title = f"epoch {epoch}/{plan.epochs} fold {fold + 1}/{plan.folds}"
            learner.restore(start)
            torch.manual_seed(torch_seed(config.seed, epoch, fold, "dropout"))
            train_loss = pass_over(learner, data, training_crops(folds, fold, *keys), plan.batch_size, True, progress)
            val_loss = pass_over(learner, data, validation_crops(folds, fold, *keys), plan.batch_size, False, progress)
            val_losses.append(val_loss)
            if val_loss < best:  # false for NaN, which argmin would keep
                best = val_loss
                survivor = {"survivor": fold, "train_loss": train_loss, "val_loss": val_loss}
                kept = learner.snapshot(into=kept)
    if survivor is None:
        raise UserError(f"epoch {epoch}: no fold has a finite validation loss ({val_losses}); what earlier epochs "
                        "wrote is kept. Start a new run with a lower optim.lr, or with train.precision=float32")
    learner.restore(kept)
    return survivor | {f"val_loss_{fold}": loss for fold, loss in enumerate(val_losses)}


def moving_average(previous: float | None, value: float, alpha: float) -> float:
    """Equation 1."""
    return value if previous is None else (1 - alpha) * value + alpha * previous
