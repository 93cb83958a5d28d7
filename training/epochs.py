"""One epoch: train and validate k models and keep the survivor (report, section 5.1.2), or train one (plain).

Rank r of n trains the folds r, r + n, ... (common/ranks.py). Which rank trains a fold changes nothing in the result.
"""

import math

import torch

from common import ranks
from common.config import Config
from common.console import Progress, UserError
from common.masks import IGNORE
from common.randomness import torch_seed
from training.batches import batches_on, normalise
from training.crops import Crops, draw_folds, training_crops, validation_crops
from training.learner import Learner
from training.training_set import TrainingSet


def run_pass(learner: Learner, data: TrainingSet, crops: Crops, batch_size: int, training: bool,
             progress: Progress) -> float:
    """Make one pass over `crops`, with weight updates if `training`. Return the mean loss over its images.

    Images in which no pixel has a class do not count; the result is NaN if there are no others.
    """
    learner.model.train(training)
    total, seen = (torch.zeros((), device=learner.device) for _ in range(2))
    mean_so_far = torch.zeros((), pin_memory=learner.device.type == "cuda")  # pinned: read without waiting for the GPU
    with torch.set_grad_enabled(training):
        for batch in batches_on(learner.device, crops, data.store, batch_size):
            images = normalise(batch[..., :3], data.statistics)                      # (B, 3, size, size)
            labels = batch[..., 3]                                                   # (B, size, size) uint8
            loss = learner.batch_loss(images, labels.long())
            if training:
                loss.backward()
                learner.optimizer.step()
                learner.optimizer.zero_grad()
            count = (labels != IGNORE).flatten(1).any(dim=1).sum()
            total += loss.detach() * count
            seen += count
            mean_so_far.copy_(total / seen, non_blocking=True)
            progress.advance(len(batch), note=f"loss {mean_so_far:.4f}")
    return total.item() / seen.item() if seen.item() else math.nan


def run_epoch(learner: Learner, data: TrainingSet, config: Config, epoch: int) -> dict:
    """Train and validate the models of an epoch. Leave the survivor in `learner`, and return all losses.

    Plain training has one model, which the first fold validates: the same images in every epoch.
    """
    plan = config.train
    places = draw_folds(data.groups, plan.folds, plan.images_per_epoch, config.seed, epoch, fixed=plan.is_plain)
    folds = [data.rows[fold] for fold in places]  # rows of the store
    keys = data.store.sizes, config.data.crop, config.seed
    losses, best, best_state = {}, None, None  # of the folds of this rank
    start = learner.take_snapshot()
    with ranks.SharedProgress("", plan.images, "image") as progress:
        for fold in range(ranks.rank(), plan.models, ranks.count()):
            of_folds = "" if plan.is_plain else f" fold {fold + 1}/{plan.models}"
            progress.title = f"epoch {epoch}/{plan.epochs}{of_folds if ranks.count() == 1 else ''}"
            ranks.begin(f"fold {fold + 1} of epoch {epoch}")
            learner.restore_snapshot(start)
            torch.manual_seed(torch_seed(config.seed, epoch, fold, "dropout"))
            crops = training_crops(folds, fold, *keys, epoch, config.augment)
            train_loss = run_pass(learner, data, crops, plan.batch_size, True, progress)
            crops = validation_crops(folds, fold, *keys, 0 if plan.is_plain else epoch)
            val_loss = run_pass(learner, data, crops, plan.batch_size, False, progress)
            losses[fold] = train_loss, val_loss
            if lowest(losses) == fold:
                best, best_state = fold, learner.take_snapshot(into=best_state)
        ranks.meet(progress.look)
    for others in ranks.gather(losses):
        losses |= others
    val_losses = [losses[fold][1] for fold in range(plan.models)]
    survivor = lowest(losses)
    if survivor is None:
        advice = "a lower optim.lr, or with train.precision=float32"
        if config.data.ignore or any(tile.has_new_mask for tile in data.tiles):
            advice = f"a larger data.crop if crops may hold nothing but ignored pixels, or else with {advice}"
        ranks.fail(UserError(f"epoch {epoch}: no fold has a finite validation loss ({val_losses}). What earlier epochs "
                             f"wrote is kept. Start a new run with {advice}"))
    if survivor == best:
        learner.restore_snapshot(best_state)
    learner.copy_from_rank(survivor % ranks.count())
    return {"survivor": survivor, "train_loss": losses[survivor][0], "val_loss": losses[survivor][1],
            **{f"val_loss_{fold}": loss for fold, loss in enumerate(val_losses)}}


def lowest(losses: dict[int, tuple[float, float]]) -> int | None:
    """Return the fold with the lowest validation loss, the first of equal ones; None if no loss is a number.

    `losses` holds the training and the validation loss of each fold.
    """
    finite = [fold for fold, (train_loss, val_loss) in sorted(losses.items())
              if not math.isnan(train_loss) and val_loss < math.inf]  # false for NaN, which argmin would choose
    return min(finite, key=lambda fold: losses[fold][1], default=None)


def moving_average(previous: float | None, value: float, alpha: float) -> float:
    """Return alpha * previous + (1 - alpha) * value (equation 1); the first value has no average before it."""
    return value if previous is None else (1 - alpha) * value + alpha * previous
