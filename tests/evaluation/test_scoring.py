"""evaluation/scoring.py: candidates predict the test tiles, and every part of the scores is counted."""

import shutil

import numpy as np
import pytest
import torch
from helpers import GREYS, read_rows, read_scores, run_evaluate
from PIL import Image
from sklearn.metrics import f1_score

from evaluation import metrics, scoring
from evaluation.candidates import candidate_of_run
from evaluation.test_set import open_test_set
from training import checkpoints


def test_scores_equal_a_plain_computation_from_files(trained, tmp_path):
    """The same scores by Pillow, NumPy and scikit-learn, from the PNG files and the checkpoint."""
    run_evaluate(trained)
    scores = read_scores(trained / "evaluation")
    found = scores["entries"][0]["scores"]
    checkpoint = checkpoints.load_checkpoint(trained / "checkpoints/best.pt")
    model = checkpoints.build_model(checkpoint.config)
    checkpoints.load_weights(model, checkpoint)
    model.eval()
    test = [row for row in read_rows(tmp_path / "tiles/tiles.csv") if row["split"] == "test"]
    tiles = {row["key"]: row for row in read_rows(trained / "evaluation/tiles.csv")}
    truths, predictions, soft = [], [], []
    for row in test:
        image = np.asarray(Image.open(tmp_path / "tiles" / row["image"]), np.float64) / 255
        target = np.searchsorted(GREYS, np.asarray(Image.open(tmp_path / "tiles" / row["mask"])))
        x = (image - checkpoint.statistics.mean) / checkpoint.statistics.std
        with torch.no_grad():
            logits = model(torch.tensor(x, dtype=torch.float32).movedim(-1, 0)[None])[0].double().numpy()
        p, predicted = np.exp(logits) / np.exp(logits).sum(0), logits.argmax(0)
        soft.append(np.mean([2 * p[k][target == k].sum() / ((target == k).sum() + p[k].sum()) for k in range(3)]))
        truths.append(target.ravel())
        predictions.append(predicted.ravel())
        assert float(tiles[row["key"]]["soft_dice"]) == pytest.approx(soft[-1], abs=1e-5)
        assert float(tiles[row["key"]]["pixel_accuracy"]) == pytest.approx(np.mean(predicted == target), abs=1e-3)
        written = np.asarray(Image.open(trained / f"evaluation/predictions/tiny/{row['key']}.png"))
        assert np.mean(written == GREYS[predicted]) > 0.999
    truth, predicted = np.concatenate(truths), np.concatenate(predictions)
    assert scores["tiles"] == len(test) == len(tiles)
    assert found["soft_dice"]["value"] == pytest.approx(np.mean(soft), abs=1e-5)
    assert found["pixel_accuracy"]["value"] == pytest.approx(np.mean(truth == predicted), abs=1e-4)
    expected = f1_score(truth, predicted, labels=[0, 1, 2], average=None)
    values = [found["dice"][name]["value"] for name in ("background", "tissue", "tumour", "mean")]
    assert values == pytest.approx([*expected, expected.mean()], abs=1e-3)


def test_label_images_have_the_scores_of_the_model_that_made_them(trained, tmp_path):
    run_evaluate(trained)
    shutil.copytree(trained / "evaluation/predictions/tiny", tmp_path / "peer")
    (tmp_path / "x.yaml").write_text((trained / "config.yaml").read_text())
    run_evaluate("--predictions", tmp_path / "peer", "--config", tmp_path / "x.yaml")
    model = read_scores(trained / "evaluation")["entries"][0]["scores"]
    peer = read_scores(tmp_path / "peer-evaluation")["entries"][0]
    assert peer["name"] == "peer" and {"soft_dice", "ece"} == model.keys() - peer["scores"].keys()
    assert all(peer["scores"][name] == model[name] for name in peer["scores"])
    run_evaluate(trained, "--predictions", f"{tmp_path}/peer/{{key}}.png")
    other = read_scores(tmp_path / "runs/comparison-tiny-peer")["entries"][1]
    assert other["difference_to_first"]["dice"]["mean"]["value"] == 0


@pytest.mark.parametrize(("precision", "tiles", "expected"), [("bf16", 6, False), ("bf16", 1, True),
                                                              ("float32", 1, False)])
def test_the_network_is_compiled_for_many_tiles_in_bfloat16(trained, monkeypatch, precision, tiles, expected):
    calls = []
    monkeypatch.setattr(scoring, "MANY", tiles)
    monkeypatch.setattr(torch, "compile", lambda network, **options: lambda x: calls.append(x.shape) or network(x))
    run_evaluate(trained, "--precision", precision)
    assert read_scores(trained / f"evaluation-{precision}")["tiles"] < 6
    assert bool(calls) == expected


def test_the_tally_of_a_model_has_every_part(trained):
    candidate = candidate_of_run(trained, "best", [], flips=False)
    test_set = open_test_set([candidate], "all")
    tally, paths = scoring.score(candidate, test_set, 3.0, trained / "labels")
    assert len(tally.confusion) == 12 and (tally.confusion.sum((1, 2)) == 48 * 40).all()
    assert (tally.calibration[:, 0].sum(1) == 48 * 40).all()
    assert (tally.calibration[:, 2].sum(1) == np.trace(tally.confusion, axis1=1, axis2=2)).all()
    assert metrics.tile_scores(tally)["soft_dice"].shape == (12,) and len(paths) == 12
