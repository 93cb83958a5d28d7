"""tools/show_field.py: a tile with its prediction, and what decides one pixel of it."""

import numpy as np
import pytest
import torch

from common import geometry
from common.config import Config, Model
from common.console import UserError
from common.statistics import Statistics
from evaluation.candidates import Candidate
from tools.show_field import gradient_map, middle_of_class
from training.checkpoints import build_model


@pytest.mark.parametrize(("row", "column"), [(40, 50), (47, 33), (20, 90)])
def test_the_map_is_how_much_a_pixel_of_the_image_changes_the_logits(tmp_path, row, column):
    config = Config(model=Model(widths=(4, 6, 8), dropout=0))
    torch.manual_seed(0)
    model = build_model(config).eval().requires_grad_(False)
    statistics = Statistics([0.5, 0.6, 0.7], [0.1, 0.2, 0.3], [0.5, 0.3, 0.2])
    candidate = Candidate("a", config, tmp_path, torch.device("cpu"), model=model, statistics=statistics)
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3)).astype(np.uint8)
    found, top, left = gradient_map(candidate, image, row, column)
    assert top % 4 == left % 4 == 0 and found.shape < image.shape[:2]

    def logits(pixels):
        inputs = (pixels / 255 - np.array(statistics.mean)) / np.array(statistics.std)
        return model(torch.from_numpy(inputs.transpose(2, 0, 1)[None]).float())[0, :, row, column].double().numpy()

    whole, step = np.zeros(image.shape[:2]), 2e-3
    whole[top:top + found.shape[0], left:left + found.shape[1]] = found
    low, high = geometry.box(3)
    assert not whole[:max(0, row + low)].any() and not whole[:, :column + low].any()
    assert not whole[row + high + 1:].any() and not whole[:, column + high + 1:].any()
    for y, x in [(row, column), (row - 3, column + 2), (row + 5, column), (row, column - 9)]:
        total = 0
        for channel in range(3):
            shift = np.zeros(image.shape)
            shift[y, x, channel] = 255 * statistics.std[channel] * step
            total += np.abs(logits(image + shift) - logits(image - shift)).sum() / (2 * step)
        assert whole[y, x] == pytest.approx(total, rel=0.1, abs=1e-3)
    with pytest.raises(UserError, match="too near the border"):
        gradient_map(candidate, image[:90], 89, 50)


def test_the_pixel_lies_in_the_middle_of_the_last_class_inside():
    truth = np.zeros((60, 80), np.uint8)
    truth[20:41, 10:71] = 1
    truth[0:7, 0:7] = 2  # too near the border
    row, column = middle_of_class(truth, 3, border=8)
    assert row == 30 and 20 <= column <= 60
    truth[30:33, 50:53] = 2
    assert middle_of_class(truth, 3, border=8) == (31, 51)
    with pytest.raises(UserError, match="choose one by --pixel"):
        middle_of_class(truth, 3, border=30)


def test_the_picture_of_a_run(trained, tmp_path, here):
    out = here("tools.show_field", trained, "--out", tmp_path / "field.png", cwd=tmp_path)
    assert out.returncode == 0 and "wrote" in out.stdout and (tmp_path / "field.png").stat().st_size > 5000
    for words, message in ((["--tile", "x"], "no such test tile"), (["--pixel", "99", "0"], "lies outside the tile")):
        out = here("tools.show_field", trained, "--out", tmp_path / "other.png", *words, cwd=tmp_path)
        assert out.returncode == 2 and message in out.stderr
    assert here("tools.show_field", "--out", "x.png", cwd=tmp_path).returncode == 2
