"""train.py: whole runs. What they leave, that a resumed run equals an uninterrupted one, when they end, and errors."""

import csv
import math

import numpy as np
import pytest
import torch
from helpers import GREYS, TINY, assert_equal, checkpoint_contents
from PIL import Image

import train
from common.config import Config, Train
from common.config_files import apply_overrides, to_yaml
from common.console import UserError
from dataset import TILE_LIST, read_list, write_tiles
from evaluation.candidates import candidate_of_run
from evaluation.test_set import open_test_set
from filtering import pipeline
from training import checkpoints, epochs
from training.learner import build_learner
from training.training_set import prepare_data


def test_a_run_leaves_what_the_readme_says(workplace, tiny, capsys):
    train.start(tiny)
    run = workplace / "runs/tiny"
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} == {
        ".lock", "config.yaml", "environment.json", "trained_on.csv", "metrics.csv", "checkpoints/best.pt",
        "checkpoints/last.pt", "figures/losses.png", "figures/predictions.png"}
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "survivor", "train_loss", "val_loss", "val_loss_0", "val_loss_1", "train_ema",
                             "val_ema", "lr", "seconds", "images_per_second", "peak_memory_mb"]
    for row in rows:
        folds = [float(row["val_loss_0"]), float(row["val_loss_1"])]
        assert float(row["val_loss"]) == min(folds) and int(row["survivor"]) == int(np.argmin(folds))
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert checkpoints.load_checkpoint(run / "checkpoints/best.pt").epoch == int(best["epoch"])
    assert "all 3 epochs (train.epochs) are done\nwrote runs/tiny/checkpoints/best.pt" in capsys.readouterr().out


def test_the_network_learns_a_simple_task(workplace, tiles_root):
    """Dark, medium and light pixels are the three classes: a correct pipeline learns this in seconds."""
    random = np.random.default_rng(0)
    for path in (tiles_root / "masks").iterdir():
        labels = np.repeat(np.repeat(random.integers(0, 3, (12, 10)), 4, 0), 4, 1)
        Image.fromarray(GREYS[labels]).save(path)
        image = np.array([60, 120, 180])[labels][..., None] + random.integers(-20, 20, (48, 40, 3))
        Image.fromarray(image.astype(np.uint8)).save(tiles_root / "frames" / path.name.replace("mask", "frame"))
    config = apply_overrides(Config(name="simple"), [*TINY, f"data.root={tiles_root}", "optim.lr=0.01",
                                                     "train.epochs=16", "train.images_per_epoch=40", "loss.name=ce",
                                                     "model.dropout=0"])
    write_tiles(tiles_root / "tiles.csv", pipeline.filter_tiles(config).tiles)
    train.start(config)
    history = checkpoints.load_checkpoint(workplace / "runs/simple/checkpoints/last.pt").history
    assert history[0]["val_loss"] > 0.5 and history[-1]["val_loss"] < 0.15


def test_one_seed_gives_one_run_and_another_seed_another(workplace, tiny):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.start(apply_overrides(tiny, [f"name={name}", f"seed={seed}", "train.epochs=1"]))
    a, b, c = (checkpoint_contents(workplace / "runs" / name)["history"] for name in "abc")
    assert a == b != c


# ---------------------------------------------------------------------------------------------- several seeds

