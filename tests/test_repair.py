"""Repair from the command line: new masks, what a person decides about them, models and their predictions."""

import csv
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers import GREYS, TINY, moved_mask, scene, script
from matplotlib.figure import Figure
from PIL import Image

from common.config import Config
from common.config_files import apply_overrides
from common.console import UserError
from common.masks import IGNORE
from common.store import open_store, read_pair
from dataset import Tile, find_pairs, identity, read_tiles
from evaluation.unseen import UnseenTiles
from filtering import report
from filtering.new_masks import decode, encode
from filtering.pipeline import filter_tiles, mark_copies
from filtering.registration import Move
from training.training_set import prepare_data

SIZE, SLIDES = 200, 5
MOVED = {"s0-3": Move(22, -14, 0), "s1-2": Move(-25, 8, 6), "s2-0": Move(5, 30, 0)}
LEFT_OUT, GONE = "s4-2", "s1-1"  # a part of the tissue, most of it
CONFIG = ["data.root=tiles", "data.group=^(s\\d+)", "filter.sigma=5", "filter.max_unmarked=0.06", "filter.max_shift=15",
          "data.test_fraction=0.25"]
REPAIR = [*CONFIG, "filter.repair=true"]


@pytest.fixture(scope="session")
def tiles(tmp_path_factory):
    """Twenty tiles of five slides; three masks lie off, and two lack tissue."""
    root = tmp_path_factory.mktemp("tiles") / "tiles"
    for name in ("frames", "masks"):
        (root / name).mkdir(parents=True)
    for slide in range(SLIDES):
        for number in range(4):
            key = f"s{slide}-{number}"
            labels, image = scene(100 + 10 * slide + number, 400)
            given = moved_mask(labels, MOVED.get(key, Move()), (100, 100, SIZE, SIZE))
            if key == LEFT_OUT:
                given[:, :SIZE // 3] = 0
            if key == GONE:
                given[:, :SIZE - 60] = 0
            Image.fromarray(image[100:300, 100:300]).save(root / f"frames/frame#{key}.png")
            Image.fromarray(GREYS[given]).save(root / f"masks/mask#{key}.png")
    (root.parent / "any.yaml").write_text("model:\n  widths: [4, 8]\n")
    return root


@pytest.fixture
def pictures(request, monkeypatch):
    """Draw no pictures, which take most of the time, unless a test is marked by the parameter."""
    if not getattr(request, "param", False):
        monkeypatch.setattr(report, "sheets", lambda result, limits: {})
        monkeypatch.setattr(report, "histograms", lambda result, limits: Figure(figsize=(1, 1)))


@pytest.fixture
def place(tiles, tmp_path, pictures):
    shutil.copytree(tiles.parent, tmp_path / "place")
    return tmp_path / "place"


def rows(place):
    with (place / "tiles/tiles.csv").open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def edit(place, **changes):
    """Change cells of the list: key with _ for -, and the columns."""
    found = rows(place)
    for key, cells in changes.items():
        found[key.replace("_", "-")] |= cells
    with (place / "tiles/tiles.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, next(iter(found.values())).keys())
        writer.writeheader()
        writer.writerows(found.values())


def filtered(here, place, *settings, code=0):
    out = here("data_filter.py", "--config", "any.yaml", *settings, "--workers", 1, cwd=place)
    assert out.returncode == code, out.stderr
    return out


def truth(key):
    slide, number = key[1:].split("-")
    return scene(100 + 10 * int(slide) + int(number), 400)[0][100:300, 100:300]


def mask_in_use(place, key):
    data = apply_overrides(Config(), [f"data.root={place / 'tiles'}"]).data
    tile = next(tile for tile in read_tiles(data) if tile.key == key)
    return read_pair(tile.pair, data)[1]


@pytest.mark.parametrize("pictures", [True], indirect=True)
def test_masks_are_repaired_and_the_given_ones_stay(place, here):
    before = {path.name: path.read_bytes() for path in (place / "tiles/masks").iterdir()}
    filtered(here, place, *CONFIG)
    dropped = {key for key, row in rows(place).items() if row["split"] not in ("train", "test")}
    assert {*MOVED, LEFT_OUT, GONE} == dropped and not (place / "tiles/repaired").exists()
    out = filtered(here, place, *REPAIR)
    found = rows(place)
    for key, move in MOVED.items():
        row, mask = found[key], mask_in_use(place, key)
        kept = mask != IGNORE
        assert row["mask_from"] == "repaired" and row["split"] in ("train", "test") and "moved by" in row["reason"]
        assert (mask[kept] != truth(key)[kept]).mean() < 0.02
        assert float(row["ignored"]) == pytest.approx((~kept).mean())
        assert float(row["shift_x"]) == pytest.approx(move.right, abs=3)
        assert float(row["shift_y"]) == pytest.approx(move.down, abs=3)
        assert float(row["angle"]) == pytest.approx(move.clockwise, abs=2.5)
        assert float(row["shift"]) == pytest.approx(move.length((SIZE, SIZE)), abs=5)
    assert found[LEFT_OUT]["mask_from"] == "repaired" and found[GONE]["mask_from"] == "given"
    assert found[GONE]["split"] == "unmarked" and "would lose" in found[GONE]["reason"]
    assert {key for key, row in found.items() if row["mask_from"] == "repaired"} == {*MOVED, LEFT_OUT}
    assert {path.name: path.read_bytes() for path in (place / "tiles/masks").iterdir()} == before
    assert "masks repaired: 4 (" in out.stdout and "% of their pixels are ignored" in out.stdout
    summary = (place / "tiles/filter/summary.md").read_text()
    assert "## New masks" in summary and "masks repaired: 4" in summary
    assert (place / "tiles/filter/repaired.png").stat().st_size > 10_000


def test_a_second_run_changes_nothing_and_without_repair_the_masks_go(place, here):
    filtered(here, place, *REPAIR)
    first, text = rows(place), (place / "tiles/tiles.csv").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (place / "tiles/repaired").iterdir() if path.suffix == ".png"}
    assert len(times) == 4
    filtered(here, place, *REPAIR)
    assert (place / "tiles/tiles.csv").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in times} == times
    filtered(here, place, *CONFIG)
    assert not list((place / "tiles/repaired").glob("*.png"))
    filtered(here, place, *REPAIR)
    (place / "tiles/repaired/s0-3.png").write_bytes((place / "tiles/repaired/s1-2.png").read_bytes())  # edited
    filtered(here, place, *CONFIG)
    assert [path.name for path in (place / "tiles/repaired").glob("*.png")] == ["s0-3.png"]
    assert {key for key, row in rows(place).items() if row["mask_from"] != "given"} == set()
    assert Counter(row["split"] in ("train", "test") for row in first.values())[True] == 19


