"""evaluate.py --merge and --by: classes scored as one, as papers on binary segmentation do, against plain sums."""

import numpy as np
import pytest
import torch
from helpers import GREYS, copy_run, read_rows, read_scores, run_evaluate
from PIL import Image
from torchmetrics.functional.classification import binary_jaccard_index

from common.console import UserError
from evaluation import metrics


def test_merged_counts_are_those_of_merged_labels():
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 4, (2, 5, 30, 30))
    counts = metrics.confusion(torch.from_numpy(predicted), torch.from_numpy(truth), 4).numpy()
    for classes in ([1], [1, 3], [0, 2, 3]):
        both = [torch.from_numpy(np.isin(labels, classes)).long() for labels in (predicted, truth)]
        assert (metrics.merged(counts, classes) == metrics.confusion(*both, 2).numpy()).all()


def test_scores_of_merged_classes_by_part(trained, tmp_path, capsys):
    run_evaluate(trained, "--split", "all", "--merge", "gland=tissue,tumour", "--merge", "bad=tumour", "--by",
                 r"^(s[01])", "--out", "out")
    contents, rows = read_scores(tmp_path / "out"), read_rows(tmp_path / "out/merged.csv")
    assert [(found["merge"], found["part"]) for found in contents["merged"]] == [
        ("gland", ""), ("gland", "s0"), ("gland", "s1"), ("bad", ""), ("bad", "s0"), ("bad", "s1")]
    classes = {"gland": [1, 2], "bad": [2]}
    for found, row in zip(contents["merged"], rows, strict=True):
        pairs = []
        for path in sorted((tmp_path / "out/predictions/tiny").iterdir()):
            if path.stem.startswith(found["part"]):
                files = path, tmp_path / f"tiles/masks/mask#{path.name}"
                labels = [np.searchsorted(GREYS, np.array(Image.open(file))) for file in files]
                pairs.append([np.isin(each, classes[found["merge"]]) for each in labels])
        assert len(pairs) == found["tiles"] == int(row["tiles"]) == (12 if not found["part"] else 2)
        dices = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs if (a | b).any()]
        pooled = np.array([np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1)])
        (scores,) = found["rows"]
        assert scores["tile_dice"]["value"] == pytest.approx(np.mean(dices), abs=1e-6)
        expected = binary_jaccard_index(*torch.from_numpy(pooled).int()).item()
        assert scores["iou"]["value"] == pytest.approx(expected, abs=1e-6)
        assert scores["dice"]["value"] == pytest.approx(2 * expected / (1 + expected), abs=1e-6)
        assert float(row["tile Dice"]) == pytest.approx(np.mean(dices), abs=6e-5)
        assert (scores["dice"]["low"] is None) == (found["groups"] < 5)
    printed = capsys.readouterr().out
    assert any(line.split()[:3] == ["gland", "s0", "2"] for line in printed.splitlines())
    assert "gland is tissue or tumour; bad is tumour" in (tmp_path / "out/table.md").read_text()
    assert "against the rest" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(("options", "message"), [
    (["--merge", "gland"], "--merge gland: write NAME=CLASS,CLASS"),
    (["--merge", "x=tissue,stroma"], "background, tissue"),
    (["--merge", "x=background,tissue,tumour"], "not all"), (["--by", "x"], "--by has no effect without --merge"),
    (["--merge", "x=tumour", "--by", "("], "not a regular expression"),
    (["--merge", "x=tumour", "--merge", " x =tissue"], "another --merge has the name x"),
    (["--merge", "x=tumour", "--by", "nothing"], "is found in no key of the test tiles, such as s")])
def test_merges_that_cannot_be_read_are_rejected(trained, options, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run_evaluate(trained, *options)


# ---------------------------------------------------------------------------------------------- ensembles

def test_an_ensemble_averages_probabilities(trained, tmp_path):
    def biased(weights):
        weights["head.bias"] += torch.tensor([0.3, -0.2, 0.1])
    other = copy_run(trained, "biased", biased)
    from evaluation.candidates import candidate_of_run, ensemble_of
    models = [candidate_of_run(run, "best", [], False, "float32") for run in (trained, other)]
    images = torch.randint(0, 256, (2, 37, 45, 3), dtype=torch.uint8)
    labels, logits = ensemble_of(models).predict(images, [])
    expected = sum(torch.softmax(model.predict(images, [])[1], 1) for model in models) / 2
    assert torch.allclose(logits.exp(), expected, atol=1e-6) and torch.equal(labels, expected.argmax(1))
    run_evaluate(trained, other, "--ensemble", "--split", "all")
    contents = read_scores(tmp_path / "runs/comparison-tiny-biased-ensemble-all")
    assert [entry["name"] for entry in contents["entries"]] == ["tiny", "biased", "ensemble"]
    ensemble = contents["entries"][2]
    assert ensemble["members"] == ["tiny", "biased"] and ensemble["source"].count("best.pt") == 2
    assert sum(map(sum, ensemble["confusion"])) == 12 * 48 * 40


def test_an_ensemble_predicts_images_and_needs_two_runs(trained, tmp_path):
    other = copy_run(trained, "other", lambda weights: None)
    run_evaluate(trained, other, "--ensemble", "--images", tmp_path / "tiles/frames")
    run_evaluate(trained, "--images", tmp_path / "tiles/frames")
    with pytest.raises(UserError, match="would be replaced, but holds results of .*tiny.*other"):
        run_evaluate(trained, copy_run(trained, "third", lambda weights: None), "--ensemble", "--images",
                     tmp_path / "tiles/frames")
    folders = [tmp_path / "runs/ensemble-predictions-frames/labels", trained / "predictions-frames/labels"]
    for path in folders[1].iterdir():
        assert (np.array(Image.open(path)) == np.array(Image.open(folders[0] / path.name))).all()
    with pytest.raises(UserError, match="averages several runs"):
        run_evaluate(trained, "--ensemble")
    with pytest.raises(UserError, match="with --ensemble"):
        run_evaluate(trained, other, "--images", tmp_path / "tiles/frames")
