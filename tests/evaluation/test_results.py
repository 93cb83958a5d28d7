"""evaluation/results.py: the numbers of scores.json, their intervals and their differences."""

import numpy as np
import pytest
from helpers import GREYS, always_predict, copy_run, read_rows, read_scores, run_evaluate
from PIL import Image

from common import bootstrap


def test_differences_to_the_first_run(trained, tmp_path):
    same, tumour = copy_run(trained, "same"), copy_run(trained, "tumour", always_predict(2))
    run_evaluate(trained, same, tumour, "--split", "all")
    out = tmp_path / "runs/comparison-tiny-same-tumour-all"
    ours, twin, other = read_scores(out)["entries"]
    assert (ours["name"], twin["name"], other["name"]) == ("tiny", "same", "tumour")
    assert ours["difference_to_first"] == {}
    for difference in twin["difference_to_first"]["dice"].values():
        assert difference == {"value": 0, "low": 0, "high": 0}
    for name in ("background", "tumour", "mean"):
        difference = other["difference_to_first"]["dice"][name]
        assert difference["value"] == pytest.approx(other["scores"]["dice"][name]["value"]
                                                    - ours["scores"]["dice"][name]["value"], abs=2e-6)
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert other["tiles_where_missed"] == {"background": 12, "tissue": 12, "tumour": 0}
    assert other["scores"]["dice"]["background"]["value"] == 0 and other["scores"]["recall"]["tumour"]["value"] == 1
    assert np.sum(other["confusion"], axis=0)[:2].tolist() == [0, 0]
    tiles = read_rows(out / "tiles.csv")
    assert len(tiles) == 3 * read_scores(out)["tiles"]
    weights = bootstrap.resampled_weights([row["group"] for row in tiles[24:]])
    accuracy = weights @ [float(row["pixel_accuracy"]) for row in tiles[24:]] / weights.sum(1)
    low, high = bootstrap.interval(accuracy, groups=6)
    found = other["scores"]["pixel_accuracy"]
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=2e-6)


def test_a_class_on_few_slides_has_no_interval(trained, tmp_path):
    """Of six slides, four have tumour."""
    (tmp_path / "peer").mkdir()
    for path in (tmp_path / "tiles/masks").iterdir():
        mask = np.array(Image.open(path))
        if path.stem[len("mask#"):].startswith(("s4", "s5")):
            mask[mask == GREYS[2]] = GREYS[1]
        Image.fromarray(mask).save(path)
        mask[0, mask[0] != GREYS[2]] = GREYS[0]
        Image.fromarray(mask).save(tmp_path / "peer" / path.name)
    run_evaluate("--predictions", "peer", "--config", trained / "config.yaml", "--split", "all")
    dice = read_scores(tmp_path / "peer-evaluation-all")["entries"][0]["scores"]["dice"]
    assert [name for name, score in dice.items() if score["low"] is None] == ["tumour"]


def test_differences_have_shorter_intervals_than_scores(trained, tmp_path):
    """Both models predict the same easy and hard slides, so their difference varies less than their scores."""
    def nudged(weights):
        weights["head.bias"][2] += 1e-3
    run_evaluate(trained, copy_run(trained, "nudged", nudged), "--split", "all")
    ours, other = read_scores(tmp_path / "runs/comparison-tiny-nudged-all")["entries"]
    score, change = ours["scores"]["pixel_accuracy"], other["difference_to_first"]["pixel_accuracy"]
    assert change["high"] - change["low"] < 0.2 * (score["high"] - score["low"])


def test_an_absent_class_has_no_score(trained, tmp_path):
    for path in (tmp_path / "tiles/masks").iterdir():
        Image.fromarray(np.full((48, 40), 51, np.uint8)).save(path)
    run_evaluate(copy_run(trained, "tissue", always_predict(1)))
    contents = read_scores(tmp_path / "runs/tissue/evaluation")
    candidate = contents["entries"][0]
    assert candidate["scores"]["dice"]["tumour"] == {"value": None, "low": None, "high": None}
    assert candidate["scores"]["dice"]["mean"]["value"] == 1 and candidate["tiles_behind_means"]["tumour"] == 0
    assert candidate["tiles_where_missed"] == candidate["tiles_where_invented"] == dict.fromkeys(contents["classes"], 0)
    assert candidate["scores"]["soft_dice"]["value"] == pytest.approx(1 / 3, abs=1e-5)
    assert contents["best_constant"]["class"] == "tissue"
