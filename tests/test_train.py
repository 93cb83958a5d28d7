import copy
import csv
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from common.config_files import apply_overrides, to_yaml
from common.console import Progress, UserError
from common.randomness import torch_seed
from evaluation.candidates import candidate_of_run
from losses import make_loss
from training import checkpoints, epochs, training_set
from training.batches import copied_to
from training.crops import draw_folds, training_crops, validation_crops
from training.learner import build_learner, restore_checkpoint
from unet import UNet


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(run, name="last"):
    """All that a checkpoint holds, but for measured times."""
    contents = torch.load(run / "checkpoints" / f"{name}.pt", weights_only=True)
    for row in contents["history"]:
        for measured in ("seconds", "images_per_second", "peak_memory_mb"):
            del row[measured]
    return contents


def assert_equal(a, b, path=""):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def test_a_run_leaves_what_the_readme_says(workplace, tiny, capsys):
    train.start(tiny)
    run = workplace / "runs/tiny"
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} == {
        ".lock", "config.yaml", "environment.json", "metrics.csv", "checkpoints/best.pt", "checkpoints/last.pt",
        "figures/losses.png"}
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "survivor", "train_loss", "val_loss", "val_loss_0", "val_loss_1", "train_ema",
                             "val_ema", "lr", "seconds", "images_per_second", "peak_memory_mb"]
    for row in rows:
        folds = [float(row["val_loss_0"]), float(row["val_loss_1"])]
        assert float(row["val_loss"]) == min(folds) and int(row["survivor"]) == int(np.argmin(folds))
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert checkpoints.load_checkpoint(run / "checkpoints/best.pt").epoch == int(best["epoch"])
    assert "next:  python evaluate.py runs/tiny" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(workplace, tiny, stop):
    tiny = apply_overrides(tiny, ["model.dropout=0.5", "optim.patience=0"])
    train.start(apply_overrides(tiny, ["name=whole"]))
    train.start(apply_overrides(tiny, ["name=parts", f"train.epochs={stop}"]))
    train.resume(workplace / "runs/parts", ["train.epochs=3"])
    for name in ("last", "best"):
        whole, parts = (state(workplace / "runs" / run, name) for run in ("whole", "parts"))
        whole["config"]["name"] = parts["config"]["name"]
        whole["config"]["train"]["epochs"] = parts["config"]["train"]["epochs"]  # best.pt may be of the first part
        assert_equal(whole, parts)


def test_a_run_killed_inside_an_epoch_goes_on_after_the_last_whole_one(workplace, tiny, monkeypatch):
    train.start(apply_overrides(tiny, ["name=whole"]))
    original, calls = checkpoints.save_checkpoint, []

    def killed_between_best_and_last(path, **contents):
        calls.append(path.name)
        if len(contents["history"]) == 2 and path.name == "last.pt":
            raise KeyboardInterrupt
        original(path, **contents)

    monkeypatch.setattr(checkpoints, "save_checkpoint", killed_between_best_and_last)
    with pytest.raises(KeyboardInterrupt):
        train.start(apply_overrides(tiny, ["name=parts"]))
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    train.resume(workplace / "runs/parts", [])
    whole, parts = (state(workplace / "runs" / run) for run in ("whole", "parts"))
    whole["config"]["name"] = "parts"
    assert_equal(whole, parts)


def test_a_run_killed_before_its_first_checkpoint_can_be_resumed(workplace, tiny, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *args: None)
    train.start(tiny)
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    train.resume(workplace / "runs/tiny", [])
    assert len(state(workplace / "runs/tiny")["history"]) == 3


