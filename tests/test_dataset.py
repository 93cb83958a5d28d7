"""dataset.py: pairs of files, groups and split, tiles.csv, the packed store, statistics."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import GREYS, write_pairs
from PIL import Image

import dataset
from common.console import UserError
from common.pictures import read_image
from dataset import Tile, find_pairs, group_of, open_store, read_tiles, split_by_group, statistics_of, write_tiles

LAYOUT = "frames/frame#{key}.png", "masks/mask#{key}.png"


# ---------------------------------------------------------------------------------------------- pairs of files

def test_pairs_are_found_by_key_in_natural_order(tmp_path):
    write_pairs(tmp_path, 12)
    tiles = find_pairs(tmp_path, *LAYOUT)
    assert [tile.key for tile in tiles] == [str(i) for i in range(12)]
    assert tiles[10].image == "frames/frame#10.png" and tiles[10].mask == "masks/mask#10.png"


def test_other_layouts_are_found_too(tmp_path):
    for key in ("a", "b"):
        for folder, name in (("x", "image.png"), ("y", "label_1.png")):
            path = tmp_path / folder / key / name
            path.parent.mkdir(parents=True)
            path.touch()
    tiles = find_pairs(tmp_path, "x/{key}/image.png", "y/{key}/label_1.png")
    assert [(tile.key, tile.mask) for tile in tiles] == [("a", "y/a/label_1.png"), ("b", "y/b/label_1.png")]


def test_images_and_masks_may_share_a_folder_with_other_files(tmp_path):
    for name in ("foo 1.png", "foo 1_mask.png", "bär.png", "bär_mask.png", "._foo 1.png"):
        (tmp_path / name).touch()
    assert [tile.key for tile in find_pairs(tmp_path, "{key}.png", "{key}_mask.png")] == ["bär", "foo 1"]


def test_names_in_any_unicode_form_pair_up(tmp_path):
    """macOS programs may write an accent as its own character (NFD), others do not; both names look the same."""
    composed, decomposed = "Gewebe-\u00fc\u00e9 1", "Gewebe-u\u0308e\u0301 1"
    write_pairs(tmp_path, 1)
    (tmp_path / "frames/frame#0.png").rename(tmp_path / f"frames/frame#{decomposed}.png")
    (tmp_path / "masks/mask#0.png").rename(tmp_path / f"masks/mask#{composed}.png")
    tile, = find_pairs(tmp_path, *LAYOUT, group="^(\\w+)-\u00fc")
    assert (tile.key, tile.group) == (composed, "Gewebe")
    assert read_image(tmp_path / tile.image).shape == (48, 40, 3)
    (tmp_path / "frames").rename(tmp_path / "Ru\u0308ckseite")
    assert find_pairs(tmp_path, "R\u00fcckseite/frame#{key}.png", LAYOUT[1])[0].key == composed
    if len(list((tmp_path / "masks").iterdir())) == 1:
        (tmp_path / f"masks/mask#{decomposed}.png").touch()
    if len(list((tmp_path / "masks").iterdir())) == 2:  # some file systems treat both names as one
        with pytest.raises(UserError, match="accents"):
            find_pairs(tmp_path, "R\u00fcckseite/frame#{key}.png", LAYOUT[1])


def test_a_name_that_is_not_text_is_named(tmp_path):
    write_pairs(tmp_path, 2)
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "frames") + b"/frame#\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes only names that are text")
    with pytest.raises(UserError, match=r"'frame#\\udcff.png'.*Unicode"):
        find_pairs(tmp_path, *LAYOUT)


@pytest.mark.parametrize(("removed", "named"), [("frames/frame#3.png", "mask#3.png.*image.*frame#3.png"),
                                                ("masks/mask#3.png", "frame#3.png.*mask.*mask#3.png")])
def test_a_file_without_partner_is_named(tmp_path, removed, named):
    write_pairs(tmp_path, 5)
    (tmp_path / removed).unlink()
    with pytest.raises(UserError, match=named):
        find_pairs(tmp_path, *LAYOUT)


def test_no_tiles_says_where_they_are_expected_and_how_to_get_some(tmp_path):
    with pytest.raises(UserError, match=r"frame#\{key\}.png.*mask#\{key\}.png.*data.root.*make_demo_data"):
        find_pairs(tmp_path, *LAYOUT)


# ---------------------------------------------------------------------------------------------- groups and split

def test_groups_come_from_the_key():
    assert group_of("s03-0017", r"^(s\d+)") == group_of("s03-0018", r"s\d+") == "s03"
    assert group_of("anything", "") == ""
    for pattern in (r"\d", "y*", "(z)?.*"):
        with pytest.raises(UserError, match="data.group.*'x'"):
            group_of("x", pattern)


def test_the_split_of_single_tiles_is_the_reports():
    splits = split_by_group([Tile(str(i), "", "") for i in range(11_033)], 0.2, seed=0)
    assert (splits.count("train"), splits.count("test")) == (8_827, 2_206)


@pytest.mark.parametrize("seed", range(20))
def test_a_split_never_cuts_a_group(seed):
    random = np.random.default_rng(seed)
    tiles = [Tile(str(i), "", "", group=f"g{random.integers(15)}") for i in range(100)]
    splits = split_by_group(tiles, 0.2, seed)
    test, train = ({t.group for t, s in zip(tiles, splits, strict=True) if s == name} for name in ("test", "train"))
    assert test and train and not test & train
    assert 10 <= splits.count("test") <= 20


def test_one_group_cannot_be_split():
    with pytest.raises(UserError, match="too few groups"):
        split_by_group([Tile(str(i), "", "", group="g") for i in range(9)], 0.2, seed=0)


# ---------------------------------------------------------------------------------------------- tiles.csv

def listed(root):
    """Write 6 tiles of 3 slides and their list; return its tiles."""
    write_pairs(root, 6, slides=3)
    tiles = [replace(tile, foreground=0.5, blank=0.01, split="test" if tile.group == "s0" else "train")
             for tile in find_pairs(root, *LAYOUT, group=r"^(s\d+)")]
    write_tiles(root / "tiles.csv", tiles)
    return tiles


def test_the_list_comes_back_as_written(tmp_path):
    tiles = listed(tmp_path)
    assert read_tiles(tmp_path) == tiles


@pytest.mark.parametrize(("edit", "expected"), [
    (lambda rows: [{**row, "split": "trian"} for row in rows], "line 2.*split.*'trian'"),
    (lambda rows: [{**rows[0], "blank": "low"}, *rows[1:]], "line 2.*blank.*'low'"),
    (lambda rows: [{**rows[0], "proposed": "good"}, *rows[1:]], "line 2.*proposed.*'good'"),
    (lambda rows: [{**rows[0], "split": "corrupt", "proposed": "train"}, *rows[1:]], "line 2.*'excluded'"),
    (lambda rows: [{**rows[0], "shift_x": "left"}, *rows[1:]], "line 2.*shift_x.*'left'"),
    (lambda rows: [*rows, rows[0]], "2 rows.*'s0-0'"),
    (lambda rows: [{**rows[0], "image": "../../etc/passwd"}, *rows[1:]], "line 2.*image.*passwd"),
    (lambda rows: [{**row, "split": "train" if i else "test", "group": "s0"} for i, row in enumerate(rows)],
     "group 's0'.*train.*test"),
    (lambda rows: [{k: v for k, v in row.items() if k != "split"} for row in rows], "missing.*split"),
])
def test_a_badly_edited_list_names_line_and_cause(tmp_path, edit, expected):
    listed(tmp_path)
    path = tmp_path / "tiles.csv"
    with path.open() as file:
        rows = edit(list(csv.DictReader(file)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(UserError, match=expected) as error:
        read_tiles(tmp_path)
    assert str(path) in str(error.value)


def test_a_list_whose_file_has_become_a_link_out_of_the_folder_is_rejected(tmp_path):
    tiles = listed(tmp_path / "tiles")
    file = tmp_path / "tiles" / tiles[0].image
    file.rename(tmp_path / "secret.png")
    file.symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="frame#s0-0.png.*secret.png"):
        read_tiles(tmp_path / "tiles")


@pytest.mark.parametrize("save", [
    lambda text: text.encode("utf-8-sig"), lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace(",", ";").replace("0.5", "0,5").encode(),
    lambda text: text.replace("key,image", '"key","image"').replace(",", ";").encode(),
    lambda text: text.replace(",", "\t").encode(), lambda text: (text + ",,,,,,\n").encode()],
    ids=["byte order mark", "CRLF", "semicolons", "quotes", "tabs", "blank row"])
def test_lists_saved_by_spreadsheets_are_read(tmp_path, save):
    tiles = listed(tmp_path)
    path = tmp_path / "tiles.csv"
    path.write_bytes(save(path.read_text()))
    assert read_tiles(tmp_path) == tiles


def test_a_list_in_another_encoding_is_rejected(tmp_path):
    listed(tmp_path)
    path = tmp_path / "tiles.csv"
    path.write_bytes(path.read_text().replace("s1", "ä1").encode("cp1252"))
    with pytest.raises(UserError, match="tiles.csv.*UTF-8"):
        read_tiles(tmp_path)


def test_a_missing_list_names_the_command_that_writes_it(tmp_path):
    with pytest.raises(UserError, match=r"tiles.csv.*data_filter.py"):
        read_tiles(tmp_path)
    with pytest.raises(UserError, match="make_demo_data"):
        read_tiles(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------- the packed store

def test_the_store_holds_the_files(tmp_path):
    tiles = listed(tmp_path)
    store = open_store(tmp_path, tiles, GREYS.tolist()).pixels
    assert store.shape == (6, 48, 40, 4) and store.dtype == np.uint8
    for i, tile in enumerate(tiles):
        assert (store[i, ..., :3] == np.asarray(Image.open(tmp_path / tile.image))).all()
        assert (GREYS[store[i, ..., 3]] == np.asarray(Image.open(tmp_path / tile.mask))).all()


def change_mask(root, tiles):
    path = root / tiles[2].mask
    picture = np.array(Image.open(path))
    picture[:] = 26
    Image.fromarray(picture).save(path)
    return tiles


def touch(root, tiles):
    os.utime(root / tiles[1].image, ns=(1, 1))
    return tiles


def truncate(root, tiles):
    with (root / "tiles.u8").open("r+b") as file:
        file.truncate(5000)
    return tiles


def of_older_code(root, tiles):
    path = root / "tiles.u8"
    packed = path.read_bytes()
    path.write_bytes(packed.replace(b"crc-unet tiles 2", b"crc-unet tiles 1"))
    return tiles


@pytest.mark.parametrize(("change", "stale"), [
    (lambda root, tiles: tiles, False), (lambda root, tiles: tiles[:-1], True), (lambda root, tiles: tiles[::-1], True),
    (change_mask, True), (touch, True), (truncate, True), (of_older_code, True),
], ids=["same", "removed", "reordered", "edited", "touched", "cut", "of older code"])
def test_the_store_is_packed_anew_exactly_when_stale(tmp_path, monkeypatch, change, stale):
    tiles = listed(tmp_path)
    open_store(tmp_path, tiles, GREYS.tolist())
    tiles, packed, pack = change(tmp_path, tiles), [], dataset._pack
    monkeypatch.setattr(dataset, "_pack", lambda *args: packed.append(1) or pack(*args))
    store = open_store(tmp_path, tiles, GREYS.tolist()).pixels
    assert bool(packed) == stale
    for i, tile in enumerate(tiles):
        assert (GREYS[store[i, ..., 3]] == np.asarray(Image.open(tmp_path / tile.mask))).all()


def test_other_mask_values_make_the_store_stale(tmp_path):
    tiles = listed(tmp_path)
    before = np.array(open_store(tmp_path, tiles, [26, 51, 77]).pixels[..., 3])
    after = open_store(tmp_path, tiles, [77, 51, 26]).pixels[..., 3]
    assert (after == 2 - before).all()


def test_a_store_that_another_process_replaces_meanwhile_is_read_from_one_file(tmp_path, monkeypatch):
    tiles = listed(tmp_path)
    expected, memmap = open_store(tmp_path, tiles, [26, 51, 77]).pixels[..., 3].copy(), np.memmap

    def with_other_values_first(*args, **options):
        monkeypatch.setattr(np, "memmap", memmap)
        open_store(tmp_path, tiles, [77, 51, 26])
        return memmap(*args, **options)

    monkeypatch.setattr(np, "memmap", with_other_values_first)
    assert (open_store(tmp_path, tiles, [26, 51, 77]).pixels[..., 3] == expected).all()


def test_leftovers_of_a_killed_packing_are_removed(tmp_path):
    tiles = listed(tmp_path)
    leftover = tmp_path / ".tiles.u8.123.tmp"
    leftover.touch()
    open_store(tmp_path, tiles, GREYS.tolist())
    assert not leftover.exists()


def test_a_tile_of_another_size_is_named_and_no_store_is_left(tmp_path):
    tiles = listed(tmp_path)
    Image.fromarray(np.full((50, 40, 3), 90, np.uint8)).save(tmp_path / tiles[4].image)
    with pytest.raises(UserError, match="48 x 40.*50 x 40"):
        open_store(tmp_path, tiles, GREYS.tolist())
    Image.fromarray(np.full((50, 40), 51, np.uint8)).save(tmp_path / tiles[4].mask)
    with pytest.raises(UserError, match="50 x 40.*48 x 40"):
        open_store(tmp_path, tiles, GREYS.tolist())
    assert not list(tmp_path.glob("*.u8")) and not list(tmp_path.glob(".*.tmp"))


# ---------------------------------------------------------------------------------------------- statistics

def test_statistics_equal_those_of_numpy_for_the_chosen_tiles(tmp_path):
    tiles = listed(tmp_path)
    store, rows = open_store(tmp_path, tiles, GREYS.tolist()), [1, 2, 4]
    statistics, pixels = statistics_of(store.sums[rows]), store.pixels[rows] / 255
    assert statistics.mean == pytest.approx(pixels[..., :3].mean((0, 1, 2)), rel=1e-12)
    assert statistics.std == pytest.approx(pixels[..., :3].std((0, 1, 2)), rel=1e-12)
    assert statistics.frequencies == pytest.approx([np.mean(store.pixels[rows][..., 3] == k) for k in range(3)])


def test_statistics_are_read_from_the_store_and_not_computed_again(tmp_path, monkeypatch):
    tiles = listed(tmp_path)
    first = open_store(tmp_path, tiles, GREYS.tolist())
    monkeypatch.setattr(dataset, "sums_of", None)
    assert (open_store(tmp_path, tiles, GREYS.tolist()).sums == first.sums).all()
    assert first.sums.shape == (6, 9) and (first.sums[:, 6:].sum(1) == 48 * 40).all()


def test_statistics_of_one_colour_have_no_deviation_of_zero():
    white, labels = np.full((500, 500, 3), 255, np.uint8), np.zeros((500, 500), np.uint8)
    statistics = statistics_of(np.stack([dataset.sums_of(white, labels, 3)] * 9))
    assert statistics.mean == [1.0] * 3 and statistics.std == [1e-6] * 3 and statistics.frequencies == [1.0, 0.0, 0.0]
