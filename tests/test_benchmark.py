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


def test_a_race_gives_the_ratio_of_medians_and_its_range():
    def spin(times):
        return lambda: sum(range(200_000 * times))

    row = race(spin(1), spin(8), items=10, rounds=3)
    assert 2 < row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1] < 40
    assert row["ours"] < row["baseline"]


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
