"""training/batches.py: batches from disk and from the device equal those that NumPy cuts, and are normalised."""

import numpy as np
import pytest
import torch
from helpers import GREYS, numpy_batches

from dataset import Statistics, find_pairs, open_store, statistics_of
from training.batches import batches_on, copy_store, normalise, store_on
from training.crops import Crops

CPU = torch.device("cpu")


def test_the_oracle_flips_image_and_mask_alike():
    """`helpers.numpy_batches`, with which other tests compare."""
    store = np.random.default_rng(0).integers(0, 255, (3, 10, 12, 4)).astype(np.uint8)
    crops = Crops(*(np.array(v) for v in ([2, 0, 1], [0, 6, 3], [8, 0, 5], [0, 1, 1], [1, 0, 1])), size=4)
    batches = list(numpy_batches(crops, store, 2))
    assert [batch.shape for batch in batches] == [(2, 4, 4, 4), (1, 4, 4, 4)]
    windows = np.concatenate(batches)
    assert (windows[0] == store[2, 0:4, 8:12][:, ::-1]).all()
    assert (windows[1] == store[0, 6:10, 0:4][::-1]).all()
    assert (windows[2] == store[1, 3:7, 5:9][::-1, ::-1]).all()
    one_by_one = np.concatenate(list(numpy_batches(crops, store, 1)))
    assert (one_by_one == windows).all(), "the batch size changes nothing"


def random_crops(store, count, size):
    random = np.random.default_rng(1)
    return Crops(random.integers(0, len(store), count), random.integers(0, store.shape[1] - size + 1, count),
                 random.integers(0, store.shape[2] - size + 1, count), random.random(count) < 0.5,
                 random.random(count) < 0.5, size)


@pytest.mark.parametrize("batch_size", [1, 4, 21, 30])
def test_a_store_on_the_device_gives_the_batches_of_the_store_on_disk(batch_size):
    store = np.random.default_rng(0).integers(0, 256, (5, 40, 48, 4), np.uint8)
    crops = random_crops(store, 21, 16)
    expected = []
    for row, top, left, down, right in zip(crops.rows, crops.top, crops.left, crops.flip_vertical,
                                           crops.flip_horizontal, strict=True):
        window = store[row][top:top + 16, left:left + 16]
        window = np.flipud(window) if down else window
        expected.append(np.fliplr(window) if right else window)
    copy = copy_store(CPU, store, tiles_at_once=2)
    assert (copy.numpy() == store).all()
    for source in (store, copy):
        batches = list(batches_on(CPU, crops, source, batch_size))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size} and batches[0].dtype == torch.uint8
        assert (torch.cat(batches).numpy() == np.stack(expected)).all()


def test_a_store_is_copied_to_a_gpu_that_has_four_times_its_size_free(monkeypatch):
    store, copies = np.zeros((2, 4, 4, 4), np.uint8), []
    monkeypatch.setattr("training.batches.copy_store", lambda device, store: copies.append(device.type) or "a copy")
    for free, expected in ((4 * store.nbytes - 1, store), (4 * store.nbytes, "a copy")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert store_on(torch.device("cuda"), store) is expected
    assert store_on(CPU, store) is store and copies == ["cuda"]


def test_normalised_training_tiles_have_mean_0_and_deviation_1(tiles_root):
    tiles = find_pairs(tiles_root, "frames/frame#{key}.png", "masks/mask#{key}.png")
    store = open_store(tiles_root, tiles, GREYS.tolist())
    x = normalise(torch.from_numpy(np.array(store.pixels[..., :3])), statistics_of(store.sums))
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
