"""evaluation/test_set.py: which tiles are scored, and which candidates can be compared on them."""

import csv
import shutil

import pytest
import torch
from helpers import copy_run, read_rows, read_scores, run_evaluate, tiny_config, write_pairs

from common.console import UserError


def test_runs_with_other_classes_or_tiles_cannot_be_compared(trained, tmp_path):
    other = copy_run(trained, "other")
    shutil.copytree(tmp_path / "tiles", tmp_path / "others")
    config = other / "config.yaml"
    config.write_text(config.read_text().replace(str(tmp_path / "tiles"), str(tmp_path / "others")))
    with pytest.raises(UserError, match="other .*/others.* tiny .*/tiles"):
        run_evaluate(trained, other)
    run_evaluate(trained, other, f"data.root={tmp_path}/tiles")
    contents = torch.load(other / "checkpoints/best.pt", weights_only=True)
    contents["config"]["data"]["classes"] = ["background", "stroma", "tumour"]
    torch.save(contents, other / "checkpoints/best.pt")
    config.write_text(config.read_text().replace("tissue", "stroma"))
    with pytest.raises(UserError, match="other .*data.classes.*stroma.*tiny .*tissue"):
        run_evaluate(trained, other)


def test_a_changed_list_of_tiles_is_reported(trained, tmp_path, capsys):
    path = tmp_path / "tiles/tiles.csv"
    rows = read_rows(path)
    moved = next(row["group"] for row in rows if row["split"] == "train")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(row | {"split": "test"} if row["group"] == moved else row for row in rows)
    run_evaluate(trained)
    assert f"{path} has changed since tiny was trained" in capsys.readouterr().err
    for name in ("report.html", "table.md", "scores.json"):
        assert "has changed since tiny was trained" in (trained / "evaluation" / name).read_text()


def test_tiles_of_another_folder_are_not_doubted_unless_they_were_learned(trained, tmp_path, capsys):
    shutil.copytree(tmp_path / "tiles", tmp_path / "copy")
    rows = read_rows(tmp_path / "copy/tiles.csv")
    with (tmp_path / "copy/tiles.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows[1:])
    write_pairs(tmp_path / "others", 6, seed=8, slides=3)
    tiny_config(tmp_path / "others")
    for folder, is_doubted in (("others", False), ("copy", True)):
        run_evaluate(trained, f"data.root={tmp_path / folder}", "--split", "all", "--out", tmp_path / f"of_{folder}")
        assert ("has changed since tiny was trained" in capsys.readouterr().err) == is_doubted
        assert bool(read_scores(tmp_path / f"of_{folder}")["doubts"]) == is_doubted


def test_missing_tiles_masks_and_lists(trained, tmp_path):
    path = tmp_path / "tiles/tiles.csv"
    text = path.read_text()
    path.write_text(text.replace(",test", ",train"))
    with pytest.raises(UserError, match="tiles.csv: .*split = test"):
        run_evaluate(trained)
    path.write_text(text)
    shutil.rmtree(tmp_path / "tiles/masks")
    with pytest.raises(UserError, match="mask#.*no such file"):
        run_evaluate(trained)
    path.unlink()
    with pytest.raises(UserError, match="tiles.csv: .*missing"):
        run_evaluate(trained)
