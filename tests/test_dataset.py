import csv
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GREYS, numpy_batches, write_pairs
from PIL import Image

import dataset
from common import pictures
from common.console import UserError
from common.pictures import picture_size, read_image, read_mask
from dataset import (
    Statistics,
    Tile,
    find_pairs,
    group_of,
    open_store,
    read_tiles,
    split_by_group,
    statistics_of,
    write_tiles,
)
from training.batches import batches_on, copied_to, normalise, store_on
from training.crops import Crops, draw_folds, training_crops, validation_crops

LAYOUT = "frames/frame#{key}.png", "masks/mask#{key}.png"


# ---------------------------------------------------------------------------------------------- files of a tile

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


def test_names_in_any_unicode_form_pair_up(tmp_path):
    """macOS programs write an accent as a character of its own (NFD), others do not; both look the same."""
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
    if len(list((tmp_path / "masks").iterdir())) == 2:  # not where the file system takes both for one
        with pytest.raises(UserError, match="differ only in how accents are written"):
            find_pairs(tmp_path, "R\u00fcckseite/frame#{key}.png", LAYOUT[1])


def test_a_name_that_is_no_text_is_named(tmp_path):
    write_pairs(tmp_path, 2)
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "frames") + b"/frame#\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes only names that are text")
    with pytest.raises(UserError, match=r"'frame#\\udcff.png' is not valid Unicode"):
        find_pairs(tmp_path, *LAYOUT)


def test_threads_leave_pillows_limit_as_it_was(tmp_path):
    write_pairs(tmp_path, 1)
    limit, path = Image.MAX_IMAGE_PIXELS, tmp_path / "frames/frame#0.png"
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: picture_size(path), range(600)))
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(("removed", "named"), [("frames/frame#3.png", "mask#3.png: its image"),
                                                ("masks/mask#3.png", "frame#3.png: its mask")])
def test_a_file_without_partner_is_named(tmp_path, removed, named):
    write_pairs(tmp_path, 5)
    (tmp_path / removed).unlink()
    with pytest.raises(UserError, match=named):
        find_pairs(tmp_path, *LAYOUT)


def test_no_tiles_says_where_they_are_expected_and_how_to_get_some(tmp_path):
    with pytest.raises(UserError, match=r"no tiles found.*make_demo_data"):
        find_pairs(tmp_path, *LAYOUT)


def test_groups_come_from_the_key():
    assert group_of("s03-0017", r"^(s\d+)") == group_of("s03-0018", r"s\d+") == "s03"
    assert group_of("anything", "") == ""
    for pattern in (r"\d", "y*", "(z)?.*"):
        with pytest.raises(UserError, match="finds nothing in the key 'x'"):
            group_of("x", pattern)


def test_images_and_masks_may_share_a_folder_with_other_files(tmp_path):
    for name in ("foo 1.png", "foo 1_mask.png", "bär.png", "bär_mask.png", "._foo 1.png"):
        (tmp_path / name).touch()
    assert [tile.key for tile in find_pairs(tmp_path, "{key}.png", "{key}_mask.png")] == ["bär", "foo 1"]


def test_masks_are_read_exactly_from_grey_and_equal_rgb(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (7, 9))
    path = tmp_path / "m.png"
    for picture in (Image.fromarray(GREYS[labels]), Image.fromarray(np.stack([GREYS[labels]] * 3, -1))):
        picture.save(path)
        assert (read_mask(path, GREYS.tolist()) == labels).all()


@pytest.mark.parametrize(("make", "expected"), [
    (lambda a: Image.fromarray(np.where(np.arange(16).reshape(4, 4) < 3, 99, a).astype(np.uint8)),
     r"grey 99 \(3 pixels\) is none of data.mask_values"),
    (lambda a: Image.fromarray(a).convert("P"), "mode P"),
    (lambda a: Image.fromarray(a.astype(np.uint16)), "16"),
    (lambda a: Image.fromarray(a).convert("RGBA"), "mode RGBA"),
    (lambda a: Image.fromarray(a > 30), "mode 1"),
    (lambda a: Image.fromarray(np.dstack([a, a, a + 1])), "coloured"),
])
def test_masks_that_cannot_be_read_exactly_are_refused(tmp_path, make, expected):
    path = tmp_path / "m.png"
    make(np.full((4, 4), 26, np.uint8)).save(path)
    with pytest.raises(UserError, match=expected) as error:
        read_mask(path, GREYS.tolist())
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_formats_that_smear_labels_are_refused(tmp_path, kind):
    path = tmp_path / "m.png"
    Image.new("RGB", (16, 16), (26, 26, 26)).save(path, format=kind)
    with pytest.raises(UserError, match=kind):
        read_mask(path, GREYS.tolist())


