"""common/store.py and common/statistics.py: the packed store and what its sums say."""

import os

import numpy as np
import pytest
from helpers import GREYS, arrays, write_pairs
from PIL import Image

from common import statistics, store
from common.config import Data
from common.console import UserError
from common.statistics import statistics_of
from common.store import Pair, open_store


def pairs_in(root):
    """Write 6 tiles; return their files."""
    return [Pair(f"frames/frame#{key}.png", f"masks/mask#{key}.png") for key in write_pairs(root, 6)]


def opened(root, pairs, **settings):
    return open_store(pairs, Data(root=str(root), **settings))


def test_the_store_holds_the_files(tmp_path):
    pairs = pairs_in(tmp_path)
    tiles = arrays(opened(tmp_path, pairs))
    assert tiles.shape == (6, 48, 40, 4) and tiles.dtype == np.uint8
    for i, pair in enumerate(pairs):
        assert (tiles[i, ..., :3] == np.asarray(Image.open(tmp_path / pair.image))).all()
        assert (GREYS[tiles[i, ..., 3]] == np.asarray(Image.open(tmp_path / pair.mask))).all()


def change_mask(root, pairs):
    path = root / pairs[2].mask
    picture = np.array(Image.open(path))
    picture[:] = 26
    Image.fromarray(picture).save(path)
    return pairs


def touch(root, pairs):
    os.utime(root / pairs[1].image, ns=(1, 1))
    return pairs


def truncate(root, pairs):
    with (root / "tiles.u8").open("r+b") as file:
        file.truncate(5000)
    return pairs


def of_older_code(root, pairs):
    path = root / "tiles.u8"
    packed = path.read_bytes()
    path.write_bytes(packed.replace(b"crc-unet tiles 3", b"crc-unet tiles 2"))
    return pairs


@pytest.mark.parametrize(("change", "stale"), [
    (lambda root, pairs: pairs, False), (lambda root, pairs: pairs[:-1], True), (lambda root, pairs: pairs[::-1], True),
    (change_mask, True), (touch, True), (truncate, True), (of_older_code, True),
], ids=["same", "removed", "reordered", "edited", "touched", "cut", "of older code"])
def test_the_store_is_packed_anew_exactly_when_stale(tmp_path, monkeypatch, change, stale):
    pairs = pairs_in(tmp_path)
    opened(tmp_path, pairs)
    pairs, packed, pack = change(tmp_path, pairs), [], store._pack
    monkeypatch.setattr(store, "_pack", lambda *args: packed.append(1) or pack(*args))
    tiles = arrays(opened(tmp_path, pairs))
    assert bool(packed) == stale
    for i, pair in enumerate(pairs):
        assert (GREYS[tiles[i, ..., 3]] == np.asarray(Image.open(tmp_path / pair.mask))).all()


def test_other_mask_values_make_the_store_stale(tmp_path):
    pairs = pairs_in(tmp_path)
    before = np.array(opened(tmp_path, pairs).pixels[..., 3])
    after = opened(tmp_path, pairs, mask_values=(77, 51, 26)).pixels[..., 3]
    assert (after == 2 - before).all()


def test_a_store_that_another_process_replaces_meanwhile_is_read_from_one_file(tmp_path, monkeypatch):
    pairs = pairs_in(tmp_path)
    expected, memmap = opened(tmp_path, pairs).pixels[..., 3].copy(), np.memmap

    def with_other_values_first(*args, **options):
        monkeypatch.setattr(np, "memmap", memmap)
        opened(tmp_path, pairs, mask_values=(77, 51, 26))
        return memmap(*args, **options)

    monkeypatch.setattr(np, "memmap", with_other_values_first)
    assert (opened(tmp_path, pairs).pixels[..., 3] == expected).all()


def test_leftovers_of_a_killed_packing_are_removed(tmp_path):
    pairs = pairs_in(tmp_path)
    leftover = tmp_path / ".tiles.u8.123.tmp"
    leftover.touch()
    opened(tmp_path, pairs)
    assert not leftover.exists()