def test_best_is_always_the_lowest_of_the_history_wherever_the_run_is_killed(workplace, tiny, monkeypatch):
    """Killed at each of the writes in turn, and resumed."""
    original = checkpoints.save_checkpoint
    for kill_at in range(6):
        run, writes = workplace / f"runs/k{kill_at}", []

        def save(path, writes=writes, kill_at=kill_at, **contents):
            writes.append(path)
            if len(writes) == kill_at + 1:
                raise KeyboardInterrupt
            original(path, **contents)

        monkeypatch.setattr(checkpoints, "save_checkpoint", save)
        try:
            train.start(apply_overrides(tiny, [f"name=k{kill_at}"]))
        except KeyboardInterrupt:
            monkeypatch.setattr(checkpoints, "save_checkpoint", original)
            train.resume(run, [])
        history = checkpoints.load_checkpoint(run / "checkpoints/last.pt").history
        best = checkpoints.load_checkpoint(run / "checkpoints/best.pt")
        assert len(history) == 3
        assert best.history[-1]["val_loss"] == min(row["val_loss"] for row in history)


def test_a_checkpoint_of_another_run_is_not_continued(workplace, tiny):
    train.start(tiny)
    train.start(apply_overrides(tiny, ["name=other", "optim.lr=0.1"]))
    last = workplace / "runs/tiny/checkpoints/last.pt"
    last.write_bytes((workplace / "runs/other/checkpoints/last.pt").read_bytes())
    before = (workplace / "runs/tiny/config.yaml").read_text()
    with pytest.raises(UserError, match="was trained with name=other, but the run's config.yaml says tiny"):
        train.resume(workplace / "runs/tiny", ["train.epochs=5"])
    assert (workplace / "runs/tiny/config.yaml").read_text() == before


def test_a_longer_run_that_is_killed_stays_longer(workplace, tiny, monkeypatch):
    train.start(tiny)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "next_row", killed)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train.resume(workplace / "runs/tiny", ["train.epochs=5"])
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    (workplace / "runs/tiny/metrics.csv").unlink()
    train.resume(workplace / "runs/tiny", [])
    assert len((workplace / "runs/tiny/metrics.csv").read_text().splitlines()) == 6
    with pytest.raises(UserError, match="longer, not shorter"):
        train.resume(workplace / "runs/tiny", ["train.epochs=2"])


def test_a_run_that_fails_in_its_first_epoch_leaves_its_name_free(workplace, tiny, monkeypatch):
    monkeypatch.setattr(epochs, "pass_over", lambda *args: math.nan)
    with pytest.raises(UserError, match="no fold has a finite validation loss"):
        train.start(tiny)
    assert not (workplace / "runs/tiny").exists()


@pytest.mark.skipif(os.name == "nt", reason="simulates Windows")
def test_no_lock_file_is_removed_while_it_is_held(workplace, tiny, monkeypatch):
    """Windows removes no open file; the message about the run would be lost in one about its lock."""
    import fcntl

    unlink = os.unlink

    def as_windows_does(path, **options):
        if str(path).endswith(".lock"):
            with Path(path).open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", as_windows_does)
    monkeypatch.setattr(epochs, "pass_over", lambda *args: math.nan)
    with pytest.raises(UserError, match="no fold has a finite validation loss"):
        train.start(tiny)
    assert not (workplace / "runs/tiny").exists()


def test_how_adam_computes_belongs_to_the_device_not_to_the_checkpoint(workplace, tiny):
    train.start(apply_overrides(tiny, ["train.epochs=1"]))
    checkpoint = checkpoints.load_checkpoint(workplace / "runs/tiny/checkpoints/last.pt")
    assert checkpoint.optimizer["param_groups"][0]["fused"] is True
    learner = build_learner(tiny, checkpoint.statistics)
    learner.optimizer.param_groups[0]["fused"] = None  # as on a device without it
    restore_checkpoint(learner, checkpoint)
    assert learner.optimizer.param_groups[0]["fused"] is None