def test_pages_and_rotation_flags_are_refused(tmp_path):
    picture = Image.new("RGB", (16, 16), (26, 26, 26))
    picture.save(tmp_path / "pages.tif", save_all=True, append_images=[picture])
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    picture.save(tmp_path / "rotated.jpg", exif=exif)
    for name in ("pages.tif", "rotated.jpg"):
        with pytest.raises(UserError, match="rotation flag"):
            read_image(tmp_path / name)
    picture.save(tmp_path / "plain.tif")
    assert read_image(tmp_path / "plain.tif").shape == (16, 16, 3)


def test_images_are_rgb_or_opaque_rgba(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    path = tmp_path / "i.png"
    for mode in ("RGB", "RGBA"):
        Image.fromarray(pixels).convert(mode).save(path)
        assert (read_image(path) == pixels).all()
    Image.fromarray(np.dstack([pixels, np.full((5, 6), 9, np.uint8)])).save(path)
    with pytest.raises(UserError, match="mode RGBA"):
        read_image(path)
    Image.fromarray(pixels[..., 0]).save(path)
    with pytest.raises(UserError, match="mode L"):
        read_image(path)


@pytest.mark.parametrize("spoil", [lambda b: b[:len(b) // 2], lambda b: b"not an image", lambda b: b""])
def test_unreadable_images_are_named(tmp_path, spoil):
    write_pairs(tmp_path, 1)
    path = tmp_path / "frames/frame#0.png"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=r"frame#0.png: not a readable image"):
        read_image(path)


def test_a_small_file_with_a_huge_picture_is_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("L", (20_000, 20_000)).save(path)
    with pytest.raises(UserError, match="pixels"):
        read_image(path)


def test_16_bit_colour_is_refused(tmp_path):
    """Pillow would cut it to 8 bits without a word."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(4 * 6) for _ in range(4))
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="16 bits"):
        read_image(path)


# ---------------------------------------------------------------------------------------------- the list of tiles

def listed(root, count=6, slides=3):
    keys = write_pairs(root, count, slides=slides)
    tiles = [replace(tile, foreground=0.5, blank=0.01, split="test" if tile.group == "s0" else "train")
             for tile in find_pairs(root, *LAYOUT, group=r"^(s\d+)")]
    write_tiles(root / "tiles.csv", tiles)
    return keys, tiles


def test_the_list_comes_back_as_written(tmp_path):
    _, tiles = listed(tmp_path)
    assert read_tiles(tmp_path) == tiles


@pytest.mark.parametrize(("edit", "expected"), [
    (lambda rows: [{**row, "split": "trian"} for row in rows], "line 2: split is 'trian'"),
    (lambda rows: [{**rows[0], "blank": "low"}, *rows[1:]], "blank must be a number or empty"),
    (lambda rows: [{**rows[0], "proposed": "good"}, *rows[1:]], "line 2: proposed is 'good'"),
    (lambda rows: [{**rows[0], "split": "corrupt", "proposed": "train"}, *rows[1:]], "write 'excluded'"),
    (lambda rows: [{**rows[0], "shift_x": "left"}, *rows[1:]], "shift_x must be a number or empty"),
    (lambda rows: [*rows, rows[0]], "stands in 2 rows"),
    (lambda rows: [{**rows[0], "image": "../../etc/passwd"}, *rows[1:]], "leaves the data folder"),
    (lambda rows: [{**row, "split": "train" if i else "test", "group": "s0"} for i, row in enumerate(rows)],
     "group 's0' has tiles in train and in test"),
    (lambda rows: [{k: v for k, v in row.items() if k != "split"} for row in rows], "missing: split"),
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


def test_a_list_whose_file_has_become_a_link_out_of_the_folder_is_refused(tmp_path):
    _, tiles = listed(tmp_path / "tiles")
    file = tmp_path / "tiles" / tiles[0].image
    file.rename(tmp_path / "secret.png")
    file.symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="leads out of the data folder"):
        read_tiles(tmp_path / "tiles")


@pytest.mark.parametrize("save", [
    lambda text: text.encode("utf-8-sig"), lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace(",", ";").replace("0.5", "0,5").encode(),
    lambda text: text.replace("key,image", '"key","image"').replace(",", ";").encode(),
    lambda text: text.replace(",", "\t").encode(), lambda text: (text + ",,,,,,\n").encode()],
    ids=["byte order mark", "CRLF", "semicolons", "quotes", "tabs", "blank row"])
def test_lists_saved_by_spreadsheets_are_read(tmp_path, save):
    _, tiles = listed(tmp_path)
    path = tmp_path / "tiles.csv"
    path.write_bytes(save(path.read_text()))
    assert read_tiles(tmp_path) == tiles


def test_a_list_in_another_encoding_is_refused(tmp_path):
    listed(tmp_path)
    path = tmp_path / "tiles.csv"
    path.write_bytes(path.read_text().replace("s1", "ä1").encode("cp1252"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_tiles(tmp_path)


def test_a_missing_list_names_the_command_that_writes_it(tmp_path):
    with pytest.raises(UserError, match=r"tiles.csv.*data_filter.py"):
        read_tiles(tmp_path)
    with pytest.raises(UserError, match="make_demo_data"):
        read_tiles(tmp_path / "nowhere")


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


# ---------------------------------------------------------------------------------------------- the packed store

def test_the_store_holds_the_files(tmp_path):
    _, tiles = listed(tmp_path)
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
    _, tiles = listed(tmp_path)
    open_store(tmp_path, tiles, GREYS.tolist())
    tiles, packed, pack = change(tmp_path, tiles), [], dataset._pack
    monkeypatch.setattr(dataset, "_pack", lambda *args: packed.append(1) or pack(*args))
    store = open_store(tmp_path, tiles, GREYS.tolist()).pixels
    assert bool(packed) == stale
    for i, tile in enumerate(tiles):
        assert (GREYS[store[i, ..., 3]] == np.asarray(Image.open(tmp_path / tile.mask))).all()


def test_other_greys_make_the_store_stale(tmp_path):
    _, tiles = listed(tmp_path)
    before = np.array(open_store(tmp_path, tiles, [26, 51, 77]).pixels[..., 3])
    after = open_store(tmp_path, tiles, [77, 51, 26]).pixels[..., 3]
    assert (after == 2 - before).all()


def test_a_store_that_another_process_replaces_right_now_is_read_from_one_file(tmp_path, monkeypatch):
    _, tiles = listed(tmp_path)
    expected, memmap = open_store(tmp_path, tiles, [26, 51, 77]).pixels[..., 3].copy(), np.memmap

    def other_greys_first(*args, **options):
        monkeypatch.setattr(np, "memmap", memmap)
        open_store(tmp_path, tiles, [77, 51, 26])
        return memmap(*args, **options)

    monkeypatch.setattr(np, "memmap", other_greys_first)
    assert (open_store(tmp_path, tiles, [26, 51, 77]).pixels[..., 3] == expected).all()


def test_leftovers_of_a_killed_packing_are_removed(tmp_path):
    _, tiles = listed(tmp_path)
    leftover = tmp_path / ".tiles.u8.123.tmp"
    leftover.touch()
    open_store(tmp_path, tiles, GREYS.tolist())
    assert not leftover.exists()


def test_a_tile_of_another_size_is_named_and_no_store_is_left(tmp_path):
    _, tiles = listed(tmp_path)
    Image.fromarray(np.full((50, 40, 3), 90, np.uint8)).save(tmp_path / tiles[4].image)
    with pytest.raises(UserError, match="they must agree"):
        open_store(tmp_path, tiles, GREYS.tolist())
    Image.fromarray(np.full((50, 40), 51, np.uint8)).save(tmp_path / tiles[4].mask)
    with pytest.raises(UserError, match="tiles must be of one size"):
        open_store(tmp_path, tiles, GREYS.tolist())
    assert not list(tmp_path.glob("*.u8")) and not list(tmp_path.glob(".*.tmp"))


# ---------------------------------------------------------------------------------------------- the training set

def test_statistics_equal_numpy_and_look_at_the_chosen_tiles_only(tmp_path):
    _, tiles = listed(tmp_path)
    store, rows = open_store(tmp_path, tiles, GREYS.tolist()), [1, 2, 4]
    statistics, pixels = statistics_of(store.sums[rows]), store.pixels[rows] / 255
    assert statistics.mean == pytest.approx(pixels[..., :3].mean((0, 1, 2)), rel=1e-12)
    assert statistics.std == pytest.approx(pixels[..., :3].std((0, 1, 2)), rel=1e-12)
    assert statistics.frequencies == pytest.approx([np.mean(store.pixels[rows][..., 3] == k) for k in range(3)])


def test_statistics_come_with_the_store_and_need_no_look_at_its_pixels(tmp_path, monkeypatch):
    _, tiles = listed(tmp_path)
    first = open_store(tmp_path, tiles, GREYS.tolist())
    monkeypatch.setattr(dataset, "sums_of", None)
    assert (open_store(tmp_path, tiles, GREYS.tolist()).sums == first.sums).all()
    assert first.sums.shape == (6, 9) and (first.sums[:, 6:].sum(1) == 48 * 40).all()


def test_statistics_of_one_colour_have_no_deviation_of_zero():
    statistics = statistics_of(np.stack([dataset.sums_of(np.full((500, 500, 3), 255, np.uint8),
                                                   np.zeros((500, 500), np.uint8), 3)] * 9))
    assert statistics.mean == [1.0] * 3 and statistics.std == [1e-6] * 3 and statistics.frequencies == [1.0, 0.0, 0.0]


def test_normalised_training_tiles_have_mean_0_and_deviation_1(tmp_path):
    _, tiles = listed(tmp_path)
    store = open_store(tmp_path, tiles, GREYS.tolist())
    x = normalise(torch.from_numpy(np.array(store.pixels[..., :3])), statistics_of(store.sums))
    assert x.shape == (6, 3, 48, 40) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("groups", [[""] * 103, [f"g{i % 17}" for i in range(103)]], ids=["tiles", "groups"])
def test_folds_are_disjoint_random_and_never_cut_a_group(groups):
    seen = set()
    for epoch in range(1, 30):
        folds = draw_folds(groups, 5, 60, seed=3, epoch=epoch)
        assert [len(fold) for fold in folds] == [12] * 5
        names = [{groups[i] or i for i in fold} for fold in folds]
        assert sum(map(len, names)) == len(set().union(*names))
        seen |= {int(i) for fold in folds for i in fold}
    assert seen == set(range(103)), "in the end every training tile is used"


def test_every_tile_is_drawn_about_equally_often():
    counts = np.zeros(100)
    for epoch in range(300):
        np.add.at(counts, np.concatenate(draw_folds([""] * 100, 5, 40, seed=0, epoch=epoch)), 1)
    assert abs(counts - 120).max() < 5 * (300 * 0.4 * 0.6) ** 0.5


def test_too_few_tiles_repeat_inside_their_own_fold_with_other_crops():
    folds = draw_folds([""] * 10, 5, 100, seed=0, epoch=1)
    assert [sorted(np.bincount(fold, minlength=10).tolist(), reverse=True)[:3] for fold in folds] == [[10, 10, 0]] * 5
    assert len(set(np.concatenate(folds))) == 10
    crops = validation_crops(folds, 0, (500, 500), 256, seed=0, epoch=1)
    assert len(set(zip(crops.rows, crops.top, crops.left, strict=True))) == 20


def test_fewer_groups_than_folds():
    with pytest.raises(UserError, match=r"6 training tiles of 3 groups cannot fill 5 folds.*at most 3"):
        draw_folds(["a", "b", "c"] * 2, 5, 10, seed=0, epoch=1)


def test_training_crops_are_the_other_folds_shuffled():
    folds = [np.arange(i * 10, i * 10 + 10) for i in range(4)]
    crops = training_crops(folds, 2, (50, 60), 16, seed=0, epoch=1)
    assert sorted(crops.rows) == [i for i in range(40) if not 20 <= i < 30]
    assert list(crops.rows) != sorted(crops.rows)


def test_windows_reach_every_position_on_both_axes_independently():
    folds = [np.zeros(4000, int)] * 2
    crops = training_crops(folds, 0, (20, 24), 16, seed=1, epoch=1)
    assert set(crops.top) == set(range(5)) and set(crops.left) == set(range(9))
    assert len(set(zip(crops.top, crops.left, strict=True))) == 45
    flips = set(zip(crops.flip_vertical, crops.flip_horizontal, strict=True))
    assert len(flips) == 4, "both flips together occur, as does none"


def test_randomness_depends_on_its_keys_alone():
    folds = draw_folds([""] * 50, 5, 40, seed=1, epoch=7)
    again = draw_folds([""] * 50, 5, 40, seed=1, epoch=7)
    assert all((a == b).all() for a, b in zip(folds, again, strict=True))
    base = training_crops(folds, 1, (99, 99), 32, seed=1, epoch=7)
    for fold, seed, epoch in ((1, 1, 7), (2, 1, 7), (1, 2, 7), (1, 1, 8)):
        other = training_crops(folds, fold, (99, 99), 32, seed=seed, epoch=epoch)
        assert (other.top == base.top).all() == ((fold, seed, epoch) == (1, 1, 7))
    fixed = [validation_crops(folds, 3, (99, 99), 32, seed=1, epoch=7) for _ in range(2)]
    assert (fixed[0].top == fixed[1].top).all() and not fixed[0].flip_vertical.any()


def test_batches_are_the_windows_flipped_alike_for_image_and_mask():
    store = np.random.default_rng(0).integers(0, 255, (3, 10, 12, 4)).astype(np.uint8)
    crops = Crops(*(np.array(v) for v in ([2, 0, 1], [0, 6, 3], [8, 0, 5], [0, 1, 1], [1, 0, 1])), size=4)
    batches = list(numpy_batches(crops, store, 2))
    assert [tuple(b.shape) for b in batches] == [(2, 4, 4, 4), (1, 4, 4, 4)]
    windows = np.concatenate(batches)
    assert (windows[0] == store[2, 0:4, 8:12][:, ::-1]).all()
    assert (windows[1] == store[0, 6:10, 0:4][::-1]).all()
    assert (windows[2] == store[1, 3:7, 5:9][::-1, ::-1]).all()
    one_by_one = np.concatenate(list(numpy_batches(crops, store, 1)))
    assert (one_by_one == windows).all(), "the batch size changes nothing"


def many_crops(store, count, size):
    random = np.random.default_rng(1)
    return Crops(random.integers(0, len(store), count), random.integers(0, store.shape[1] - size + 1, count),
                 random.integers(0, store.shape[2] - size + 1, count), random.random(count) < 0.5,
                 random.random(count) < 0.5, size)


@pytest.mark.parametrize("batch_size", [1, 4, 21, 30])
def test_a_store_on_the_device_gives_the_batches_of_the_one_on_disk(batch_size):
    """Of every way out of the store; the oracle cuts and flips with NumPy."""
    store = np.random.default_rng(0).integers(0, 256, (5, 40, 48, 4), np.uint8)
    crops, device = many_crops(store, 21, 16), torch.device("cpu")
    expected = []
    for row, top, left, down, right in zip(crops.rows, crops.top, crops.left, crops.flip_vertical,
                                           crops.flip_horizontal, strict=True):
        window = store[row][top:top + 16, left:left + 16]
        window = np.flipud(window) if down else window
        expected.append(np.fliplr(window) if right else window)
    there = copied_to(device, store, at_once=2)
    assert (there.numpy() == store).all()
    for source in (store, there):
        batches = list(batches_on(device, crops, source, batch_size))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size} and batches[0].dtype == torch.uint8
        assert (torch.cat(batches).numpy() == np.stack(expected)).all()


def test_a_store_goes_to_a_gpu_that_has_four_times_the_room(monkeypatch):
    store, moved = np.zeros((2, 4, 4, 4), np.uint8), []
    monkeypatch.setattr("training.batches.copied_to", lambda device, store: moved.append(device.type) or "there")
    for free, expected in ((4 * store.nbytes - 1, store), (4 * store.nbytes, "there")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert store_on(torch.device("cuda"), store) is expected
    assert store_on(torch.device("cpu"), store) is store and moved == ["cuda"]


def test_normalising_again_needs_no_new_constants():
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    statistics = Statistics([0.5, 0.4, 0.3], [0.1, 0.2, 0.3], [1.0])
    expected = (pixels.numpy() / np.float32(255) - np.float32([0.5, 0.4, 0.3])) / np.float32([0.1, 0.2, 0.3])
    for _ in range(2):
        assert (normalise(pixels, statistics).movedim(1, -1).numpy() == expected).all()
    other = Statistics([0.5, 0.4, 0.2], [0.1, 0.2, 0.3], [1.0])
    assert not torch.equal(normalise(pixels, other), normalise(pixels, statistics))
