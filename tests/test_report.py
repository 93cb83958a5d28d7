"""The numbers that the report prints, and its published tiles, predictions and loss curves (with --real-data)."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from common.config import Config, Data, Filter
from dataset import TILE_LIST, Tile, write_tiles
from filtering.pipeline import filter_tiles
from losses import class_weights
from training.crops import draw_folds, training_crops, validation_crops
from training.epochs import moving_average


def test_equation_4_gives_the_printed_weights():
    weights = class_weights(torch.tensor([0.525, 0.275, 0.200]))
    assert [round(w, 3) for w in weights.tolist()] == [0.181, 0.345, 0.474]
    assert weights.sum().item() == pytest.approx(1)


def test_an_epoch_is_250_batches_and_training_at_most_50_000_updates():
    train = Config().train
    folds = draw_folds([""] * 8827, train.folds, train.images_per_epoch, seed=0, epoch=1)
    assert len(set(np.concatenate(folds))) == 4000
    sizes = np.full((8827, 2), 500)
    for fold in range(train.folds):
        updates = math.ceil(len(training_crops(folds, fold, sizes, 256, 0, 1)) / train.batch_size)
        validations = math.ceil(len(validation_crops(folds, fold, sizes, 256, 0, 1)) / train.batch_size)
        assert (updates, validations) == (200, 50)
    assert updates * train.epochs == 50_000


CURVES = {"ce": (66,), "wce": (), "dice": (), "dice_ce": ()}


@pytest.mark.parametrize("name", [*(f"large_drop_batch_{n}" for n in CURVES), "small_dice_ce"])
def test_equation_1_gives_the_published_moving_averages(real_data, name):
    """The CE run was resumed at epoch 66 without its moving averages, so they start again there."""
    curves = torch.load(real_data / f"report_tiles/loss_curves/model_{name}.pt", weights_only=True).double().numpy()
    curves = curves[: int(np.flatnonzero(curves.any(1)).max()) + 1]
    restarts = {0, *(epoch - 1 for epoch in CURVES.get(name.removeprefix("large_drop_batch_"), ()))}
    assert len(curves) >= 60
    for loss, average in ((0, 2), (1, 3)):
        ema = None
        for epoch, row in enumerate(curves):
            ema = moving_average(None if epoch in restarts else ema, row[loss], Config().optim.ema)
            assert ema == pytest.approx(row[average], abs=1e-5), f"epoch {epoch + 1}"


@pytest.mark.parametrize("reference", ["absolute", "maximum"])
def test_the_reports_test_tiles_pass_the_filter(real_data, reference):
    config = Config(data=Data(root=str(real_data / "report_tiles"), test_fraction=0.4),
                    filter=Filter(blank_reference=reference))
    tiles = filter_tiles(config).tiles
    assert {tile.key: tile.split in ("train", "test") for tile in tiles} == {"26": True, "139": True, "1058": True}


FIGURE_9 = {"ce": (0.6241, 0.514), "wce": (0.6283, 0.572), "dice": (0.6138, 0.571), "dice_ce": (0.5152, 0.486)}


def test_figure_9_scores(real_data, tmp_path, monkeypatch):
    """evaluate.py gives the printed accuracies, and hard Dice, on the pixels whose truth is known exactly."""
    source = real_data / "report_tiles"
    known = np.asarray(Image.open(source / "known/known_pixels.png")) == 255
    grid = np.ix_(known.any(1), known.any(0))
    assert known[grid].all() and known.sum() == known[grid].size
    for name in ("frames/frame#26.png", "masks/mask#26.png", *(f"pred/{name}_mask#26.png" for name in FIGURE_9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(Image.open(source / name))[grid]).save(tmp_path / name)
    write_tiles(tmp_path / TILE_LIST, [Tile("26", "frames/frame#26.png", "masks/mask#26.png", split="test")])
    (tmp_path / "x.yaml").write_text(f"data: {{root: {tmp_path}}}")
    patterns = [f"--predictions={tmp_path}/pred/{name}_mask#{{key}}.png" for name in FIGURE_9]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *patterns, "--config", f"{tmp_path}/x.yaml",
                                      "--out", f"{tmp_path}/out"])
    evaluate.main()
    candidates = json.loads((tmp_path / "out/scores.json").read_text())["entries"]
    assert [candidate["name"] for candidate in candidates] == [f"{name}_mask" for name in FIGURE_9]
    for candidate, (accuracy, dice) in zip(candidates, FIGURE_9.values(), strict=True):
        assert candidate["scores"]["pixel_accuracy"]["value"] == pytest.approx(accuracy, abs=1e-3)
        assert candidate["scores"]["dice"]["mean"]["value"] == pytest.approx(dice, abs=1e-3)
