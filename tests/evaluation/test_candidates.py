"""evaluation/candidates.py: trained models and label images are found, checked and named."""

import shutil

import numpy as np
import pytest
import torch
from helpers import always_predict, read_scores, run_evaluate
from PIL import Image

import train
from common.console import UserError
from evaluation.candidates import candidate_of_run
from training import checkpoints
from training.batches import normalise


def test_images_are_normalised_with_the_training_statistics(trained):
    candidate = candidate_of_run(trained, "best", [], flips=False, precision="float32")
    checkpoint = checkpoints.load_checkpoint(trained / "checkpoints/best.pt")
    model = checkpoints.build_model(checkpoint.config)
    checkpoints.load_weights(model, checkpoint)
    images = torch.randint(0, 256, (1, 20, 22, 3), dtype=torch.uint8)
    expected = model.eval()(normalise(images, checkpoint.statistics))
    assert torch.allclose(candidate.predictor.logits(images), expected, atol=1e-5)


def test_the_named_checkpoint_is_scored(trained):
    checkpoint = trained / "checkpoints/last.pt"
    contents = torch.load(checkpoint, weights_only=True)
    contents["history"].append(contents["history"][0])
    always_predict(2)(contents["model"])
    torch.save(contents, checkpoint)
    for arguments, folder in ((["--checkpoint", "last"], "evaluation-last"), (["--checkpoint", checkpoint], "x")):
        run_evaluate(trained, *arguments, "--out", trained / folder)
        candidate = read_scores(trained / folder)["entries"][0]
        assert candidate["tested_epoch"] == 2 and np.sum(candidate["confusion"], axis=0)[:2].tolist() == [0, 0]
    shutil.copy(checkpoint, trained.parent / "best.pt")
    run_evaluate(trained, "--checkpoint", trained.parent / "best.pt", "--out", trained / "loose")
    candidate = read_scores(trained / "loose")["entries"][0]
    assert (candidate["name"], candidate["epochs"]) == ("tiny (best)", 2)  # by the checkpoint, not by metrics.csv
    assert f"{trained.parent}/best.pt of epoch 2" in (trained / "loose/table.md").read_text()
    run_evaluate(trained / "checkpoints/best.pt", checkpoint, "--out", trained / "both")
    assert [candidate["name"] for candidate in read_scores(trained / "both")["entries"]] == ["tiny", "tiny (last)"]


def test_the_tiles_of_a_run_may_move(trained, tmp_path):
    moved = (tmp_path / "tiles").rename(tmp_path / "moved")
    train.resume(trained, [f"data.root={moved}"])
    run_evaluate(trained)
    assert read_scores(trained / "evaluation")["data_root"] == str(moved)


@pytest.mark.parametrize(("change", "expected"), [
    (lambda c: c["config"]["model"].update(widths=[4, 8, 16]),
     r"best.pt: .*model.widths=\(4, 8, 16\).*config.yaml .*\(4, 8\)"),
    (lambda c: c["config"]["data"].update(classes=["a", "b", "c"]), "data.classes=.*'a', 'b', 'c'.*'tumour'"),
    (lambda c: c["model"].update({"head.bias": torch.full((3,), torch.nan)}), "head.bias.*not finite"),
    (lambda c: c["config"].update(name="other"), "name=other.*tiny"),
    (lambda c: c["statistics"].update(mean=[0.5]), r"best.pt: .*mean is \[0.5\]"),
    (lambda c: c["statistics"].update(std=[0.1, 0.0, 0.1]), "best.pt: .*std is"),
    (lambda c: c["statistics"].update(frequencies=[0.5, 0.5, float("nan")]), "best.pt: .*frequencies is"),
    (lambda c: c["statistics"].pop("std"), "best.pt: not a checkpoint.*std"),
    (lambda c: c.update(statistics=None, config=None), "best.pt: not a checkpoint"),
    (lambda c: c.update(history=None), "best.pt: not a checkpoint"),
    (lambda c: c.update(model=[1]), "best.pt: not a checkpoint"),
    (lambda c: c.update(model={"head.bias": 1}), "best.pt: .*tensors"),
    (lambda c: c["model"].update({"head.bias": torch.zeros(5)}), r"head.bias.*\(5,\).*\(3,\)")])
