"""tools/repair_accuracy.py: what it makes of results, and that it does not mix runs of different settings."""

import numpy as np
import pytest

from common.console import Progress, UserError
from tools.repair_accuracy import at_once, closed, reject_other_settings, scores


def test_a_folder_of_other_settings_is_refused(tmp_path):
    out = tmp_path / "new"
    for _ in range(2):
        reject_other_settings(out, {"tiles": 480, "overrides": ["train.epochs=2"]})
    with pytest.raises(UserError, match="was begun with tiles = 480, not 96"):
        reject_other_settings(out, {"tiles": 96, "overrides": ["train.epochs=2"]})
    with pytest.raises(UserError, match="overrides"):
        reject_other_settings(out, {"tiles": 480, "overrides": []})
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        reject_other_settings(tmp_path, {"tiles": 480})


def test_the_dice_is_pooled_over_tiles_and_averaged_over_classes():
    perfect, half = np.diag([8, 4, 4]), np.array([[8, 0, 0], [0, 2, 2], [0, 2, 2]])
    slides = [f"s{i}" for i in range(12)]
    found = scores([(slides, np.array([perfect, half] * 6)), (slides, np.array([perfect] * 12))])
    assert found[1] == pytest.approx(1) and found[0, 0] == pytest.approx((1 + 0.75 + 0.75) / 3)
    assert len(np.unique(found[0].round(6))) > 1, "slides are resampled"


@pytest.mark.parametrize(("report", "other", "clean", "text"), [
    (0.8, 0.85, 0.9, "50%"), (0.8, 0.75, 0.9, "-50%"), (0.9, 0.95, 0.9, "no gap"), (0.9, 0.8, 0.85, "no gap")])
def test_the_share_of_the_gap(report, other, clean, text):
    values = {"report": np.array([[report, 0]]), "repair": np.array([[other, 0]]), "clean": np.array([[clean, 0]])}
    assert closed(values, "repair") == text and closed(values, "clean") == closed(values, "report") == ""


def test_jobs_return_their_results_in_order():
    with Progress("", 5) as progress:
        assert at_once([lambda i=i: i * i for i in range(5)], progress) == [0, 1, 4, 9, 16]
