"""fields/borders.py: counts near the borders of tiles and crops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import arrays, as_store

from common import geometry
from common.masks import IGNORE
from fields import borders


@pytest.mark.parametrize("levels", [1, 2, 4, 5])
@pytest.mark.parametrize(("length", "crop"), [(500, 256), (224, 192), (331, 64), (192, 192), (200, 192)])
def test_the_crop_is_central_and_keeps_the_alignment(levels, length, crop):
    start, block = borders._crop_start(levels, length, crop), geometry.multiple(levels)
    assert (start + (-length % block) // 2) % block == 0  # from the canvas, which begins before the tile
    assert 0 <= (length - crop) / 2 - start < block + 1


@pytest.mark.parametrize("ignored", [0, 0.3])
def test_counts_equal_a_loop_over_all_labelled_pixels(candidate, tiles, ignored):
    store, levels = arrays(tiles.store), 2
    store[..., 3][np.random.default_rng(0).random(store.shape[:3]) < ignored] = IGNORE
    tiles = replace(tiles, store=as_store(store))
    border = borders.measure_border(candidate, tiles)
    height, width = store.shape[1:3]
    assert border.tiles == list(range(len(tiles.tiles))) and border.crop == 16
    for number, tile in enumerate(border.tiles[:3]):
        image = torch.from_numpy(np.array(store[tiles.rows[tile]][..., :3]))
        target, labels = store[tiles.rows[tile]][..., 3], candidate.predictor.labels(image)
        confusion, distances, crop = np.zeros((2, 3, 3), int), np.zeros((2, 8), int), np.zeros((3, 8), int)
        alone = candidate.predictor.labels(image[16:32, 12:28])
        for y in range(height):
            for x in np.flatnonzero(target[y] != IGNORE).tolist():
                fields = [geometry.receptive_field(levels, p) for p in (y, x)]
                inside = all(a >= 0 and b < n for (a, b), n in zip(fields, (height, width), strict=True))
                confusion[int(inside), target[y, x], labels[y, x]] += 1
                distance = min(y, x, height - 1 - y, width - 1 - x)
                band = max(i for i, start in enumerate(borders.DISTANCES) if start <= distance)
                distances[:, band] += [labels[y, x] == target[y, x], 1]
                if 16 <= y < 32 and 12 <= x < 28:
                    band = 1 if min(y - 16, x - 12, 31 - y, 27 - x) >= 4 else 0
                    crop[:, band] += [1, alone[y - 16, x - 12] == target[y, x], labels[y, x] == target[y, x]]
        assert (border.outer[number] == confusion[0]).all() and (border.interior[number] == confusion[1]).all()
        assert (np.array([border.right[number], border.pixels[number]]) == distances).all()
        counts = border.crop_pixels[number], border.right_alone[number], border.right_in_tile[number]
        assert (np.array(counts) == crop).all() and crop[0].sum() == (target[16:32, 12:28] != IGNORE).sum()
