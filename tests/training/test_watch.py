"""training/watch.py: the tiles that are shown, and what TensorBoard gets, also after a resumed run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import arrays, as_store

import train
from common.config_files import apply_overrides
from common.console import UserError
from training import watch
from training.batches import normalise
from training.crops import draw_folds
from training.learner import build_learner
from training.training_set import prepare_data


@pytest.mark.parametrize("scheme", ["kfold", "plain"])
def test_the_shown_tiles_stay_the_same_and_validate_in_plain_training(tiny, scheme):
    config = apply_overrides(tiny, [f"train.scheme={scheme}"])
    data = prepare_data(config)
    learner = build_learner(config, data.statistics)
    keys, images, truth, predicted = watch.predicted_tiles(learner, data, config)
    assert learner.model.training is False and len(set(keys)) == len(keys) == len(images) >= 2
    tiles = {tile.key: data.store.tile(row) for tile, row in zip(data.tiles, data.rows, strict=True)}
    for key, image, labels in zip(keys, images, truth, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(tiles[key], (16, 16), axis=(0, 1))  # (h, w, 4, 16, 16)
        shown = np.dstack([image, labels]).transpose(2, 0, 1)
        assert (windows == shown).all((2, 3, 4)).sum() == 1, "one window of the tile"
    logits = learner.model(normalise(torch.from_numpy(images), data.statistics))
    assert (logits.argmax(1).numpy() == predicted).all()
    validating = draw_folds(data.groups, 2, 12, config.seed, 1, scheme == "plain")[0]
    if scheme == "plain":
        assert set(keys) <= {data.tiles[i].key for i in validating}
    with torch.no_grad():
        learner.model.head.bias[2] = 1e3
    again = watch.predicted_tiles(learner, data, config)
    assert again[0] == keys and (again[1] == images).all() and (again[3] == 2).all()


def test_crops_with_many_classes_are_shown(tiny, monkeypatch):
    monkeypatch.setattr(watch, "SHOWN", 2)
    data = prepare_data(tiny)
    learner = build_learner(tiny, data.statistics)
    tiles = arrays(data.store)
    tiles[..., 3] = 0
    blank = replace(data, store=as_store(tiles))
    keys, *_ = watch.predicted_tiles(learner, blank, tiny)
    others = [key for key in (tile.key for tile in data.tiles) if key not in keys]
    all_shown = draw_folds(data.groups, 2, 12, tiny.seed, 0)[0]
    one = next(i for i in all_shown if data.tiles[i].key in others)
    tiles[data.rows[one], ::2, :, 3] = 2
    keys, _, truth, _ = watch.predicted_tiles(learner, replace(data, store=as_store(tiles)), tiny)
    assert data.tiles[one].key in keys and len(keys) == 2 and {2} <= set(np.unique(truth))


def test_tensorboard_gets_each_epoch_once_also_of_a_run_killed_before_it_sent_one(workplace, tiny, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(watch, "SECONDS_BETWEEN_PICTURES", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(watch.Watch, "after_epoch", killed_after(1, watch.Watch.after_epoch))
        train.start(tiny, tensorboard=True)
    for epochs in (2, 3):  # the second time, the first epochs are known
        train.resume(workplace / "runs/tiny", [f"train.epochs={epochs}"], tensorboard=True)
    found = accumulators.EventAccumulator(str(workplace / "runs/tiny/tensorboard"))
    found.Reload()
    history = train.run_folder.read_metrics(workplace / "runs/tiny")
    for name in ("train_loss", "val_loss", "val_loss_1", "train_ema", "lr", "images_per_second"):
        events = found.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.value for event in events] == pytest.approx([row[name] for row in history], rel=1e-5)
    assert [event.step for event in found.Images("predictions")] == [1, 3]


def killed_after(epochs, after_epoch):
    """The epoch that follows is saved, but TensorBoard does not hear of it."""
    def replacement(self, history):
        if len(history) > epochs:
            raise KeyboardInterrupt
        after_epoch(self, history)
    return replacement


def test_without_tensorboard_the_error_says_what_to_install(workplace, tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install -r requirements-extra.txt"):
        train.start(tiny, tensorboard=True)
    assert not (workplace / "runs/tiny").exists()
