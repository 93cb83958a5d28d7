"""Measurements of a tile against Algorithm 1 as it is printed, and against masks that were moved by known distances."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from common.config import Filter
from dataset import Tile
from filtering.audit import find_glass, inverted_grey, measure_tile, misalignment, verdict


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


def half_glass(random, height, width):
    """Tissue with holes on the left, glass on the right."""
    image = random.integers(225, 250, (height, width, 3)).astype(np.uint8)
    image[:, :width // 2] = random.integers(60, 240, (height, width // 2, 3))
    return image


@pytest.mark.parametrize("seed", range(5))
def test_blank_equals_the_algorithm_line_by_line(seed):
    random = np.random.default_rng(seed)
    image, mask = half_glass(random, 60, 70), np.zeros((60, 70), np.uint8)
    mask[5:50, 5 + 5 * seed:40 + 5 * seed] = random.integers(1, 3, (45, 35))
    blank = measure_tile(image, mask > 0, Filter(sigma=4))["blank"]
    assert blank == literal_algorithm_1(image, mask, 4, 40) and 0 <= blank < 1


@pytest.mark.parametrize("seed", range(5))
def test_the_reading_of_the_code_divides_by_the_maximum_of_the_tile(seed):
    image = half_glass(np.random.default_rng(seed), 60, 70)
    image[:, 40:] = 250
    smooth = gaussian_filter(255.0 - np.mean(image, axis=2), sigma=4)
    glass = find_glass(inverted_grey(image), Filter(sigma=4, blank_reference="maximum"))
    assert (glass == (smooth / np.max(smooth) < 40 / 255)).all() and 0 < glass.mean() < 1


def test_the_inverted_grey_equals_the_mean_in_every_bit():
    """All 766 sums of red, green and blue."""
    sums = np.arange(766)
    image = np.stack([np.clip(sums - low, 0, 255) for low in (0, 255, 510)], axis=-1)[None].astype(np.uint8)
    assert (image.sum(-1) == sums).all()
    assert (inverted_grey(image) == 255.0 - np.mean(image, axis=2)).all()


@pytest.mark.parametrize("reference", ["absolute", "maximum"])
def test_a_white_tile_is_glass(reference):
    white = np.full((40, 40, 3), 255, np.uint8)
    found = measure_tile(white, np.ones((40, 40), bool), Filter(blank_reference=reference))
    assert found["blank"] == 1 and found["unmarked"] == 0


def test_references_differ_as_the_report_and_its_code_do():
    """A pale tile: a smoothed inverted grey of 30 is glass by the text, and tissue by the code's 40/255 of 60."""
    image = np.full((200, 200, 3), 225, np.uint8)
    image[:, :100] = 195
    tissue = np.ones((200, 200), bool)
    text, code = (measure_tile(image, tissue, Filter(blank_reference=name))["blank"]
                  for name in ("absolute", "maximum"))
    assert text == pytest.approx(0.5, abs=0.03) and code == 0


def test_unmarked_is_the_share_of_the_tile_that_is_tissue_called_background():
    image = np.full((200, 200, 3), 245, np.uint8)
    image[:, :120] = 160
    tissue = np.zeros((200, 200), bool)
    tissue[:, :70] = True
    assert measure_tile(image, tissue, Filter())["unmarked"] == pytest.approx(0.25, abs=0.03)
    tissue[:, :120] = True
    assert measure_tile(image, tissue, Filter())["unmarked"] < 0.03


def blobs(seed, size):
    """A field of tissue with sides of its own everywhere, and the image that a microscope would show."""
    random = np.random.default_rng(seed)
    tissue = gaussian_filter(random.normal(size=(size, size)), 40) > 0
    image = np.where(tissue[..., None], random.integers(90, 190, (size, size, 3)), 242)
    return image.astype(np.uint8), tissue


@pytest.mark.parametrize(("right", "down"), [(0, 0), (40, 0), (0, -40), (-63, 27), (90, 70), (17, -9)])
@pytest.mark.parametrize(("height", "width"), [(400, 400), (300, 420)])
def test_a_moved_mask_is_found_to_lie_where_it_was_moved(right, down, height, width):
    image, tissue = blobs(3, 700)
    corner = 120
    tile = image[corner:corner + height, corner:corner + width]
    mask = tissue[corner - down:corner - down + height, corner - right:corner - right + width]
    x, y, confidence = misalignment(inverted_grey(tile), mask, 10.0)
    assert abs(x - right) <= 4 and abs(y - down) <= 4
    if np.hypot(right, down) >= 40:
        assert confidence > 0.6
    elif right == down == 0:
        assert confidence < 0.3


