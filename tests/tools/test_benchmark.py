"""tools/benchmark: both sides do the same work, FLOP and bytes are right, rows are written. Speed is not tested."""

import json
import platform
import resource
from functools import partial

import numpy as np
import pytest
import torch
from helpers import script

from common.config import Model, Train
from common.console import UserError
from common.devices import has_bf16
from common.statistics import Statistics
from dataset import SPLITS
from evaluation.inference import Predictor
from filtering.pipeline import filter_tiles
from tools.benchmark import __main__ as benchmark
from tools.benchmark import plain, roofline
from tools.benchmark.__main__ import QUICK, benchmarks, table_row, with_roofline
from tools.benchmark.filtering import multiply, original_pass, our_search, plain_search, with_labels
from tools.benchmark.many_tiles import many_tiles
from tools.benchmark.network import (
    STATISTICS,
    our_crops,
    our_inference,
    peer,
    plain_crops,
    plain_inference,
    random_tiles,
    trained_network,
    trainer,
)
from tools.benchmark.race import PREPARE, Lap, Race, Setting, Sides, compete, plain_row, turns
from tools.benchmark.scaling import crops_row, epoch, step_row
from training.batches import normalise
from unet import UNet

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    made = script("tools.make_demo_data", "data/demo", "--tiles", 24, "--slides", 3, "--size", 128, cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture
def setting(tiles):
    return Setting(tiles / "data/demo", True, "cpu")


# ---------------------------------------------------------------------------------------------- the same work

def test_the_plain_way_keeps_the_same_tiles_as_ours(tiles, tmp_path):
    config = multiply(tiles / "data/demo", tmp_path / "tiles", 24)
    result = filter_tiles(config)
    (tmp_path / "npz").mkdir()
    original_pass(tmp_path / "tiles", result.tiles, tmp_path / "npz")
    kept = {tile.key for tile in result.tiles if tile.split in SPLITS}
    assert {path.stem.removeprefix("mask") for path in (tmp_path / "npz").glob("mask*")} == kept
    assert {tile.split for tile in result.tiles} > {"sparse", "misregistered"}


def test_the_plain_search_finds_the_same_move_as_ours(tiles):
    for image, labels in with_labels(tiles / "data/demo", 2):
        assert plain_search(image, labels) == our_search(image, labels)


def test_the_plain_way_predicts_the_same_as_ours():
    model, images = trained_network(), random_tiles(2, 50)[..., :3].copy()
    ours = Predictor.of(model, lambda pixels: normalise(pixels, STATISTICS), False).logits(torch.from_numpy(images))
    assert (torch.stack(plain.predict(model, images, 16, STATISTICS)()) == ours.argmax(1)).float().mean() > 0.999


@pytest.mark.parametrize("bf16", [False, True])
def test_the_plain_way_trains_the_same_network_on_as_many_pixels(bf16):
    torch.manual_seed(0)
    model = UNet((4, 8), dropout=0)
    step = plain.step(model, torch.randn(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16)), bf16)
    losses = [step() for _ in range(5)]
    assert losses[-1] < losses[0]
    ours = roofline.work_of(trainer("cpu", 2, 1, 16, (4, 8)))
    plain_work = roofline.work_of(step)
    assert roofline.flop(ours) == roofline.flop(plain_work) > 0
    assert ("bfloat16" in {dtype for dtype, flop, _ in plain_work if flop}) == bf16


def test_the_plain_loader_gives_normalised_crops_of_the_tiles(tmp_path):
    tiles = random_tiles(4, 20)
    plain.NpzTiles.write(tmp_path, tiles)
    data = plain.NpzTiles(tmp_path, 4, 20, Statistics([0.5] * 3, [0.25] * 3, [1.0]))
    image, target = data[2]  # as large as its tile, so that only flips are left
    upright = [(image.flip(axes), target.flip(axes)) for axes in ([], [-1], [-2], [-1, -2])]
    expected = normalise(torch.from_numpy(tiles[2:3, ..., :3]), Statistics([0.5] * 3, [0.25] * 3, [1.0]))[0]
    assert any(torch.allclose(a, expected) and (b.numpy() == tiles[2, ..., 3]).all() for a, b in upright)
    batches = list(plain.loader(plain.NpzTiles(tmp_path, 4, 8, STATISTICS), 3))
    assert [tuple(images.shape) for images, _ in batches] == [(3, 3, 8, 8), (1, 3, 8, 8)]


