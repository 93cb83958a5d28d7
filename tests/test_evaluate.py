"""evaluate.py: its arguments, and the folders that it writes and replaces."""

import shutil

import numpy as np
import pytest
from helpers import copy_run, read_scores, run_evaluate

from common.console import UserError
from common.result_folders import names_in
from evaluation import report

OUTPUTS = {"scores.json", "tiles.csv", "table.md", "table.csv", "losses.png", "tiles.png", "reliability.png",
           "report.html", "predictions"}


def test_an_evaluation_replaces_all_files_of_the_one_before_and_no_others(trained):
    run_evaluate(trained)
    (trained / "evaluation/predictions/old").mkdir()
    run_evaluate(trained, "--pictures", 3)
    assert set(names_in(trained / "evaluation").split(", ")) == OUTPUTS
    assert [path.name for path in (trained / "evaluation/predictions").iterdir()] == ["tiny"]
    (trained / "evaluation/predictions/tiny/mine.png").touch()
    with pytest.raises(UserError, match="evaluation .*predictions/tiny/mine.png"):
        run_evaluate(trained)
    assert not list(trained.glob(".evaluation.being-*"))


def test_files_of_several_runs_and_of_label_images(trained, tmp_path):
    run_evaluate(trained, copy_run(trained, "other"))
    out = tmp_path / "runs/comparison-tiny-other"
    assert set(names_in(out).split(", ")) == OUTPUTS and names_in(out / "predictions") == "other, tiny"
    run_evaluate("--predictions", "tiles/masks", "--config", trained / "config.yaml")
    expected = OUTPUTS - {"losses.png", "reliability.png", "predictions"}
    assert set(names_in(tmp_path / "tiles/masks-evaluation").split(", ")) == expected