def test_a_fold_that_repeats_its_tiles_is_said(workplace, tiny, capsys):
    training_set.prepare_data(tiny)
    assert "drawn" not in capsys.readouterr().err
    training_set.prepare_data(apply_overrides(tiny, ["train.images_per_epoch=40"]))
    warning = capsys.readouterr().err
    assert "for the 20 images it needs" in warning and "train.images_per_epoch" in warning
    training_set.warn_of_repeats([np.arange(10), np.resize(np.arange(4), 10)])
    assert "has 4 tiles for the 10 images it needs, so each is drawn 2.5 times" in capsys.readouterr().err


def test_moving_averages_are_carried_and_the_training_one_drives_the_learning_rate(workplace, tiny, monkeypatch):
    learner, seen, history = build_learner(tiny, training_set.prepare_data(tiny).statistics), [], []
    given = iter([{"train_loss": t, "val_loss": v} for t, v in ((1.0, 5.0), (0.5, 9.0), (2.0, 1.0))])
    monkeypatch.setattr(train, "run_epoch", lambda *args: next(given))
    monkeypatch.setattr(learner.scheduler, "step", seen.append)
    for _ in range(3):
        history.append(train.next_row(learner, None, tiny, history))
    assert [row["train_ema"] for row in history] == pytest.approx([1.0, 0.95, 0.9 * 0.95 + 0.1 * 2.0])
    assert [row["val_ema"] for row in history] == pytest.approx([5.0, 5.4, 0.9 * 5.4 + 0.1 * 1.0])
    assert seen == [row["train_ema"] for row in history]


def test_statistics_are_those_of_the_training_tiles(workplace, tiny, tiles_root):
    from PIL import Image

    from dataset import read_tiles

    tiles = read_tiles(tiles_root)
    for tile in tiles:
        if tile.split == "test":
            Image.new("RGB", (40, 48), "white").save(tiles_root / tile.image)
    pixels = np.stack([np.asarray(Image.open(tiles_root / tile.image)) for tile in tiles if tile.split == "train"])
    statistics = training_set.prepare_data(tiny).statistics
    assert statistics.mean == pytest.approx(pixels.mean((0, 1, 2)) / 255)


def test_tiles_that_changed_are_noticed_though_the_list_did_not(workplace, tiny, tiles_root):
    from PIL import Image

    from dataset import read_tiles

    train.start(tiny)
    tile = next(tile for tile in read_tiles(tiles_root) if tile.split == "train")
    Image.new("RGB", (40, 48), "purple").save(tiles_root / tile.image)
    with pytest.raises(UserError, match="changed since this run began"):
        train.resume(workplace / "runs/tiny", ["train.epochs=4"])


def test_groups_that_the_list_does_not_hold_are_said(workplace, tiny, tiles_root, capsys):
    training_set.prepare_data(tiny)
    assert "groups" not in capsys.readouterr().err
    training_set.prepare_data(apply_overrides(tiny, ["data.group=(\\d+)$"]))
    assert "finds other groups" in capsys.readouterr().err
    for pattern in ("^(patient)", "x*", "(z)?.*"):
        training_set.prepare_data(apply_overrides(tiny, [f"data.group={pattern}"]))
        assert "finds other groups" in capsys.readouterr().err
    training_set.prepare_data(apply_overrides(tiny, ["data.group="]))
    assert "groups" not in capsys.readouterr().err
    text = (tiles_root / "tiles.csv").read_text()
    for slide in range(6):
        text = text.replace(f",s{slide},", ",,")
    (tiles_root / "tiles.csv").write_text(text)
    training_set.prepare_data(tiny)
    assert "has no group of two tiles" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(workplace, tiny, capsys):
    train.start(tiny)
    before = state(workplace / "runs/tiny")
    train.resume(workplace / "runs/tiny", [])
    assert_equal(before, state(workplace / "runs/tiny"))
    assert "all 3 epochs" in capsys.readouterr().out