@pytest.mark.parametrize("share", [0, 1])
def test_without_an_edge_there_is_nothing_to_align(share):
    image, _ = blobs(0, 200)
    assert misalignment(inverted_grey(image), np.full((200, 200), bool(share)), 10.0) is None
    assert misalignment(np.full((200, 200), 200, np.float32), blobs(1, 200)[1], 10.0) is None


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (65, 33)])
def test_small_and_narrow_tiles_are_measured(height, width):
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
    tissue = random.random((height, width)) < 0.5
    tissue[0, 0] = True
    found = measure_tile(image, tissue, Filter())
    assert 0 <= found["blank"] <= 1 and 0 <= found["unmarked"] <= 1


def test_a_tile_without_annotated_pixels_has_no_blank_share():
    found = measure_tile(np.full((50, 60, 3), 120, np.uint8), np.zeros((50, 60), bool), Filter())
    assert found["blank"] is None and found["unmarked"] == 1 and found["shift_x"] is None


@pytest.mark.parametrize("seed", range(4))
def test_ignored_pixels_are_left_out_of_the_shares(seed):
    random = np.random.default_rng(seed)
    image, classes = half_glass(random, 60, 70), random.integers(0, 3, (60, 70))
    labelled = random.random((60, 70)) < 0.6
    found = measure_tile(image, (classes > 0) & labelled, Filter(sigma=4), labelled)
    glass = find_glass(inverted_grey(image), Filter(sigma=4))
    pixels = [(glass[y, x], classes[y, x] > 0) for y in range(60) for x in range(70) if labelled[y, x]]
    assert found["blank"] == sum(g and a for g, a in pixels) / sum(a for _, a in pixels)
    assert found["unmarked"] == sum(not g and not a for g, a in pixels) / len(pixels)


@pytest.mark.parametrize(("dx", "dy"), [(32, 0), (-24, 40), (0, 0)])
def test_a_shift_is_found_in_the_labelled_part_of_a_mask(dx, dy):
    image, tissue = blobs(5, 640)
    window = np.s_[70:570, 70:570]
    image, mask = image[window], np.roll(tissue, (dy, dx), (0, 1))[window]
    labelled = np.ones(mask.shape, bool)
    labelled[:150], labelled[:, 400:] = False, False
    for hidden in (mask & labelled, mask | ~labelled):  # whatever stands where nothing is labelled
        x, y, confidence = misalignment(inverted_grey(image), hidden, 10, labelled)
        assert abs(x - dx) <= 8 and abs(y - dy) <= 8 and (confidence > 0.5 or dx == dy == 0)
    labelled[:, 200:] = False
    assert misalignment(inverted_grey(image), mask, 10, labelled) is None, "too little is left to compare"


FULL = Tile("a", "a", "a", foreground=0.5, blank=0.0, unmarked=0.0, shift_x=30.0, shift_y=40.0, confidence=0.6)


@pytest.mark.parametrize(("changes", "limits", "expected"), [
    ({}, {}, ""),
    ({"foreground": 0.0099}, {}, "sparse"),
    ({"foreground": 0.0, "blank": None}, {"min_foreground": 0.0}, ""),
    ({"foreground": None, "blank": None}, {"min_foreground": 0.0}, "unlabelled"),
    ({"blank": 0.075}, {}, "misregistered"),
    ({"blank": 0.0749}, {}, ""),
    ({"blank": 1.0}, {"max_blank": None}, ""),
    ({"unmarked": 0.9}, {}, ""),
    ({"unmarked": 0.9}, {"max_unmarked": 0.9}, "unmarked"),
    ({}, {"max_shift": 50.0}, "shifted"),
    ({}, {"max_shift": 50.1}, ""),
    ({"confidence": 0.4}, {"max_shift": 50.0}, ""),
    ({"confidence": 0.4}, {"max_shift": 50.0, "min_confidence": 0.4}, "shifted"),
    ({"shift_x": None, "shift_y": None, "confidence": None}, {"max_shift": 0.0}, ""),
    ({"blank": 0.5, "unmarked": 0.9}, {"max_unmarked": 0.1}, "misregistered"),
])
def test_verdicts(changes, limits, expected):
    assert verdict(replace(FULL, **changes), Filter(**limits)) == expected


def test_the_reports_tile_139_lies_too_low_although_algorithm_1_passes_it(real_data):
    """By eye about 120 px, in a tile whose annotated tissue shows no glass at all."""
    found = {}
    for key in ("26", "139", "1058"):
        image = np.asarray(Image.open(real_data / f"report_tiles/frames/frame#{key}.png").convert("RGB"))
        mask = np.asarray(Image.open(real_data / f"report_tiles/masks/mask#{key}.png"))
        found[key] = measure_tile(image, mask != 26, Filter())
    assert found["139"]["shift_y"] == pytest.approx(120, abs=8) and found["139"]["confidence"] > 0.8
    assert found["139"]["blank"] < 0.075 and found["139"]["unmarked"] > 0.2
    assert found["26"]["confidence"] < 0.5 and found["1058"]["confidence"] < 0.5
