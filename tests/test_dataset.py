"""dataset.py: pairs of files, groups and split, tiles.csv."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import write_pairs

from common.config import Data
from common.console import UserError
from common.pictures import read_image
from dataset import Tile, find_pairs, group_of, read_tiles, split_by_group, write_tiles


def pairs_in(root, **settings):
    return find_pairs(Data(root=str(root), **settings))


def listed_in(root):
    return read_tiles(Data(root=str(root)))


# ---------------------------------------------------------------------------------------------- pairs of files

def test_pairs_are_found_by_key_in_natural_order(tmp_path):
    write_pairs(tmp_path, 12)
    tiles = pairs_in(tmp_path)
    assert [tile.key for tile in tiles] == [str(i) for i in range(12)]
    assert tiles[10].image == "frames/frame#10.png" and tiles[10].mask == "masks/mask#10.png"


def test_other_layouts_are_found_too(tmp_path):
    for key in ("a", "b"):
        for folder, name in (("x", "image.png"), ("y", "label_1.png")):
            path = tmp_path / folder / key / name
            path.parent.mkdir(parents=True)
            path.touch()
    tiles = pairs_in(tmp_path, images="x/{key}/image.png", masks="y/{key}/label_1.png")
    assert [(tile.key, tile.mask) for tile in tiles] == [("a", "y/a/label_1.png"), ("b", "y/b/label_1.png")]


def test_images_and_masks_may_share_a_folder_with_other_files(tmp_path):
    for name in ("foo 1.png", "foo 1_mask.png", "bär.png", "bär_mask.png", "._foo 1.png"):
        (tmp_path / name).touch()
    assert [tile.key for tile in pairs_in(tmp_path, images="{key}.png", masks="{key}_mask.png")] == ["bär", "foo 1"]


def test_names_in_any_unicode_form_pair_up(tmp_path):
    """macOS programs may write an accent as its own character (NFD), others do not; both names look the same."""
    composed, decomposed = "Gewebe-\u00fc\u00e9 1", "Gewebe-u\u0308e\u0301 1"
    write_pairs(tmp_path, 1)
    (tmp_path / "frames/frame#0.png").rename(tmp_path / f"frames/frame#{decomposed}.png")
    (tmp_path / "masks/mask#0.png").rename(tmp_path / f"masks/mask#{composed}.png")
    tile, = pairs_in(tmp_path, group="^(\\w+)-\u00fc")
    assert (tile.key, tile.group) == (composed, "Gewebe")
    assert read_image(tmp_path / tile.image).shape == (48, 40, 3)
    (tmp_path / "frames").rename(tmp_path / "Ru\u0308ckseite")
    assert pairs_in(tmp_path, images="R\u00fcckseite/frame#{key}.png")[0].key == composed
    if len(list((tmp_path / "masks").iterdir())) == 1:
        (tmp_path / f"masks/mask#{decomposed}.png").touch()
    if len(list((tmp_path / "masks").iterdir())) == 2:  # some file systems treat both names as one
        with pytest.raises(UserError, match="accents"):
            pairs_in(tmp_path, images="R\u00fcckseite/frame#{key}.png")


def test_a_name_that_is_not_text_is_named(tmp_path):
    write_pairs(tmp_path, 2)
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "frames") + b"/frame#\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes only names that are text")
    with pytest.raises(UserError, match=r"'frame#\\udcff.png'.*Unicode"):
        pairs_in(tmp_path)


@pytest.mark.parametrize(("removed", "named"), [("frames/frame#3.png", "mask#3.png.*image.*frame#3.png"),
                                                ("masks/mask#3.png", "frame#3.png.*mask.*mask#3.png")])
def test_a_file_without_partner_is_named(tmp_path, removed, named):
    write_pairs(tmp_path, 5)
    (tmp_path / removed).unlink()
    with pytest.raises(UserError, match=named):
        pairs_in(tmp_path)


def test_no_tiles_says_where_they_are_expected_and_how_to_get_some(tmp_path):
    with pytest.raises(UserError, match=r"frame#\{key\}.png.*mask#\{key\}.png.*data.root.*make_demo_data"):
        pairs_in(tmp_path)


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
    with pytest.raises(UserError, match="at least two groups.*of one.*data.group"):
        split_by_group([Tile(str(i), "", "", group="g") for i in range(9)], 0.2, seed=0)


# ---------------------------------------------------------------------------------------------- tiles.csv

def listed(root):
    """Write 6 tiles of 3 slides and their list; return its tiles."""
    write_pairs(root, 6, slides=3)
    tiles = [replace(tile, foreground=0.5, blank=0.01, split="test" if tile.group == "s0" else "train")
             for tile in pairs_in(root, group=r"^(s\d+)")]
    write_tiles(root / "tiles.csv", tiles)
    return tiles


def test_the_list_comes_back_as_written(tmp_path):
    tiles = listed(tmp_path)
    assert listed_in(tmp_path) == tiles


@pytest.mark.parametrize(("edit", "expected"), [
    (lambda rows: [{**row, "split": "trian"} for row in rows], "line 2.*split.*'trian'"),
    (lambda rows: [{**rows[0], "blank": "low"}, *rows[1:]], "line 2.*blank.*'low'"),
    (lambda rows: [{**rows[0], "proposed": "good"}, *rows[1:]], "line 2.*proposed.*'good'"),
    (lambda rows: [{**rows[0], "split": "corrupt", "proposed": "train"}, *rows[1:]], "line 2.*'excluded'"),
    (lambda rows: [{**rows[0], "shift_x": "left"}, *rows[1:]], "line 2.*shift_x.*'left'"),
    (lambda rows: [{**rows[0], "mask_from": "mine"}, *rows[1:]], "line 2.*mask_from.*'mine'"),
    (lambda rows: [{**row, "mask_from": "model x", "split": "test"} for row in rows], "line 2.*are predictions"),
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
        listed_in(tmp_path)
    assert str(path) in str(error.value)


def test_a_list_whose_file_has_become_a_link_out_of_the_folder_is_rejected(tmp_path):
    tiles = listed(tmp_path / "tiles")
    file = tmp_path / "tiles" / tiles[0].image
    file.rename(tmp_path / "secret.png")
    file.symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="frame#s0-0.png.*secret.png"):
        listed_in(tmp_path / "tiles")


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
    assert listed_in(tmp_path) == tiles


def test_a_list_in_another_encoding_is_rejected(tmp_path):
    listed(tmp_path)
    path = tmp_path / "tiles.csv"
    path.write_bytes(path.read_text().replace("s1", "ä1").encode("cp1252"))
    with pytest.raises(UserError, match="tiles.csv.*UTF-8"):
        listed_in(tmp_path)


def test_a_missing_list_names_the_command_that_writes_it(tmp_path):
    with pytest.raises(UserError, match=r"tiles.csv.*data_filter.py"):
        listed_in(tmp_path)
    with pytest.raises(UserError, match="make_demo_data"):
        listed_in(tmp_path / "nowhere")
