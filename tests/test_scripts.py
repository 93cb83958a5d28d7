"""The scripts as a user runs them: the whole way from tiles to scores, errors, killed runs, full disks, closed folders.

A full disk is simulated by the system's limit on the size of files.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, TINY, assert_equal, checkpoint_contents, script

SMALL = ["model.widths=[4,8]", "data.crop=64", "train.epochs=2", "train.folds=2", "train.images_per_epoch=16",
         "train.batch_size=4", "device=cpu"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Demo tiles, filtered."""
    folder = tmp_path_factory.mktemp("demo")
    made = script("tools.make_demo_data", "data/demo", "--tiles", 24, "--slides", 6, "--size", 128, cwd=folder)
    assert made.returncode == 0, made.stderr
    assert "python data_filter.py --config configs/demo.yaml" in made.stdout
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    return folder


def test_from_tiles_to_scores(demo, here):
    filtered = script("data_filter.py", "--config", "configs/demo.yaml", cwd=demo)
    assert filtered.returncode == 0, filtered.stderr
    assert "\r" not in filtered.stderr + filtered.stdout  # without a terminal there are plain lines
    assert "wrote data/demo/tiles.csv" in filtered.stdout
    assert "next:  python train.py --config configs/demo.yaml" in filtered.stdout
    trained = script("train.py", "--config", "configs/demo.yaml", *SMALL, cwd=demo)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("epoch ") == 2 and "next:  python evaluate.py runs/demo" in trained.stdout
    evaluated = here("evaluate.py", "runs/demo", cwd=demo)
    assert evaluated.returncode == 0, evaluated.stderr
    scores = json.loads((demo / "runs/demo/evaluation/scores.json").read_text())
    assert scores["tiles"] > 0 and scores["entries"][0]["scores"]["dice"]["tumour"]["value"] is not None
    assert "wrote runs/demo/evaluation" in evaluated.stdout
    segmented = here("evaluate.py", "runs/demo", "--images", "data/demo/frames", cwd=demo)
    assert segmented.returncode == 0, segmented.stderr
    assert len(list((demo / "runs/demo/predictions-frames/labels").iterdir())) == 24
    resumed = here("train.py", "--resume", "runs/demo", "train.epochs=3", cwd=demo)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 3/3" in resumed.stdout and "epoch 2/3" not in resumed.stdout


@pytest.mark.parametrize("name", ["ce", "wce", "dice", "dice_ce", "log_dice_ce", "small_dice_ce"])
def test_any_config_runs_on_any_prepared_root(demo, here, name):
    if not (demo / "data/demo/tiles.csv").exists():
        assert here("data_filter.py", "--config", "configs/demo.yaml", cwd=demo).returncode == 0
    trained = here("train.py", "--config", f"configs/{name}.yaml", "data.root=data/demo", *SMALL, cwd=demo)
    assert trained.returncode == 0, trained.stderr
    assert (demo / f"runs/{name}/checkpoints/best.pt").exists()


def test_the_next_command_can_be_pasted(tiles_root, tmp_path, here):
    (tmp_path / "my configs").mkdir()
    (tmp_path / "my configs/x.yaml").write_text("name: x\n")
    out = here("data_filter.py", "--config", "my configs/x.yaml", f"data.root={tiles_root}", *TINY, cwd=tmp_path)
    line = next(line for line in out.stdout.splitlines() if line.startswith("next:"))
    assert shlex.split(line)[3:] == ["--config", "my configs/x.yaml", f"data.root={tiles_root}", *TINY]