@pytest.mark.parametrize("prepare", [our_crops, partial(our_crops, normalised=True), plain_crops])
def test_a_lap_cuts_as_many_crops_as_it_says(setting, prepare):
    lap = prepare(setting)
    assert lap.run() == lap.items >= 64


def test_a_lap_predicts_as_many_tiles_as_it_says(setting):
    ours, plain_way = our_inference(setting), plain_inference(setting)
    predictions, expected = torch.cat(ours.run()), torch.stack(plain_way.run())
    assert ours.items == plain_way.items == len(expected) and predictions.shape == expected.shape == (1, 500, 500)
    assert (predictions == expected).float().mean() > 0.9  # the network is not trained
    assert roofline.flop(ours.facts["work"]) == roofline.flop(plain_way.facts["work"])


@pytest.mark.parametrize("name", ["monai", "smp"])
def test_other_libraries_networks_take_our_tiles(name):
    pytest.importorskip({"monai": "monai", "smp": "segmentation_models_pytorch"}[name])
    assert peer(name).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)


# ---------------------------------------------------------------------------------------------- the race

def test_sides_take_turns_and_the_row_has_medians_and_ratios_of_neighbouring_laps():
    order, took = [], {"ours": iter([9, 1, 1, 2]), "baseline": iter([9, 4, 6, 8]), "as_shipped": iter([9, 8, 9, 10])}

    def lap(name):
        order.append(name)
        return next(took[name])  # seconds; the first is the warm-up

    row = turns({name: partial(lap, name) for name in took}, dict.fromkeys(took, (10, {"flop": 7})), "ms a tile", 3)
    assert order == ["ours", "baseline", "as_shipped"] * 4
    assert [row[name] for name in took] == pytest.approx([100, 600, 900]) and row["rounds"] == 3
    assert (row["ratio_same_allocator"], *row["range_same_allocator"]) == pytest.approx((4, 4, 6))
    assert (row["ratio_as_shipped"], *row["range_as_shipped"]) == pytest.approx((8, 5, 9))
    assert row["flop_ours"] == row["flop_baseline"] == 7 and row["items_ours"] == 10


def test_short_laps_get_more_rounds_and_equal_use_of_memory_gives_one_ratio():
    calls = []
    row = turns({"ours": lambda: calls.append(1) or 0.5, "baseline": lambda: 1.0}, dict.fromkeys(
        ("ours", "baseline"), (1, {})), "s", 1)
    assert row["rounds"] == len(calls) - 1 == 3  # 1.5 s a round, 4 s are enough
    assert row["ratio_as_shipped"] == row["ratio_same_allocator"] == 2 and row["ours"] == 0.5


def nothing(setting):
    return Lap(lambda: None, facts={"where": str(setting.root)})


def broken(setting):
    raise UserError("no tiles")


def faulty(setting):
    raise KeyError("x")


