from dataclasses import replace

import numpy as np
import pytest
from helpers import REPOSITORY
from PIL import Image
from sklearn.metrics import precision_score, recall_score

from common.config import Filter
from common.files import write_csv
from dataset import Tile, write_tiles
from filtering.audit import verdict
from filtering.registration import Move
from tools.filter_accuracy import ALL, OF_MASKS, REPORT, Planted, curve, read, rules, score, tables
from tools.make_demo_data import DEFECTS


def some_tiles(seed=0, count=300):
    random = np.random.default_rng(seed)
    planted = []
    for i in range(count):
        x, y = random.uniform(-100, 100, 2)
        tile = Tile(str(i), "f", "m", foreground=random.choice([0.0, 0.005, 0.5]), blank=random.uniform(0, 0.15),
                    unmarked=random.uniform(0, 0.1), shift_x=x, shift_y=y, angle=0.0, shift=np.hypot(x, y),
                    confidence=random.uniform())
        planted.append(Planted(tile, str(random.choice(["none", *DEFECTS])), random.uniform(), random.uniform(0, 0.04),
                               Move(x + 3, y + 4, 0), (100, 120)))
    return planted


def test_precision_and_recall_are_those_of_scikit_learn():
    planted, limits = some_tiles(), Filter(max_unmarked=0.05, max_shift=30.0)
    dropped = [one.tile.foreground < 0.01 or one.tile.blank >= 0.075 for one in planted]
    defect = [one.defect != "none" for one in planted]
    number, precision, recall = score(planted, *rules(limits)[REPORT])
    assert number == sum(dropped)
    assert precision == pytest.approx(precision_score(defect, dropped))
    assert recall == pytest.approx(recall_score(defect, dropped))
    dropped = [drop or one.tile.unmarked >= 0.05 or (one.tile.shift >= 30 and one.tile.confidence >= 0.25)
               for drop, one in zip(dropped, planted, strict=True)]
    assert score(planted, *rules(limits)[ALL])[1:] == pytest.approx(
        (precision_score(defect, dropped), recall_score(defect, dropped)))


def test_a_curve_judges_one_measurement_alone_on_masks_with_tissue():
    planted = some_tiles()
    judged = [one for one in planted if one.tile.foreground]
    defect = [one.defect in OF_MASKS for one in judged]
    for threshold, precision, recall in curve(planted, Filter(), "unmarked", [0.02, 0.05, 0.08]):
        dropped = [one.tile.unmarked >= threshold for one in judged]
        assert (precision, recall) == pytest.approx((precision_score(defect, dropped), recall_score(defect, dropped)))


def test_tables_count_every_tile_once():
    planted, limits = some_tiles(), Filter(max_unmarked=0.05, max_shift=30.0)
    contents = {title: rows for title, _, rows in tables(planted, limits)}
    assert sum(int(cell) for row in contents["Verdict by planted defect"] for cell in row[2:]) == len(planted)
    moves = contents["Measured moves"]
    assert [row[:2] for row in moves] == [["image", "shifted"], ["image", "rotated"], ["image", "none"]]
    assert moves[0][4:] == ["5.0 px", "5.0 px"]
    seen = contents["Defects that can be seen, and others"]
    expected = sum(one.defect in OF_MASKS and one.tile.foreground > 0 for one in planted)
    assert len(seen) == 2 * len(OF_MASKS) and sum(int(row[1]) for row in seen) == expected
    by_name = {row[0]: row for row in seen}
    chosen = [one for one in planted if one.defect == "rotated" and one.tile.foreground and one.visible < 0.02]
    found = [one for one in chosen if verdict(one.tile, limits)]
    assert by_name["rotated, unseen"][1:3] == [str(len(chosen)), str(len(found))]
    assert by_name["rotated, unseen"][3] == f"{np.mean([one.wrong for one in chosen if one not in found]):.2%}"
    left = {row[0]: int(row[1]) for row in contents["What is left"]}
    assert left[ALL] < left[REPORT] < len(planted)