def test_checkpoints_that_do_not_fit_are_rejected(trained, change, expected):
    path = trained / "checkpoints/best.pt"
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)
    with pytest.raises(UserError, match=expected):
        run_evaluate(trained)
    assert not (trained / "evaluation").exists()


def test_damaged_checkpoints_are_rejected(trained):
    path = trained / "checkpoints/best.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(UserError, match="best.pt: not a readable"):
        run_evaluate(trained)
    weights = torch.load(path.with_name("last.pt"), weights_only=True)["model"]["head.weight"]
    place = whole.index(weights.numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
    with pytest.raises(UserError, match="best.pt: .*(damaged|not a readable)"):
        run_evaluate(trained)


def test_a_damaged_history_is_rejected(trained):
    path = trained / "metrics.csv"
    for text in (path.read_text().replace("val_loss,", "vloss,", 1), "garbage\n", ""):
        path.write_text(text)
        with pytest.raises(UserError, match="metrics.csv: .*column"):
            run_evaluate(trained)


def test_label_images_in_folders_and_patterns_of_any_name(trained, tmp_path):
    for name in ("lab.v1", "lab.v2"):
        shutil.copytree(tmp_path / "tiles/masks", tmp_path / name)
    config = trained / "config.yaml"
    run_evaluate("--predictions", "lab.v1", "--predictions", "lab.v2", "--config", config)
    candidates = read_scores(tmp_path / "comparison-lab.v1-lab.v2")["entries"]
    assert [candidate["name"] for candidate in candidates] == ["lab.v1", "lab.v2"]
    for path in (tmp_path / "tiles/masks").iterdir():
        (tmp_path / "nest" / path.stem.removeprefix("mask#")).mkdir(parents=True)
        shutil.copy(path, tmp_path / "nest" / path.stem.removeprefix("mask#") / "seg.png")
    run_evaluate("--predictions", "nest/{key}/seg.png", "--config", config)
    assert read_scores(tmp_path / "nest/seg-evaluation")["entries"][0]["name"] == "seg"
    assert not (tmp_path / "nest/{key}").exists()


def test_label_images_may_have_the_names_of_the_masks(trained, tmp_path):
    run_evaluate(trained, "--predictions", tmp_path / "tiles/masks")
    truth = read_scores(tmp_path / "runs/comparison-tiny-masks")["entries"][1]["scores"]
    assert truth["dice"]["mean"]["value"] == truth["tile_surface_dice"]["mean"]["value"] == 1
    assert truth["tile_hausdorff"]["mean"]["value"] == 0


@pytest.mark.parametrize(("change", "expected"), [
    (lambda folder, first: first.unlink(), "peer: no label image .*'s"),
    (lambda folder, first: Image.new("L", (7, 5)).save(first), "png: 5 x 7 .*mask#.* 48 x 40"),
    (lambda folder, first: Image.fromarray(np.full((48, 40), 3, np.uint8)).save(first),
     r"png: .*\b3\b.*data.mask_values.*26, 51, 77"),
    (lambda folder, first: Image.new("L", (40, 48), 26).save(first.with_suffix(".tif")),
     "peer: both .*png and .*tif .*keep one"),
    (lambda folder, first: shutil.rmtree(folder), "peer: no such folder")])
def test_bad_label_images(trained, tmp_path, change, expected):
    run_evaluate(trained)
    peer = shutil.copytree(trained / "evaluation/predictions/tiny", tmp_path / "peer")
    change(peer, sorted(peer.iterdir())[0])
    with pytest.raises(UserError, match=expected):
        run_evaluate(trained, "--predictions", peer)
