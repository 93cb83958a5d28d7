"""filtering/repair.py and filtering/new_masks.py: which pixels keep a class, and whose files are kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import moved_mask, scene
from PIL import Image

from common.config import Data, Filter
from common.masks import IGNORE, read_mask
from dataset import Tile
from filtering import new_masks
from filtering.audit import contradicted, disputed
from filtering.registration import Move
from filtering.repair import relabel, repair, wide_areas

LIMITS = Filter(sigma=6.0, repair=True, max_unmarked=0.05)
MOVE = Move(30, -20, 8)


@pytest.fixture
def tile():
    """Image, true classes, glass, and a mask that lies off by MOVE."""
    labels, image = scene(11)
    window = np.s_[150:450, 150:450]
    return image[window], labels[window], labels[window] == 0, moved_mask(labels, MOVE, (150, 150, 300, 300))


def test_a_mask_that_lies_off_is_moved_back(tile):
    image, truth, glass, given = tile
    new = repair(image, given, glass, [MOVE], LIMITS)
    kept = new.labels != IGNORE
    assert new.ignored == pytest.approx((~kept).mean()) and 0.1 < new.ignored < 0.4
    assert (new.labels[kept] != truth[kept]).mean() < 0.01 < (given != truth).mean()
    assert "moved by -30.0, +20.0 px, turned by -8.0 degrees" in new.what and f"{new.ignored:.1%} ignored" in new.what


def test_a_move_after_which_the_mask_fits_worse_does_not_count(tile):
    image, _truth, glass, given = tile
    assert (repair(image, given, glass, [Move(-60, 40, 0), MOVE], LIMITS).labels
            == repair(image, given, glass, [MOVE], LIMITS).labels).all()
    only_colours = Filter(sigma=6.0, max_blank=None)
    assert repair(image, given, glass, [Move(-60, 40, 0)], only_colours).what == "nothing in the mask can be repaired"
    assert "moved by -30.0" in repair(image, given, glass, [Move(-60, 40, 0), MOVE], only_colours).what


@pytest.mark.parametrize(("rows", "expected"), [(10, "moved by"), (90, "still lie off")])
def test_a_move_after_which_the_mask_contradicts_the_glass_does_not_count(tile, rows, expected):
    """The colours are explained by any classes; that glass is tissue in some rows changes little for them."""
    image, truth, glass, given = tile
    wrong = truth.copy()
    wrong[-rows:] = np.where(glass[-rows:], 1, truth[-rows:])
    y, x = np.mgrid[:300, :300]
    place = np.rint(MOVE.of_points(np.stack([y, x], -1), (300, 300))).astype(int)
    inside = ((place >= 0) & (place < 300)).all(-1)
    given[tuple(place[inside].T)] = wrong[inside]
    assert expected in repair(image, given, glass, [MOVE], Filter(sigma=6.0, max_ignored=1.0, max_shift=20.0)).what


def test_areas_that_contradict_the_image_lose_their_class(tile):
    image, truth, glass, _ = tile
    given = truth.copy()
    given[:90] = np.where(glass[:90], 1, 0)  # tissue on glass and glass on tissue
    new = repair(image, given, glass, [], LIMITS)
    assert (new.labels[:84] == IGNORE).all() and (new.labels[120:] == truth[120:]).mean() > 0.95
    kept = new.labels != IGNORE
    assert (new.labels[kept] == truth[kept]).all()


def test_areas_that_a_model_disputes_lose_their_class(tile):
    image, truth, glass, _ = tile
    probs = np.eye(3, dtype=np.float32)[truth]
    given = truth.copy()
    box = np.s_[40:140, 50:130]
    given[box] = np.where(truth[box] == 1, 2, np.where(truth[box] == 2, 1, 0))
    assert "nothing" in repair(image, given, glass, [], LIMITS).what, "the image alone does not show it"
    new = repair(image, given, glass, [], LIMITS, probs)
    kept = new.labels != IGNORE
    assert (new.labels[kept] == truth[kept]).mean() > 0.999
    unsure = 0.6 * probs + 0.4 / 3
    assert "nothing" in repair(image, given, glass, [], LIMITS, unsure).what


@pytest.mark.parametrize(("changes", "expected"), [
    ({"max_ignored": 0.1}, "lose"), ({"min_foreground": 0.99}, "too little tissue"), ({}, None),
])
def test_a_mask_that_loses_too_much_is_no_repair(tile, changes, expected):
    image, _, glass, given = tile
    new = repair(image, given, glass, [MOVE], Filter(**{"sigma": 6.0, "max_unmarked": 0.05, **changes}))
    assert (new.labels is None and expected in new.what) if expected else new.labels is not None


def test_a_mask_that_would_still_be_dropped_is_no_repair(tile):
    """Contradictions too narrow to be taken out, but many: one row of three is annotated on glass."""
    image, truth, glass, _ = tile
    given = truth.copy()
    given[::3][glass[::3]] = 1
    new = repair(image, given, glass, [], Filter(sigma=6.0, max_blank=0.05))
    assert new.labels is None and new.what == "nothing in the mask can be repaired"
    given[:80] = np.where(glass[:80], 1, truth[:80])  # wide enough to be taken out
    new = repair(image, given, glass, [], Filter(sigma=6.0, max_blank=0.05))
    assert new.labels is None and new.what == "a new mask would still say tissue where the image shows glass"
    assert repair(image, given, glass, [], Filter(sigma=6.0, max_blank=0.6)).labels is not None


def test_a_mask_that_a_model_would_still_dispute_is_no_repair(tile):
    image, truth, glass, _ = tile
    said = truth.copy()
    said[::3] = (said[::3] + 1) % 3  # too narrow to be taken out
    said[:80] = (truth[:80] + 1) % 3
    probs = np.eye(3, dtype=np.float32)[said]
    limits = Filter(sigma=6.0, max_blank=None, max_disagreement=0.1)
    new = repair(image, truth, glass, [], limits, probs)
    assert new.labels is None and new.what == "a new mask would still be disputed"
    assert repair(image, truth, glass, [], replace(limits, max_disagreement=0.5), probs).labels is not None


def test_a_prediction_gives_no_class_to_ignored_pixels(tile):
    _, truth, _, given = tile
    given = given.copy()
    given[:30] = IGNORE
    new = relabel(given, np.eye(3, dtype=np.float32)[truth], Filter())
    assert (new.labels[:30] == IGNORE).all() and (new.labels[30:] == truth[30:]).all()


def test_a_mask_that_lies_off_but_fits_nowhere_is_no_repair(tile):
    image, _, glass, given = tile
    new = repair(image, given, glass, [Move(-60, 40, 0)], Filter(sigma=6.0, max_shift=20.0))
    assert new.labels is None and new.what == "a new mask would still lie off" and 0.1 < new.ignored < 0.3


def test_left_out_tissue_that_looks_like_a_move_loses_its_class(tile):
    image, truth, glass, _ = tile
    given = truth.copy()
    given[150:] = 0
    new = repair(image, given, glass, [Move(-60, 40, 0)], Filter(sigma=6.0, max_shift=20.0, max_unmarked=0.05))
    kept = new.labels != IGNORE
    assert (new.labels[kept] == truth[kept]).all() and 0.7 < kept.mean() < 0.9


def test_a_mask_in_place_is_not_said_to_move_when_little_of_it_is_left(tile, monkeypatch):
    image, truth, glass, _ = tile
    given = truth.copy()
    given[:90] = np.where(glass[:90], 1, 0)
    found = {"blank": 0.0, "unmarked": 0.0, "shift": 50.0, "confidence": 0.9}
    monkeypatch.setattr("filtering.repair.measure_tile", lambda *args: dict(found))
    limits = replace(LIMITS, max_shift=20.0)
    assert repair(image, given, glass, [], limits).labels is not None
    assert repair(image, given, glass, [Move(-60, 40, 0)], limits).what == "a new mask would still lie off"


def test_a_mask_without_a_class_is_none(tile):
    _, _, _, given = tile
    new = relabel(given, np.full((300, 300, 3), 1 / 3, np.float32), Filter(max_ignored=1.0))
    assert new.labels is None and new.what == "a new mask would have no labelled pixel" and new.ignored == 1


def test_pixels_without_a_class_are_not_counted_as_lost(tile):
    image, truth, glass, _ = tile
    given = truth.copy()
    given[200:225, :40] = np.where(glass[200:225, :40], 1, 0)
    given[:180] = IGNORE
    new = repair(image, given, glass, [], Filter(sigma=6.0, max_unmarked=0.05, max_ignored=0.1))
    assert new.labels is not None and new.ignored > 0.55


def test_a_prediction_becomes_a_mask_where_the_model_is_sure(tile):
    _, truth, _, given = tile
    random = np.random.default_rng(0)
    probs = random.dirichlet((0.2, 0.2, 0.2), truth.shape).astype(np.float32)
    new = relabel(given, probs, Filter(sure=0.8, max_ignored=1.0))
    for y, x in random.integers(0, 300, (500, 2)):
        expected = probs[y, x].argmax() if probs[y, x].max() >= 0.8 else IGNORE
        assert new.labels[y, x] == expected


def test_contradictions_and_disputes_are_told_pixel_by_pixel():
    random = np.random.default_rng(0)
    labels = random.choice([0, 1, 2, IGNORE], (20, 20)).astype(np.uint8)
    glass, probs = random.random((20, 20)) < 0.5, random.dirichlet((0.3, 0.3, 0.3), (20, 20))
    for y, x in np.ndindex(20, 20):
        label = labels[y, x]
        assert contradicted(labels, glass, LIMITS)[y, x] == (label != IGNORE and (label > 0) == glass[y, x])
        assert contradicted(labels, glass, Filter())[y, x] == (label in (1, 2) and glass[y, x])
        off = Filter(max_blank=None, max_unmarked=0.1)
        assert contradicted(labels, glass, off)[y, x] == (label == 0 and not glass[y, x])
        assert disputed(labels, probs, 0.8)[y, x] == (
            label != IGNORE and probs[y, x].argmax() != label and probs[y, x].max() >= 0.8)


def test_wide_areas_have_room_for_a_disc():
    pixels = np.zeros((60, 80), bool)
    pixels[10:14, :], pixels[30:50, 20:50] = True, True  # a thin line and a block
    found = wide_areas(pixels, 5)
    assert not found[11, 70] and found[30:50, 20:50].all() and not found[:18].any()
    assert found[40, 59] and not found[40, 60]  # a rim of 10 pixels
    band = np.arange(60)[:, None] < np.full(80, 8)[None]
    assert wide_areas(band, 5)[:8].all(), "it goes on outside the tile"
    assert not wide_areas(np.zeros((9, 9), bool), 5).any() and wide_areas(np.ones((40, 40), bool), 5).all()


# ---------------------------------------------------------------------------------------------- files

@pytest.fixture
def masks():
    random = np.random.default_rng(0)
    return {key: random.choice([0, 1, 2, IGNORE], (9, 11)).astype(np.uint8) for key in ("a", "b", "c")}


def files_of(masks):
    return {key: new_masks.encode(labels, 3) for key, labels in masks.items()}


TILES = [Tile(key, f"frames/{key}.png", f"masks/{key}.png") for key in ("a", "b", "c")]


def test_masks_are_read_back_whatever_the_users_masks_look_like(tmp_path, masks):
    for data in (Data(root=str(tmp_path)), Data(root=str(tmp_path), colours=("ffffff", "00ff00", "ff0000"))):
        new_masks.write(files_of(masks), data)
        for key, labels in masks.items():
            path = tmp_path / "repaired" / f"{key}.png"
            assert (read_mask(path, data.of_new_masks) == labels).all()
            assert (new_masks.decode(path.read_bytes()) == labels).all()
            assert Image.open(path).mode == "P"


def test_files_that_stay_the_same_are_not_touched_and_others_go(tmp_path, masks):
    data = Data(root=str(tmp_path))
    new_masks.write(files_of(masks), data)
    before = (tmp_path / "repaired/a.png").stat().st_mtime_ns
    masks["b"] = 2 - np.minimum(masks["b"], 2)
    new_masks.write(files_of({key: masks[key] for key in ("a", "b")}), data)
    assert (tmp_path / "repaired/c.png").exists(), "an old list may still need it"
    new_masks.remove_others(files_of({key: masks[key] for key in ("a", "b")}), data)
    assert sorted(path.name for path in (tmp_path / "repaired").glob("*.png")) == ["a.png", "b.png"]
    assert (tmp_path / "repaired/a.png").stat().st_mtime_ns == before
    assert (read_mask(tmp_path / "repaired/b.png", data.of_new_masks) == masks["b"]).all()
    assert new_masks.made_by_hand(TILES, data) == set()


def test_files_of_a_person_are_recognised_and_kept(tmp_path, masks):
    data = Data(root=str(tmp_path))
    new_masks.write(files_of({key: masks[key] for key in ("a", "b")}), data)
    edited = np.array(masks["a"])
    edited[0] = 1
    (tmp_path / "repaired/a.png").write_bytes(new_masks.encode(edited, 3))
    Image.fromarray(masks["c"]).save(tmp_path / "repaired/c.png")  # a grey image, and the filter never made one
    assert new_masks.made_by_hand(TILES, data) == {"a", "c"}
    new_masks.write(files_of({"b": masks["b"]}), data)
    new_masks.remove_others({}, data)
    assert sorted(path.name for path in (tmp_path / "repaired").glob("*.png")) == ["a.png", "c.png"]
    assert (read_mask(tmp_path / "repaired/a.png", data.of_new_masks) == edited).all()
    assert new_masks.made_by_hand(TILES, data) == {"a", "c"}
    (tmp_path / "repaired/a.png").write_bytes(new_masks.encode(masks["a"], 3))
    assert new_masks.made_by_hand(TILES, data) == {"c"}, "the filter's own file is back"


def test_an_edit_during_a_run_is_kept(tmp_path, masks):
    """The tile was judged while its new mask was the filter's."""
    data, path = Data(root=str(tmp_path)), tmp_path / "repaired/a.png"
    new_masks.write(files_of({"a": masks["a"]}), data)
    path.write_bytes(new_masks.encode(masks["c"], 3))
    new_masks.write(files_of({"a": masks["b"]}), data)
    assert (read_mask(path, data.of_new_masks) == masks["c"]).all()