def test_with_several_workers_the_result_is_the_same(place, here):
    filtered(here, place, *REPAIR)
    text = (place / "tiles/tiles.csv").read_bytes()
    (place / "tiles/tiles.csv").unlink()
    out = here("data_filter.py", "--config", "any.yaml", *REPAIR, "--workers", 2, cwd=place)
    assert out.returncode == 0 and (place / "tiles/tiles.csv").read_bytes() == text


def test_the_new_masks_can_lie_in_a_cache(place, here):
    filtered(here, place, *REPAIR, "data.cache=lists")
    assert len(list((place / "lists/repaired").glob("*.png"))) == 4 and not (place / "tiles/repaired").exists()
    data = apply_overrides(Config(), [f"data.root={place / 'tiles'}", f"data.cache={place / 'lists'}"]).data
    pairs = [tile.pair for tile in read_tiles(data) if tile.split in ("train", "test")]
    store = open_store(pairs, data)
    for i, pair in enumerate(pairs):
        assert (store.tile(i)[..., 3] == read_pair(pair, data)[1]).all()
    assert sum((store.tile(i)[..., 3] == IGNORE).any() for i in range(len(store))) == 4


def test_who_wants_the_given_mask_gets_it(place, here):
    filtered(here, place, *REPAIR)
    edit(place, s0_3={"mask_from": "given"}, s2_0={"split": "excluded"})
    for _ in range(2):
        out = filtered(here, place, *REPAIR)
        row = rows(place)["s0-3"]
        assert row["mask_from"] == "given" and row["split"] == row["by_hand"] in ("train", "test")
        assert row["proposed"] in ("misregistered", "unmarked", "shifted") and "refused" in row["reason"]
        assert rows(place)["s2-0"]["split"] == "excluded" and "set by hand and kept (" in out.stdout
        assert "given masks kept by hand (1): s0-3" in out.stdout or "set by hand and kept (2)" in out.stdout
    edit(place, s0_3={"split": row["proposed"], "by_hand": ""})  # taken back
    filtered(here, place, *REPAIR)
    assert rows(place)["s0-3"]["mask_from"] == "repaired"


