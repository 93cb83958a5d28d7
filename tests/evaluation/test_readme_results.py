"""The README's results by its own commands. These tests take minutes, so they have the marker `slow`."""

import json
import shutil

import numpy as np
import pytest
from helpers import REPOSITORY, script
from PIL import Image


def train_and_evaluate(folder, name):
    for command in (["data_filter.py", "--config", f"configs/{name}.yaml"],
                    ["train.py", "--config", f"configs/{name}.yaml"], ["evaluate.py", f"runs/{name}"]):
        out = script(*command, cwd=folder)
        assert out.returncode == 0, out.stderr
    scores = json.loads((folder / f"runs/{name}/evaluation/scores.json").read_text())
    dice = scores["entries"][0]["scores"]["dice"]
    return {name: score["value"] for name, score in dice.items()}, scores["best_constant"]["dice_mean"]


def shares(candidate):
    """The scores from 0 to 1 by name and class, without distances, which one pixel can change much."""
    return {f"{name} {class_}": number["value"] for name, score in candidate["scores"].items()
            if name not in ("tile_hausdorff", "tile_hd95")
            for class_, number in ({"": score} if "value" in score else score).items()}


def assert_precision_does_not_matter(folder, name):
    """Compare the evaluation in the default precision with one in float32."""
    out = script("evaluate.py", f"runs/{name}", "--precision", "float32", "--out", "exact", cwd=folder)
    assert out.returncode == 0, out.stderr
    evaluations = [folder / f"runs/{name}/evaluation", folder / "exact"]
    fast, exact = ([np.asarray(Image.open(path)) for path in sorted(evaluation.glob("predictions/*/*.png"))]
                   for evaluation in evaluations)
    assert len(fast) == len(exact) > 0
    assert np.mean([a == b for a, b in zip(fast, exact, strict=True)]) >= 0.999
    fast, exact = (json.loads((evaluation / "scores.json").read_text())["entries"][0] for evaluation in evaluations)
    assert exact["precision"] == "float32"
    assert shares(fast) == pytest.approx(shares(exact), abs=1e-3)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    return tmp_path


@pytest.mark.slow
def test_the_demo_beats_the_best_constant_by_a_quarter(folder):
    made = script("tools.make_demo_data", "data/demo", "--tiles", 240, "--slides", 40, "--seed", 0, cwd=folder)
    assert made.returncode == 0, made.stderr
    dice, constant = train_and_evaluate(folder, "demo")
    assert dice["mean"] > constant + 0.25 and min(dice.values()) > 0.5
    assert_precision_does_not_matter(folder, "demo")


@pytest.mark.slow
def test_real_biopsies_beat_the_best_constant_on_unseen_patients(real_data, folder):
    assert script("tools.prepare_ebhi", real_data / "ebhi", "data/ebhi", cwd=folder).returncode == 0
    dice, constant = train_and_evaluate(folder, "ebhi")
    assert dice["mean"] > constant + 0.15
    assert_precision_does_not_matter(folder, "ebhi")
