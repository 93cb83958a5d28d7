"""tools/make_demo_data.py: tiles are reproducible and complete, truth.csv is right, defects can be found."""

import csv

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter

from common.console import UserError
from common.masks import IGNORE
from filtering.registration import Move
from tools import make_demo_data as demo

SIZE, SLIDES, TILES = 256, 4, 48


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "deep" / "data"
    demo.main([str(out), "--tiles", str(TILES), "--slides", str(SLIDES), "--size", str(SIZE), "--seed", "1"])
    with (out / "truth.csv").open() as file:
        return out, list(csv.DictReader(file))


def read(path):
    return np.asarray(Image.open(path))


def read_tile(out, row):
    key = row["key"]
    return (read(out / f"frames/frame#{key}.png"), read(out / f"masks/mask#{key}.png"),
            read(out / f"truth/mask#{key}.png"))


def find(defect, count, seed=1):
    """Return (slide, number) of the first `count` tiles with this defect."""
    places = [(slide, number) for number in range(40) for slide in range(SLIDES)]
    return [place for place in places if demo.make_plan(seed, *place).defect == defect][:count]


def blank_share(image, mask):
    """Return the share of annotated pixels on glass, computed independently of the filter; None without tissue."""
    inverted = gaussian_filter(255 - image.mean(2), 10)
    return (inverted[mask > 26] < 40).mean() if (mask > 26).mean() >= 0.01 else None


def test_files_have_the_promised_layout_sizes_and_values(data):
    out, rows = data
    assert sorted(path.name for path in out.iterdir()) == ["frames", "masks", "truth", "truth.csv"]
    assert not [path for path in out.parent.iterdir() if path != out]
    assert len(rows) == TILES and tuple(rows[0]) == demo.COLUMNS
    names = sorted(path.name for path in (out / "frames").iterdir())
    assert names == sorted(f"frame#{row['key']}.png" for row in rows)
    for row in rows:
        image, mask, clean = read_tile(out, row)
        assert image.shape == (SIZE, SIZE, 3) and mask.shape == clean.shape == (SIZE, SIZE)
        assert image.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) | set(np.unique(clean)) <= {26, 51, 77}


def test_every_slide_has_every_class(data):
    out, rows = data
    for slide in range(SLIDES):
        found = {value for row in rows if row["slide"] == f"s{slide:02d}" and row["defect"] == "none"
                 for value in np.unique(read_tile(out, row)[1])}
        assert found == {26, 51, 77}


def test_truth_csv_is_right(data):
    out, rows = data
    for row in rows:
        _, mask, clean = read_tile(out, row)
        assert float(row["wrong"]) == pytest.approx((mask != clean).mean(), abs=1e-6)
        assert float(row["foreground"]) == pytest.approx((clean > 26).mean(), abs=1e-6)
        assert float(row["visible"]) == pytest.approx(((mask > 26) != (clean > 26)).mean(), abs=1e-6)
        assert float(row["wrong"]) == 0 or row["defect"] not in ("none", "empty")
        assert bool(row["dx"]) == bool(row["dy"]) == bool(row["angle"]) == (row["defect"] in ("shifted", "rotated"))
        assert bool(row["bend"]) == (row["defect"] == "deformed")
        if row["defect"] == "empty":
            assert (mask == 26).all() and (clean == 26).all()


