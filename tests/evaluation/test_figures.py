"""evaluation/figures.py: error maps, overlays, and names in legends."""

import warnings

import numpy as np

from common import palette
from evaluation import figures


def test_the_error_map_colours_wrong_pixels_only():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    target, predicted = np.zeros((8, 9), np.uint8), np.zeros((8, 9), np.uint8)
    predicted[2:4, 5] = 1
    errors = figures.error_map(image, target, predicted)
    coloured = errors.max(-1) != errors.min(-1)
    assert (coloured == (target != predicted)).all()


def test_the_overlay_does_not_change_the_background():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    labels = np.zeros((8, 9), np.uint8)
    labels[3, 3] = 2
    mixed = figures.overlay(image, labels, 3)
    assert ((mixed != image).any(-1) == (labels > 0)).all()
    expected = 0.6 * image[3, 3] + 0.4 * palette.class_colours(3)[2]
    assert np.abs(mixed[3, 3] - expected).max() <= 1


def test_names_are_drawn_unchanged(tmp_path):
    names = ("_a$x_$ {b}", "\\frac$ $")
    history = [{"epoch": 1, "train_loss": 1.0, "train_ema": 1.0, "val_loss": 1.0, "val_ema": 1.0}]
    predictions = [("Dice 1", np.zeros((9, 9), np.uint8))] * 2
    row = ("key$_$", "$why_$", np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8), predictions)
    with_errors = [f"{name}: error 0.000" for name in names]
    drawn = {"losses": (figures.compared_losses(dict.fromkeys(names, history)), names),
             "reliability": (figures.reliability(dict.fromkeys(names, np.ones((3, 15)))), with_errors),
             "tiles": (figures.tiles([row], names, names), names)}
    for name, (figure, expected) in drawn.items():
        with warnings.catch_warnings(action="error"):
            palette.save(figure, tmp_path / f"{name}.png")
        legends = [*figure.legends, *filter(None, (axis.get_legend() for axis in figure.axes))]
        for legend in legends:
            assert [text.get_text() for text in legend.get_texts()][-2:] == list(expected), name
        assert legends
