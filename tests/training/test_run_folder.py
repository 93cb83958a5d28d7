"""training/run_folder.py: a run is created whole, locked, cleaned up, never overwritten, and records its starts."""

import json
import math
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

import train
from common.config import Config
from common.config_files import apply_overrides, load_config
from common.console import UserError
from common.workers import processor
from dataset import Tile
from training import epochs, run_folder


def make_run(folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").touch()
    return folder


def hold(folder, locked, done):
    with run_folder.locked_run(folder):
        locked.set()
        done.wait()


def test_two_processes_cannot_train_one_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    make_run(tmp_path)
    locked, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, locked, done), daemon=True)
    process.start()
    while not locked.wait(0.1):
        assert process.is_alive()
    with pytest.raises(UserError, match="another process"), run_folder.locked_run(tmp_path):
        pass
    process.kill()
    process.join()
    with run_folder.locked_run(tmp_path):
        pass  # the system freed the lock


@pytest.mark.skipif(os.name == "nt", reason="simulates Windows")
def test_no_lock_file_is_removed_while_it_is_held(workplace, tiny, monkeypatch):
    """Windows cannot remove open files. The error about the lock would hide the error of the run."""
    import fcntl

    unlink = os.unlink

    def unlink_as_on_windows(path, **options):
        if str(path).endswith(".lock"):
            with Path(path).open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", unlink_as_on_windows)
    monkeypatch.setattr(epochs, "run_pass", lambda *args: math.nan)
    with pytest.raises(UserError, match="finite validation loss"):
        train.start(tiny)
    assert not (workplace / "runs/tiny").exists()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (make_run(tmp_path) / "checkpoints").mkdir()
    leftover, other = tmp_path / "checkpoints" / ".last.pt.123.tmp", tmp_path / "checkpoints" / ".precious.tmp"
    leftover.touch()
    other.touch()
    with run_folder.locked_run(tmp_path):
        assert not leftover.exists() and other.exists()


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="no such run"), run_folder.locked_run(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten_and_records_how_it_was_made(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "tiles.csv").write_text("key\n")
    config = apply_overrides(Config(name="x"), [f"data.root={root}"])
    folder = tmp_path / "runs" / "x"
    run_folder.reject_existing(folder)
    tiles = [Tile("a", "f/a.png", "m/a.png", group="s1", digest="0a"), Tile("b", "f/b.png", "m/b.png", digest="0b")]
    run_folder.create_run(folder, config, tiles)
    assert [(row["key"], row["group"], row["digest"]) for row in run_folder.read_trained_on(folder)] == [
        ("a", "s1", "0a"), ("b", "", "0b")]
    with pytest.raises(UserError, match=f"{folder}.*not overwritten"):
        run_folder.create_run(folder, config, tiles)
    assert [path.name for path in folder.parent.iterdir()] == ["x"]
    for precision in (torch.bfloat16, torch.float32):
        run_folder.record_start(folder, config, torch.device("cpu"), precision)
    first, second = json.loads((folder / "environment.json").read_text())
    assert first["precision"] == "bfloat16" and load_config(folder / "config.yaml") == config
    assert torch.__version__.startswith(second["packages"]["torch"].partition("+")[0])
    assert second["device"] == f"cpu ({processor()})"
    assert second["precision"] == "float32" and len(second["tiles_sha256"]) == 64
    with pytest.raises(UserError, match="--resume"):
        run_folder.reject_existing(folder)