def test_a_tile_that_was_kept_with_its_mask_against_the_filter_is_not_repaired(place, here):
    filtered(here, place, *CONFIG)
    edit(place, s0_3={"split": "train"})
    filtered(here, place, *REPAIR)
    row = rows(place)["s0-3"]
    assert row["mask_from"] == "given" and row["by_hand"] == row["split"] in ("train", "test")


def test_masks_edited_by_hand_are_kept(place, here):
    filtered(here, place, *REPAIR)
    path, new = place / "tiles/repaired/s0-3.png", place / "tiles/repaired/s1-1.png"
    labels = np.array(Image.open(path))
    labels[:50, :60] = 1
    for target in (path, new):  # one that the filter made, and one that it did not
        Image.fromarray(labels).save(target)
    for settings in (REPAIR, [*REPAIR, "filter.max_ignored=0.05"]):
        out = filtered(here, place, *settings)
        found = rows(place)
        assert (mask_in_use(place, "s0-3") == labels).all() and (mask_in_use(place, "s1-1") == labels).all()
        for key in ("s0-3", "s1-1"):
            assert found[key]["mask_from"] == "repaired" and found[key]["split"] in ("train", "test")
            assert "by hand" in found[key]["reason"]
            assert float(found[key]["ignored"]) == pytest.approx((labels == IGNORE).mean())
        assert "made or edited by hand and stay as they are: 2" in out.stdout and "of no tile" not in out.stderr
    edit(place, s1_1={"mask_from": "given"})
    out = filtered(here, place, *REPAIR)
    assert rows(place)["s1-1"]["mask_from"] == "given" and "stay as they are: 1, for example s0-3" in out.stdout
    assert "the list keeps the given mask: 1, for example s1-1" in out.stderr
    edit(place, s1_1={"mask_from": "repaired", "split": rows(place)["s1-1"]["proposed"], "by_hand": ""})
    Image.fromarray(np.full((SIZE, SIZE), 7, np.uint8)).save(new)
    out = filtered(here, place, *REPAIR, code=2)
    assert "s1-1.png: contains 7" in out.stderr and "0 to 2, or 255 for none" in out.stderr
    assert "mask_values" not in out.stderr
    Image.fromarray(np.full_like(labels, IGNORE)).save(new)
    filtered(here, place, *REPAIR)
    assert rows(place)["s1-1"]["split"] == "unlabelled"
    new.write_bytes(encode(np.where(labels == 2, 1, labels).astype(np.uint8), 3))  # 0, 1 and 255
    coloured = np.array(Image.open(new).convert("RGB"))
    colours, places = np.unique(coloured.reshape(-1, 3), axis=0, return_inverse=True)  # in an order of their own
    picture = Image.fromarray(places.reshape(coloured.shape[:2]).astype(np.uint8)).convert("P")
    picture.putpalette(colours.astype(np.uint8).tobytes())
    picture.save(new)
    out = filtered(here, place, *REPAIR, code=2)
    assert "s1-1.png: the colour" in out.stderr and "changed the order" in out.stderr
    Image.fromarray(labels[:50]).save(new)
    out = filtered(here, place, *REPAIR, code=2)
    assert "the mask is 50 x 200 pixels" in out.stderr


