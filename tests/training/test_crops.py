"""training/crops.py: folds that share no group, random windows and flips, and randomness that depends on keys alone."""

import re
from collections import Counter

import numpy as np
import pytest

from common.config import Config
from common.config_files import apply_overrides
from common.console import UserError
from common.randomness import generator
from training.crops import draw_folds, training_crops, validation_crops

SIZES = np.full((50, 2), 99)


@pytest.mark.parametrize("groups", [[""] * 103, [f"g{i % 17}" for i in range(103)]], ids=["tiles", "groups"])
def test_folds_are_disjoint_and_random_and_never_share_a_group(groups):
    seen = set()
    for epoch in range(1, 30):
        folds = draw_folds(groups, 5, 60, seed=3, epoch=epoch)
        assert [len(fold) for fold in folds] == [12] * 5
        names = [{groups[i] or i for i in fold} for fold in folds]
        assert sum(map(len, names)) == len(set().union(*names))
        seen |= {int(i) for fold in folds for i in fold}
    assert seen == set(range(103)), "over many epochs every training tile is used"


def test_every_tile_is_drawn_about_equally_often():
    counts = np.zeros(100)
    for epoch in range(300):
        np.add.at(counts, np.concatenate(draw_folds([""] * 100, 5, 40, seed=0, epoch=epoch)), 1)
    assert abs(counts - 120).max() < 5 * (300 * 0.4 * 0.6) ** 0.5


def test_too_few_tiles_repeat_in_their_own_fold_with_other_crops():
    folds = draw_folds([""] * 10, 5, 100, seed=0, epoch=1)
    assert [sorted(np.bincount(fold, minlength=10).tolist(), reverse=True)[:3] for fold in folds] == [[10, 10, 0]] * 5
    assert len(set(np.concatenate(folds))) == 10
    crops = validation_crops(folds, 0, np.full((10, 2), 500), 256, seed=0, epoch=1)
    assert len(set(zip(crops.rows, crops.top, crops.left, strict=True))) == 20


@pytest.mark.parametrize(("groups", "images", "advice"), [
    (["a", "b", "c"] * 2, 10, ["train.folds=2"]), (["a", "b", "c"] * 2, 60, ["train.folds=3"]),
    (["a", "b", "c"] * 2, 35, ["train.folds=3", "train.images_per_epoch=33"]), (["", ""], 20, ["train.folds=2"]),
    (["a", "b"], 5, ["train.folds=2", "train.images_per_epoch=4"])])
def test_with_few_groups_the_advice_works(groups, images, advice):
    with pytest.raises(UserError, match=r"5 folds.*group.*have") as error:
        draw_folds(groups, 5, images, seed=0, epoch=1)
    assert re.findall(r"train\.\w+=\d+", str(error.value)) == advice
    settings = dict(setting.split("=") for setting in [f"train.images_per_epoch={images}", *advice])
    config = apply_overrides(Config(), [f"{name}={value}" for name, value in settings.items()])
    folds = draw_folds(groups, config.train.folds, config.train.images_per_epoch, seed=0, epoch=1)
    assert len(folds) == config.train.folds


@pytest.mark.parametrize(("groups", "advice"), [(["a"] * 9, "without data.group"), (["a"], "add tiles"),
                                                ([""], "add tiles")])
def test_one_group_cannot_be_dealt_to_folds(groups, advice):
    with pytest.raises(UserError, match=f"have 1.*{advice}") as error:
        draw_folds(groups, 5, 10, seed=0, epoch=1)
    assert "train.folds=1" not in str(error.value)


def test_training_crops_are_the_other_folds_shuffled():
    folds = [np.arange(i * 10, i * 10 + 10) for i in range(4)]
    crops = training_crops(folds, 2, np.full((40, 2), (50, 60)), 16, seed=0, epoch=1)
    assert sorted(crops.rows) == [i for i in range(40) if not 20 <= i < 30]
    assert list(crops.rows) != sorted(crops.rows)


def test_no_epoch_trains_on_the_tiles_that_it_validates():
    for epoch in range(5):
        folds = draw_folds([""] * 40, 5, 20, seed=0, epoch=epoch)
        for fold in range(5):
            crops = training_crops(folds, fold, np.full((40, 2), 32), 16, 0, epoch)
            assert not set(crops.rows) & set(folds[fold])
            assert max(Counter(crops.rows.tolist()).values()) == 1


def test_windows_reach_every_position_on_both_axes_independently():
    folds = [np.zeros(4000, int)] * 2
    crops = training_crops(folds, 0, np.array([[20, 24]]), 16, seed=1, epoch=1)
    assert set(crops.top) == set(range(5)) and set(crops.left) == set(range(9))
    assert len(set(zip(crops.top, crops.left, strict=True))) == 45
    flips = set(zip(crops.flip_vertical, crops.flip_horizontal, strict=True))
    assert len(flips) == 4, "no flip, either flip, and both flips occur"


def test_randomness_depends_on_its_keys_alone():
    folds = draw_folds([""] * 50, 5, 40, seed=1, epoch=7)
    again = draw_folds([""] * 50, 5, 40, seed=1, epoch=7)
    assert all((a == b).all() for a, b in zip(folds, again, strict=True))
    base = training_crops(folds, 1, SIZES, 32, seed=1, epoch=7)
    for fold, seed, epoch in ((1, 1, 7), (2, 1, 7), (1, 2, 7), (1, 1, 8)):
        other = training_crops(folds, fold, SIZES, 32, seed=seed, epoch=epoch)
        assert (other.top == base.top).all() == ((fold, seed, epoch) == (1, 1, 7))
    first, second = (validation_crops(folds, 3, SIZES, 32, seed=1, epoch=7) for _ in range(2))
    assert (first.top == second.top).all() and not first.flip_vertical.any()


def test_windows_stay_in_their_tiles_whatever_their_sizes_and_contain_smaller_ones():
    sizes, size = np.array([[20, 24], [16, 40], [9, 30], [5, 3]]), 16
    crops = training_crops([np.arange(4), np.arange(4000) % 4], 0, sizes, size, seed=0, epoch=1)
    for row, (height, width) in enumerate(sizes):
        chosen = crops.rows == row
        for starts, length in ((crops.top, height), (crops.left, width)):
            room = length - size
            assert set(starts[chosen]) == set(range(min(room, 0), max(room, 0) + 1))


def test_a_size_of_all_tiles_gives_the_windows_of_numbers_drawn_for_it():
    """Runs of earlier versions stay comparable: one bound for all draws what a bound for each draws."""
    crops = validation_crops([np.arange(50)], 0, SIZES, 32, seed=1, epoch=7)
    random = generator(1, 7, 0, "validation crops")
    assert (crops.top == random.integers(0, 68, 50)).all() and (crops.left == random.integers(0, 68, 50)).all()