def test_several_seeds_give_the_runs_of_each_and_go_on_where_they_were_interrupted(workplace, tiny, here, monkeypatch):
    (workplace / "tiny.yaml").write_text(to_yaml(tiny))
    command = "train.py", "--config", "tiny.yaml", "seed=3,4", "train.epochs=2"
    save_checkpoint, saved = checkpoints.save_checkpoint, []

    def killed_in_the_second_run(path, **contents):
        save_checkpoint(path, **contents)
        saved.append(path)
        if path.parts[1] == "tiny-seed4" and len(contents["history"]) == 1 and path.name == "last.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", killed_in_the_second_run)
        interrupted = here(*command, cwd=workplace)
    assert interrupted.returncode != 0 and "give the same command again" in interrupted.stderr
    done = (workplace / "runs/tiny-seed3/checkpoints/last.pt").read_bytes()
    out = here(*command, cwd=workplace)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("epoch 1/2") == 0 and out.stdout.count("epoch 2/2") == 1
    assert out.stdout.endswith("next:  python evaluate.py runs/tiny-seed3 runs/tiny-seed4\n")
    assert out.stdout.count("next:") == 1
    assert (workplace / "runs/tiny-seed3/checkpoints/last.pt").read_bytes() == done
    train.start(apply_overrides(tiny, ["name=alone", "seed=4", "train.epochs=2"]))
    several, alone = (checkpoint_contents(workplace / "runs" / name) for name in ("tiny-seed4", "alone"))
    alone["config"]["name"] = "tiny-seed4"
    assert_equal(several, alone)
    longer = here(*command[:-1], "train.epochs=3", cwd=workplace)
    assert longer.returncode == 0 and longer.stdout.count("epoch 3/3") == 2
    assert len(checkpoint_contents(workplace / "runs/tiny-seed3")["history"]) == 3
    shorter = here(*command, cwd=workplace)
    assert shorter.returncode == 2 and "can be made longer, not shorter" in shorter.stderr
    other = here(*command, "loss.name=ce", cwd=workplace)
    assert other.returncode == 2 and "runs/tiny-seed3 was trained with loss.name=dice_ce, not ce" in other.stderr


def test_a_complete_seed_of_other_tiles_is_not_taken_for_one_of_the_series(workplace, tiny, here):
    (workplace / "tiny.yaml").write_text(to_yaml(tiny))
    command = "train.py", "--config", "tiny.yaml", "train.epochs=1"
    assert here(*command, "seed=0,1", cwd=workplace).returncode == 0
    path = tiny.data.list_folder / TILE_LIST
    tiles = read_list(path)
    write_tiles(path, [tiles[0].__class__(**(vars(tiles[0]) | {"split": "excluded"})), *tiles[1:]])
    out = here(*command, "seed=0,1,2", cwd=workplace)
    assert out.returncode == 2 and "changed since this run began" in out.stderr
    assert not (workplace / "runs/tiny-seed2").exists()


@pytest.mark.parametrize("seeds", ["0,", "0,x", "1,,2", "[0,1]", "0, 1"])
def test_seeds_that_cannot_be_read_are_rejected(workplace, tiny, here, seeds):
    (workplace / "tiny.yaml").write_text(to_yaml(tiny))
    out = here("train.py", "--config", "tiny.yaml", f"seed={seeds}", cwd=workplace)
    assert out.returncode == 2 and "such as seed=0,1,2" in out.stderr and not (workplace / "runs").exists()


def test_the_last_seed_counts(tiny, workplace):
    (workplace / "tiny.yaml").write_text(to_yaml(tiny))
    several = ["tiny-seed2", "tiny-seed1"]
    for overrides, names in ((["seed=0,1", "seed=5"], ["tiny"]), (["seed=5", "seed=2,2,1"], several)):
        assert [config.name for config in train.configs_of_seeds("tiny.yaml", overrides)] == names


# ---------------------------------------------------------------------------------------------- resumed runs

def assert_runs_equal(workplace, name="last"):
    """The runs `whole` and `parts`, except for their names."""
    whole, parts = (checkpoint_contents(workplace / "runs" / run, name) for run in ("whole", "parts"))
    whole["config"]["name"] = "parts"
    assert_equal(whole, parts)


AUGMENTED = ["augment.right_angles=true", "augment.rotate=30", "augment.elastic=2", "augment.stain=0.1",
             "augment.contrast=0.1", "augment.blur=1", "augment.noise=5"]