def test_resume_refuses_what_would_make_another_run(workplace, tiny):
    train.start(tiny)
    with pytest.raises(UserError, match="optim.lr belongs to what was trained"):
        train.resume(workplace / "runs/tiny", ["optim.lr=1"])
    with pytest.raises(UserError, match="no such run"):
        train.resume(workplace / "runs/other", [])


def rewritten(path, change=lambda rows: rows, delimiter=","):
    """The list as `change` and a spreadsheet leave it."""
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
def test_what_does_not_concern_a_run_in_the_list_changes_nothing(workplace, tiny, capsys, change, delimiter):
    from evaluation.test_set import open_test_set

    tiny = apply_overrides(tiny, ["train.epochs=2"])
    train.start(apply_overrides(tiny, ["name=whole"]))
    train.start(apply_overrides(tiny, ["name=parts", "train.epochs=1"]))
    rewritten(workplace / "tiles/tiles.csv", change, delimiter)
    train.resume(workplace / "runs/parts", ["train.epochs=2"])
    whole, parts = (state(workplace / "runs" / run) for run in ("whole", "parts"))
    whole["config"]["name"] = "parts"
    assert_equal(whole, parts)
    assert open_test_set([candidate_of_run(workplace / "runs/parts", "best", [], False)], "test").caveats == []


def on_the_other_side(rows):
    group = next(row["group"] for row in rows if row["split"] == "train")
    return [row | {"split": "test"} if row["group"] == group else row for row in rows]


def with_swapped_masks(rows):
    first, second = [row for row in rows if row["split"] == "train"][:2]
    first["mask"], second["mask"] = second["mask"], first["mask"]
    return rows


def in_another_group(rows):
    next(row for row in rows if row["split"] == "train")["group"] = "s77"
    return rows


@pytest.mark.parametrize("change", [on_the_other_side, with_swapped_masks, in_another_group, lambda rows: rows[:-1]],
                         ids=["split", "masks", "group", "removed"])
def test_what_a_run_depends_on_in_the_list_is_noticed(workplace, tiny, change):
    from evaluation.test_set import open_test_set

    train.start(apply_overrides(tiny, ["train.epochs=1"]))
    rewritten(workplace / "tiles/tiles.csv", change)
    with pytest.raises(UserError, match="changed since this run began"):
        train.resume(workplace / "runs/tiny", ["train.epochs=2"])
    caveats = open_test_set([candidate_of_run(workplace / "runs/tiny", "best", [], False)], "test").caveats
    assert len(caveats) == 1 and "may have been training tiles" in caveats[0]


def test_an_existing_run_is_not_overwritten(workplace, tiny):
    (workplace / "runs/tiny").mkdir(parents=True)
    with pytest.raises(UserError, match="not overwritten"):
        train.start(tiny)


@pytest.mark.parametrize(("override", "expected"), [
    ("data.crop=48", "data.crop=40"), ("train.folds=6", "groups cannot fill 6 folds"),
    ("device=cuda:7", "cannot be used here"), ("device=abacus", "cannot be used here")])
def test_bad_settings_are_refused_before_a_run_folder_exists(workplace, tiny, override, expected):
    with pytest.raises(UserError, match=expected):
        train.start(apply_overrides(tiny, [override]))
    assert not (workplace / "runs").exists()


def test_an_empty_test_split_is_refused_before_training(workplace, tiny, tiles_root):
    text = (tiles_root / "tiles.csv").read_text()
    (tiles_root / "tiles.csv").write_text(text.replace(",test", ",train"))
    with pytest.raises(UserError, match="no tile has split = test"):
        train.start(tiny)


def test_same_seed_same_run_and_another_seed_another(workplace, tiny):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.start(apply_overrides(tiny, [f"name={name}", f"seed={seed}", "train.epochs=1"]))
    a, b, c = (state(workplace / "runs" / name)["history"] for name in "abc")
    assert a == b != c


