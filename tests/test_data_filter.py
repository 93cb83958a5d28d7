from dataclasses import replace

import numpy as np
import pytest
from conftest import GREYS, write_pairs
from PIL import Image

import data_filter
from config import Config, Data, Filter
from console import UserError
from data_filter import blank_share, filter_tiles, summary


def literal_algorithm_1(image, mask, sigma, blank_intensity):
    """Algorithm 1 line by line, with a convolution of our own and the divisor that is meant in line 8."""
    grey = np.array([[sum(map(int, pixel)) / 3 for pixel in row] for row in image])
    inverted = 255 - grey
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for _ in range(2):
        padded = np.pad(inverted, ((radius, radius), (0, 0)), mode="symmetric")
        inverted = np.stack([kernel @ padded[i:i + len(kernel)] for i in range(len(inverted))]).T
    tissue_px = inverted[(mask == 1) | (mask == 2)]
    return (tissue_px < blank_intensity).sum() / tissue_px.size


@pytest.mark.parametrize("seed", range(5))
def test_blank_share_equals_the_algorithm_line_by_line(seed):
    random = np.random.default_rng(seed)
    image = np.full((60, 70, 3), 240, np.uint8)
    image[:, :35] = random.integers(60, 220, (60, 35, 3))
    mask = np.zeros((60, 70), np.uint8)
    mask[5:50, 5 + 5 * seed:40 + 5 * seed] = random.integers(1, 3, (45, 35))
    share = blank_share(image, mask > 0, sigma=4, blank_intensity=40)
    assert share == pytest.approx(literal_algorithm_1(image, mask, 4, 40), abs=1e-12) and 0 <= share < 1


def test_without_tissue_there_is_no_share():
    assert np.isnan(blank_share(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), bool), 2, 40))


def planted(root):
    """Tiles of which the verdict is plain: good, empty mask, just above and below 1 %, tissue on glass."""
    size = 200
    for folder in ("frames", "masks"):
        (root / folder).mkdir(parents=True)
    dark, glass = np.full((size, size, 3), 120, np.uint8), np.full((size, size, 3), 242, np.uint8)
    tissue, nothing = np.ones((size, size), int), np.zeros((size, size), int)
    below, above, half = nothing.copy(), nothing.copy(), glass.copy()
    below.flat[:399], above.flat[:400] = 2, 2
    half[:100] = 120
    for key, image, mask in (("a-good", dark, tissue), ("a-empty", glass, nothing), ("b-below", dark, below),
                             ("b-above", dark, above), ("c-glass", half, tissue), ("c-good", dark, tissue)):
        Image.fromarray(image).save(root / f"frames/frame#{key}.png")
        Image.fromarray(GREYS[mask]).save(root / f"masks/mask#{key}.png")
    return Config(data=Data(root=str(root), group="^(.)", test_fraction=0.3))


def test_every_tile_stays_listed_with_its_numbers_and_verdict(tmp_path):
    config = planted(tmp_path)
    tiles, pixels = filter_tiles(config)
    found = {tile.key: tile for tile in tiles}
    assert {key for key, tile in found.items() if tile.split == "sparse"} == {"a-empty", "b-below"}
    assert {key for key, tile in found.items() if tile.split == "misregistered"} == {"c-glass"}
    assert sorted(found[key].split for key in ("a-good", "b-above", "c-good")) == ["test", "train", "train"]
    assert found["b-above"].foreground == pytest.approx(0.01) and found["b-below"].foreground < 0.01
    assert found["c-glass"].blank == pytest.approx(0.5, abs=0.05) and found["c-good"].blank == 0
    assert found["a-empty"].blank is None
    assert pixels.sum(1).tolist() == [40_000] * 6
    text = summary(tiles, pixels, config.data.classes)
    assert "sparse" in text and text.splitlines()[-1].split()[:2] == ["all", "6"]


def test_groups_of_the_pattern_reach_the_list_and_are_not_cut(tmp_path):
    write_pairs(tmp_path, 20, slides=5)
    for seed in range(5):
        tiles, _ = filter_tiles(Config(seed=seed, data=Data(root=str(tmp_path), group=r"^(s\d+)", test_fraction=0.3)))
        sides = [{tile.group for tile in tiles if tile.split == split} for split in ("train", "test")]
        assert sides[0] | sides[1] == {f"s{i}" for i in range(5)} and not sides[0] & sides[1]


def test_tiles_of_two_sizes_are_refused(tmp_path):
    write_pairs(tmp_path, 2)
    for folder, mode in (("frames/frame", "RGB"), ("masks/mask", "L")):
        Image.new(mode, (60, 60), 51 if mode == "L" else "purple").save(tmp_path / f"{folder}#1.png")
    with pytest.raises(UserError, match="tiles must be of one size"):
        filter_tiles(Config(data=Data(root=str(tmp_path))))


def test_thresholds_are_those_of_the_config(tmp_path):
    config = planted(tmp_path)
    tiles, _ = filter_tiles(replace(config, filter=Filter(min_foreground=0.005, max_blank=1.0)))
    assert [tile.key for tile in tiles if tile.split == "sparse"] == ["a-empty"]
    assert not [tile.key for tile in tiles if tile.split == "misregistered"]


def test_nothing_kept_is_an_error(tmp_path):
    with pytest.raises(UserError, match="none of 6 tiles passes"):
        filter_tiles(replace(planted(tmp_path), filter=Filter(min_foreground=1.0, max_blank=0.0)))


@pytest.mark.parametrize("foreground", [True, False], ids=["kept", "sparse"])
def test_image_and_mask_of_different_sizes(tmp_path, foreground):
    write_pairs(tmp_path, 2)
    mask = np.full((40, 48), 51 if foreground else 26, np.uint8)
    Image.fromarray(mask).save(tmp_path / "masks/mask#1.png")
    with pytest.raises(UserError, match=r"mask#1.png: the mask is 40 x 48 .* is 48 x 40"):
        filter_tiles(Config(data=Data(root=str(tmp_path))))


def test_the_sparse_rule_spares_decoding_the_image(tmp_path, monkeypatch):
    config = planted(tmp_path)
    read, original = [], data_filter.read_pair
    monkeypatch.setattr(data_filter, "read_pair", lambda root, tile, greys: read.append(tile.key)
                        or original(root, tile, greys))
    filter_tiles(config)
    assert sorted(read) == ["a-good", "b-above", "c-glass", "c-good"]