def test_new_contents_of_a_new_mask_are_seen_by_runs(place, here):
    filtered(here, place, *REPAIR)
    data = apply_overrides(Config(), [f"data.root={place / 'tiles'}"]).data
    tiles = read_tiles(data)
    assert tiles[0].mask_from == "given" and identity(tiles, data) == identity(tiles[::-1], data)
    before, path = identity(tiles, data), place / "tiles/repaired/s0-3.png"
    labels = np.array(Image.open(path))
    labels[:5] = IGNORE
    Image.fromarray(labels).save(path)
    assert identity(tiles, data) != before
    path.unlink()
    with pytest.raises(UserError, match="s0-3.png: cannot be read"):
        identity(tiles, data)


def test_of_two_copies_the_one_with_its_given_mask_stays(place, here):
    frames, masks = place / "tiles/frames", place / "tiles/masks"
    labels = truth("s0-3")
    shutil.copy(frames / "frame#s0-3.png", frames / "frame#s0-9.png")
    Image.fromarray(GREYS[labels]).save(masks / "mask#s0-9.png")
    filtered(here, place, *REPAIR, "filter.drop_duplicates=true")
    found = rows(place)
    assert found["s0-3"]["split"] == "duplicate" and found["s0-9"]["split"] in ("train", "test")
    assert "same image as s0-9" in found["s0-3"]["reason"]
    Image.fromarray(labels).save(place / "tiles/repaired/s0-3.png")  # made by hand
    filtered(here, place, *REPAIR, "filter.drop_duplicates=true")
    found = rows(place)
    assert found["s0-9"]["split"] == "duplicate" and found["s0-3"]["split"] in ("train", "test")
    assert "same image as s0-3" in found["s0-9"]["reason"] and "s0-9" not in found["s0-3"]["reason"]


def test_a_copy_that_only_a_model_saves_does_not_push_a_test_tile_out():
    tiles = [Tile("a", "a", "a", proposed="train", digest="x"), Tile("b", "b", "b", proposed="test", digest="x",
                                                                      mask_from="repaired")]
    marked, copies = mark_copies(tiles, drop=True)
    assert [tile.proposed for tile in marked] == ["duplicate", "test"] and copies == [["a", "b"]]


# ---------------------------------------------------------------------------------------------- models

TRAIN = [*TINY, "data.crop=32", "model.widths=[6,12]", "train.images_per_epoch=48", "train.epochs=4", "optim.lr=0.01",
         *CONFIG]


@pytest.fixture(scope="session")
def asked(tiles, built_once):
    """A copy of the tiles that was repaired, with three cross-fitted models. Tests must not change it."""
    def fill(place):
        shutil.copytree(tiles.parent, place)
        for command in (["data_filter.py", "--config", "any.yaml", *REPAIR, "--workers", 1],
                        ["tools.cross_fit", "--config", "any.yaml", "--parts", 3, *TRAIN]):
            out = script(*command, cwd=place)
            assert out.returncode == 0, out.stderr
    return built_once("asked", fill)


RUNS = [f"runs/any.part{part}" for part in (1, 2, 3)]


def test_every_training_group_is_left_out_once(asked):
    found, data = rows(asked), apply_overrides(Config(), [f"data.root={asked / 'tiles'}"]).data
    train = {key for key, row in found.items() if row["split"] == "train"}
    left_out = []
    for run in RUNS:
        with (asked / run / "trained_on.csv").open(newline="") as file:
            learned = list(csv.DictReader(file))
        assert {row["key"] for row in learned} < train
        assert all(row["digest"] == found[row["key"]]["digest"] != "" for row in learned)
        groups = {row["group"] for row in learned}
        left_out.append({found[key]["group"] for key in train} - groups)
        assert {row["key"] for row in learned} == {key for key in train if found[key]["group"] in groups}
    assert sorted(group for groups in left_out for group in groups) == sorted({found[key]["group"] for key in train})
    assert all(left_out) and data.classes == ("background", "tissue", "tumour")


