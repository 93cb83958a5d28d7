"""evaluate.py, evaluation/entries.py, evaluation/report.py, evaluation/unlabelled.py and common/figures.py."""

import csv
import dataclasses
import json
import re
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import GREYS
from PIL import Image
from sklearn.metrics import f1_score

import evaluate
import train
from common import bootstrap, palette
from common.console import UserError
from common.result_folders import names_in
from evaluation import figures, metrics, scoring, unlabelled
from evaluation.candidates import candidate_of_run
from evaluation.test_set import open_test_set
from training import checkpoints
from training.batches import normalise


def test_class_colours_do_not_depend_on_which_classes_a_mask_has():
    alone, mixed = palette.colour_mask(np.full((2, 2), 2), 3), palette.colour_mask(np.array([[0, 1], [2, 2]]), 3)
    assert (alone[0, 0] == mixed[1, 1]).all() and len({tuple(c) for c in palette.class_colours(8)}) == 8
    assert palette.class_colours(20).shape == (20, 3)


def test_the_error_map_marks_wrong_pixels_and_no_others():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    target, predicted = np.zeros((8, 9), np.uint8), np.zeros((8, 9), np.uint8)
    predicted[2:4, 5] = 1
    errors = figures.error_map(image, target, predicted)
    coloured = errors.max(-1) != errors.min(-1)
    assert (coloured == (target != predicted)).all()


def test_the_overlay_leaves_the_background_alone():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    labels = np.zeros((8, 9), np.uint8)
    labels[3, 3] = 2
    mixed = figures.overlay(image, labels, 3)
    assert ((mixed != image).any(-1) == (labels > 0)).all()
    expected = 0.6 * image[3, 3] + 0.4 * palette.class_colours(3)[2]
    assert np.abs(mixed[3, 3] - expected).max() <= 1


def test_names_are_drawn_as_they_are(tmp_path):
    names = ("_a$x_$ {b}", "\\frac$ $")
    history = [{"epoch": 1, "train_loss": 1.0, "train_ema": 1.0, "val_loss": 1.0, "val_ema": 1.0}]
    answers = [("Dice 1", np.zeros((9, 9), np.uint8))] * 2
    row = ("key$_$", "$why_$", np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8), answers)
    with_errors = [f"{name}: error 0.000" for name in names]
    drawn = {"losses": (figures.compared_losses(dict.fromkeys(names, history)), names),
             "reliability": (figures.reliability(dict.fromkeys(names, np.ones((3, 15)))), with_errors),
             "tiles": (figures.tiles([row], names, names), names)}
    for name, (figure, expected) in drawn.items():
        with warnings.catch_warnings(action="error"):
            palette.save(figure, tmp_path / f"{name}.png")
        legends = [*figure.legends, *filter(None, (axis.get_legend() for axis in figure.axes))]
        for legend in legends:
            assert [text.get_text() for text in legend.get_texts()][-2:] == list(expected), name
        assert legends


