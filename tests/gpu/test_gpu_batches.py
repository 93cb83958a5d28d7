"""Batches on the GPU equal those that NumPy cuts: from a store on the GPU, from a huge one, and by pinned memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_helpers import random_crops
from helpers import as_store, numpy_batches

from common.config import Augment
from common.store import Store
from training.batches import batches_on, copy_pixels, store_on
from training.crops import Crops, training_crops

pytestmark = pytest.mark.gpu


def random_tiles(tiles: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (tiles, height, width, 4), np.uint8)


def assert_batches_equal(ours, expected, device: torch.device) -> None:
    ours = list(ours)
    assert all(batch.device.type == device.type and batch.dtype == torch.uint8 for batch in ours)
    for batch, other in zip(ours, expected, strict=True):
        assert torch.equal(batch.cpu(), torch.from_numpy(other))


@pytest.mark.parametrize("source", ["store on the device", "pinned memory"])
def test_random_flipped_crops_equal_those_that_numpy_cuts(device, source):
    store = as_store(random_tiles(20, 70, 90))
    crops = random_crops(np.arange(20), (70, 90), 48, count=103)
    assert {*zip(crops.flip_vertical.tolist(), crops.flip_horizontal.tolist(), strict=True)} == {
        (False, False), (False, True), (True, False), (True, True)}
    on_device = source == "store on the device"
    place = replace(store, pixels=copy_pixels(device, store.pixels)) if on_device else store
    assert_batches_equal(batches_on(device, crops, place, 8), numpy_batches(crops, store, 8), device)


def test_a_small_store_is_copied_to_the_gpu_unchanged(cuda_only):
    store = as_store(random_tiles(70, 20, 20))
    there = store_on(cuda_only, store).pixels
    assert isinstance(there, torch.Tensor) and there.is_cuda
    assert np.array_equal(there.cpu().numpy(), store.pixels)


def test_crops_of_tiles_of_several_sizes_are_mirrored_alike_on_cpu_and_device(device):
    tiles = [np.random.default_rng(i).integers(0, 255, (*size, 4), np.uint8)
             for i, size in enumerate(((70, 90), (48, 48), (30, 60), (17, 20)))]
    store = as_store(tiles)
    crops = training_crops([np.arange(103) % 4, np.array([], int)], 1, store.sizes, 48, seed=0, epoch=1)
    there = replace(store, pixels=copy_pixels(device, store.pixels))
    for batch, other in zip(batches_on(device, crops, there, 8), batches_on(torch.device("cpu"), crops, store, 8),
                            strict=True):
        assert torch.equal(batch.cpu(), other)


def test_crops_of_a_store_of_9_gb_equal_those_that_numpy_cuts(device, record):
    """Its last tiles lie beyond 2^31 pixels, others beyond 2^31 and 2^32 bytes."""
    tiles, side, size = (9000, 500, 256) if device.type == "cuda" else (40, 50, 32)
    bytes_needed = tiles * side * side * 4
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if free < 1.2 * bytes_needed:
            pytest.skip(f"the GPU has {free / 1e9:.1f} GB free, a store of {bytes_needed / 1e9:.1f} GB is needed")
        assert tiles * side * side > 2**31
    tile_bytes = side * side * 4
    edges = [edge // tile_bytes for edge in (2**31, 2**32, 2**33)] if device.type == "cuda" else [7, 20]
    filled = sorted({0, 1, *(row for edge in edges for row in (edge - 1, edge, edge + 1)), *range(tiles - 3, tiles)})
    known = random_tiles(len(filled), side, side)
    pixels = torch.empty((tiles, side, side, 4), dtype=torch.uint8, device=device)
    for row, tile in zip(filled, known, strict=True):
        pixels[row] = torch.from_numpy(tile).to(device)
    store = Store(pixels.view(-1, 4), np.full((tiles, 2), side), np.zeros((tiles, 9), int))
    here = random_crops(np.arange(len(filled)), (side, side), size, count=4 * len(filled))
    corner = [np.append(values, [0, side - size]) for values in (here.top, here.left)]  # up to the last pixel
    here = Crops(np.append(here.rows, [len(filled) - 1] * 2), *corner, np.append(here.flip_vertical, [False, True]),
                 np.append(here.flip_horizontal, [False, True]), np.append(here.transpose, [False, True]), size)
    there = replace(here, rows=np.array(filled)[here.rows])
    assert_batches_equal(batches_on(device, there, store, 16), numpy_batches(here, as_store(known), 16), device)
    record("largest store that was gathered from", bytes_needed / 1e9, unit="GB")


MARKED, SIDE = 10_000, 32


@pytest.fixture
def marked() -> Store:
    """A store in which every pixel of a tile is the tile's number."""
    pixels = np.repeat(np.arange(MARKED, dtype=np.uint32), SIDE * SIDE).view(np.uint8).reshape(-1, 4)
    return Store(pixels, np.full((MARKED, 2), SIDE), np.zeros((MARKED, 9), int))