def page_faults(setting):
    """A lap that reports the page faults of the second of two equal arrays of 64 MB."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(2**23)
    return Lap(lambda: None, facts={"faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before})


def test_a_race_of_processes(setting):
    """Rows arrive, errors of both kinds are raised, and only the plain way as shipped returns memory to the system."""
    race = Race(nothing, nothing, "ms", one_thread=True)
    with Sides() as sides:
        row = compete(race, setting, 1, sides)
        assert compete(race, setting, 1, sides)["rounds"] == row["rounds"] == 15
        assert len(sides.open) == 3 and row["where_ours"] == str(setting.root)
        if platform.libc_ver()[0] == "glibc":
            faults = {name: side.call(PREPARE, page_faults, setting)[1]["faults"]
                      for name, side in sides.of(race).items()}
            assert faults["ours"] < 100 and faults["baseline"] < 100 and faults["as_shipped"] > 0
        with pytest.raises(UserError, match="no tiles"):
            compete(Race(nothing, broken, "ms", one_thread=True), setting, 1, sides)
        with pytest.raises(RuntimeError, match=r"(?s)in a process of the benchmark.*in faulty"):
            compete(Race(faulty, nothing, "ms", one_thread=True), setting, 1, sides)
    assert all(not side.process.is_alive() for side in sides.open.values())


# ---------------------------------------------------------------------------------------------- FLOP, bytes, roofline

def test_work_is_counted_as_on_paper():
    x, conv = torch.randn(2, 3, 8, 8), torch.nn.Conv2d(3, 5, 3, padding=1)
    with torch.no_grad():
        work = roofline.work_of(lambda: torch.relu(conv(x)).transpose(0, 1))
    convolution = 2 * 2 * 8 * 8 * 5 * 3 * 9, 4 * (x.numel() + conv.weight.numel() + 5 + 2 * 5 * 64)
    assert work == [("float32", *convolution), ("float32", 0, 4 * 2 * 2 * 5 * 64)]  # a transposed view costs nothing
    peaks = {"float32": 1000.0, "bfloat16": 2000.0, "bytes": 100.0}
    assert roofline.bound(work, peaks) == pytest.approx(max(convolution[0] / 1000, convolution[1] / 100) + 51.2)
    assert roofline.bound([("bfloat16", 4000.0, 1.0), ("int64", 500.0, 1.0)], peaks) == pytest.approx(2.5)


def bytes_of(task):
    return sum(size for _, _, size in roofline.work_of(task))


def test_bytes_are_those_that_must_move():
    x, y, picked = torch.ones(1000), torch.ones(1000), torch.arange(10)
    assert bytes_of(lambda: torch.empty(1000)) == 0
    assert bytes_of(lambda: x.zero_()) == bytes_of(lambda: x.fill_(2.0)) == 4000
    assert bytes_of(lambda: x.copy_(y)) == bytes_of(lambda: torch._foreach_copy_([x], [y])) == 8000
    assert bytes_of(lambda: x.add_(y)) == 12000 and bytes_of(lambda: x + y) == 12000
    assert bytes_of(lambda: x[picked]) == 2 * 40 + 80


def test_peaks_are_the_best_of_this_machine(setting):
    found = roofline.peaks(setting)
    assert found.keys() == {"float32", "bytes"} | ({"bfloat16"} if has_bf16(CPU) else set())
    assert all(1e8 < peak < 1e16 for peak in found.values())


def test_the_reports_network_has_the_documented_flop():
    model = UNet().eval()
    with torch.no_grad():
        work = roofline.work_of(lambda: model(torch.zeros(1, 3, 64, 64)))
    assert roofline.flop(work) * 16 / 1e9 == pytest.approx(24.15, abs=0.01)  # of 256 x 256


def test_shares_of_the_roofline_are_for_one_item():
    row = {"ours": 500.0, "baseline": 1000.0, "unit": "ms a tile", "items_ours": 4, "work_ours": [("float32", 8e9, 0)]}
    peaks = {"float32": 8e9, "bfloat16": 8e9, "bytes": 1e9}
    assert with_roofline(row, peaks) == {"ours": 500.0, "baseline": 1000.0, "unit": "ms a tile", "gflop_ours": 2.0,
                                   "roofline_ours": 0.5}


# ---------------------------------------------------------------------------------------------- rows

def test_rows_of_a_training_step_and_of_an_epoch(setting):
    row = step_row(setting, 32, 2, (4, 8))
    assert row["images_per_second"] == pytest.approx(1000 / row["ours"], abs=0.051) and row["peak_memory_mb"] > 100
    assert (row["crop"], row["batch"], row["widths"], row["baseline"]) == (32, 2, [4, 8], None)
    assert crops_row(setting, 3)["where"] == "memory"
    row = epoch(setting, Train(folds=2, images_per_epoch=8, batch_size=4), Model(widths=(2, 4)), 8)
    assert row["unit"] == "s an epoch of 16 images"
    assert row["images_per_second"] == pytest.approx(16 / row["ours"], abs=0.1)


def test_every_row_becomes_cells_of_the_table():
    row = {"name": "scaling_crop_128", "ours": 1.5, "baseline": None, "unit": "ms an image",
           "ratio_same_allocator": None, "range_same_allocator": None, "ratio_as_shipped": None,
           "range_as_shipped": None}
    assert table_row(row) == ["scaling_crop_128", "1.5", "", "ms an image", "", "", "", "", ""]
    raced = row | {"baseline": 3.0, "ratio_same_allocator": 2.0, "range_same_allocator": [1.0, 3.0],
                   "ratio_as_shipped": 4.0, "range_as_shipped": [4.0, 4.0], "roofline_ours": 0.5, "gflop_ours": 72.34,
                   "batch_ours": 4}
    assert table_row(raced)[2:] == ["3", "ms an image of 4", "2.00 (1.00 to 3.00)", "4.00 (4.00 to 4.00)", "72.3", "",
                                   "50.0%"]


def test_many_tiles_are_filtered_packed_and_prepared(tmp_path):
    rows = list(many_tiles(Setting(tmp_path, quick=True, device="cpu")))
    assert [row["name"] for row in rows] == [f"many_tiles_{count}_{what}" for count in (100, 200)
                                             for what in ("filter", "pack", "start")]
    assert all(row["ours"] > 0 and row["peak_memory_mb"] > 20 for row in rows)


def test_the_documented_names_exist_on_every_device():
    for device in ("cpu", "cuda"):
        names = benchmarks(device)
        assert {"train_step", "inference_512", "crops", "filter_check", "filter_pass", "snapshot", "epoch", "scaling",
                "many_tiles", *QUICK} <= names.keys()


def test_rows_reach_the_terminal_and_the_file(tiles):
    names = ["crops", "filter_check"]
    out = script("tools.benchmark", "--quick", "--only", *names, "--json", "speed.json", cwd=tiles)
    assert out.returncode == 0, out.stderr
    rows = json.loads((tiles / "speed.json").read_text())
    assert [row["name"] for row in rows] == names
    needed = {"name", "ours", "baseline", "unit", "ratio_same_allocator", "ratio_as_shipped"}
    assert all(needed <= row.keys() for row in rows)
    assert all(np.isfinite(row["ratio_as_shipped"]) for row in rows)
    assert all(row["quick"] and row["device"] == "cpu" and row["peaks"]["bytes"] > 0 for row in rows)
    assert all(name in out.stdout for name in [*names, "GFLOP/s in float32", "do not quote"])


def test_an_interrupted_run_keeps_what_it_has(setting, tmp_path, monkeypatch, capsys):
    def interrupted(setting):
        raise KeyboardInterrupt

    tasks = {"first": lambda setting: plain_row(1.0, 2.0, "s", [2.0]), "second": interrupted}
    monkeypatch.setattr(benchmark, "benchmarks", lambda device: tasks)
    monkeypatch.setattr(benchmark, "in_new_process", lambda *_: {"float32": 1e9, "bfloat16": 1e9, "bytes": 1e9})
    with pytest.raises(KeyboardInterrupt):
        benchmark.measure(list(tasks), setting, tmp_path / "rows.json")
    assert [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["first"]
    assert "first" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--data", "nowhere"], "make_demo_data"), (["--only", "nothing"], "--only nothing"),
    (["--json", "nowhere/x.json"], "--json nowhere/x.json"), (["--device", "cuda"], "--device cuda")])
def test_wrong_arguments_are_rejected(tiles, here, arguments, expected):
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = here("tools.benchmark.__main__", *arguments, cwd=tiles)
    assert out.returncode == 2 and expected in out.stderr
