"""training/training_set.py: statistics of the training tiles only, and warnings about groups and repeated tiles."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config_files import apply_overrides
from common.console import UserError
from dataset import read_tiles
from training.training_set import prepare_data, warn_about_repeats


def test_statistics_are_those_of_the_training_tiles(tiny, tiles_root):
    tiles = read_tiles(tiny.data)
    for tile in tiles:
        if tile.split == "test":
            Image.new("RGB", (40, 48), "white").save(tiles_root / tile.image)
    pixels = np.stack([np.asarray(Image.open(tiles_root / tile.image)) for tile in tiles if tile.split == "train"])
    assert prepare_data(tiny).statistics.mean == pytest.approx(pixels.mean((0, 1, 2)) / 255)


def test_a_list_without_test_tiles_is_rejected(tiny, tiles_root):
    text = (tiles_root / "tiles.csv").read_text()
    (tiles_root / "tiles.csv").write_text(text.replace(",test", ",train"))
    with pytest.raises(UserError, match="tiles.csv.*split = test"):
        prepare_data(tiny)


def test_tiles_smaller_than_the_crop_are_said_once_with_the_crop_that_suits_all(tiny, capsys):
    prepare_data(tiny)
    assert "smaller" not in capsys.readouterr().err
    prepare_data(apply_overrides(tiny, ["data.crop=48"]))
    warning = capsys.readouterr().err
    assert "data.crop=48 on a side: 10 of 10." in warning and "data.crop=40" in warning
    assert warning.count("smaller") == 1


def test_tiles_of_ignored_pixels_are_left_out(tiny, capsys):
    before = prepare_data(tiny)
    capsys.readouterr()
    tiles = [tile for tile in read_tiles(tiny.data) if tile.split == "train"]
    Image.new("L", (40, 48), 255).save(Path(tiny.data.root) / tiles[0].mask)
    data = prepare_data(apply_overrides(tiny, ["data.ignore=255"]))
    assert len(data.rows) == len(data.groups) == len(before.rows) - 1 and before.rows[0] not in data.rows
    assert "training tiles in which no pixel has a class: 1" in capsys.readouterr().err


def test_a_fold_that_repeats_its_tiles_often_gives_a_warning(tiny, capsys):
    prepare_data(tiny)
    assert "drawn" not in capsys.readouterr().err
    prepare_data(apply_overrides(tiny, ["train.images_per_epoch=40"]))
    warning = capsys.readouterr().err
    assert "4 tiles for 20 images" in warning and "train.images_per_epoch" in warning
    warn_about_repeats([np.arange(10), np.resize(np.arange(4), 10)])
    warning = capsys.readouterr().err
    assert "4 tiles for 10 images" in warning and "2.5 times" in warning


def test_a_group_setting_that_disagrees_with_the_list_gives_a_warning(tiny, tiles_root, capsys):
    prepare_data(tiny)
    assert "groups" not in capsys.readouterr().err
    for pattern in ("(\\d+)$", "^(patient)", "x*", "(z)?.*"):
        prepare_data(apply_overrides(tiny, [f"data.group={pattern}"]))
        warning = capsys.readouterr().err
        assert f"data.group '{pattern}' finds other groups" in warning and "tiles.csv" in warning
    prepare_data(apply_overrides(tiny, ["data.group="]))
    assert "groups" not in capsys.readouterr().err


def test_a_list_without_groups_gives_a_warning(tiny, tiles_root, capsys):
    text = (tiles_root / "tiles.csv").read_text()
    for slide in range(6):
        text = text.replace(f",s{slide},", ",,")
    (tiles_root / "tiles.csv").write_text(text)
    prepare_data(tiny)
    warning = capsys.readouterr().err
    assert "no group of two tiles" in warning and "data.group" in warning