def test_every_defect_occurs():
    plans = [demo.make_plan(seed, i % 12, i // 12).defect for seed in (0, 1, 2) for i in range(240)]
    shares = {name: plans.count(name) / len(plans) for name in demo.DEFECTS}
    assert shares == pytest.approx(demo.DEFECTS, abs=0.012)


def test_shares_of_classes_are_as_planned():
    plans = [demo.make_plan(0, i % 12, i // 12) for i in range(240)]
    clean = [plan for plan in plans if plan.defect == "none"]
    assert np.mean([plan.glass for plan in clean]) == pytest.approx(0.525, abs=0.05)
    assert np.mean([plan.tumour * (1 - plan.glass) for plan in clean]) == pytest.approx(0.22, abs=0.05)


def test_the_same_seed_gives_the_same_bytes(data):
    out, rows = data
    row = rows[5]
    tile = demo.make_tile(1, int(row["slide"][1:]), int(row["key"][4:]), SIZE)
    image, mask, clean = read_tile(out, row)
    assert (tile.image == image).all() and (demo.MASK_VALUES[tile.written] == mask).all()
    assert (demo.MASK_VALUES[tile.clean] == clean).all()


def test_another_seed_slide_or_number_gives_another_tile():
    image = demo.make_tile(0, 0, 0, 128).image
    for place in ((1, 0, 0), (0, 1, 0), (0, 0, 20)):
        assert (demo.make_tile(*place, 128).image != image).mean() > 0.1


def test_a_shifted_mask_is_the_clean_mask_moved():
    for slide, number in find("shifted", 3):
        tile = demo.make_tile(1, slide, number, SIZE)
        dx, dy = tile.row["dx"], tile.row["dy"]
        assert 40 <= np.hypot(dx, dy) <= 140
        written = tile.written[max(dy, 0) : SIZE + min(dy, 0), max(dx, 0) : SIZE + min(dx, 0)]
        clean = tile.clean[max(-dy, 0) : SIZE + min(-dy, 0), max(-dx, 0) : SIZE + min(-dx, 0)]
        assert (written == clean).all()


def test_over_glass_adds_tissue_and_left_out_removes_it():
    for slide, number in find("over_glass", 2):
        tile = demo.make_tile(1, slide, number, SIZE)
        assert (tile.written >= tile.clean).all()
        assert (tile.written[tile.clean == 0] == 1).mean() > 0.7
    for slide, number in find("left_out", 2):
        tile = demo.make_tile(1, slide, number, SIZE)
        assert set(np.unique(tile.written[tile.written != tile.clean])) == {0}
        assert 0.3 < (tile.written[tile.clean > 0] == 0).mean() < 0.7


def test_rotated_masks_are_the_clean_masks_turned():
    for place in find("rotated", 4):
        tile = demo.make_tile(1, *place, SIZE)
        assert 8 <= abs(tile.row["angle"]) <= 25
        back = Move(*(float(tile.row[name]) for name in ("dx", "dy", "angle"))).undo(tile.written)
        inside = back != IGNORE
        assert inside.mean() > 0.5 and (back == tile.clean)[inside].mean() > 0.985


def test_deformed_masks_lie_off_by_no_more_than_they_say():
    for place in find("deformed", 3):
        tile = demo.make_tile(1, *place, SIZE)
        bend = float(tile.row["bend"])
        assert 10 <= bend <= 25
        layout = demo.lay_out(demo.stream(1, *place, demo.LAYOUT), demo.make_slide(1, place[0]),
                              demo.make_plan(1, *place), SIZE)
        for k in np.unique(tile.written):  # every class lies at most so far from where it belongs
            distance = distance_transform_edt(layout.field != k)
            inner = np.s_[demo.MARGIN:demo.MARGIN + SIZE, demo.MARGIN:demo.MARGIN + SIZE]
            assert distance[inner][tile.written == k].max() <= bend + 1


def test_visible_defects_lie_on_tiles_with_glass_and_lay_more_tissue_on_it():
    for place in find("shifted", 3):
        plan = demo.make_plan(1, *place, visible=True)
        assert 0.3 <= plan.glass <= 0.7
        seen = demo.make_tile(1, *place, SIZE, visible=True)
        layout = demo.lay_out(demo.stream(1, *place, demo.LAYOUT), demo.make_slide(1, place[0]), plan, SIZE)
        y, x = demo.MARGIN + seen.row["dy"], demo.MARGIN + seen.row["dx"]
        opposite = layout.field[y:y + SIZE, x:x + SIZE]
        on_glass = [((mask > 0) & (seen.clean == 0)).sum() for mask in (seen.written, opposite)]
        assert on_glass[0] >= on_glass[1]


def test_algorithm_1_tells_clean_tiles_from_tissue_over_glass():
    for place in [*find("none", 7), *find("left_out", 2)]:
        tile = demo.make_tile(1, *place, SIZE)
        assert blank_share(tile.image, demo.MASK_VALUES[tile.clean]) < 0.05
    for place in find("over_glass", 2):
        tile = demo.make_tile(1, *place, SIZE)
        assert blank_share(tile.image, demo.MASK_VALUES[tile.written]) > 0.15
    tile = demo.make_tile(1, *find("empty", 1)[0], SIZE)
    assert blank_share(tile.image, demo.MASK_VALUES[tile.written]) is None and tile.image.mean() > 230


def test_classes_look_different(data):
    out, rows = data
    for slide in range(SLIDES):
        image, mask, _ = read_tile(out, next(row for row in rows if row["key"] == f"s{slide:02d}-0000"))
        glass, tissue, tumour = (255 - image[mask == value].mean() for value in (26, 51, 77))
        assert glass < 30 and tissue > 75 and tumour > tissue + 10


def test_an_existing_folder_is_not_overwritten(data):
    out, _ = data
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match=f"{out.name}.*not an empty folder"):
        demo.main([str(out), "--tiles", "4", "--slides", "2", "--size", "128"])
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("wrong", [["--tiles", "3", "--slides", "4"], ["--size", "64"], ["--seed", "-1"],
                                   ["--slides", "0"]])
def test_wrong_arguments_are_rejected(tmp_path, wrong):
    with pytest.raises(UserError, match=wrong[0]):
        demo.main([str(tmp_path / "out"), *wrong])
    assert not any(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "write_data_set", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.main([str(tmp_path / "out"), "--tiles", "12"])
    assert not any(tmp_path.iterdir())


def test_slides_of_another_laboratory_look_different_and_have_the_same_masks(tmp_path, capsys):
    arguments = ["--tiles", "8", "--slides", "4", "--size", "128", "--seed", "2"]
    demo.main([str(tmp_path / "one"), *arguments])
    demo.main([str(tmp_path / "labs"), *arguments, "--other-lab", "2"])
    assert "data.test_groups=[s02,s03]" in capsys.readouterr().out
    assert (tmp_path / "one/truth.csv").read_bytes() == (tmp_path / "labs/truth.csv").read_bytes()
    for path in sorted((tmp_path / "one/masks").iterdir()):
        here, there = (tmp_path / name for name in ("one", "labs"))
        assert (here / "masks" / path.name).read_bytes() == (there / "masks" / path.name).read_bytes()
        name = path.name.replace("mask", "frame")
        images = [read(folder / "frames" / name).astype(float) for folder in (here, there)]
        difference = np.median(images[1] - images[0], axis=(0, 1))
        assert (difference != 0).any() == path.name.startswith(("mask#s02", "mask#s03"))
        if difference.any():
            assert difference[2] < difference[0] - 5, "its light is yellower"


@pytest.mark.parametrize("count", ["-1", "4"])
def test_not_all_slides_are_of_another_laboratory(tmp_path, count):
    with pytest.raises(UserError, match="--other-lab .*expected 0 to 3"):
        demo.main([str(tmp_path / "x"), "--tiles", "8", "--slides", "4", "--other-lab", count])