def test_a_run_killed_at_any_moment_and_resumed_equals_an_uninterrupted_one(tiles_root, tmp_path, here):
    """Kill the process three times at random moments; then every bit of the last checkpoint must be equal."""
    (tmp_path / "x.yaml").write_text("model: {dropout: 0.5}\n")
    settings = [*TINY, f"data.root={tiles_root}", "train.epochs=24"]
    assert here("data_filter.py", "--config", "x.yaml", *settings, cwd=tmp_path).returncode == 0
    assert script("train.py", "--config", "x.yaml", *settings, "name=whole", cwd=tmp_path).returncode == 0
    arguments, random = ["--config", "x.yaml", *settings, "name=parts"], np.random.default_rng()
    for _ in range(3):
        process = subprocess.Popen([sys.executable, REPOSITORY / "train.py", *arguments], cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(random.integers(1, 8)):  # epochs, then any part of the next one
            process.stdout.readline()
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.wait()
        process.stdout.close()
        arguments = ["--resume", "runs/parts"]
    out = script("train.py", *arguments, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    whole, parts = (checkpoint_contents(tmp_path / "runs" / name) for name in ("whole", "parts"))
    whole["config"]["name"] = "parts"
    assert len(whole["history"]) == 24
    assert_equal(whole, parts)
    assert not list((tmp_path / "runs/parts").rglob(".*.tmp"))


@pytest.mark.parametrize(("command", "expected"), [
    (["train.py", "--config", "configs/dice_ce.yaml", "name=none"], "make_demo_data"),
    (["data_filter.py", "--config", "configs/dice_ce.yaml"], "make_demo_data"),
    (["train.py", "--config", "configs/none.yaml"], "configs/none.yaml"),
    (["train.py", "--config", "configs/demo.yaml", "optim.Ir=1"], "'optim.lr'"),
    (["train.py", "--resume", "runs/none"], "runs/none"),
    (["evaluate.py", "runs/none"], "runs/none"),
    (["evaluate.py", "data.root=x"], "no run given"),
    (["evaluate.py", "--predictions", "x", "--config", "configs/none.yaml"], "configs/none.yaml"),
    (["evaluate.py", "runs/none", "--images", "data"], "runs/none"),
    (["tools.prepare_ebhi", "nowhere", "data/ebhi"], "nowhere/CLASS/image/NAME.png"),
    (["tools.make_demo_data", "configs"], "configs exists"),
])
def test_what_a_user_can_fix_is_one_line_and_exit_code_2(demo, here, command, expected):
    out = here(*command, cwd=demo)
    assert out.returncode == 2 and expected in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1 and "Traceback" not in out.stderr
    assert not (demo / "runs/none").exists() and not (demo / "data/ebhi").exists()


def test_overrides_may_stand_anywhere(tiles_root, tmp_path, here):
    (tmp_path / "x.yaml").write_text("name: x\n")
    out = here("data_filter.py", TINY[0], "--config", "x.yaml", f"data.root={tiles_root}", *TINY[1:], cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert (tiles_root / "tiles.csv").exists()


LIMITED = """
import resource, runpy, sys

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def on_a_full_disk(room, name, *arguments, cwd):
    """Run a script in a process in which no file may grow beyond `room` bytes."""
    pytest.importorskip("resource")
    (cwd / "limited.py").write_text(LIMITED)
    return script(cwd / "limited.py", room, REPOSITORY / name, *arguments, cwd=cwd)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def test_a_full_disk_costs_a_run_only_the_current_epoch(tiles_root, tmp_path, here):
    (tmp_path / "x.yaml").write_text("{}")
    settings = [*TINY, f"data.root={tiles_root}", "train.epochs=2"]
    assert here("data_filter.py", "--config", "x.yaml", *settings, cwd=tmp_path).returncode == 0
    out = on_a_full_disk(10_000, "train.py", "--config", "x.yaml", *settings, cwd=tmp_path)
    assert out.returncode == 2 and f"{tiles_root}/tiles.u8: cannot be written (File too large)" in out.stderr
    assert "Traceback" not in out.stderr and not list(tiles_root.glob(".*.tmp"))
    out = here("train.py", "--config", "x.yaml", *settings, "name=whole", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    out = here("train.py", "--config", "x.yaml", *settings, "name=parts", "train.epochs=1", cwd=tmp_path)
    before = contents(tmp_path / "runs/parts/checkpoints")
    out = on_a_full_disk(10_000, "train.py", "--resume", "runs/parts", "train.epochs=2", cwd=tmp_path)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert "runs/parts/checkpoints/" in out.stderr and ".pt: cannot be written (File too large)" in out.stderr
    assert out.stderr.strip().endswith("with: python train.py --resume runs/parts")
    assert contents(tmp_path / "runs/parts/checkpoints") == before
    assert here("train.py", "--resume", "runs/parts", cwd=tmp_path).returncode == 0
    whole, parts = (torch.load(tmp_path / f"runs/{name}/checkpoints/last.pt", weights_only=True)["model"]
                    for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_full_disk_keeps_earlier_results(trained, here):
    workplace = trained.parent.parent
    assert here("evaluate.py", trained, cwd=workplace).returncode == 0
    assert here("data_filter.py", "--config", trained / "config.yaml", cwd=workplace).returncode == 0
    root = workplace / "tiles"
    for folder, command in ((trained / "evaluation", ["evaluate.py", trained]),
                            (root / "filter", ["data_filter.py", "--config", trained / "config.yaml"])):
        before = contents(folder), (root / "tiles.csv").read_bytes()
        out = on_a_full_disk(3_000, *command, cwd=workplace)
        assert out.returncode == 2 and "Traceback" not in out.stderr
        assert str(folder) in out.stderr and "cannot be written (File too large)" in out.stderr
        assert (contents(folder), (root / "tiles.csv").read_bytes()) == before
        assert not list(folder.parent.glob(".*.being-*"))


@pytest.fixture
def powerless():
    """The words before a command that take root's privilege to write everywhere; none if we are not root."""
    if not hasattr(os, "geteuid"):
        pytest.skip("folders are not protected by modes here")
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root may write everywhere, and there is no setpriv")
    return ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]


@pytest.mark.parametrize("command", [["train.py", "--config", "x.yaml"], ["train.py", "--resume", "runs/tiny"],
                                     ["evaluate.py", "runs/tiny"], ["data_filter.py", "--config", "x.yaml"]])
def test_a_folder_that_cannot_be_written_to_is_named(trained, tiles_root, powerless, command):
    workplace = trained.parent.parent
    (workplace / "x.yaml").write_text((trained / "config.yaml").read_text().replace("name: tiny", "name: x"))
    closed = [workplace / "runs", trained, trained / "checkpoints", tiles_root]
    modes = [folder.stat().st_mode for folder in closed]
    for folder in closed:
        folder.chmod(0o555)
    try:
        name, *arguments = command
        out = subprocess.run([*powerless, sys.executable, REPOSITORY / name, *arguments], cwd=workplace, text=True,
                             capture_output=True)
    finally:
        for folder, mode in zip(closed, modes, strict=True):
            folder.chmod(mode)
    message = out.stderr.strip().splitlines()[-1]
    assert out.returncode == 2 and "Traceback" not in out.stderr and message.startswith("error: ")
    assert "written" in message and ("runs/" in message or str(tiles_root) in message)


def test_a_console_that_cannot_print_a_name_does_not_end_the_work(trained):
    """On Windows the encoding of the console, or of the file with the output, may lack letters of a name."""
    workplace = trained.parent.parent
    config = (trained / "config.yaml").read_text(encoding="utf-8")
    (workplace / "x.yaml").write_text(config.replace("name: tiny", "name: prüfung-Ж")
                                      .replace("- tumour", "- Tumor-Ж"), encoding="utf-8")
    for command in (["data_filter.py", "--config", "x.yaml"], ["train.py", "--config", "x.yaml"],
                    ["evaluate.py", "runs/prüfung-Ж"]):
        out = script(*command, cwd=workplace, PYTHONIOENCODING="ascii")
        assert out.returncode == 0, out.stderr
    assert "\\u0416" in out.stdout
    assert "Tumor-Ж" in (workplace / "runs/prüfung-Ж/evaluation/table.md").read_text(encoding="utf-8")


def test_real_biopsies_from_source_to_list(real_data, tmp_path, here):
    """430 pairs of 227 patients become tiles of three classes, split by patient."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    out = here("tools.prepare_ebhi", real_data / "ebhi", "data/ebhi", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[1].split()[:2] == ["430", "227"]
    out = here("data_filter.py", "--config", "configs/ebhi.yaml", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    rows = [line.split(",") for line in (tmp_path / "data/ebhi/tiles.csv").read_text().splitlines()]
    group, split = rows[0].index("group"), rows[0].index("split")
    sides = {name: {row[group] for row in rows[1:] if row[split] == name} for name in ("train", "test")}
    assert not sides["train"] & sides["test"] and len(sides["train"] | sides["test"]) == 227