def test_folds_start_from_one_snapshot_and_the_survivor_is_the_lowest_finite(workplace, tiny, monkeypatch):
    """A stand-in for the passes: fold losses are given, NaN first; weights and Adam state are marked by each fold."""
    data = training_set.prepare_data(tiny)
    learner = build_learner(tiny, data.statistics)
    learner.model(torch.randn(2, 3, 16, 16)).sum().backward()
    learner.optimizer.step()  # so that there is Adam state to keep apart
    start, seen = learner.snapshot(), []

    def fake_pass(learner, data, crops, batch_size, training, progress):
        if not training:
            return next(given)
        assert_equal(learner.model.state_dict(), start[0])
        assert_equal(learner.optimizer.state_dict(), start[1])
        seen.append(1)
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter.fill_(float(len(seen)))
                learner.optimizer.state[parameter]["exp_avg"].fill_(float(len(seen)))
        return float(len(seen))

    monkeypatch.setattr(epochs, "pass_over", fake_pass)
    for losses, survivor in (([math.nan, 0.25], 1), ([0.25, math.nan], 0), ([0.25, 0.5], 0), ([0.5, 0.25], 1)):
        given = iter(losses)
        learner.restore(start)
        seen.clear()
        row = epochs.run_epoch(learner, data, tiny, epoch=1)
        assert row["survivor"] == survivor and row["val_loss"] == 0.25 and row["train_loss"] == survivor + 1
        for parameter in learner.model.parameters():
            assert (parameter == survivor + 1).all()
            assert (learner.optimizer.state[parameter]["exp_avg"] == survivor + 1).all()
    given = iter([math.nan, math.nan])
    learner.restore(start)
    seen.clear()
    with pytest.raises(UserError, match="no fold has a finite validation loss"):
        epochs.run_epoch(learner, data, tiny, epoch=2)


def test_a_snapshot_is_not_changed_by_further_training(workplace, tiny):
    data = training_set.prepare_data(tiny)
    learner = build_learner(tiny, data.statistics)

    def step():
        learner.optimizer.zero_grad()
        learner.model(torch.randn(2, 3, 16, 16)).sum().backward()
        learner.optimizer.step()

    step()
    snapshot = learner.snapshot()
    copy = torch.tensor([t.double().sum() for t in snapshot[0].values()])
    learner.restore(snapshot)
    step()
    assert torch.equal(copy, torch.tensor([t.double().sum() for t in snapshot[0].values()]))
    adam = [state["exp_avg"].clone() for state in snapshot[1]["state"].values()]
    step()
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(adam, snapshot[1]["state"].values(), strict=True))


def plain_epoch(config, data, epoch):
    """The method written down without thought of speed: deepcopies, a crop at a time, the loss read at each step."""
    learner = build_learner(config, data.statistics)
    model, keys = learner.model, (data.store.shape[1:3], config.data.crop, config.seed, epoch)
    loss_of = make_loss(config.loss.name, torch.tensor(data.statistics.frequencies))
    plan, folds = config.train, [data.rows[fold] for fold in draw_folds(
        data.groups, config.train.folds, config.train.images_per_epoch, config.seed, epoch)]
    mean, std = (torch.tensor(values) for values in (data.statistics.mean, data.statistics.std))
    start, results = copy.deepcopy(model.state_dict()), []
    for fold in range(plan.folds):
        model.load_state_dict(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay,
                                     fused=True)
        torch.manual_seed(torch_seed(config.seed, epoch, fold, "dropout"))
        losses = []
        for crops in (training_crops(folds, fold, *keys), validation_crops(folds, fold, *keys)):
            model.train(not losses)
            total = 0.0
            for first in range(0, len(crops), plan.batch_size):
                windows = []
                for i in range(first, min(first + plan.batch_size, len(crops))):
                    window = data.store[crops.rows[i], crops.top[i]:, crops.left[i]:][:crops.size, :crops.size]
                    window = window[::-1] if crops.flip_vertical[i] else window
                    windows.append(window[:, ::-1] if crops.flip_horizontal[i] else window)
                batch = torch.from_numpy(np.stack(windows))
                images = ((batch[..., :3] / 255 - mean) / std).permute(0, 3, 1, 2)
                with torch.set_grad_enabled(not losses):
                    loss = loss_of(model(images), batch[..., 3].long())
                if not losses:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                total += loss.item() * len(batch)
            losses.append(total / len(crops))
        results.append((losses, copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())))
    survivor = int(np.argmin([losses[1] for losses, _, _ in results]))
    return survivor, *results[survivor], [losses[1] for losses, _, _ in results]


