"""evaluation/unlabelled.py: images without masks are predicted into one folder."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import GREYS, copy_run, read_rows, run_evaluate
from PIL import Image

from common.console import UserError
from common.result_folders import names_in
from evaluation import figures, unlabelled
from evaluation.candidates import candidate_of_run


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    random = np.random.default_rng(5)
    for name, size in (("a.png", (48, 40)), ("b.jpg", (33, 70)), ("c & <d>.tif", (5, 9))):
        Image.fromarray(random.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / name)
    (folder / "notes.txt").touch()
    return folder


def without_bias(weights):
    """A change for `copy_run`: the predicted class varies from pixel to pixel."""
    weights["head.bias"][:] = 0
    weights["head.weight"] -= weights["head.weight"].mean(0)


def test_images_without_masks(trained, images, capsys):
    model = copy_run(trained, "varied", without_bias)
    run_evaluate(model, "--images", images)
    out = model / f"predictions-{images.name}"
    rows = read_rows(out / "areas.csv")
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


def test_a_large_image_is_predicted_in_windows_as_a_whole(trained, images):
    candidate = candidate_of_run(trained, "best", [], flips=False)
    pixels = torch.randint(0, 256, (1100, 90, 3), dtype=torch.uint8)
    assert len(list(candidate.predictor.pieces(pixels[None]))) == 2
    whole = dataclasses.replace(candidate.predictor, window=2000)
    assert np.mean(candidate.predictor.labels(pixels) == whole.labels(pixels)) > 0.9999


def test_overlays_of_large_images_are_reduced(trained, images, monkeypatch):
    monkeypatch.setattr(unlabelled, "OVERLAY", 30)
    run_evaluate(trained, "--images", images)
    sizes = {path.stem: Image.open(path).size for path in (trained / f"predictions-{images.name}/overlays").iterdir()}
    assert sizes == {"a": (20, 24), "b": (24, 11), "c & <d>": (9, 5)}
    assert Image.open(trained / f"predictions-{images.name}/labels/a.png").size == (40, 48)


def test_bad_images_are_rejected_before_anything_is_computed(trained, images, monkeypatch):
    whole = (images / "b.jpg").read_bytes()
    (images / "b.jpg").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(unlabelled, "predict_folder", lambda *_: pytest.fail("computed"))
    with pytest.raises(UserError, match="b.jpg: .*1 of 3 images"):
        run_evaluate(trained, "--images", images)
    (images / "b.jpg").write_bytes(whole)
    (images / "b.png").write_bytes((images / "a.png").read_bytes())
    with pytest.raises(UserError, match="new: 2 images .*'b'"):
        run_evaluate(trained, "--images", images)
    (images / "b.png").unlink()
    for name in ("print", "print2"):
        Image.new("CMYK", (5, 5)).save(images / f"{name}.tif")
    with pytest.raises(UserError, match="print.tif: .*RGB.*2 of 5 images.*print2.tif"):
        run_evaluate(trained, "--images", images)


def test_images_have_a_size_limit_of_their_own(trained, images, monkeypatch):
    monkeypatch.setattr("common.pictures.MAX_PIXELS", 100)
    monkeypatch.setattr(unlabelled, "MAX_PIXELS", 2000)
    with pytest.raises(UserError, match="70 x 33 pixels"):
        run_evaluate(trained, "--images", images)
