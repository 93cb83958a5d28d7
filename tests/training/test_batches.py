"""training/batches.py: batches from disk and from the device equal those that NumPy cuts, and are normalised."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import arrays, as_store, numpy_batches

from common.config import Data
from common.masks import IGNORE
from common.statistics import Statistics, statistics_of
from common.store import open_store
from dataset import find_pairs
from training.batches import batches_on, copy_pixels, normalise, store_on
from training.crops import Crops, training_crops

CPU = torch.device("cpu")


def test_the_oracle_flips_image_and_mask_alike():
    """`helpers.numpy_batches`, with which other tests compare."""
    tiles = np.random.default_rng(0).integers(0, 255, (3, 10, 12, 4)).astype(np.uint8)
    crops = Crops(*(np.array(v) for v in ([2, 0, 1], [0, 6, 3], [8, 0, 5], [0, 1, 1], [1, 0, 1], [0, 0, 0])), size=4)
    batches = list(numpy_batches(crops, as_store(tiles), 2))
    assert [batch.shape for batch in batches] == [(2, 4, 4, 4), (1, 4, 4, 4)]
    windows = np.concatenate(batches)
    assert (windows[0] == tiles[2, 0:4, 8:12][:, ::-1]).all()
    assert (windows[1] == tiles[0, 6:10, 0:4][::-1]).all()
    assert (windows[2] == tiles[1, 3:7, 5:9][::-1, ::-1]).all()
    one_by_one = np.concatenate(list(numpy_batches(crops, as_store(tiles), 1)))
    assert (one_by_one == windows).all(), "the batch size changes nothing"


def mirrored_window(tile, top, left, size):
    """A window of a tile that is surrounded by its mirror images without a class."""
    height, width = tile.shape[:2]
    marked = tile.copy()
    marked[..., 3] = IGNORE
    row = np.concatenate([marked[:, ::-1], tile, marked[:, ::-1]] if left + size > width or left < 0 else [tile], 1)
    edge = row.copy()
    edge[..., 3] = IGNORE
    whole = np.concatenate([edge[::-1], row, edge[::-1]], 0)
    left += width if row.shape[1] > width else 0
    return whole[height + top:height + top + size, left:left + size]


@pytest.mark.parametrize("batch_size", [1, 4, 21, 60])
def test_crops_from_disk_and_from_the_device_are_windows_of_tiles_and_their_mirror_images(batch_size):
    random, size = np.random.default_rng(0), 16
    tiles = [random.integers(0, 255, (*shape, 4)).astype(np.uint8) for shape in ((40, 48), (16, 16), (10, 30), (9, 8))]
    store, rows = as_store(tiles), np.arange(60) % 4
    crops = training_crops([rows, rows[:0]], 1, store.sizes, size, seed=0, epoch=1)
    expected = []
    for row, top, left, down, right in zip(crops.rows, crops.top, crops.left, crops.flip_vertical,
                                           crops.flip_horizontal, strict=True):
        window = mirrored_window(tiles[row], top, left, size)
        window = np.flipud(window) if down else window
        expected.append(np.fliplr(window) if right else window)
    copy = replace(store, pixels=copy_pixels(CPU, store.pixels, at_once=100))
    assert (copy.pixels.numpy() == store.pixels).all()
    for source in (store, copy):
        batches = list(batches_on(CPU, crops, source, batch_size))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size} and batches[0].dtype == torch.uint8
        assert (torch.cat(batches).numpy() == np.stack(expected)).all()
    ignored = [(window[..., 3] == IGNORE).sum() for window in expected]
    assert {int(crops.rows[i]) for i in np.flatnonzero(ignored)} == {2, 3}


def test_a_store_is_copied_to_a_gpu_that_has_four_times_its_size_free(monkeypatch):
    store, copies = as_store(np.zeros((2, 4, 4, 4), np.uint8)), []
    monkeypatch.setattr("training.batches.copy_pixels", lambda device, pixels: copies.append(device.type) or "a copy")
    for free, expected in ((4 * store.pixels.nbytes - 1, store.pixels), (4 * store.pixels.nbytes, "a copy")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert store_on(torch.device("cuda"), store).pixels is expected
    assert store_on(CPU, store) is store and copies == ["cuda"]


def test_normalised_training_tiles_have_mean_0_and_deviation_1(tiles_root):
    data = Data(root=str(tiles_root))
    store = open_store([tile.pair for tile in find_pairs(data)], data)
    x = normalise(torch.from_numpy(arrays(store)[..., :3].copy()), statistics_of(store.sums))
    assert x.shape == (12, 3, 48, 40) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-3)


def test_cached_constants_are_those_of_the_given_statistics():
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    statistics = Statistics([0.5, 0.4, 0.3], [0.1, 0.2, 0.3], [1.0])
    expected = (pixels.numpy() / np.float32(255) - np.float32([0.5, 0.4, 0.3])) / np.float32([0.1, 0.2, 0.3])
    for _ in range(2):
        assert (normalise(pixels, statistics).movedim(1, -1).numpy() == expected).all()
    other = Statistics([0.5, 0.4, 0.2], [0.1, 0.2, 0.3], [1.0])
    assert not torch.equal(normalise(pixels, other), normalise(pixels, statistics))
