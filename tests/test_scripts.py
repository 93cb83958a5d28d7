"""Every script as its user runs it: a process of its own, in a folder of its own."""

import json
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, script

SMALL = ["model.widths=[4,8]", "data.crop=64", "train.epochs=2", "train.folds=2", "train.images_per_epoch=16",
         "train.batch_size=4", "device=cpu"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Demo tiles, filtered."""
    folder = tmp_path_factory.mktemp("demo")
    made = script("tools.make_demo_data", "data/demo", "--tiles", 24, "--slides", 6, "--size", 128, cwd=folder)
    assert made.returncode == 0, made.stderr
    assert "python data_filter.py --config configs/demo.yaml" in made.stdout
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    return folder


def test_from_tiles_to_scores(demo):
    filtered = script("data_filter.py", "--config", "configs/demo.yaml", cwd=demo)
    assert filtered.returncode == 0, filtered.stderr
    assert "wrote data/demo/tiles.csv" in filtered.stdout
    assert "next:  python train.py --config configs/demo.yaml" in filtered.stdout
    trained = script("train.py", "--config", "configs/demo.yaml", *SMALL, cwd=demo)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("epoch ") == 2 and "next:  python evaluate.py runs/demo" in trained.stdout
    evaluated = script("evaluate.py", "runs/demo", cwd=demo)
    assert evaluated.returncode == 0, evaluated.stderr
    scores = json.loads((demo / "runs/demo/evaluation/scores.json").read_text())
    assert scores["tiles"] > 0 and scores["entries"][0]["scores"]["dice"]["tumour"]["value"] is not None
    assert "wrote runs/demo/evaluation" in evaluated.stdout
    segmented = script("evaluate.py", "runs/demo", "--images", "data/demo/frames", cwd=demo)
    assert segmented.returncode == 0, segmented.stderr
    assert len(list((demo / "runs/demo/predictions-frames/labels").iterdir())) == 24
    resumed = script("train.py", "--resume", "runs/demo", "train.epochs=3", cwd=demo)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 3/3" in resumed.stdout and "epoch 2/3" not in resumed.stdout


@pytest.mark.parametrize("name", ["ce", "wce", "dice", "dice_ce", "log_dice_ce", "small_dice_ce"])
def test_any_config_runs_on_any_prepared_root(demo, name):
    if not (demo / "data/demo/tiles.csv").exists():
        assert script("data_filter.py", "--config", "configs/demo.yaml", cwd=demo).returncode == 0
    trained = script("train.py", "--config", f"configs/{name}.yaml", "data.root=data/demo", *SMALL, cwd=demo)
    assert trained.returncode == 0, trained.stderr
    assert (demo / f"runs/{name}/checkpoints/best.pt").exists()


def test_the_next_command_can_be_pasted(tiles_root, tmp_path):
    (tmp_path / "my configs").mkdir()
    (tmp_path / "my configs/x.yaml").write_text("name: x\n")
    out = script("data_filter.py", "--config", "my configs/x.yaml", f"data.root={tiles_root}", *TINY, cwd=tmp_path)
    line = next(line for line in out.stdout.splitlines() if line.startswith("next:"))
    assert shlex.split(line)[3:] == ["--config", "my configs/x.yaml", f"data.root={tiles_root}", *TINY]


def test_a_run_killed_at_any_instant_and_resumed_equals_the_uninterrupted_one(tiles_root, tmp_path):
    """SIGKILL, three times, wherever the process is; then every bit of the last checkpoint is compared."""
    (tmp_path / "x.yaml").write_text("model: {dropout: 0.5}\n")
    settings = [*TINY, f"data.root={tiles_root}", "train.epochs=40"]
    for command in (["data_filter.py", "--config", "x.yaml", *settings],
                    ["train.py", "--config", "x.yaml", *settings, "name=whole"]):
        assert script(*command, cwd=tmp_path).returncode == 0
    arguments, random = ["--config", "x.yaml", *settings, "name=parts"], np.random.default_rng()
    for _ in range(3):
        process = subprocess.Popen([sys.executable, REPOSITORY / "train.py", *arguments], cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(random.integers(1, 12)):  # epochs, then any part of the next one
            process.stdout.readline()
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.wait()
        process.stdout.close()
        arguments = ["--resume", "runs/parts"]
    out = script("train.py", *arguments, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    whole, parts = (torch.load(tmp_path / f"runs/{name}/checkpoints/last.pt", weights_only=True)
                    for name in ("whole", "parts"))
    assert len(whole["history"]) == len(parts["history"]) == 40
    for ours, theirs in zip(whole["history"], parts["history"], strict=True):
        assert all(ours[key] == theirs[key] for key in ours if "loss" in key or "ema" in key or key == "lr")
    adam = [(state, parts["optimizer"]["state"][i]) for i, state in whole["optimizer"]["state"].items()]
    for ours, theirs in [(whole["model"], parts["model"]), *adam]:
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert whole["scheduler"] == parts["scheduler"]
    assert not list((tmp_path / "runs/parts").rglob(".*.tmp"))


def test_without_a_terminal_there_are_plain_lines(demo):
    out = script("data_filter.py", "--config", "configs/demo.yaml", cwd=demo)
    assert "\r" not in out.stderr + out.stdout


@pytest.mark.parametrize(("command", "expected"), [
    (["train.py", "--config", "configs/dice_ce.yaml", "name=none"], "make_demo_data"),
    (["data_filter.py", "--config", "configs/dice_ce.yaml"], "make_demo_data"),
    (["train.py", "--config", "configs/none.yaml"], "no such config file"),
    (["train.py", "--config", "configs/demo.yaml", "optim.Ir=1"], "did you mean 'optim.lr'"),
    (["train.py", "--resume", "runs/none"], "no such run"),
    (["evaluate.py", "runs/none"], "no such checkpoint"),
    (["evaluate.py", "data.root=x"], "no run given"),
    (["evaluate.py", "--predictions", "x", "--config", "configs/none.yaml"], "no such config file"),
    (["evaluate.py", "runs/none", "--images", "data"], "no such checkpoint"),
    (["tools.prepare_ebhi", "nowhere", "data/ebhi"], "no EBHI-Seg images found"),
    (["tools.make_demo_data", "configs"], "not an empty folder"),
])
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(demo, command, expected):
    out = script(*command, cwd=demo)
    assert out.returncode == 2 and expected in out.stderr
    assert len(out.stderr.strip().splitlines()) <= 2 and "Traceback" not in out.stderr
    assert not (demo / "runs/none").exists() and not (demo / "data/ebhi").exists()


def test_overrides_may_stand_anywhere(tiles_root, tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\n")
    out = script("data_filter.py", TINY[0], "--config", "x.yaml", f"data.root={tiles_root}", *TINY[1:], cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert (tiles_root / "tiles.csv").exists()


def test_real_biopsies_from_source_to_list(real_data, tmp_path):
    """430 pairs of 227 patients become tiles of three classes, split by patient."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    out = script("tools.prepare_ebhi", real_data / "ebhi", "data/ebhi", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[1].split()[:2] == ["430", "227"]
    out = script("data_filter.py", "--config", "configs/ebhi.yaml", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    rows = [line.split(",") for line in (tmp_path / "data/ebhi/tiles.csv").read_text().splitlines()]
    group, split = rows[0].index("group"), rows[0].index("split")
    sides = {name: {row[group] for row in rows[1:] if row[split] == name} for name in ("train", "test")}
    assert not sides["train"] & sides["test"] and len(sides["train"] | sides["test"]) == 227