def test_tiles_keep_their_sizes(tmp_path):
    pairs = pairs_in(tmp_path)
    sizes = [(48, 40), (160, 200), (7, 3), (48, 41), (1, 1), (300, 20)]
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    labels = [random.integers(0, 3, size) for size in sizes]
    for pair, image, classes in zip(pairs, images, labels, strict=True):
        Image.fromarray(image).save(tmp_path / pair.image)
        Image.fromarray(GREYS[classes]).save(tmp_path / pair.mask)
    packed = opened(tmp_path, pairs)
    assert len(packed) == 6 and packed.sizes.tolist() == [list(size) for size in sizes]
    assert packed.pixels.nbytes == 4 * sum(height * width for height, width in sizes), "no pixel is spent on padding"
    for i in range(6):
        assert (packed.tile(i) == np.dstack([images[i], labels[i]])).all()
        assert np.shares_memory(packed.tile(i), packed.pixels)
    assert (packed.counts([1, 5]) == [np.bincount(labels[i].ravel(), minlength=3) for i in (1, 5)]).all()


def test_a_mask_of_another_size_than_its_image_is_named_and_no_store_is_left(tmp_path):
    pairs = pairs_in(tmp_path)
    Image.fromarray(np.full((50, 40, 3), 90, np.uint8)).save(tmp_path / pairs[4].image)
    with pytest.raises(UserError, match="48 x 40.*50 x 40"):
        opened(tmp_path, pairs)
    assert not list(tmp_path.glob("*.u8")) and not list(tmp_path.glob(".*.tmp"))


def test_the_store_lies_in_the_cache_if_there_is_one(tmp_path):
    pairs, cache = pairs_in(tmp_path / "tiles"), tmp_path / "cache"
    cache.mkdir()
    before = sorted((tmp_path / "tiles").rglob("*"))
    opened(tmp_path / "tiles", pairs, cache=str(cache))
    assert (cache / "tiles.u8").exists() and sorted((tmp_path / "tiles").rglob("*")) == before


# ---------------------------------------------------------------------------------------------- statistics

def test_statistics_equal_those_of_numpy_for_the_chosen_tiles(tmp_path):
    pairs = pairs_in(tmp_path)
    packed, rows = opened(tmp_path, pairs), [1, 2, 4]
    found, tiles = statistics_of(packed.sums[rows]), arrays(packed)[rows]
    assert found.mean == pytest.approx(tiles[..., :3].mean((0, 1, 2)) / 255, rel=1e-12)
    assert found.std == pytest.approx(tiles[..., :3].std((0, 1, 2)) / 255, rel=1e-12)
    assert found.frequencies == pytest.approx([np.mean(tiles[..., 3] == k) for k in range(3)])


def test_statistics_are_those_of_the_labelled_pixels(tmp_path):
    pairs, random = pairs_in(tmp_path), np.random.default_rng(3)
    values, colours = [], []
    for pair in pairs:
        mask, image = (np.array(Image.open(tmp_path / name)) for name in (pair.mask, pair.image))
        mask[random.random(mask.shape) < 0.3] = 9
        image[mask == 9] = 255  # what is ignored looks different
        Image.fromarray(mask).save(tmp_path / pair.mask)
        Image.fromarray(image).save(tmp_path / pair.image)
        values += [value for value in mask.ravel() if value != 9]
        colours += [colour for colour, value in zip(image.reshape(-1, 3), mask.ravel(), strict=True) if value != 9]
    found = statistics_of(opened(tmp_path, pairs, ignore=(9,)).sums)
    assert found.frequencies == pytest.approx([np.mean(np.array(values) == grey) for grey in GREYS], rel=1e-12)
    assert found.mean == pytest.approx(np.mean(colours, axis=0) / 255, rel=1e-12)
    assert found.std == pytest.approx(np.std(colours, axis=0) / 255, rel=1e-12)


def test_statistics_are_read_from_the_store_and_not_computed_again(tmp_path, monkeypatch):
    pairs = pairs_in(tmp_path)
    first = opened(tmp_path, pairs)
    monkeypatch.setattr(store, "sums_of", None)
    assert (opened(tmp_path, pairs).sums == first.sums).all()
    assert first.sums.shape == (6, 9) and (first.sums[:, 6:].sum(1) == 48 * 40).all()


def test_statistics_of_one_colour_have_no_deviation_of_zero():
    white, labels = np.full((500, 500, 3), 255, np.uint8), np.zeros((500, 500), np.uint8)
    found = statistics_of(np.stack([statistics.sums_of(white, labels, 3)] * 9))
    assert found.mean == [1.0] * 3 and found.std == [1e-6] * 3 and found.frequencies == [1.0, 0.0, 0.0]