@pytest.mark.parametrize("settings", [["loss.name=wce", "model.dropout=0.5"], ["loss.name=log_dice_ce"]])
def test_an_epoch_is_the_plain_one_bit_for_bit(workplace, tiny, settings):
    """In float32 on a CPU, whatever is done for speed; losses are summed in float32 here, so they differ a little."""
    config = apply_overrides(tiny, [*settings, "train.batch_size=5"])  # the last batches are smaller
    data = training_set.prepare_data(config)
    learner = build_learner(config, data.statistics)
    row = epochs.run_epoch(learner, data, config, epoch=3)
    survivor, losses, model, optimizer, val_losses = plain_epoch(config, data, epoch=3)
    assert row["survivor"] == survivor
    assert (row["train_loss"], row["val_loss"]) == pytest.approx(losses, rel=1e-6)
    assert [row[f"val_loss_{fold}"] for fold in range(2)] == pytest.approx(val_losses, rel=1e-6)
    assert_equal(learner.model.state_dict(), model)
    assert_equal(learner.optimizer.state_dict()["state"], optimizer["state"])


def test_a_store_on_the_device_changes_no_bit(workplace, tiny):
    data, rows = training_set.prepare_data(tiny), []
    for store in (data.store, copied_to(torch.device("cpu"), data.store)):
        learner = build_learner(tiny, data.statistics)
        rows.append((epochs.run_epoch(learner, replace(data, store=store), tiny, 1), learner.state))
    assert_equal(*rows)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.\nGPU 0 has a total"),
    torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),  # page-locked memory
    RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB, other allocations: 1.1 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Invalid buffer size: 12.00 GiB"),  # MPS
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_too_little_memory_ends_with_three_settings_and_changes_none(workplace, tiny, monkeypatch, error):
    def too_large(*args):
        raise error

    monkeypatch.setattr(epochs, "pass_over", too_large)
    with pytest.raises(UserError, match=r"memory.*train\.batch_size.*data\.crop.*model\.widths") as raised:
        train.start(tiny)
    assert "\n" not in str(raised.value) and not (workplace / "runs/tiny").exists()


@pytest.mark.parametrize("arguments", [["--config", "x.yaml"], ["--resume", "runs/tiny"]])
def test_too_little_memory_before_training_is_said_too(workplace, tiny, here, monkeypatch, arguments):
    """For the tiles on a GPU, or for the network."""
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    train.start(apply_overrides(tiny, ["train.epochs=1"]))
    (workplace / "x.yaml").write_text(to_yaml(tiny).replace("name: tiny", "name: x"))
    monkeypatch.setattr(train, "build_learner", too_large)
    out = here("train.py", *arguments, cwd=workplace)
    assert out.returncode == 2 and "train.batch_size" in out.stderr and "Traceback" not in out.stderr
    assert not (workplace / "runs/x").exists() and (workplace / "runs/tiny/checkpoints/last.pt").exists()


def test_the_reports_batch_needs_far_less_than_the_6_gb_that_it_had():
    """Counted, not measured: what autograd keeps of 16 images until the backward pass, and weights and their copies."""
    model, kept = UNet().to(memory_format=torch.channels_last), {}
    weights = {weight.data_ptr() for weight in model.parameters()}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16)):
        make_loss("dice_ce", torch.ones(3))(model(torch.zeros(1, 3, 256, 256)), torch.zeros(1, 256, 256).long())
    of_an_image = sum(storage.nbytes() for storage in kept.values())
    of_weights = sum(weight.nbytes for weight in model.parameters())
    assert 16 * of_an_image + 10 * of_weights < 2.5e9  # the ten: gradients, Adam's two, two snapshots of three