def test_results_of_other_sources_are_not_replaced(trained, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(tmp_path / "tiles/masks", tmp_path / place / "labels")
        shutil.copytree(tmp_path / "tiles/frames", tmp_path / place / "frames")
        run_evaluate(trained, *(["--predictions", tmp_path / "a/labels"] if place == "a" else ["--images", "a/frames"]))
    assert names_in(trained.parent) == "comparison-tiny-labels, tiny" and "predictions-frames" in names_in(trained)
    for option, folder in (("--predictions", "labels"), ("--images", "frames")):
        with pytest.raises(UserError, match=f"results of .*a/{folder}"):
            run_evaluate(trained, option, f"b/{folder}")
        run_evaluate(trained, option, f"b/{folder}", "--out", f"mine/{folder}")
        run_evaluate(trained, option, f"a/{folder}", "--out", f"mine/{folder}")  # --out may replace them
    run_evaluate(trained, "--predictions", "a/labels", "--pictures", 1)  # the same sources
    shutil.copytree(tmp_path / "tiles", tmp_path / "others")
    with pytest.raises(UserError, match="results of .*tiles"):
        run_evaluate(trained, "--predictions", "a/labels", "data.root=others")
    run_evaluate(trained, "--checkpoint", "last", "--predictions", "a/labels")
    assert names_in(trained.parent / "comparison-tiny-last-labels/predictions") == "tiny-last"


def test_an_evaluation_that_fails_keeps_the_one_before(trained, monkeypatch):
    run_evaluate(trained)
    before = (trained / "evaluation/scores.json").stat().st_mtime_ns
    monkeypatch.setattr(report, "draw_tiles", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_evaluate(trained)
    assert (trained / "evaluation/scores.json").stat().st_mtime_ns == before
    assert not list(trained.glob(".evaluation.being-*"))


def test_flips_split_checkpoint_and_out(trained, tmp_path):
    run_evaluate(trained)
    plain = read_scores(trained / "evaluation")
    run_evaluate(trained, "--flips", "--split", "train", "--checkpoint", "last", "--device", "cpu")
    other = read_scores(trained / "evaluation-last-train-flips")
    assert other["entries"][0]["name"] == "tiny (last)" and other["split"] == "train"
    assert other["tiles"] + plain["tiles"] == 12
    run_evaluate(trained, "--flips")
    flips, once = (contents["entries"][0]["scores"] for contents in (read_scores(trained / "evaluation-flips"), plain))
    assert flips["soft_dice"]["value"] != once["soft_dice"]["value"]
    assert flips["soft_dice"]["value"] == pytest.approx(once["soft_dice"]["value"], abs=0.05)
    run_evaluate(trained, "--split", "all", "--out", tmp_path / "elsewhere", "--tolerance", 1)
    both = read_scores(tmp_path / "elsewhere")
    run_evaluate(trained, "--split", "all", "--tolerance", 9)
    near, far = (contents["entries"][0]["scores"]["tile_surface_dice"]["tissue"]["value"] for contents in
                 (both, read_scores(trained / "evaluation-all-tolerance-9")))
    assert far > near
    assert both["tiles"] == 12 and both["surface_dice_tolerance_px"] == 1
    assert other["entries"][0]["flips"] and not plain["entries"][0]["flips"]
    assert (np.array(both["entries"][0]["confusion"]) >= plain["entries"][0]["confusion"]).all()


def test_each_precision_has_its_own_folder(trained):
    for precision in ("float32", "bf16"):
        run_evaluate(trained, "--precision", precision)
    exact, fast = (read_scores(trained / f"evaluation-{name}")["entries"][0] for name in ("float32", "bf16"))
    assert (exact["precision"], fast["precision"]) == ("float32", "bfloat16")
    assert exact["scores"]["soft_dice"] != fast["scores"]["soft_dice"]


def test_a_link_is_followed_and_not_replaced(trained, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    for _ in range(2):
        run_evaluate(trained, "--out", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and set(names_in(tmp_path / "scratch").split(", ")) == OUTPUTS
    assert not list(tmp_path.glob(".*being*"))


@pytest.mark.parametrize(("arguments", "expected"), [
    (["RUN", "model.widths=[4]"], "model.widths"),
    (["RUN", "--tiles", "nowhere"], "--tiles nowhere.*/tiles "),
    (["RUN", "--pictures", "0"], "--pictures .*1 to 50"),
    (["RUN", "--pictures", "51"], "--pictures .*1 to 50"),
    (["RUN", "--tolerance", "nan"], "--tolerance .*pixels"),
    (["--tiles", "0", "RUN"], "no run .*before --tiles"),
    (["RUN", "--checkpoint", "none.pt"], "none.pt"),
    (["RUN", "RUN"], "runs/tiny/.*best.pt and .*best.pt .*same name.*runs/tiny"),
    (["RUN", "--tolerance", "inf"], "--tolerance .*pixels"),
    (["RUN", "--checkpoint", "runs/else/checkpoints/best.pt"], "else/checkpoints/best.pt .*another run .*runs/tiny"),
    (["--predictions", "tiles/masks", "--config", "mine/x.yaml", "--flips"], "--flips .*without a run"),
    (["--predictions", "tiles/masks", "--config", "mine/x.yaml", "--checkpoint", "last"], "--checkpoint .*without"),
    (["RUN", "--config", "x.yaml"], "--config .*with a run"),
    (["--predictions", "tiles/masks"], "--predictions .*--config"),
    (["RUN", "--images", "nowhere"], "nowhere: no such folder"),
    (["RUN", "--images", "runs"], "runs: no images"),
    (["RUN", "RUN", "--images", "tiles/frames"], "--images .*one run"),
    (["RUN", "--images", "tiles/frames", "--tolerance", "2"], "--tolerance .*with --images"),
    (["RUN", "--images", "mine/areas.csv"], "mine/areas.csv: a file"),
    (["RUN", "--split", "all", "--images", "tiles/frames"], "--split .*with --images"),
    (["RUN", "--predictions", "tiles"], "tiles: no label images .*frames, masks"),
    (["RUN", "RUN", "--checkpoint", "x.pt"], "--checkpoint PATH .*one run"),
    (["RUN/checkpoints/last.pt", "--checkpoint", "last"], "--checkpoint last .*last.pt"),
    (["RUN", "--out", "tiles"], "tiles lies in tiles"),
    (["RUN", "--out", "slides"], "slides .*a.svs and 1 more"),
    (["RUN", "--out", "runs"], "lies in runs"),
    (["RUN", "--out", "mine"], "mine .*areas.csv"),
    (["RUN", "--out", "tiles/tiles.csv"], "tiles/tiles.csv is a file"),
    (["RUN", "--predictions", "runs/peer/predictions", "--out", "runs/peer"], "lies in runs/peer"),
    (["RUN", "--predictions", "runs/peer/predictions/mask#{key}.png", "--out", "runs/peer"], "lies in runs/peer"),
    (["--predictions", "tiles/masks", "--config", "mine/x.yaml", "--out", "mine"], "lies in mine"),
    (["RUN", "--images", "runs/peer/predictions", "--out", "runs/peer"], "lies in runs/peer"),
    (["RUN", "--device", "tpu"], "tpu")])
def test_bad_arguments(trained, tmp_path, arguments, expected):
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
        run_evaluate(*(argument.replace("RUN", str(trained)) for argument in arguments))
    assert not (trained / "evaluation").exists() and (tmp_path / "tiles/tiles.csv").exists()
