"""Measurements of a tile against Algorithm 1 as it is printed, and against masks that were moved by known distances."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from common.config import Filter
from common.masks import IGNORE
from dataset import Tile
from filtering.audit import ask_model, find_glass, inverted_grey, measure_tile, verdict


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
    blank = measure_tile(image, mask, Filter(sigma=4))["blank"]
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
    found = measure_tile(white, np.ones((40, 40), np.uint8), Filter(blank_reference=reference))
    assert found["blank"] == 1 and found["unmarked"] == 0


def test_references_differ_as_the_report_and_its_code_do():
    """A pale tile: a smoothed inverted grey of 30 is glass by the text, and tissue by the code's 40/255 of 60."""
    image = np.full((200, 200, 3), 225, np.uint8)
    image[:, :100] = 195
    tissue = np.ones((200, 200), np.uint8)
    text, code = (measure_tile(image, tissue, Filter(blank_reference=name))["blank"]
                  for name in ("absolute", "maximum"))
    assert text == pytest.approx(0.5, abs=0.03) and code == 0


def test_unmarked_is_the_share_of_the_tile_that_is_tissue_called_background():
    image = np.full((200, 200, 3), 245, np.uint8)
    image[:, :120] = 160
    tissue = np.zeros((200, 200), np.uint8)
    tissue[:, :70] = 1
    assert measure_tile(image, tissue, Filter())["unmarked"] == pytest.approx(0.25, abs=0.03)
    tissue[:, :120] = 1
    assert measure_tile(image, tissue, Filter())["unmarked"] < 0.03


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (65, 33)])
def test_small_and_narrow_tiles_are_measured(height, width):
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
    tissue = random.integers(0, 2, (height, width)).astype(np.uint8)
    tissue[0, 0] = 1
    found = measure_tile(image, tissue, Filter())
    assert 0 <= found["blank"] <= 1 and 0 <= found["unmarked"] <= 1


def test_a_tile_without_annotated_pixels_has_no_blank_share():
    found = measure_tile(np.full((50, 60, 3), 120, np.uint8), np.zeros((50, 60), np.uint8), Filter())
    assert found["blank"] is None and found["unmarked"] == 1 and found["shift_x"] is None


@pytest.mark.parametrize("seed", range(4))
def test_ignored_pixels_are_left_out_of_the_shares(seed):
    random = np.random.default_rng(seed)
    image, classes = half_glass(random, 60, 70), random.integers(0, 3, (60, 70))
    labelled = random.random((60, 70)) < 0.6
    found = measure_tile(image, np.where(labelled, classes, IGNORE).astype(np.uint8), Filter(sigma=4))
    glass = find_glass(inverted_grey(image), Filter(sigma=4))
    pixels = [(glass[y, x], classes[y, x] > 0) for y in range(60) for x in range(70) if labelled[y, x]]
    assert found["blank"] == sum(g and a for g, a in pixels) / sum(a for _, a in pixels)
    assert found["unmarked"] == sum(not g and not a for g, a in pixels) / len(pixels)


FULL = Tile("a", "a", "a", foreground=0.5, blank=0.0, unmarked=0.0, shift_x=30.0, shift_y=40.0, shift=50.0,
            confidence=0.6)


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
    ({"confidence": 0.24}, {"max_shift": 50.0}, ""),
    ({"confidence": 0.1}, {"max_shift": 50.0, "min_confidence": 0.1}, "shifted"),
    ({"shift": None, "confidence": None}, {"max_shift": 0.0}, ""),
    ({"model_shift": 60.0, "model_confidence": 0.5}, {"max_shift": 55.0}, "shifted"),
    ({"model_shift": 60.0, "model_confidence": 0.2}, {"max_shift": 55.0}, ""),
    ({"disagreement": 0.2}, {}, ""),
    ({"disagreement": 0.2}, {"max_disagreement": 0.2}, "disputed"),
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
        found[key] = measure_tile(image, np.searchsorted([26, 51, 77], mask).astype(np.uint8), Filter())
    assert found["139"]["shift_y"] == pytest.approx(120, abs=8) and found["139"]["confidence"] > 0.5
    assert found["139"]["blank"] < 0.075 and found["139"]["unmarked"] > 0.2
    assert found["26"]["confidence"] < 0.25 and found["1058"]["confidence"] < 0.25


@pytest.mark.parametrize("seed", range(3))
def test_the_quality_of_labels_is_the_softmin_of_their_probabilities(seed):
    """Lad and Mueller 2023, section 3, with loops; a share of confident disagreement beside it."""
    random = np.random.default_rng(seed)
    probs = random.dirichlet((0.3, 0.3, 0.3), (20, 24)).astype(np.float32)
    labels = random.integers(0, 3, (20, 24)).astype(np.uint8)
    labels[random.random((20, 24)) < 0.2] = IGNORE
    found = ask_model(probs, labels, Filter(sure=0.8))
    pixels = [(y, x) for y in range(20) for x in range(24) if labels[y, x] != IGNORE]
    scores = [float(probs[y, x, labels[y, x]]) for y, x in pixels]
    weights = [np.exp((1 - score) / 0.1) for score in scores]
    assert found["quality"] == pytest.approx(np.dot(scores, weights) / sum(weights), rel=1e-4)
    wrong = [probs[y, x].max() >= 0.8 and probs[y, x].argmax() != labels[y, x] for y, x in pixels]
    assert found["disagreement"] == sum(wrong) / len(pixels) > 0


def test_a_model_says_nothing_about_a_mask_without_classes():
    probs = np.full((20, 20, 3), 1 / 3, np.float32)
    assert ask_model(probs, np.full((20, 20), IGNORE, np.uint8), Filter()) == {}