@pytest.mark.parametrize(("stop", "settings"), [(1, []), (2, AUGMENTED), (1, ["train.scheme=plain", *AUGMENTED])],
                         ids=["kfold", "augmented", "plain"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(workplace, tiny, stop, settings):
    tiny = apply_overrides(tiny, ["model.dropout=0.5", "optim.patience=0", *settings])
    train.start(apply_overrides(tiny, ["name=whole"]))
    train.start(apply_overrides(tiny, ["name=parts", f"train.epochs={stop}"]))
    train.resume(workplace / "runs/parts", ["train.epochs=3"])
    for name in ("last", "best"):
        whole, parts = (checkpoint_contents(workplace / "runs" / run, name) for run in ("whole", "parts"))
        whole["config"]["name"] = parts["config"]["name"]
        whole["config"]["train"]["epochs"] = parts["config"]["train"]["epochs"]  # best.pt may be of the first part
        assert_equal(whole, parts)


def test_a_run_killed_in_an_epoch_continues_after_the_last_finished_one(workplace, tiny, monkeypatch):
    train.start(apply_overrides(tiny, ["name=whole"]))
    save_checkpoint = checkpoints.save_checkpoint

    def killed_between_best_and_last(path, **contents):
        if len(contents["history"]) == 2 and path.name == "last.pt":
            raise KeyboardInterrupt
        save_checkpoint(path, **contents)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", killed_between_best_and_last)
        with pytest.raises(KeyboardInterrupt):
            train.start(apply_overrides(tiny, ["name=parts"]))
    train.resume(workplace / "runs/parts", [])
    assert_runs_equal(workplace)


def test_a_run_killed_before_its_first_checkpoint_can_be_resumed(workplace, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *args: None)
        train.start(tiny)
    train.resume(workplace / "runs/tiny", [])
    assert len(checkpoint_contents(workplace / "runs/tiny")["history"]) == 3


def test_best_is_the_lowest_of_the_history_wherever_the_run_is_killed(workplace, tiny, monkeypatch):
    """A run is killed at each of its writes in turn, and resumed."""
    save_checkpoint = checkpoints.save_checkpoint
    for kill_at in range(6):
        run, writes = workplace / f"runs/k{kill_at}", []

        def save(path, writes=writes, kill_at=kill_at, **contents):
            writes.append(path)
            if len(writes) == kill_at + 1:
                raise KeyboardInterrupt
            save_checkpoint(path, **contents)

        monkeypatch.setattr(checkpoints, "save_checkpoint", save)
        try:
            train.start(apply_overrides(tiny, [f"name=k{kill_at}"]))
        except KeyboardInterrupt:
            monkeypatch.setattr(checkpoints, "save_checkpoint", save_checkpoint)
            train.resume(run, [])
        history = checkpoints.load_checkpoint(run / "checkpoints/last.pt").history
        best = checkpoints.load_checkpoint(run / "checkpoints/best.pt")
        assert len(history) == 3
        assert best.history[-1]["val_loss"] == min(row["val_loss"] for row in history)


def test_a_longer_run_that_is_killed_stays_longer(workplace, tiny, monkeypatch):
    train.start(tiny)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "run_next_epoch", killed)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            train.resume(workplace / "runs/tiny", ["train.epochs=5"])
    (workplace / "runs/tiny/metrics.csv").unlink()
    train.resume(workplace / "runs/tiny", [])
    assert len((workplace / "runs/tiny/metrics.csv").read_text().splitlines()) == 6
    with pytest.raises(UserError, match=r"train\.epochs=2.*5 epochs.*last\.pt"):
        train.resume(workplace / "runs/tiny", ["train.epochs=2"])


def test_resuming_a_finished_run_changes_nothing(workplace, tiny, capsys):
    train.start(tiny)
    before = checkpoint_contents(workplace / "runs/tiny")
    train.resume(workplace / "runs/tiny", [])
    assert_equal(before, checkpoint_contents(workplace / "runs/tiny"))
    assert "all 3 epochs" in capsys.readouterr().out


def test_resume_rejects_settings_that_would_make_another_run(workplace, tiny):
    train.start(tiny)
    with pytest.raises(UserError, match="optim.lr"):
        train.resume(workplace / "runs/tiny", ["optim.lr=1"])
    with pytest.raises(UserError, match="no such run"):
        train.resume(workplace / "runs/other", [])


def test_the_checkpoint_of_another_run_is_not_continued(workplace, tiny):
    train.start(tiny)
    train.start(apply_overrides(tiny, ["name=other", "optim.lr=0.1"]))
    last = workplace / "runs/tiny/checkpoints/last.pt"
    last.write_bytes((workplace / "runs/other/checkpoints/last.pt").read_bytes())
    before = (workplace / "runs/tiny/config.yaml").read_text()
    with pytest.raises(UserError, match=r"last\.pt.*name=other.*config\.yaml says tiny"):
        train.resume(workplace / "runs/tiny", ["train.epochs=5"])
    assert (workplace / "runs/tiny/config.yaml").read_text() == before


@pytest.mark.slow
def test_a_compiled_run_trains_like_one_that_is_not_and_resumes_bit_for_bit(workplace, tiny):
    config = apply_overrides(tiny, ["train.compile=true", "train.batch_size=6"])
    for name, changes in (("plain", ["train.compile=false"]), ("whole", []), ("parts", ["train.epochs=1"])):
        train.start(apply_overrides(config, [f"name={name}", *changes]))
    train.resume(workplace / "runs/parts", ["train.epochs=3"])
    assert_runs_equal(workplace)
    plain, whole = (checkpoint_contents(workplace / "runs" / name)["history"] for name in ("plain", "whole"))
    assert [row["val_loss"] for row in whole] == pytest.approx([row["val_loss"] for row in plain], rel=1e-3)


# ---------------------------------------------------------------------------------------------- changed tiles

def rewrite(path, change=lambda rows: rows, delimiter=","):
    """Change the list, and save it as a spreadsheet does."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    header, rows = rows[0].keys(), change(rows)
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, header, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def with_a_note(rows):
    rows[0]["note"] = "looked at it"
    return rows


def with_decimal_commas(rows):
    return [row | {name: row[name].replace(".", ",") for name in ("foreground", "blank", "unmarked")} for row in rows]


def with_a_dropped_tile(rows):
    return [*rows, rows[0] | {"key": "s9-99", "image": "frames/frame#9.png", "mask": "masks/mask#9.png", "group": "s9",
                              "split": "excluded", "proposed": "train"}]


@pytest.mark.parametrize(("change", "delimiter"), [
    (with_a_note, ","), (with_decimal_commas, ";"), (lambda rows: rows[::-1], "\t"), (with_a_dropped_tile, ",")],
    ids=["note", "numbers and separator", "order", "a tile that is dropped"])
def test_changes_of_the_list_that_do_not_concern_a_run_have_no_effect(workplace, tiny, change, delimiter):
    tiny = apply_overrides(tiny, ["train.epochs=2"])
    train.start(apply_overrides(tiny, ["name=whole"]))
    train.start(apply_overrides(tiny, ["name=parts", "train.epochs=1"]))
    rewrite(workplace / "tiles/tiles.csv", change, delimiter)
    train.resume(workplace / "runs/parts", ["train.epochs=2"])
    assert_runs_equal(workplace)
    assert open_test_set([candidate_of_run(workplace / "runs/parts", "best", [], False)], "test").caveats == []


def in_the_other_split(rows):
    group = next(row["group"] for row in rows if row["split"] == "train")
    return [row | {"split": "test"} if row["group"] == group else row for row in rows]


def with_swapped_masks(rows):
    first, second = [row for row in rows if row["split"] == "train"][:2]
    first["mask"], second["mask"] = second["mask"], first["mask"]
    return rows


def in_another_group(rows):
    next(row for row in rows if row["split"] == "train")["group"] = "s77"
    return rows


@pytest.mark.parametrize("change", [in_the_other_split, with_swapped_masks, in_another_group, lambda rows: rows[:-1]],
                         ids=["split", "masks", "group", "removed"])
def test_changes_of_the_list_that_concern_a_run_are_rejected(workplace, tiny, change):
    train.start(apply_overrides(tiny, ["train.epochs=1"]))
    rewrite(workplace / "tiles/tiles.csv", change)
    with pytest.raises(UserError, match="changed since this run began"):
        train.resume(workplace / "runs/tiny", ["train.epochs=2"])
    caveats = open_test_set([candidate_of_run(workplace / "runs/tiny", "best", [], False)], "test").caveats
    assert len(caveats) == 1 and "training tiles" in caveats[0]


def test_changed_pictures_are_rejected_although_the_list_is_unchanged(workplace, tiny, tiles_root):
    train.start(tiny)
    tile = next(tile for tile in read_list(tiles_root / TILE_LIST) if tile.split == "train")
    Image.new("RGB", (40, 48), "purple").save(tiles_root / tile.image)
    with pytest.raises(UserError, match="changed since this run began"):
        train.resume(workplace / "runs/tiny", ["train.epochs=4"])


# ---------------------------------------------------------------------------------------------- learning rate and end

def test_moving_averages_are_carried_on_and_that_of_training_drives_the_learning_rate(tiny, monkeypatch):
    learner, seen, history = build_learner(tiny, prepare_data(tiny).statistics), [], []
    losses = iter([{"train_loss": t, "val_loss": v} for t, v in ((1.0, 5.0), (0.5, 9.0), (2.0, 1.0))])
    monkeypatch.setattr(train, "run_epoch", lambda *args: next(losses))
    monkeypatch.setattr(learner.scheduler, "step", seen.append)
    for _ in range(3):
        history.append(train.run_next_epoch(learner, None, tiny, history))
    assert [row["train_ema"] for row in history] == pytest.approx([1.0, 0.95, 0.9 * 0.95 + 0.1 * 2.0])
    assert [row["val_ema"] for row in history] == pytest.approx([5.0, 5.4, 0.9 * 5.4 + 0.1 * 1.0])
    assert seen == [row["train_ema"] for row in history]


def test_early_stop_counts_epochs_since_the_best():
    config = Config(train=Train(early_stop=2, epochs=9))
    history = [{"epoch": e, "val_loss": v} for e, v in enumerate([3.0, 1.0, 2.0, 1.0], start=1)]
    assert train.reason_to_end([], config) == "" and train.reason_to_end(history[:3], config) == ""
    assert "train.early_stop" in train.reason_to_end(history, config)
    assert "train.epochs" in train.reason_to_end([{"epoch": e, "val_loss": -e} for e in range(1, 10)], config)


# ---------------------------------------------------------------------------------------------- errors

def test_an_existing_run_is_not_overwritten(workplace, tiny):
    (workplace / "runs/tiny").mkdir(parents=True)
    with pytest.raises(UserError, match="not overwritten"):
        train.start(tiny)


@pytest.mark.parametrize(("override", "expected"), [
    ("train.folds=6", r"train\.folds"),
    ("device=cuda:7", "cuda:7"), ("device=abacus", "abacus")])
def test_bad_settings_are_rejected_before_a_run_folder_exists(workplace, tiny, override, expected):
    with pytest.raises(UserError, match=expected):
        train.start(apply_overrides(tiny, [override]))
    assert not (workplace / "runs").exists()


def test_a_run_that_fails_in_its_first_epoch_leaves_its_name_free(workplace, tiny, monkeypatch):
    monkeypatch.setattr(epochs, "run_pass", lambda *args: math.nan)
    with pytest.raises(UserError, match="finite validation loss"):
        train.start(tiny)
    assert not (workplace / "runs/tiny").exists()


def raising(error):
    def fail(*args):
        raise error
    return fail


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.\nGPU 0 has a total"),
    torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),  # pinned memory
    RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB, other allocations: 1.1 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Invalid buffer size: 12.00 GiB"),  # MPS
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_too_little_memory_ends_with_advice_on_three_settings(workplace, tiny, monkeypatch, error):
    monkeypatch.setattr(epochs, "run_pass", raising(error))
    with pytest.raises(UserError, match=r"memory.*train\.batch_size.*data\.crop.*model\.widths") as raised:
        train.start(tiny)
    assert "\n" not in str(raised.value) and not (workplace / "runs/tiny").exists()


@pytest.mark.parametrize("arguments", [["--config", "x.yaml"], ["--resume", "runs/tiny"]])
def test_too_little_memory_before_training_has_the_same_advice(workplace, tiny, here, monkeypatch, arguments):
    """For the tiles on a GPU, or for the network."""
    train.start(apply_overrides(tiny, ["train.epochs=1"]))
    (workplace / "x.yaml").write_text(to_yaml(tiny).replace("name: tiny", "name: x"))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to")
    monkeypatch.setattr("training.learner.build_optimizer", raising(error))
    out = here("train.py", *arguments, cwd=workplace)
    assert out.returncode == 2 and "train.batch_size" in out.stderr and "Traceback" not in out.stderr
    assert not (workplace / "runs/x").exists() and (workplace / "runs/tiny/checkpoints/last.pt").exists()


def test_other_errors_do_not_pass_for_too_little_memory(workplace, tiny, monkeypatch):
    monkeypatch.setattr(epochs, "run_pass", raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="mat1"):
        train.start(tiny)


def test_a_network_that_cannot_be_compiled_ends_with_advice(workplace, tiny, monkeypatch):
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/no/such/compiler"))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with pytest.raises(UserError, match=r"cannot be compiled.*train\.compile=false"):
        train.start(apply_overrides(tiny, ["train.compile=true"]))
    assert not (workplace / "runs/tiny").exists()