@pytest.fixture
def command(monkeypatch):
    """evaluate.py in this process; returns what it says on stdout."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
    return call


def scores_of(folder):
    return json.loads((folder / "scores.json").read_text())


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def another(trained, name, change):
    """A second run: a copy whose weights `change` has been at."""
    folder = shutil.copytree(trained, trained.parent / name, ignore=shutil.ignore_patterns("evaluation*"))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("name: tiny", f"name: {name}"))
    for path in (folder / "checkpoints").iterdir():
        contents = torch.load(path, weights_only=True)
        contents["config"]["name"] = name
        change(contents["model"])
        torch.save(contents, path)
    return folder


def always(k):
    def change(weights):
        weights["head.weight"][:] = 0
        weights["head.bias"][:] = torch.eye(3)[k] * 50
    return change


OUTPUTS = {"scores.json", "tiles.csv", "table.md", "table.csv", "losses.png", "tiles.png", "reliability.png",
           "report.html", "predictions"}


def test_scores_equal_a_plain_computation_from_files(trained, tmp_path, command):
    """Everything over again with Pillow, NumPy and scikit-learn, from the PNG files and the checkpoint."""
    command(trained)
    scores = scores_of(trained / "evaluation")
    found = scores["entries"][0]["scores"]
    checkpoint = checkpoints.load_checkpoint(trained / "checkpoints/best.pt")
    model = checkpoints.build_model(checkpoint.config)
    checkpoints.load_weights(model, checkpoint)
    model.eval()
    test = [row for row in rows_of(tmp_path / "tiles/tiles.csv") if row["split"] == "test"]
    tiles = {row["key"]: row for row in rows_of(trained / "evaluation/tiles.csv")}
    truths, guesses, soft = [], [], []
    for row in test:
        image = np.asarray(Image.open(tmp_path / "tiles" / row["image"]), np.float64) / 255
        target = np.searchsorted(GREYS, np.asarray(Image.open(tmp_path / "tiles" / row["mask"])))
        x = (image - checkpoint.statistics.mean) / checkpoint.statistics.std
        with torch.no_grad():
            logits = model(torch.tensor(x, dtype=torch.float32).movedim(-1, 0)[None])[0].double().numpy()
        p, guess = np.exp(logits) / np.exp(logits).sum(0), logits.argmax(0)
        soft.append(np.mean([2 * p[k][target == k].sum() / ((target == k).sum() + p[k].sum()) for k in range(3)]))
        truths.append(target.ravel())
        guesses.append(guess.ravel())
        assert float(tiles[row["key"]]["soft_dice"]) == pytest.approx(soft[-1], abs=1e-5)
        assert float(tiles[row["key"]]["pixel_accuracy"]) == pytest.approx(np.mean(guess == target), abs=1e-3)
        written = np.asarray(Image.open(trained / f"evaluation/predictions/tiny/{row['key']}.png"))
        assert np.mean(written == GREYS[guess]) > 0.999
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    assert scores["tiles"] == len(test) == len(tiles)
    assert found["soft_dice"]["value"] == pytest.approx(np.mean(soft), abs=1e-5)
    assert found["pixel_accuracy"]["value"] == pytest.approx(np.mean(truth == guess), abs=1e-4)
    expected = f1_score(truth, guess, labels=[0, 1, 2], average=None)
    values = [found["dice"][name]["value"] for name in ("background", "tissue", "tumour", "mean")]
    assert values == pytest.approx([*expected, expected.mean()], abs=1e-3)


def test_every_output_is_there_and_nothing_of_the_one_before(trained, command):
    command(trained)
    (trained / "evaluation/predictions/old").mkdir()
    command(trained, "--pictures", 3)
    assert set(names_in(trained / "evaluation").split(", ")) == OUTPUTS
    assert [path.name for path in (trained / "evaluation/predictions").iterdir()] == ["tiny"]
    (trained / "evaluation/predictions/tiny/mine.png").touch()
    with pytest.raises(UserError, match=r"holds predictions/tiny/mine.png, which no earlier run wrote"):
        command(trained)
    assert not list(trained.glob(".evaluation.being-*"))


def test_results_of_one_thing_do_not_replace_those_of_another(trained, command, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(tmp_path / "tiles/masks", tmp_path / place / "labels")
        shutil.copytree(tmp_path / "tiles/frames", tmp_path / place / "frames")
        command(trained, *(["--predictions", tmp_path / "a/labels"] if place == "a" else ["--images", "a/frames"]))
    assert names_in(trained.parent) == "comparison-tiny-labels, tiny" and "predictions-frames" in names_in(trained)
    for option, folder in (("--predictions", "labels"), ("--images", "frames")):
        with pytest.raises(UserError, match=f"holds results of .*a/{folder}.*; move it"):
            command(trained, option, f"b/{folder}")
        command(trained, option, f"b/{folder}", "--out", f"mine/{folder}")
        command(trained, option, f"a/{folder}", "--out", f"mine/{folder}")  # said in so many words
    command(trained, "--predictions", "a/labels", "--pictures", 1)  # the same again
    shutil.copytree(tmp_path / "tiles", tmp_path / "others")
    with pytest.raises(UserError, match="holds results of .*tiles; move it"):
        command(trained, "--predictions", "a/labels", "data.root=others")
    command(trained, "--checkpoint", "last", "--predictions", "a/labels")
    assert names_in(trained.parent / "comparison-tiny-last-labels/predictions") == "tiny-last"


def test_folders_and_patterns_of_any_name(trained, command, tmp_path):
    for name in ("lab.v1", "lab.v2"):
        shutil.copytree(tmp_path / "tiles/masks", tmp_path / name)
    config = trained / "config.yaml"
    command("--predictions", "lab.v1", "--predictions", "lab.v2", "--config", config)
    candidates = scores_of(tmp_path / "comparison-lab.v1-lab.v2")["entries"]
    assert [candidate["name"] for candidate in candidates] == ["lab.v1", "lab.v2"]
    for path in (tmp_path / "tiles/masks").iterdir():
        (tmp_path / "nest" / path.stem.removeprefix("mask#")).mkdir(parents=True)
        shutil.copy(path, tmp_path / "nest" / path.stem.removeprefix("mask#") / "seg.png")
    command("--predictions", "nest/{key}/seg.png", "--config", config)
    assert scores_of(tmp_path / "nest/seg-evaluation")["entries"][0]["name"] == "seg"
    assert not (tmp_path / "nest/{key}").exists()


def test_a_damaged_history_is_refused_before_any_compute(trained, command):
    path = trained / "metrics.csv"
    for text in (path.read_text().replace("val_loss,", "vloss,", 1), "garbage\n", ""):
        path.write_text(text)
        with pytest.raises(UserError, match="metrics.csv: not the metrics of a run .no column"):
            command(trained)


def test_an_evaluation_that_fails_leaves_the_one_before(trained, command, monkeypatch):
    command(trained)
    before = (trained / "evaluation/scores.json").stat().st_mtime_ns
    monkeypatch.setattr(evaluate.report, "draw_tiles", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(trained)
    assert (trained / "evaluation/scores.json").stat().st_mtime_ns == before
    assert not list(trained.glob(".evaluation.being-*"))


def test_a_run_compared_with_itself_differs_by_nothing_and_with_another_by_what_it_should(trained, command, tmp_path,
                                                                                          capsys):
    same, tumour = another(trained, "same", lambda _: None), another(trained, "tumour", always(2))
    command(trained, same, tumour, "--split", "all")
    out = tmp_path / "runs/comparison-tiny-same-tumour-all"
    assert set(names_in(out).split(", ")) == OUTPUTS
    ours, twin, other = scores_of(out)["entries"]
    assert (ours["name"], twin["name"], other["name"]) == ("tiny", "same", "tumour")
    assert ours["difference_to_first"] == {}
    for difference in twin["difference_to_first"]["dice"].values():
        assert difference == {"value": 0, "low": 0, "high": 0}
    for kind in ("background", "tumour", "mean"):
        difference = other["difference_to_first"]["dice"][kind]
        assert difference["value"] == pytest.approx(other["scores"]["dice"][kind]["value"]
                                                    - ours["scores"]["dice"][kind]["value"], abs=2e-6)
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert other["tiles_where_missed"] == {"background": 12, "tissue": 12, "tumour": 0}
    assert re.search(r"diagonal: .*, 24 and \d+ times by tumour\.\n", capsys.readouterr().out)
    assert other["scores"]["dice"]["background"]["value"] == 0 and other["scores"]["recall"]["tumour"]["value"] == 1
    assert np.sum(other["confusion"], axis=0)[:2].tolist() == [0, 0]
    tiles = rows_of(out / "tiles.csv")
    assert len(tiles) == 3 * scores_of(out)["tiles"]
    weights = bootstrap.resampled_weights([row["group"] for row in tiles[24:]])
    accuracy = weights @ [float(row["pixel_accuracy"]) for row in tiles[24:]] / weights.sum(1)
    low, high = bootstrap.interval(accuracy, groups=6)
    found = other["scores"]["pixel_accuracy"]
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=2e-6)
    assert {path.name for path in (out / "predictions").iterdir()} == {"tiny", "same", "tumour"}
    table = rows_of(out / "table.csv")
    assert [row["run"] for row in table] == ["tiny", "same", "tumour"]
    assert [row["loss"] for row in table] == ["dice_ce"] * 3 and table[0]["epochs"] == table[0]["best epoch"] == "1"
    assert float(table[2]["Dice - first"]) == pytest.approx(other["difference_to_first"]["dice"]["mean"]["value"],
                                                            abs=1e-4)
    assert (out / "table.md").read_text().count("\n| ") >= 3


def test_a_class_that_few_slides_have_has_no_interval(trained, command, tmp_path):
    """Six slides, four with tumour."""
    (tmp_path / "peer").mkdir()
    for path in (tmp_path / "tiles/masks").iterdir():
        mask = np.array(Image.open(path))
        if path.stem[len("mask#"):].startswith(("s4", "s5")):
            mask[mask == GREYS[2]] = GREYS[1]
        Image.fromarray(mask).save(path)
        mask[0, mask[0] != GREYS[2]] = GREYS[0]
        Image.fromarray(mask).save(tmp_path / "peer" / path.name)
    command("--predictions", "peer", "--config", trained / "config.yaml", "--split", "all")
    dice = scores_of(tmp_path / "peer-evaluation-all")["entries"][0]["scores"]["dice"]
    assert [name for name, score in dice.items() if score["low"] is None] == ["tumour"]


def test_paired_differences_are_surer_than_the_scores_themselves(trained, command, tmp_path):
    """Both models meet the same easy and hard slides, so their difference varies less than either."""
    def nudged(weights):
        weights["head.bias"][2] += 1e-3
    command(trained, another(trained, "nudged", nudged), "--split", "all")
    ours, other = scores_of(tmp_path / "runs/comparison-tiny-nudged-all")["entries"]
    score, change = ours["scores"]["pixel_accuracy"], other["difference_to_first"]["pixel_accuracy"]
    assert change["high"] - change["low"] < 0.2 * (score["high"] - score["low"])


def test_predictions_of_another_tool_are_scored_as_a_model_is(trained, command, tmp_path, capsys):
    """The label images that an evaluation leaves, scored as if another tool had made them."""
    command(trained)
    shutil.copytree(trained / "evaluation/predictions/tiny", tmp_path / "peer")
    (tmp_path / "x.yaml").write_text((trained / "config.yaml").read_text())
    command("--predictions", tmp_path / "peer", "--config", tmp_path / "x.yaml")
    model = scores_of(trained / "evaluation")["entries"][0]["scores"]
    peer = scores_of(tmp_path / "peer-evaluation")["entries"][0]
    assert peer["name"] == "peer" and {"soft_dice", "ece"} == model.keys() - peer["scores"].keys()
    assert all(peer["scores"][name] == model[name] for name in peer["scores"])
    made_without_model = OUTPUTS - {"losses.png", "reliability.png", "predictions"}
    assert set(names_in(tmp_path / "peer-evaluation").split(", ")) == made_without_model
    command(trained, "--predictions", f"{tmp_path}/peer/{{key}}.png")
    other = scores_of(tmp_path / "runs/comparison-tiny-peer")["entries"][1]
    assert other["difference_to_first"]["dice"]["mean"]["value"] == 0
    assert "peer" in capsys.readouterr().out


def test_perfect_predictions_are_perfect_and_found_by_the_masks_names(trained, command, tmp_path):
    command(trained, "--predictions", tmp_path / "tiles/masks")
    truth = scores_of(tmp_path / "runs/comparison-tiny-masks")["entries"][1]["scores"]
    assert truth["dice"]["mean"]["value"] == truth["tile_surface_dice"]["mean"]["value"] == 1
    assert truth["tile_hausdorff"]["mean"]["value"] == 0


@pytest.mark.parametrize(("change", "expected"), [
    (lambda folder, first: first.unlink(), "no label image for tile"),
    (lambda folder, first: Image.new("L", (7, 5)).save(first), "5 x 7 pixels"),
    (lambda folder, first: Image.fromarray(np.full((48, 40), 3, np.uint8)).save(first),
     "holds 3; label images must hold the greys of the masks: 26 for background"),
    (lambda folder, first: Image.new("L", (40, 48), 26).save(first.with_suffix(".tif")), "keep one"),
    (lambda folder, first: shutil.rmtree(folder), "no such folder of label images")])
def test_bad_predictions(trained, command, tmp_path, change, expected):
    command(trained)
    peer = shutil.copytree(trained / "evaluation/predictions/tiny", tmp_path / "peer")
    change(peer, sorted(peer.iterdir())[0])
    with pytest.raises(UserError, match=expected):
        command(trained, "--predictions", peer)


def test_flips_split_checkpoint_and_out(trained, command, tmp_path):
    command(trained)
    plain = scores_of(trained / "evaluation")
    command(trained, "--flips", "--split", "train", "--checkpoint", "last", "--device", "cpu")
    other = scores_of(trained / "evaluation-last-train-flips")
    assert other["entries"][0]["name"] == "tiny (last)" and other["split"] == "train"
    assert other["tiles"] + plain["tiles"] == 12
    command(trained, "--flips")
    flips, once = (contents["entries"][0]["scores"] for contents in (scores_of(trained / "evaluation-flips"), plain))
    assert flips["soft_dice"]["value"] != once["soft_dice"]["value"]
    assert flips["soft_dice"]["value"] == pytest.approx(once["soft_dice"]["value"], abs=0.05)
    command(trained, "--split", "all", "--out", tmp_path / "elsewhere", "--tolerance", 1)
    both = scores_of(tmp_path / "elsewhere")
    command(trained, "--split", "all", "--tolerance", 9)
    near, far = (contents["entries"][0]["scores"]["tile_surface_dice"]["tissue"]["value"] for contents in
                 (both, scores_of(trained / "evaluation-all-tolerance-9")))
    assert far > near
    assert both["tiles"] == 12 and both["surface_dice_tolerance_px"] == 1
    assert other["entries"][0]["flips"] and not plain["entries"][0]["flips"]
    assert (np.array(both["entries"][0]["confusion"]) >= plain["entries"][0]["confusion"]).all()


def test_precisions_are_evaluated_side_by_side(trained, command):
    for precision in ("float32", "bf16"):
        command(trained, "--precision", precision)
    exact, fast = (scores_of(trained / f"evaluation-{name}")["entries"][0] for name in ("float32", "bf16"))
    assert (exact["precision"], fast["precision"]) == ("float32", "bfloat16")
    assert exact["scores"]["soft_dice"] != fast["scores"]["soft_dice"]


@pytest.mark.parametrize(("precision", "tiles", "expected"), [("bf16", 6, False), ("bf16", 1, True),
                                                              ("float32", 1, False)])
def test_many_tiles_are_compiled_for_in_bfloat16(trained, command, monkeypatch, precision, tiles, expected):
    calls = []
    monkeypatch.setattr(scoring, "MANY", tiles)
    monkeypatch.setattr(torch, "compile", lambda network, **options: lambda x: calls.append(x.shape) or network(x))
    command(trained, "--precision", precision)
    assert scores_of(trained / f"evaluation-{precision}")["tiles"] < 6
    assert bool(calls) == expected


def test_the_named_checkpoint_is_the_one_that_is_scored(trained, command):
    checkpoint = trained / "checkpoints/last.pt"
    contents = torch.load(checkpoint, weights_only=True)
    contents["history"].append(contents["history"][0])
    always(2)(contents["model"])
    torch.save(contents, checkpoint)
    for arguments, folder in ((["--checkpoint", "last"], "evaluation-last"), (["--checkpoint", checkpoint], "x")):
        command(trained, *arguments, "--out", trained / folder)
        candidate = scores_of(trained / folder)["entries"][0]
        assert candidate["tested_epoch"] == 2 and np.sum(candidate["confusion"], axis=0)[:2].tolist() == [0, 0]
    shutil.copy(checkpoint, trained.parent / "best.pt")
    command(trained, "--checkpoint", trained.parent / "best.pt", "--out", trained / "loose")
    candidate = scores_of(trained / "loose")["entries"][0]
    assert (candidate["name"], candidate["epochs"]) == ("tiny (best)", 2)  # its own two, not the run's one
    assert f"tiny (best): {trained.parent}/best.pt of epoch 2." in (trained / "loose/table.md").read_text()
    command(trained / "checkpoints/best.pt", checkpoint, "--out", trained / "both")
    assert [candidate["name"] for candidate in scores_of(trained / "both")["entries"]] == ["tiny", "tiny (last)"]


def test_a_link_is_followed_not_replaced(trained, command, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    for _ in range(2):
        command(trained, "--out", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and set(names_in(tmp_path / "scratch").split(", ")) == OUTPUTS
    assert not list(tmp_path.glob(".*being*"))


def test_data_that_moved_are_found_where_the_resumed_run_found_them(trained, command, tmp_path):
    moved = (tmp_path / "tiles").rename(tmp_path / "moved")
    train.resume(trained, [f"data.root={moved}"])
    command(trained)
    assert scores_of(trained / "evaluation")["data_root"] == str(moved)


def test_tiles_that_are_not_those_of_the_run_are_said(trained, command, tmp_path, capsys):
    path = tmp_path / "tiles/tiles.csv"
    rows = rows_of(path)
    moved = next(row["group"] for row in rows if row["split"] == "train")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(row | {"split": "test"} if row["group"] == moved else row for row in rows)
    command(trained)
    assert "may have been training tiles" in " ".join(capsys.readouterr().err.split())
    for name in ("report.html", "table.md", "scores.json"):
        assert "may have been training tiles" in (trained / "evaluation" / name).read_text()


def test_the_tiles_of_the_picture(trained, command, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluate.report.figures, "tiles",
                        lambda rows, *rest: shown.append([row[0] for row in rows]) or figures.Figure())
    tumour = another(trained, "tumour", always(2))
    command(trained)
    keys = {row["key"]: float(row["pixel_accuracy"]) for row in rows_of(trained / "evaluation/tiles.csv")}
    ranked = sorted(keys, key=keys.get)
    assert shown.pop() == ranked[:1] + ranked[1:] and len(ranked) == 2
    command(trained, tumour, "--pictures", 1)
    assert set(shown.pop()) == set(keys)  # the worst, and the one left where they differ
    command(trained, "--tiles", ranked[1])
    assert shown.pop() == [ranked[1]]


def test_a_class_that_is_nowhere_has_no_score(trained, command, tmp_path):
    for path in (tmp_path / "tiles/masks").iterdir():
        Image.fromarray(np.full((48, 40), 51, np.uint8)).save(path)
    command(another(trained, "tissue", always(1)))
    contents = scores_of(tmp_path / "runs/tissue/evaluation")
    candidate = contents["entries"][0]
    assert candidate["scores"]["dice"]["tumour"] == {"value": None, "low": None, "high": None}
    assert candidate["scores"]["dice"]["mean"]["value"] == 1 and candidate["tiles_behind_means"]["tumour"] == 0
    assert candidate["tiles_where_missed"] == candidate["tiles_where_invented"] == dict.fromkeys(contents["classes"], 0)
    assert candidate["scores"]["soft_dice"]["value"] == pytest.approx(1 / 3, abs=1e-5)
    assert contents["best_constant"]["class"] == "tissue"


def test_runs_that_cannot_be_compared_are_refused_naming_both(trained, command, tmp_path):
    other = another(trained, "other", lambda _: None)
    shutil.copytree(tmp_path / "tiles", tmp_path / "others")  # the same list, and perhaps other images
    config = other / "config.yaml"
    config.write_text(config.read_text().replace(str(tmp_path / "tiles"), str(tmp_path / "others")))
    with pytest.raises(UserError, match=r"other would be tested on the tiles of .*/others, and tiny on those .*/tiles"):
        command(trained, other)
    command(trained, other, f"data.root={tmp_path}/tiles")
    contents = torch.load(other / "checkpoints/best.pt", weights_only=True)
    contents["config"]["data"]["classes"] = ["background", "stroma", "tumour"]
    torch.save(contents, other / "checkpoints/best.pt")
    config.write_text(config.read_text().replace("tissue", "stroma"))
    with pytest.raises(UserError, match="other has data.classes .*stroma.*, tiny has .*tissue"):
        command(trained, other)


@pytest.mark.parametrize(("change", "expected"), [
    (lambda c: c["config"]["model"].update(widths=[4, 8, 16]), r"trained with model.widths=\(4, 8, 16\), but the run's "
     r"config.yaml says \(4, 8\)"),
    (lambda c: c["config"]["data"].update(classes=["a", "b", "c"]), "data.classes=.*'a', 'b', 'c'.*says .*'tumour'"),
    (lambda c: c["model"].update({"head.bias": torch.full((3,), torch.nan)}), "head.bias' holds numbers that are not"),
    (lambda c: c["config"].update(name="other"), "trained with name=other, but the run's config.yaml says tiny"),
    (lambda c: c["statistics"].update(mean=[0.5]), r"not a checkpoint of this repository \(its mean is \[0.5\]\)"),
    (lambda c: c["statistics"].update(std=[0.1, 0.0, 0.1]), "its std is"),
    (lambda c: c["statistics"].update(frequencies=[0.5, 0.5, float("nan")]), "its frequencies is"),
    (lambda c: c["statistics"].pop("std"), "not a checkpoint of this repository .*std"),
    (lambda c: c.update(statistics=None, config=None), "not a checkpoint of this repository"),
    (lambda c: c.update(history=None), "not a checkpoint of this repository"),
    (lambda c: c.update(model=[1]), "not a checkpoint of this repository"),
    (lambda c: c.update(model={"head.bias": 1}), "its weights are no tensors"),
    (lambda c: c["model"].update({"head.bias": torch.zeros(5)}), r"head.bias' is \(5,\) in the file and \(3,\) in")])
def test_a_checkpoint_of_another_architecture_is_refused_before_any_compute(trained, command, change, expected):
    path = trained / "checkpoints/best.pt"
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)
    with pytest.raises(UserError, match=expected):
        command(trained)
    assert not (trained / "evaluation").exists()


def test_truncated_and_altered_checkpoints_are_refused(trained, command):
    path = trained / "checkpoints/best.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        command(trained)
    weights = torch.load(path.with_name("last.pt"), weights_only=True)["model"]["head.weight"]
    place = whole.index(weights.numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
    with pytest.raises(UserError, match="damaged|not a readable checkpoint"):
        command(trained)


@pytest.mark.parametrize(("arguments", "expected"), [
    (["RUN", "model.widths=[4]"], "model.widths belongs to what was trained"),
    (["RUN", "--tiles", "nowhere"], "no such tile"),
    (["RUN", "--pictures", "0"], "--pictures and --tiles draw 1 to 50"),
    (["RUN", "--pictures", "51"], "--pictures and --tiles draw 1 to 50"),
    (["RUN", "--tolerance", "nan"], "--tolerance must be a number of pixels"),
    (["--tiles", "0", "RUN"], "no run given.*before --tiles"),
    (["RUN", "--checkpoint", "none.pt"], "no such checkpoint"),
    (["RUN", "RUN"], "runs/tiny/.*best.pt and .*best.pt would have the same name, .*runs/tiny"),
    (["RUN", "--tolerance", "inf"], "--tolerance must be a number of pixels"),
    (["RUN", "--checkpoint", "runs/else/checkpoints/best.pt"], "is a checkpoint of another run than"),
    (["--predictions", "tiles/masks", "--config", "mine/x.yaml", "--flips"], "--flips has no effect without a run"),
    (["--predictions", "tiles/masks", "--config", "mine/x.yaml", "--checkpoint", "last"], "--checkpoint has no effect"),
    (["RUN", "--config", "x.yaml"], "--config has no effect with a run"),
    (["--predictions", "tiles/masks"], "needs --config"),
    (["RUN", "--images", "nowhere"], "no such folder"),
    (["RUN", "--images", "runs"], "no images found"),
    (["RUN", "RUN", "--images", "tiles/frames"], "--images takes one run"),
    (["RUN", "--images", "tiles/frames", "--tolerance", "2"], "--tolerance has no effect with --images"),
    (["RUN", "--images", "mine/areas.csv"], "mine/areas.csv: a file; --images takes a folder"),
    (["RUN", "--split", "all", "--images", "tiles/frames"], "--split has no effect with --images"),
    (["RUN", "--predictions", "tiles"], "no label images in it .* one of its folders frames, masks"),
    (["RUN", "RUN", "--checkpoint", "x.pt"], "goes with one run"),
    (["RUN/checkpoints/last.pt", "--checkpoint", "last"], "last.pt is a checkpoint already"),
    (["RUN", "--out", "tiles"], "tiles lies in tiles, which this would replace"),
    (["RUN", "--out", "slides"], "slides would be replaced, but holds a.svs and 1 more, which no earlier run wrote"),
    (["RUN", "--out", "runs"], "which this would replace"),
    (["RUN", "--out", "mine"], "mine would be replaced, but holds areas.csv, which no earlier run wrote"),
    (["RUN", "--out", "tiles/tiles.csv"], "is a file"),
    (["RUN", "--predictions", "runs/peer/predictions", "--out", "runs/peer"], "which this would replace"),
    (["RUN", "--predictions", "runs/peer/predictions/mask#{key}.png", "--out", "runs/peer"], "which this would repl"),
    (["--predictions", "tiles/masks", "--config", "mine/x.yaml", "--out", "mine"], "which this would replace"),
    (["RUN", "--images", "runs/peer/predictions", "--out", "runs/peer"], "which this would replace"),
    (["RUN", "--device", "tpu"], "cannot be used here")])
def test_bad_arguments(trained, command, tmp_path, arguments, expected):
    shutil.copytree(tmp_path / "tiles/masks", tmp_path / "runs/peer/predictions")
    (tmp_path / "mine").mkdir()
    shutil.copytree(trained, tmp_path / "runs/else")
    (tmp_path / "mine/areas.csv").touch()
    (tmp_path / "slides").mkdir()
    for name in ("a.svs", "b.svs", ".DS_Store"):
        (tmp_path / "slides" / name).touch()
    if "mine/x.yaml" in arguments:
        shutil.copy(trained / "config.yaml", tmp_path / "mine/x.yaml")
    with pytest.raises(UserError, match=expected):
        command(*(argument.replace("RUN", str(trained)) for argument in arguments))
    assert not (trained / "evaluation").exists() and (tmp_path / "tiles/tiles.csv").exists()


def test_no_tiles_and_lost_masks(trained, command, tmp_path):
    path = tmp_path / "tiles/tiles.csv"
    text = path.read_text()
    path.write_text(text.replace(",test", ",train"))
    with pytest.raises(UserError, match="no tile has split = test"):
        command(trained)
    path.write_text(text)
    shutil.rmtree(tmp_path / "tiles/masks")
    with pytest.raises(UserError, match=r"mask#.*no such file"):
        command(trained)
    path.unlink()
    with pytest.raises(UserError, match="the cleaned list of tiles is missing"):
        command(trained)


def test_predictions_are_normalised_with_the_training_statistics(trained):
    candidate = candidate_of_run(trained, "best", [], flips=False, precision="float32")
    checkpoint = checkpoints.load_checkpoint(trained / "checkpoints/best.pt")
    model = checkpoints.build_model(checkpoint.config)
    checkpoints.load_weights(model, checkpoint)
    images = torch.randint(0, 256, (1, 20, 22, 3), dtype=torch.uint8)
    expected = model.eval()(normalise(images, checkpoint.statistics))
    assert torch.allclose(candidate.predictor.logits(images), expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------- without masks

@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    random = np.random.default_rng(5)
    for name, size in (("a.png", (48, 40)), ("b.jpg", (33, 70)), ("c & <d>.tif", (5, 9))):
        Image.fromarray(random.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / name)
    (folder / "notes.txt").touch()
    return folder


def undecided(weights):
    """Without a bias, classes vary from pixel to pixel."""
    weights["head.bias"][:] = 0
    weights["head.weight"] -= weights["head.weight"].mean(0)


def test_images_without_masks(trained, command, images, capsys):
    model = another(trained, "undecided", undecided)
    command(model, "--images", images)
    out = model / f"predictions-{images.name}"
    rows = rows_of(out / "areas.csv")
    assert [row["image"] for row in rows] == ["a.png", "b.jpg", "c & <d>.tif"]
    assert 0.1 < float(rows[0]["share_tumour"]) < 0.9
    candidate = candidate_of_run(model, "best", [], flips=False)
    for row, size in zip(rows, ((48, 40), (33, 70), (5, 9)), strict=True):
        pixels = np.array(Image.open(images / row["image"]))
        labels = candidate.predictor.logits(torch.from_numpy(pixels)[None])[0].argmax(0).numpy()
        stem = row["image"].rpartition(".")[0]
        assert (np.asarray(Image.open(out / f"labels/{stem}.png")) == GREYS[labels]).all()
        overlay = np.asarray(Image.open(out / f"overlays/{stem}.jpg"), float)
        expected = figures.overlay(pixels, labels, 3)
        assert overlay.shape == pixels.shape
        assert np.abs(overlay - expected).mean() < 0.8 * np.abs(overlay - pixels).mean()
        assert (int(row["height"]), int(row["width"])) == size
        areas = [int(row[f"pixels_{name}"]) for name in ("background", "tissue", "tumour")]
        assert areas == np.bincount(labels.ravel(), minlength=3).tolist()
        assert float(row["share_tumour"]) == pytest.approx(areas[2] / sum(areas), abs=1e-6)
    assert names_in(out) == "areas.csv, labels, legend.png, overlays"
    assert "3 images" in capsys.readouterr().out


def test_an_image_larger_than_a_window_has_the_answer_of_the_whole(trained, images):
    candidate = candidate_of_run(trained, "best", [], flips=False)
    pixels = torch.randint(0, 256, (1100, 90, 3), dtype=torch.uint8)
    assert len(list(candidate.predictor.pieces(pixels[None]))) == 2
    whole = dataclasses.replace(candidate.predictor, window=2000)
    assert np.mean(candidate.predictor.labels(pixels) == whole.labels(pixels)) > 0.9999


def test_overlays_of_large_images_are_smaller(trained, command, images, monkeypatch):
    monkeypatch.setattr(unlabelled, "OVERLAY", 30)
    command(trained, "--images", images)
    sizes = {path.stem: Image.open(path).size for path in (trained / f"predictions-{images.name}/overlays").iterdir()}
    assert sizes == {"a": (20, 24), "b": (24, 11), "c & <d>": (9, 5)}
    assert Image.open(trained / f"predictions-{images.name}/labels/a.png").size == (40, 48)


def test_a_broken_image_is_seen_before_anything_is_computed(trained, command, images, monkeypatch):
    whole = (images / "b.jpg").read_bytes()
    (images / "b.jpg").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(unlabelled, "predict_folder", lambda *_: pytest.fail("computed"))
    with pytest.raises(UserError, match="b.jpg: not a readable image"):
        command(trained, "--images", images)
    (images / "b.jpg").write_bytes(whole)
    (images / "b.png").write_bytes((images / "a.png").read_bytes())
    with pytest.raises(UserError, match="2 images are called 'b'"):
        command(trained, "--images", images)
    (images / "b.png").unlink()
    for name in ("grey", "grey2"):
        Image.new("L", (5, 5)).save(images / f"{name}.png")
    with pytest.raises(UserError, match="grey.png: .* must be 8-bit RGB.* .2 of 5 images cannot be used.*grey2.png"):
        command(trained, "--images", images)


def test_images_larger_than_a_tile_may_be_are_taken_and_huge_headers_are_not(trained, command, images, monkeypatch):
    monkeypatch.setattr("common.pictures.MAX_PIXELS", 100)
    monkeypatch.setattr(unlabelled, "MAX_PIXELS", 2000)
    with pytest.raises(UserError, match="70 x 33 pixels are more than fit here"):
        command(trained, "--images", images)


def test_the_tally_of_a_model_has_every_part(trained):
    candidate = candidate_of_run(trained, "best", [], flips=False)
    test_set = open_test_set([candidate], "all")
    tally, paths = scoring.score(candidate, test_set, 3.0, trained / "labels")
    assert len(tally.confusion) == 12 and (tally.confusion.sum((1, 2)) == 48 * 40).all()
    assert (tally.calibration[:, 0].sum(1) == 48 * 40).all()
    assert (tally.calibration[:, 2].sum(1) == np.trace(tally.confusion, axis1=1, axis2=2)).all()
    assert metrics.tile_scores(tally)["soft_dice"].shape == (12,) and len(paths) == 12
