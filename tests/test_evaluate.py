"""inference.py, figures.py and evaluate.py."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import GREYS
from PIL import Image
from sklearn.metrics import f1_score

import evaluate
import figures
import metrics
import runs
import train
from config import apply_overrides
from console import UserError
from dataset import Tile, normalise
from inference import mirrored_indices, mirrored_logits
from unet import UNet


@pytest.mark.parametrize("size", [1, 3, 5, 16, 17, 31, 224, 500])
@pytest.mark.parametrize("multiple", [1, 2, 8, 16, 32])
def test_mirroring_equals_numpys_symmetric_padding(size, multiple):
    line, margin = np.arange(size), -size % multiple
    expected = np.pad(line, (margin // 2, margin - margin // 2), mode="symmetric")
    assert (line[mirrored_indices(size, multiple).numpy()] == expected).all()


def test_500_becomes_512_with_6_pixels_on_either_side():
    indices = mirrored_indices(500, 16)
    assert len(indices) == 512 and indices[:7].tolist() == [5, 4, 3, 2, 1, 0, 0] and indices[6] == 0


@pytest.mark.parametrize("size", [(50, 38), (32, 48), (5, 3)])
def test_logits_of_any_size_are_those_of_the_padded_image_cropped_back(size):
    torch.manual_seed(0)
    model, images = UNet((4, 8, 16)).eval(), torch.randn(2, 3, *size)
    margins = [-n % 4 for n in size]
    pads = [(m // 2, m - m // 2) for m in margins]
    padded = torch.from_numpy(np.pad(images.numpy(), [(0, 0), (0, 0), *pads], mode="symmetric"))
    expected = model(padded)[:, :, pads[0][0]:pads[0][0] + size[0], pads[1][0]:pads[1][0] + size[1]]
    assert torch.equal(mirrored_logits(model, images), expected)


def test_class_colours_do_not_depend_on_which_classes_a_mask_has():
    alone, mixed = figures.colour_mask(np.full((2, 2), 2), 3), figures.colour_mask(np.array([[0, 1], [2, 2]]), 3)
    assert (alone[0, 0] == mixed[1, 1]).all() and len({tuple(c) for c in figures.class_colours(8)}) == 8
    assert figures.class_colours(20).shape == (20, 3)


def test_the_error_map_marks_wrong_pixels_and_no_others():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    target, prediction = np.zeros((8, 9), np.uint8), np.zeros((8, 9), np.uint8)
    prediction[2:4, 5] = 1
    errors = figures.error_map(image, target, prediction)
    coloured = errors.max(-1) != errors.min(-1)
    assert (coloured == (target != prediction)).all()


@pytest.fixture
def trained(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.start(apply_overrides(tiny, ["train.epochs=1"]))
    return tmp_path / "runs/tiny"


def run_evaluation(folder, which="best", pictures=1, overrides=()):
    return evaluate.evaluate(evaluate.plan(folder, which, list(overrides)), which, pictures)


def test_scores_equal_a_plain_computation_from_files(trained, tmp_path):
    """Everything over again with Pillow, NumPy and scikit-learn, from the PNG files and the checkpoint."""
    scores = run_evaluation(trained, "best", 2, [])
    assert scores == json.loads((trained / "evaluation/scores.json").read_text())
    checkpoint = runs.load_checkpoint(trained / "checkpoints/best.pt")
    model = runs.build_model(checkpoint.config)
    runs.load_weights(model, checkpoint)
    model.eval()
    with (tmp_path / "tiles/tiles.csv").open() as file:
        test = [row for row in csv.DictReader(file) if row["split"] == "test"]
    truths, guesses, soft = [], [], []
    for row in test:
        image = np.asarray(Image.open(tmp_path / "tiles" / row["image"]), np.float64) / 255
        target = np.searchsorted(GREYS, np.asarray(Image.open(tmp_path / "tiles" / row["mask"])))
        x = (image - checkpoint.statistics.mean) / checkpoint.statistics.std
        with torch.no_grad():
            logits = model(torch.tensor(x, dtype=torch.float32).movedim(-1, 0)[None])[0].double().numpy()
        p = np.exp(logits) / np.exp(logits).sum(0)
        soft.append(np.mean([2 * p[k][target == k].sum() / ((target == k).sum() + p[k].sum()) for k in range(3)]))
        truths.append(target.ravel())
        guesses.append(logits.argmax(0).ravel())
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    assert scores["tiles"] == len(test) and scores["soft_dice"] == pytest.approx(np.mean(soft), abs=1e-5)
    assert scores["pixel_accuracy"] == pytest.approx(np.mean(truth == guess), abs=1e-4)
    expected = f1_score(truth, guess, labels=[0, 1, 2], average=None)
    assert list(scores["dice"].values())[:3] == pytest.approx(expected, abs=1e-3)
    assert list(scores["dice"]) == list(scores["iou"]) == ["background", "tissue", "tumour", "mean"]


def test_the_named_checkpoint_is_the_one_that_is_scored(trained):
    checkpoint = trained / "checkpoints/last.pt"
    contents = torch.load(checkpoint, weights_only=True)
    contents["history"].append(contents["history"][0])
    contents["model"]["head.bias"][:] = torch.tensor([0.0, 0.0, 1e6])  # predicts tumour everywhere
    torch.save(contents, checkpoint)
    best, last = run_evaluation(trained, "best"), run_evaluation(trained, "last")
    assert (best["epoch"], last["epoch"]) == (1, 2)
    assert np.sum(last["confusion"], axis=0)[:2].tolist() == [0, 0] and best["confusion"] != last["confusion"]


def test_data_that_moved_are_found_where_the_resumed_run_found_them(trained, tmp_path):
    moved = (tmp_path / "tiles").rename(tmp_path / "moved")
    train.resume(trained, [f"data.root={moved}"])
    assert run_evaluation(trained)["data_root"] == str(moved)


def test_runs_on_different_tiles_get_tables_of_their_own(trained, tmp_path):
    first = run_evaluation(trained)
    (tmp_path / "tiles/tiles.csv").write_text((tmp_path / "tiles/tiles.csv").read_text() + "\n")
    other = run_evaluation(trained)
    assert len(evaluate.comparisons([first, first])) == 1 and len(evaluate.comparisons([first, other, first])) == 2


def test_an_evaluation_replaces_the_one_before_whole(trained):
    (trained / "evaluation").mkdir()
    (trained / "evaluation/old.txt").touch()
    run_evaluation(trained, "last", 3, [])
    assert {p.name for p in (trained / "evaluation").iterdir()} == {"scores.json", "tiles.csv", "predictions.png"}
    with (trained / "evaluation/tiles.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == json.loads((trained / "evaluation/scores.json").read_text())["tiles"]


def test_tiles_that_are_not_those_of_the_run_are_said(trained, tmp_path, capsys):
    with (tmp_path / "tiles/tiles.csv").open("a") as file:
        file.write("\n")
    run_evaluation(trained, "best", 1, [])
    assert "may have been training tiles" in " ".join(capsys.readouterr().err.split())


def test_bad_input(trained, tmp_path):
    with pytest.raises(UserError, match="model.widths belongs to what was trained"):
        run_evaluation(trained, "best", 1, ["model.widths=[4]"])
    with pytest.raises(UserError, match="no such checkpoint"):
        run_evaluation(tmp_path, "best", 1, [])
    text = (tmp_path / "tiles/tiles.csv").read_text()
    (tmp_path / "tiles/tiles.csv").write_text(text.replace(",test", ",train"))
    with pytest.raises(UserError, match="no tile has split = test"):
        run_evaluation(trained, "best", 1, [])


def test_a_class_that_is_nowhere_has_no_score():
    counts = metrics.confusion(np.zeros((4, 4), int), np.zeros((4, 4), int), 3)
    contents = evaluate.report(evaluate.Scores([Tile("a", "", "")], counts[None], np.array([1 / 3])), ("a", "b", "c"))
    assert contents["dice"] == {"a": 1.0, "b": None, "c": None, "mean": 1.0}
    assert contents["tiles_with_class"] == {"a": 1, "b": 0, "c": 0}
    json.dumps(contents, allow_nan=False)
    assert "-" in evaluate.comparison([{"run": "r", "epoch": 1, **contents}])


def test_mean_over_tiles_leaves_out_tiles_without_the_class():
    perfect = metrics.confusion(np.array([0, 1]), np.array([0, 1]), 3)
    missed = metrics.confusion(np.array([0, 0]), np.array([0, 2]), 3)
    scores = evaluate.Scores([Tile(k, "", "") for k in "ab"], np.stack([perfect, missed]), np.array([0.5, 0.5]))
    contents = evaluate.report(scores, ("a", "b", "c"))
    assert contents["dice_mean_over_tiles"]["b"] == 1.0 and contents["dice_mean_over_tiles"]["c"] == 0.0
    assert contents["tiles_with_class"] == {"a": 2, "b": 1, "c": 1}


def test_predictions_are_normalised_with_the_training_statistics(trained):
    checkpoint = runs.load_checkpoint(trained / "checkpoints/best.pt")
    images = torch.randint(0, 256, (1, 20, 22, 3), dtype=torch.uint8)
    model = runs.build_model(checkpoint.config)
    runs.load_weights(model, checkpoint)
    expected = mirrored_logits(model.eval(), normalise(images, checkpoint.statistics))
    assert torch.allclose(evaluate.predictor(checkpoint, torch.device("cpu"))(images), expected, atol=1e-5)
