"""The README's results, by its own commands: minutes each, so under the `slow` marker."""

import json
import shutil

import pytest
from conftest import REPOSITORY, script


def train_and_evaluate(folder, name):
    for command in (["data_filter.py", "--config", f"configs/{name}.yaml"],
                    ["train.py", "--config", f"configs/{name}.yaml"], ["evaluate.py", f"runs/{name}"]):
        out = script(*command, cwd=folder, limit=1800)
        assert out.returncode == 0, out.stderr
    scores = json.loads((folder / f"runs/{name}/evaluation/scores.json").read_text())
    dice = scores["entries"][0]["scores"]["dice"]
    return {name: score["value"] for name, score in dice.items()}, scores["best_constant"]["dice_mean"]


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


@pytest.mark.slow
def test_real_biopsies_beat_the_best_constant_on_unseen_patients(real_data, folder):
    assert script("tools.prepare_ebhi", real_data / "ebhi", "data/ebhi", cwd=folder).returncode == 0
    dice, constant = train_and_evaluate(folder, "ebhi")
    assert dice["mean"] > constant + 0.15
