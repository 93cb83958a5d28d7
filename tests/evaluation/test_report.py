"""evaluation/report.py: tables, remarks and the choice of tiles."""

import pytest
from helpers import always_predict, copy_run, read_rows, read_scores, run_evaluate

from evaluation import figures, report


def test_tables_and_remarks_of_a_comparison(trained, tmp_path, capsys):
    run_evaluate(trained, copy_run(trained, "tumour", always_predict(2)), "--split", "all")
    out = tmp_path / "runs/comparison-tiny-tumour-all"
    contents, rows = read_scores(out), read_rows(out / "table.csv")
    dice = contents["entries"][1]["scores"]["dice"]["mean"]
    change = contents["entries"][1]["difference_to_first"]["dice"]["mean"]
    assert [row["run"] for row in rows] == ["tiny", "tumour"] and [row["loss"] for row in rows] == ["dice_ce"] * 2
    assert rows[0]["epochs"] == rows[0]["best epoch"] == "1" and rows[0]["Dice - first"] == ""
    for column, value in (("Dice", dice["value"]), ("Dice low", dice["low"]), ("Dice high", dice["high"]),
                          ("Dice - first", change["value"]), ("difference low", change["low"])):
        assert float(rows[1][column]) == pytest.approx(value, abs=6e-5)
    markdown, printed = (out / "table.md").read_text(), capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:1] == "|"]
    table = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert [row["Dice - first"] for row in table] == ["-", f"{change['value']:+.4f}"]
    assert table[1]["95 % interval"] == f"{dice['low']:.4f} to {dice['high']:.4f}"
    assert f"{change['low']:+.3f} to {change['high']:+.3f}" in printed
    missed, false = (sum(contents["entries"][1][name].values()) for name in ("tiles_where_missed",
                                                                             "tiles_where_invented"))
    for text in (markdown, printed):
        assert f"tumour: {missed} missed, {false} falsely predicted" in text
        assert "12 tiles of 6 groups" in text and "With 6 groups" in text
    assert "runs/tumour/checkpoints/best.pt of epoch 1" in markdown and missed == 24


def test_scores_that_do_not_exist():
    assert report.cell(None, "value", ".3f") == report.cell({"value": None}, "value", ".3f") == ""
    assert report.interval_cell({"value": 0.5, "low": None, "high": None}, ".3f") == ""
    assert report.interval_cell({"value": 0, "low": 0, "high": 0.25}, "+.1f") == "+0.0 to +0.2"


def test_the_choice_of_tiles(trained, monkeypatch):
    drawn = []
    monkeypatch.setattr(report.figures, "tiles",
                        lambda rows, *rest: drawn.append([row[0] for row in rows]) or figures.Figure())
    tumour = copy_run(trained, "tumour", always_predict(2))
    run_evaluate(trained)
    accuracy = {row["key"]: float(row["pixel_accuracy"]) for row in read_rows(trained / "evaluation/tiles.csv")}
    ranked = sorted(accuracy, key=accuracy.get)
    assert drawn.pop() == ranked and len(ranked) == 2
    run_evaluate(trained, tumour, "--pictures", 1)
    assert set(drawn.pop()) == set(ranked)  # the worst one, and the other one because the runs differ there
    run_evaluate(trained, "--tiles", ranked[1])
    assert drawn.pop() == [ranked[1]]
