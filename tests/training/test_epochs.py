"""training/epochs.py: an epoch equals the method written down plainly, and the survivor is chosen as in the report."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import arrays, as_store, assert_equal, numpy_batches

from common.config_files import apply_overrides
from common.console import Progress, UserError
from common.masks import IGNORE
from common.randomness import torch_seed
from losses import make_loss
from training import epochs
from training.augmentation import draw_views
from training.batches import copy_pixels
from training.crops import Crops, draw_folds, training_crops, validation_crops
from training.learner import build_learner
from training.training_set import prepare_data


def test_folds_start_from_one_snapshot_and_the_lowest_finite_loss_survives(tiny, monkeypatch):
    """Fake passes return given validation losses, and each fold marks weights and Adam state with its number."""
    data = prepare_data(tiny)
    learner = build_learner(tiny, data.statistics)
    learner.model(torch.randn(2, 3, 16, 16)).sum().backward()
    learner.optimizer.step()  # so that the Adam states differ too
    start, trained = learner.take_snapshot(), []

    def fake_pass(learner, data, crops, batch_size, training, progress):
        if not training:
            return next(val_losses)
        assert_equal(learner.state, start)
        trained.append(1)
        number = float(len(trained))
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter.fill_(number)
                learner.optimizer.state[parameter]["exp_avg"].fill_(number)
        return number

    monkeypatch.setattr(epochs, "run_pass", fake_pass)
    for losses, survivor in (([math.nan, 0.25], 1), ([0.25, math.nan], 0), ([0.25, 0.5], 0), ([0.5, 0.25], 1)):
        val_losses = iter(losses)
        learner.restore_snapshot(start)
        trained.clear()
        row = epochs.run_epoch(learner, data, tiny, epoch=1)
        assert row["survivor"] == survivor and row["val_loss"] == 0.25 and row["train_loss"] == survivor + 1
        for parameter in learner.model.parameters():
            assert (parameter == survivor + 1).all()
            assert (learner.optimizer.state[parameter]["exp_avg"] == survivor + 1).all()
    val_losses = iter([math.nan, math.nan])
    learner.restore_snapshot(start)
    trained.clear()
    with pytest.raises(UserError, match="epoch 2.*finite validation loss.*optim.lr"):
        epochs.run_epoch(learner, data, tiny, epoch=2)


def plain_epoch(config, data, epoch):
    """The method without concern for speed: copies of whole state dicts, NumPy crops, the loss read at each step."""
    learner = build_learner(config, data.statistics)
    model, keys = learner.model, (data.store.sizes, config.data.crop, config.seed, epoch)
    loss_of = make_loss(config.loss, torch.tensor(data.statistics.frequencies))
    plan, folds = config.train, [data.rows[fold] for fold in draw_folds(
        data.groups, config.train.folds, config.train.images_per_epoch, config.seed, epoch)]
    mean, std = (torch.tensor(values) for values in (data.statistics.mean, data.statistics.std))
    start, results = copy.deepcopy(model.state_dict()), []
    for fold in range(plan.folds):
        model.load_state_dict(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay,
                                     fused=True)
        torch.manual_seed(torch_seed(config.seed, epoch, fold, "dropout"))
        losses = []
        for training, crops in ((True, training_crops(folds, fold, *keys)),
                                (False, validation_crops(folds, fold, *keys))):
            model.train(training)
            total = 0.0
            for windows in numpy_batches(crops, data.store, plan.batch_size):
                batch = torch.from_numpy(windows)
                images = ((batch[..., :3] / 255 - mean) / std).permute(0, 3, 1, 2)
                with torch.set_grad_enabled(training):
                    loss = loss_of(model(images), batch[..., 3].long())
                if training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                total += loss.item() * len(batch)
            losses.append(total / len(crops))
        results.append((losses, copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())))
    survivor = int(np.argmin([losses[1] for losses, _, _ in results]))
    return survivor, *results[survivor], [losses[1] for losses, _, _ in results]


@pytest.mark.parametrize("settings", [["loss.name=wce", "model.dropout=0.5"], ["loss.name=log_dice_ce"]])
def test_an_epoch_equals_the_plain_one_bit_for_bit(tiny, settings):
    """In float32 on a CPU. The losses differ a little, because `run_pass` sums them in float32."""
    config = apply_overrides(tiny, [*settings, "train.batch_size=5"])  # the last batches are smaller
    data = prepare_data(config)
    learner = build_learner(config, data.statistics)
    row = epochs.run_epoch(learner, data, config, epoch=3)
    survivor, losses, model, optimizer, val_losses = plain_epoch(config, data, epoch=3)
    assert row["survivor"] == survivor
    assert (row["train_loss"], row["val_loss"]) == pytest.approx(losses, rel=1e-6)
    assert [row[f"val_loss_{fold}"] for fold in range(2)] == pytest.approx(val_losses, rel=1e-6)
    assert_equal(learner.model.state_dict(), model)
    assert_equal(learner.optimizer.state_dict()["state"], optimizer["state"])


def test_an_epoch_is_the_same_with_the_store_on_the_device(tiny):
    data, results = prepare_data(tiny), []
    on_device = replace(data.store, pixels=copy_pixels(torch.device("cpu"), data.store.pixels))
    for store in (data.store, on_device):
        learner = build_learner(tiny, data.statistics)
        results.append((epochs.run_epoch(learner, replace(data, store=store), tiny, 1), learner.state))
    assert_equal(*results)


def test_the_mean_loss_is_over_images_and_not_over_batches(tiny):
    data = prepare_data(tiny)
    learner = build_learner(tiny, data.statistics)
    folds = [data.rows[fold] for fold in draw_folds(data.groups, 2, 14, 0, 1)]
    crops = validation_crops(folds, 0, data.store.sizes, 16, 0, 1)
    with Progress("", 1) as progress:
        losses = [epochs.run_pass(learner, data, crops, size, False, progress) for size in (7, 3, 1)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_images_of_ignored_pixels_are_in_no_mean(tiny):
    data = prepare_data(tiny)
    learner = build_learner(tiny, data.statistics)
    rows, tiles = np.arange(6), arrays(data.store)
    tiles[2:4, ..., 3] = IGNORE
    blank = replace(data, store=as_store(tiles))

    def loss(data, rows):
        crops = Crops(rows, *(np.zeros(len(rows), int) for _ in range(5)), size=16)
        with Progress("", 1) as progress:
            return epochs.run_pass(learner, data, crops, 2, False, progress)

    assert loss(blank, rows) == pytest.approx(loss(data, np.array([0, 1, 4, 5])), rel=1e-5)
    assert math.isnan(loss(blank, rows[2:4]))


def test_training_crops_are_augmented_as_the_config_says_and_validation_crops_are_not(tiny, monkeypatch):
    config = apply_overrides(tiny, ["augment.noise=9", "augment.rotate=20", "augment.right_angles=true"])
    data, passes = prepare_data(config), []
    monkeypatch.setattr(epochs, "run_pass", lambda learner, data, crops, size, training, progress:
                        passes.append((training, crops)) or 1.0)
    epochs.run_epoch(build_learner(config, data.statistics), data, config, epoch=5)
    assert [training for training, _ in passes] == [True, False] * 2
    for fold, (_, crops) in enumerate(passes[::2]):
        expected = draw_views(config.augment, len(crops), config.seed, 5, fold)
        assert all(np.array_equal(getattr(crops.views, name), getattr(expected, name)) for name in vars(expected))
        assert crops.margin > 0 and crops.transpose.any()
    assert all(crops.views is None and crops.margin == 0 and not crops.transpose.any() for _, crops in passes[1::2])


# ---------------------------------------------------------------------------------------------- plain training

def test_fixed_folds_hold_the_same_groups_and_the_first_the_same_tiles_in_every_epoch():
    groups = [f"g{i % 17}" for i in range(103)]
    drawn = [draw_folds(groups, 4, 160, seed=3, epoch=epoch, fixed=True) for epoch in range(1, 20)]
    names = [{groups[i] for epoch in drawn for i in epoch[fold]} for fold in range(4)]
    assert sum(map(len, names)) == len(set().union(*names)) == 17, "no group is ever in two folds"
    assert len({tuple(folds[0]) for folds in drawn}) == 1
    assert all(len({tuple(folds[fold]) for folds in drawn}) == 19 for fold in (1, 2, 3))
    tiles = {int(i) for folds in drawn for fold in folds[1:] for i in fold}
    assert tiles == {i for i, group in enumerate(groups) if group not in names[0]}, "all others are learned from"
    other = draw_folds(groups, 4, 160, seed=4, epoch=1, fixed=True)
    assert {groups[i] for i in other[0]} != names[0]


def test_a_plain_epoch_continues_one_model_and_validates_it_on_the_same_images(tiny, monkeypatch):
    config = apply_overrides(tiny, ["train.scheme=plain", "train.folds=3"])
    data = prepare_data(config)
    learner, passes = build_learner(config, data.statistics), []

    def fake_pass(learner, data, crops, batch_size, training, progress):
        passes.append((training, crops, {data.store.tile(row)[0, 0].tobytes() for row in crops.rows}))
        if training:
            with torch.no_grad():
                learner.model.head.bias += 1
        return 5.0

    monkeypatch.setattr(epochs, "run_pass", fake_pass)
    before = learner.model.head.bias.clone()
    rows = [epochs.run_epoch(learner, data, config, epoch) for epoch in (1, 2, 3)]
    assert rows[0] == {"survivor": 0, "train_loss": 5.0, "val_loss": 5.0, "val_loss_0": 5.0}
    assert torch.equal(learner.model.head.bias, before + 3), "each epoch starts where the last one ended"
    assert [training for training, _, _ in passes] == [True, False] * 3
    trained, validated = passes[::2], passes[1::2]
    assert [len(crops) for _, crops, _ in passes] == [8, 4] * 3
    for _, crops, _ in validated:
        assert all(np.array_equal(getattr(crops, name), getattr(validated[0][1], name)) for name in
                   ("rows", "top", "left"))
    assert len({tuple(crops.top) for _, crops, _ in trained}) == 3
    assert not {row for _, crops, _ in trained for row in crops.rows} & set(validated[0][1].rows)