def test_each_tile_is_asked_of_a_model_that_does_not_know_it(asked):
    config = apply_overrides(Config(), [f"data.root={asked / 'tiles'}", "device=cpu"])
    models = UnseenTiles.of_runs([asked / run for run in RUNS], config, read_tiles(config.data))
    names = set()
    for tile in read_tiles(config.data):
        name, probs = models.ask(tile)
        with (asked / f"runs/{name}/trained_on.csv").open(newline="") as file:
            assert tile.group not in {row["group"] for row in csv.DictReader(file)}
        assert probs.shape == (SIZE, SIZE, 3) and probs.dtype == np.uint8 and abs(probs.sum(-1).mean() - 255) < 2
        names.add(name)
    assert names == {"any.part1", "any.part2", "any.part3"}
    assert models.ask(tile.__class__("x", "frames/none.png", "m")) is None


def test_the_tool_goes_on_where_it_was_interrupted(asked, tmp_path, here):
    shutil.copytree(asked, tmp_path / "place")
    before = (tmp_path / "place/runs/any.part1/checkpoints/last.pt").read_bytes()
    shutil.rmtree(tmp_path / "place/runs/any.part3")
    out = here("tools.cross_fit", "--config", "any.yaml", "--parts", 3, *TRAIN, cwd=tmp_path / "place")
    assert out.returncode == 0 and "any.part1: complete" in out.stdout and "any.part2: complete" in out.stdout
    assert "other tiles" not in out.stderr
    assert (tmp_path / "place/runs/any.part1/checkpoints/last.pt").read_bytes() == before
    assert (tmp_path / "place/runs/any.part3/checkpoints/last.pt").exists() and "--model runs/any.part1" in out.stdout
    edit(tmp_path / "place", s0_0={"split": "excluded"})
    out = here("tools.cross_fit", "--config", "any.yaml", "--parts", 3, *TRAIN, "filter.max_ignored=0.3",
               cwd=tmp_path / "place")
    assert out.returncode == 0 and "any.part1 was trained with other tiles" in out.stderr


def test_masks_are_measured_against_the_models(asked, here, tmp_path):
    shutil.copytree(asked, tmp_path / "place")
    place = tmp_path / "place"
    filtered(here, place, *REPAIR, "--model", *RUNS)
    found = rows(place)
    for key, row in found.items():
        assert 0 <= float(row["quality"]) <= 1 and 0 <= float(row["disagreement"]) <= 1, key
        assert row["model_confidence"] == "" or 0 <= float(row["model_confidence"]) <= 1
    bad = [float(found[key]["quality"]) for key in (*MOVED, LEFT_OUT, GONE)]
    good = [float(row["quality"]) for key, row in found.items() if key not in (*MOVED, LEFT_OUT, GONE)]
    assert np.mean(bad) < np.mean(good)
    for key in MOVED:
        mask = mask_in_use(place, key)
        assert (mask[mask != IGNORE] != truth(key)[mask != IGNORE]).mean() < 0.03


@pytest.mark.parametrize(("words", "expected"), [
    ([*REPAIR, "filter.relabel=true"], "filter.relabel needs --model"),
    ([*REPAIR, "filter.max_disagreement=0.1"], "filter.max_disagreement needs --model"),
    ([*REPAIR, "--model", "runs/nothing"], "no such"),
    ([*REPAIR, "--model", RUNS[0]], "every model has learned from its slide or patient .*tools.cross_fit"),
    ([*REPAIR, "data.classes=[glass,tissue,tumour]", "--model", *RUNS], "use a model of the same classes"),
])
def test_models_that_cannot_be_asked_are_refused(asked, here, words, expected):
    before = (asked / "tiles/tiles.csv").read_bytes()
    out = here("data_filter.py", "--config", "any.yaml", *words, "--workers", 1, cwd=asked)
    assert out.returncode == 2 and out.stderr.count("error:") == 1
    assert re.search(expected, out.stderr), out.stderr
    assert (asked / "tiles/tiles.csv").read_bytes() == before