def test_other_errors_are_not_taken_for_too_little_memory(workplace, tiny, monkeypatch):
    def broken(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(epochs, "pass_over", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        train.start(tiny)


def test_a_network_that_cannot_be_compiled_ends_with_what_to_do(workplace, tiny, monkeypatch):
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/no/such/compiler"))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with pytest.raises(UserError, match=r"cannot be compiled.*train\.compile=false"):
        train.start(apply_overrides(tiny, ["train.compile=true"]))
    assert not (workplace / "runs/tiny").exists()


@pytest.mark.slow
def test_a_compiled_run_trains_like_one_that_is_not_and_resumes_bit_for_bit(workplace, tiny):
    config = apply_overrides(tiny, ["train.compile=true", "train.batch_size=6"])
    for name, changes in (("plain", ["train.compile=false"]), ("whole", []), ("parts", ["train.epochs=1"])):
        train.start(apply_overrides(config, [f"name={name}", *changes]))
    train.resume(workplace / "runs/parts", ["train.epochs=3"])
    plain, whole, parts = (state(workplace / "runs" / name) for name in ("plain", "whole", "parts"))
    assert_equal(whole["model"], parts["model"])
    assert_equal(whole["optimizer"], parts["optimizer"])
    assert_equal(whole["history"], parts["history"])
    for ours, theirs in zip(whole["history"], plain["history"], strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-3)


def test_mean_loss_is_over_images_not_batches(workplace, tiny):
    data = training_set.prepare_data(tiny)
    learner = build_learner(tiny, data.statistics)
    folds = [data.rows[fold] for fold in draw_folds(data.groups, 2, 14, 0, 1)]
    crops = validation_crops(folds, 0, data.store.shape[1:3], 16, 0, 1)
    with Progress("", 1) as progress:
        losses = [epochs.pass_over(learner, data, crops, size, False, progress) for size in (7, 3, 1)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_learning_rate_is_cut_when_the_ema_worsens_though_the_loss_is_negative(workplace, tiny):
    """With torch's relative threshold a negative loss may worsen for ever."""
    learner = build_learner(tiny, training_set.prepare_data(tiny).statistics)
    for epoch in range(8):
        learner.scheduler.step(-0.5 + 1e-5 * epoch)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(tiny.optim.lr * 0.2)


def test_early_stop_counts_epochs_since_the_best():
    from common.config import Config, Train

    config = Config(train=Train(early_stop=2, epochs=9))
    history = [{"epoch": e, "val_loss": v} for e, v in enumerate([3.0, 1.0, 2.0, 1.0], start=1)]
    assert train.ending([], config) == "" and train.ending(history[:3], config) == ""
    assert "stopped early" in train.ending(history, config)
    assert "epochs" in train.ending([{"epoch": e, "val_loss": -e} for e in range(1, 10)], config)


def test_the_network_learns_a_simple_task(workplace, tiles_root):
    """Dark, medium and light pixels are the three classes: a pipeline that is wired right learns this in seconds."""
    from helpers import GREYS, TINY
    from PIL import Image

    from common.config import Config
    from dataset import write_tiles
    from filtering import pipeline

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


def test_every_epoch_trains_on_other_tiles_than_it_validates():
    for epoch in range(5):
        folds = draw_folds([""] * 40, 5, 20, seed=0, epoch=epoch)
        for fold in range(5):
            crops = training_crops(folds, fold, (32, 32), 16, 0, epoch)
            assert not set(crops.rows) & set(folds[fold])
            assert max(Counter(crops.rows.tolist()).values()) == 1