def test_pictures_that_belong_to_no_tile_are_told(tmp_path, masks):
    data = Data(root=str(tmp_path))
    assert new_masks.without_tile(TILES, data) == []
    new_masks.write(files_of(masks), data)
    for name in ("mask#a.png", "b.tif", "b.txt", "._a.png", "old.png"):
        (tmp_path / "repaired" / name).touch()
    assert new_masks.without_tile(TILES, data) == ["b.tif", "mask#a.png", "old.png"]


def test_a_killed_run_leaves_no_file_that_passes_for_a_persons(tmp_path, masks, monkeypatch):
    data = Data(root=str(tmp_path))
    new_masks.write(files_of({"a": masks["a"]}), data)
    count = 0

    def dies_after_one(path):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return replacing(path)

    replacing = new_masks.replacing
    monkeypatch.setattr(new_masks, "replacing", dies_after_one)
    with pytest.raises(KeyboardInterrupt):
        new_masks.write(files_of({"a": masks["b"], "b": masks["b"], "c": masks["c"]}), data)
    assert new_masks.made_by_hand(TILES, data) == set()
    json.loads((tmp_path / "repaired/.written.json").read_text())


def test_a_folder_of_tiles_is_not_written_to(tmp_path):
    (tmp_path / "repaired").mkdir()
    tiles = [Tile("a", "frames/a.png", "repaired/a.png")]
    with pytest.raises(new_masks.UserError, match="rename the folder"):
        new_masks.made_by_hand(tiles, Data(root=str(tmp_path)))
