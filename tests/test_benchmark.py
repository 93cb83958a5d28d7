import json

import pytest
from conftest import script

from data_filter import filter_tiles
from dataset import SPLITS
from tools.benchmark import BENCHMARKS, multiply, original_pass, race


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    made = script("tools.make_demo_data", "data/demo", "--tiles", 24, "--slides", 3, "--size", 128, cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder


def test_the_plain_way_keeps_the_tiles_that_ours_keeps(tiles, tmp_path):
    """Otherwise their times are not of the same work."""
    config = multiply(tiles / "data/demo", tmp_path / "tiles", 24)
    result = filter_tiles(config)
    (tmp_path / "npz").mkdir()
    original_pass(tmp_path / "tiles", result.tiles, tmp_path / "npz")
    kept = {tile.key for tile in result.tiles if tile.split in SPLITS}
    assert {path.stem.removeprefix("mask") for path in (tmp_path / "npz").glob("mask*")} == kept
    assert {tile.split for tile in result.tiles} > {"sparse", "misregistered"}


def test_a_race_takes_turns_and_gives_medians_and_the_range_of_the_ratios(monkeypatch):
    clock, turns = [0.0], []
    took = {"ours": iter([9, 1, 1, 2]), "baseline": iter([9, 4, 6, 8])}  # seconds; the first is the warm-up
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def side(name):
        turns.append(name)
        clock[0] += next(took[name])

    row = race(lambda: side("ours"), lambda: side("baseline"), items=10, rounds=3)
    assert turns == ["ours", "baseline"] * 4
    assert (row["ours"], row["baseline"]) == pytest.approx((100, 600)) and row["unit"] == "ms a tile"
    assert (row["ratio"], *row["ratio_range"]) == pytest.approx((4, 4, 6))


def test_rows_reach_the_terminal_and_the_file(tiles):
    out = script("tools.benchmark", "--quick", "--only", "filter_check", "filter_pass", "filter_verdicts", "--json",
                 "speed.json", cwd=tiles)
    assert out.returncode == 0, out.stderr
    rows = {row["name"]: row for row in json.loads((tiles / "speed.json").read_text())}
    assert list(rows) == ["filter_check", "filter_pass", "filter_verdicts"] and rows.keys() <= BENCHMARKS.keys()
    assert all({"name", "ours", "baseline", "unit", "ratio"} <= row.keys() for row in rows.values())
    assert rows["filter_verdicts"]["ours"] == 0
    assert "filter_pass" in out.stdout
    out = script("tools.benchmark", "--data", "nowhere", cwd=tiles)
    assert out.returncode == 2 and "make_demo_data" in out.stderr