def test_the_same_image_under_another_name_is_known(asked, here, tmp_path):
    """A copy of the folder without a list and groups: only the images tell that the models have learned from them."""
    shutil.copytree(asked, tmp_path / "place")
    place = tmp_path / "place"
    (place / "tiles").rename(place / "others")
    (place / "others/tiles.csv").unlink()
    shutil.rmtree(place / "others/repaired")
    others = [*REPAIR, "data.root=others", "data.group="]
    out = here("data_filter.py", "--config", "any.yaml", *others, "--workers", 1, "--model", RUNS[1], cwd=place)
    assert out.returncode == 2 and "every model has learned from" in out.stderr
    (place / RUNS[0] / "trained_on.csv").unlink()
    out = here("data_filter.py", "--config", "any.yaml", *others, "--model", RUNS[0], cwd=place)
    assert out.returncode == 2 and "train it again" in out.stderr


@pytest.mark.parametrize("root", ["tiles", "others"])
@pytest.mark.parametrize("listed", [True, False])
def test_slides_are_known_by_whatever_name_they_have_now(asked, tmp_path, root, listed):
    """The slides were s0 to s4 when the models learned; now they are 0 to 4."""
    shutil.copytree(asked / "tiles", tmp_path / "others")
    place = asked / "tiles" if root == "tiles" else tmp_path / "others"
    config = apply_overrides(Config(), [f"data.root={place}", r"data.group=^s(\d+)", "device=cpu"])
    before = read_tiles(config.data) if listed else []
    found = find_pairs(config.data)
    assert {tile.group for tile in found} == set("01234")
    models = UnseenTiles.of_runs([asked / run for run in RUNS], config, found, before)
    for candidate, known in models.models:
        with (asked / f"runs/{candidate.name}/trained_on.csv").open(newline="") as file:
            assert known.groups & set("01234") == {row["group"][1:] for row in csv.DictReader(file)}
    for tile in found:
        name, _ = models.ask(tile)
        with (asked / f"runs/{name}/trained_on.csv").open(newline="") as file:
            assert tile.key[:2] not in {row["group"] for row in csv.DictReader(file)}


def test_leaving_out_is_checked(asked):
    for value, expected in (("3/2", "leave_out must"), ("0/3", "leave_out must"), ("x", "leave_out must")):
        with pytest.raises(Exception, match=expected):
            apply_overrides(Config(), [f"train.leave_out={value}"])
    config = apply_overrides(Config(), [*TRAIN, f"data.root={asked / 'tiles'}", "train.leave_out=1/40"])
    with pytest.raises(Exception, match="at most 4 parts"):
        prepare_data(config)


def test_a_resumed_part_leaves_out_the_same_tiles(asked):
    config = apply_overrides(Config(), [*TRAIN, f"data.root={asked / 'tiles'}", "train.leave_out=2/3"])
    with (asked / RUNS[1] / "trained_on.csv").open(newline="") as file:
        assert [tile.key for tile in prepare_data(config).tiles] == [row["key"] for row in csv.DictReader(file)]


class Liar:
    """A model that is right but in one box, where it is sure of another class."""

    def ask(self, tile):
        said = truth(tile.key).copy()
        said[BOX] = (said[BOX] + 1) % 3
        return "liar", (np.eye(3)[said] * 255).astype(np.uint8)


BOX = np.s_[70:130, 70:130]


def test_a_model_takes_classes_from_training_tiles_only(place):
    """What is tested must not depend on where a model is right."""
    config = apply_overrides(Config(), [*REPAIR, f"data.root={place / 'tiles'}"])
    alone, asked = filter_tiles(config, 1), filter_tiles(config, 1, load_model=lambda tiles: Liar())
    sides = Counter()
    for before, after in zip(alone.tiles, asked.tiles, strict=True):
        assert (before.split == "test") == (after.split == "test")
        if after.split == "test":
            assert (before.mask_from, before.ignored, before.reason) == (after.mask_from, after.ignored, after.reason)
            assert alone.new_masks.get(after.key) == asked.new_masks.get(after.key) and after.quality is not None
        if not after.has_new_mask:
            continue
        sides[after.split] += 1
        mask = decode(asked.new_masks[after.key])
        box = (mask[BOX] == IGNORE).mean()
        assert box == 1 if after.split == "train" else box < 0.5
        assert after.ignored == pytest.approx((mask == IGNORE).mean())
        row = asked.tiles.index(after)
        assert asked.pixels[row].tolist() == [(mask == k).sum() for k in range(3)]
        assert before.key == after.key
    assert sides["train"] and sides["test"]


