"""fields/sampling.py: which pixels are drawn, their weights, and the inputs around them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import arrays, as_store

from common.console import UserError
from common.geometry import smallest_cut
from fields import sampling
from fields.sampling import Pixels


def test_pixels_have_their_class_and_cuts_lie_inside_their_tiles(candidate, tiles):
    pixels = sampling.draw_pixels(candidate, tiles, 12)
    cut, store = smallest_cut(2), arrays(tiles.store)
    assert np.bincount(pixels.classes).tolist() == [12, 12, 12]
    for tile, corner, place, k in zip(pixels.tiles, pixels.corners, pixels.places, pixels.classes, strict=True):
        assert (corner >= 0).all() and (corner + cut.size <= store.shape[1:3]).all()
        assert store[(tiles.rows[tile], *(corner + place), 3)] == k
    assert len(set(pixels.tiles)) == len(tiles.tiles)
    for k in range(3):  # the four pairs of alignments, three times each
        _, counts = np.unique(pixels.places[pixels.classes == k] - cut.origin, axis=0, return_counts=True)
        assert counts.tolist() == [3, 3, 3, 3]
    shares = np.bincount(store[tiles.rows][..., 3].ravel()) / store[tiles.rows][..., 3].size
    assert np.allclose(pixels.shares, shares)
    again = sampling.draw_pixels(candidate, tiles, 12)
    for levels in (1, 3, 5):
        block = 2 ** (levels - 1)
        drawn = sampling._alignments(np.random.default_rng(1), 2 * block**2, levels)
        assert all(sorted(drawn[i:i + block, axis]) == list(range(block)) for i in range(0, len(drawn), block)
                   for axis in (0, 1)) and len(np.unique(drawn[:block**2], axis=0)) == block**2
    assert (again.corners == pixels.corners).all() and (again.tiles == pixels.tiles).all()


def test_tiles_smaller_than_the_cut_give_no_pixels(candidate, tiles, capsys):
    small = [tile[:17] for tile in arrays(tiles.store)]
    test_set = SimpleNamespace(store=as_store(small), rows=tiles.rows, config=tiles.config)
    with pytest.raises(UserError, match="tiny.*17 x 40 pixels.*2 levels.*18 x 18.*data.root.*model.widths"):
        sampling.draw_pixels(candidate, test_set, 5)
    row = tiles.rows[1]
    small[row] = arrays(tiles.store)[row][:, :20]
    pixels = sampling.draw_pixels(candidate, SimpleNamespace(**vars(test_set) | {"store": as_store(small)}), 5)
    assert len(pixels) and set(pixels.tiles) == {1}, "the only tile that is large enough"
    assert f"{len(tiles.rows) - 1} of {len(tiles.rows)}" in capsys.readouterr().err


def test_a_class_too_near_to_the_borders_has_no_pixels(candidate, tiles):
    store = arrays(tiles.store)
    store[..., 3] = np.minimum(store[..., 3], 1)
    store[0, 0, 0, 3] = 2  # in a corner no field fits around it
    changed = SimpleNamespace(store=as_store(store), rows=range(len(store)), config=tiles.config)
    pixels = sampling.draw_pixels(candidate, changed, 5)
    assert np.bincount(pixels.classes, minlength=3).tolist() == [5, 5, 0] and pixels.shares[2] > 0
    store[0, 8, 8, 3] = 2  # one of the four alignments reaches it
    changed.store = as_store(store)
    pixels = sampling.draw_pixels(candidate, changed, 8)
    assert pixels.places[pixels.classes == 2].tolist() == [[8, 8], [8, 8]]


def test_each_class_weighs_as_often_as_it_occurs():
    def weights(classes, inside):
        unused = np.zeros((len(classes), 2), int)
        shares = np.array([0.75, 0.25])
        return Pixels(unused[:, 0], unused, unused, np.array(classes), shares).weights(inside).tolist()

    assert weights([0, 1, 1, 0, 1], None) == pytest.approx([0.375, 0.25 / 3, 0.25 / 3, 0.375, 0.25 / 3])
    assert weights([0, 1, 1, 0, 1], 1) == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])
    assert weights([1, 1], None) == [0.5, 0.5]  # no pixel has class 0


def test_inputs_are_normalised_cuts_zeros_and_noise(candidate, tiles):
    pixels = sampling.draw_pixels(candidate, tiles, 4)
    batch = sampling.tile_inputs(candidate, tiles, pixels)(3, 9)
    for i in range(3, 9):
        top, left = pixels.corners[i]
        cut = tiles.store.tile(tiles.rows[pixels.tiles[i]])[top:top + 18, left:left + 18, :3] / 255
        expected = (cut - candidate.statistics.mean) / candidate.statistics.std
        assert np.allclose(batch[i - 3].movedim(0, -1), expected, atol=1e-5)
    device = torch.device("cpu")
    noise = sampling.noise_inputs(2, device, 0)
    assert torch.equal(noise(0, 4)[2], noise(2, 3)[0]) and not torch.equal(noise(0, 2)[0], noise(0, 2)[1])
    assert abs(noise(0, 32).mean()) < 0.02 and abs(noise(0, 32).std() - 1) < 0.02
    assert sampling.zero_inputs(2, device)(0, 3).eq(0).all()