def test_moves_by_a_model_are_compared_too():
    planted = [replace(one, tile=replace(one.tile, model_shift_x=one.move.right + 6, model_shift_y=one.move.down + 8,
                                         model_angle=0.0, model_confidence=0.9)) for one in some_tiles()]
    in_place = [replace(one, move=None) for one in planted if one.defect == "none"]
    moved = [one for one in planted if one.defect == "shifted"]
    rows = next(rows for title, _, rows in tables(moved + in_place, Filter()) if title == "Measured moves")
    assert rows[3] == ["model", "shifted", str(len(moved)), str(len(moved)), "10.0 px", "10.0 px"]
    far = [np.hypot(one.tile.model_shift_x, one.tile.model_shift_y) for one in in_place]
    assert rows[5] == ["model", "none", *[str(len(far))] * 2, f"{np.median(far):.1f} px", f"{max(far):.1f} px"]


def test_disputed_tiles_count_for_their_own_rule_only():
    planted = [replace(one, tile=replace(one.tile, disagreement=0.3 * (i % 2))) for i, one in enumerate(some_tiles())]
    limits = Filter(max_unmarked=0.05, max_shift=30.0, max_disagreement=0.1)
    tables_of = {title: (header, rows) for title, header, rows in tables(planted, limits)}
    header, rows = tables_of["Verdict by planted defect"]
    assert "disputed" in header and all(int(row[1]) == sum(map(int, row[2:])) for row in rows)
    without = {title: rows for title, _, rows in tables(planted, replace(limits, max_disagreement=None))}
    for title, same in (("Precision and recall", 5), ("What is left", 2)):
        assert tables_of[title][1][:same] == without[title][:same], "all but the last row, of all rules"
        assert tables_of[title][1][same] != without[title][same]


def test_what_a_model_says_of_tested_slides_decides_nothing(tmp_path):
    (tmp_path / "frames").mkdir()
    said = {"foreground": 0.5, "disagreement": 0.5, "quality": 0.1, "model_shift_x": 50.0, "model_shift_y": 0.0,
            "model_angle": 0.0, "model_shift": 50.0, "model_confidence": 0.9, "confidence": 0.1, "shift": 3.0}
    tiles = [Tile(f"{group}{number}", f"frames/{group}{number}.png", f"masks/{group}{number}.png", group, split=split,
                  proposed=split, **said)
             for group, splits in (("a", ("train", "shifted")), ("b", ("test", "unmarked")), ("", ("train", "test")))
             for number, split in enumerate(splits)]
    for tile in tiles:
        Image.new("RGB", (30, 20)).save(tmp_path / tile.image)
    write_tiles(tmp_path / "tiles.csv", tiles)
    write_csv(tmp_path / "truth.csv", [{"key": tile.key, "defect": "none", "wrong": 0, "visible": 0, "dx": "", "dy": "",
                                        "angle": ""} for tile in tiles])
    planted = read(tmp_path)
    limits = Filter(max_shift=30.0, max_disagreement=0.1)
    assert [verdict(one.tile, limits) for one in planted] == ["shifted", "", "shifted", "shifted", "", ""]
    moves = next(rows for title, _, rows in tables(planted, limits) if title == "Measured moves")
    assert moves[-1][:4] == ["model", "none", "6", "6"], "all of them are compared"


def test_on_demo_tiles_from_the_command_line(tmp_path, here):
    for command in (["tools.make_demo_data", "data/demo", "--tiles", 24, "--slides", 3, "--size", 200],
                    ["data_filter.py", "--config", REPOSITORY / "configs/demo.yaml"],
                    ["tools.filter_accuracy", "data/demo"],
                    ["data_filter.py", "--config", REPOSITORY / "configs/demo.yaml", "filter.repair=true"],
                    ["tools.filter_accuracy", "data/demo", "filter.max_unmarked=0.06"]):
        out = here(*command, cwd=tmp_path)
        assert out.returncode == 0, out.stderr
    assert "unmarked >= 0.06" in out.stdout
    assert "| all rules |" in (tmp_path / "data/demo/filter_accuracy/accuracy.md").read_text()
    assert (tmp_path / "data/demo/filter_accuracy/accuracy.png").stat().st_size > 10_000
    out = here("tools.filter_accuracy", "data/demo", "filter.sigma=3", cwd=tmp_path)
    assert out.returncode == 2 and "filter.sigma" in out.stderr
    out = here("tools.filter_accuracy", "nowhere", cwd=tmp_path)
    assert out.returncode == 2 and "run data_filter.py first" in out.stderr