def test_a_model_gives_no_tile_of_a_tested_slide_to_training(place):
    """Slide s4-2 is to be tested, but its only tile is dropped."""
    config = apply_overrides(Config(), [*REPAIR, f"data.root={place / 'tiles'}", "filter.relabel=true",
                                        "filter.max_ignored=0.25", r"data.group=^(s4-2|s\d)",
                                        "data.test_groups=[s0,s4-2]"])
    found = {tile.key: tile for tile in filter_tiles(config, 1, load_model=lambda tiles: Liar()).tiles}
    assert found["s4-2"].split == "unmarked" and found["s4-2"].mask_from == "given"
    assert "from the prediction" not in found["s4-2"].reason and found["s1-1"].mask_from == "model liar"


class Against:
    """A model that is right, but in all tiles of slide s4 except s4-2."""

    def ask(self, tile):
        said = truth(tile.key)
        return "against", (np.eye(3)[(said + (tile.group == "s4" and tile.key != LEFT_OUT)) % 3] * 255).astype(np.uint8)


def test_a_tile_that_is_kept_by_hand_does_not_take_its_slide_to_the_test_side(place):
    """A person keeps s4-2. If the model drops all other tiles of the slide, the side is still the one without it."""
    settings = [*CONFIG, f"data.root={place / 'tiles'}", "data.test_groups=[s0]", "filter.max_shift=off"]
    config = apply_overrides(Config(), [*settings, "filter.max_disagreement=0.1"])
    before = [replace(tile, split="test") if tile.key == LEFT_OUT else tile
              for tile in filter_tiles(apply_overrides(Config(), settings), 1).tiles]
    found = filter_tiles(config, 1, before, load_model=lambda tiles: Against()).tiles
    assert {tile.group for tile in found if tile.split == "test"} == {"s0"}
    assert {tile.key: tile.split for tile in found if tile.group == "s4"} == {
        "s4-0": "disputed", "s4-1": "disputed", "s4-2": "train", "s4-3": "disputed"}


def test_of_two_copies_a_model_may_leave_only_one(place):
    """A copy whose own mask is dropped comes back with a prediction as its mask; the first copy has its given mask."""
    class Right:
        def ask(self, tile):
            return "right", (np.eye(3)[truth(GONE if tile.key == "s1-9" else tile.key)] * 255).astype(np.uint8)

    frames, masks = place / "tiles/frames", place / "tiles/masks"
    shutil.copy(frames / f"frame#{GONE}.png", frames / "frame#s1-9.png")
    Image.fromarray(GREYS[truth(GONE)]).save(masks / "mask#s1-9.png")
    config = apply_overrides(Config(), [*REPAIR, f"data.root={place / 'tiles'}", "filter.relabel=true",
                                        "filter.max_ignored=0.25", "filter.drop_duplicates=true",
                                        "data.test_groups=[s0]"])
    found = {tile.key: tile.split for tile in filter_tiles(config, 1, load_model=lambda tiles: Right()).tiles}
    assert (found[GONE], found["s1-9"]) == ("duplicate", "train")


def test_predictions_become_masks_of_training_tiles_only(place):
    settings = [*REPAIR, f"data.root={place / 'tiles'}", "filter.relabel=true", "filter.max_ignored=0.25"]
    outcomes = set()
    for seed in range(8):
        config = apply_overrides(Config(), [*settings, f"seed={seed}"])
        result = filter_tiles(config, 1, load_model=lambda tiles: Liar())
        tested = {tile.group for tile in result.tiles if tile.split == "test"}
        for tile in result.tiles:
            if tile.key in (LEFT_OUT, GONE):
                outcomes.add(tile.mask_from)
                if tile.group in tested:
                    assert tile.mask_from == "given" and tile.split == "unmarked"
                else:
                    assert tile.mask_from == "model liar" and tile.split == tile.proposed == "train"
                    mask = decode(result.new_masks[tile.key])
                    assert (mask == Liar().ask(tile)[1].argmax(-1)).all()
        if outcomes == {"given", "model liar"}:
            break
    assert outcomes == {"given", "model liar"}