def arrived(batches, count: int, device: torch.device) -> torch.Tensor:
    """The smallest and largest number in each batch (2, count), read by a GPU that has other work to finish first."""
    found = torch.full((2, count), -1, dtype=torch.int32, device=device)
    work = torch.ones(1024, 1024, device=device) if device.type == "cuda" else None
    for i, batch in enumerate(batches):
        numbers = batch.view(torch.int32)
        found[0, i], found[1, i] = numbers.amin(), numbers.amax()
        if work is not None and i % 10 == 0:
            for _ in range(4):
                work = torch.softmax(work @ work, 0)  # copies of the next batches wait behind it
    return found.cpu()


def test_each_of_10000_batches_arrives_with_its_own_pixels(device, marked, record):
    rows = np.random.default_rng(0).permutation(MARKED)
    of_four = np.repeat(rows, 4)  # each batch is four crops of one tile
    zero, upright = np.zeros(len(of_four), int), np.zeros(len(of_four), bool)
    crops = Crops(of_four, zero, zero, upright, upright, upright, SIDE)
    found = arrived(batches_on(device, crops, marked, 4), MARKED, device)
    expected = torch.from_numpy(rows.astype(np.int32)).expand(2, -1)
    record("pinned batches that arrived with other pixels, of 10,000", int((found != expected).any(0).sum()),
           at_most=0)


def test_a_pinned_batch_that_is_filled_again_too_early_would_be_noticed(cuda_only, marked, record):
    """One buffer for all batches is filled again without waiting for its copy. torch's allocator must prevent this."""
    def batches():
        buffer = torch.empty((4, SIDE, SIDE, 4), dtype=torch.uint8, pin_memory=True)
        for number in range(200):
            buffer.numpy()[:] = marked[number]
            yield buffer.to(cuda_only, non_blocking=True)

    work = torch.ones(4096, 4096, device=cuda_only)
    torch.cuda.synchronize()
    for _ in range(50):
        work = torch.softmax(work @ work, 0)
    found = arrived(batches(), 200, cuda_only)
    wrong = int((found != torch.arange(200, dtype=torch.int32)).any(0).sum())
    record("the same with one buffer for all, of 200", wrong, at_least=1)


def test_augmented_batches_are_those_of_the_cpu(device, record):
    """All but the noise, which each device draws in its own way; a pixel between two labels may take either."""
    augment = Augment(right_angles=True, rotate=180, scale=0.25, elastic=4, stain=0.2, brightness=0.2, contrast=0.2,
                      blur=1.5)
    store = as_store(random_tiles(8, 96, 80))
    crops = training_crops([np.arange(64) % 8, np.array([], int)], 1, store.sizes, 64, 0, 1, augment)
    on_device = replace(store, pixels=copy_pixels(device, store.pixels))
    here = torch.cat(list(batches_on(torch.device("cpu"), crops, store, 16))).int()
    for source in (store, on_device):
        there = torch.cat(list(batches_on(device, crops, source, 16))).cpu().int()
        difference = (there - here).abs()
        record("augmented pixels, grey levels off", difference[..., :3].max().item(), at_most=2)
        record("augmented labels that differ", (difference[..., 3] > 0).float().mean().item(), at_most=1e-3)
    noisy = training_crops([np.arange(64) % 8, np.array([], int)], 1, store.sizes, 64, 0, 1, Augment(noise=20))
    first, again = (torch.cat(list(batches_on(device, noisy, store, size))) for size in (16, 7))
    assert torch.equal(first, again), "the noise of a crop does not depend on its batch"
