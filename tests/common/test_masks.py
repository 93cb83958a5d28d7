"""common/masks.py: masks as people have them are read exactly, or rejected with what the file holds."""

import numpy as np
import pytest
from helpers import GREYS
from PIL import Image

from common.config import Data
from common.console import UserError
from common.masks import COLOUR, IGNORE, count_classes, count_codes, label_image, read_mask, read_mask_file

REPORT = Data()
THREE = Data(mask_values=(0, 1, 2))
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 200, 90]], np.uint8)
COLOURED = Data(colours=("#000000", "FF0000", "00c85a"))
BINARY = Data(classes=("normal", "gland"), mask_values=(0, 255))
LABELS = np.random.default_rng(0).integers(0, 3, (7, 9)).astype(np.uint8)


def with_palette(labels, colours):
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette(np.asarray(colours, np.uint8).tobytes())
    return picture


def with_alpha(pixels, alpha):
    picture = Image.fromarray(pixels)
    picture.putalpha(Image.fromarray(alpha))
    return picture


FOUR = np.full(LABELS.shape, 130, np.uint8)  # an alpha that is the same everywhere


@pytest.mark.parametrize(("data", "make"), [
    (REPORT, lambda: Image.fromarray(GREYS[LABELS])),
    (REPORT, lambda: Image.fromarray(np.stack([GREYS[LABELS]] * 3, -1))),
    (REPORT, lambda: with_alpha(GREYS[LABELS], FOUR)),
    (REPORT, lambda: with_alpha(np.stack([GREYS[LABELS]] * 3, -1), FOUR)),
    (REPORT, lambda: Image.fromarray(GREYS[LABELS].astype(np.uint16))),
    (REPORT, lambda: with_palette(GREYS[LABELS], np.zeros((256, 3)))),
    (Data(masks_by="colour"), lambda: with_palette(LABELS, np.stack([GREYS] * 3, -1))),
    (THREE, lambda: with_palette(LABELS, COLOURS)),
    (COLOURED, lambda: with_palette(LABELS, COLOURS)),
    (COLOURED, lambda: with_palette(2 - LABELS, COLOURS[::-1])),
    (COLOURED, lambda: Image.fromarray(COLOURS[LABELS])),
    (COLOURED, lambda: with_alpha(COLOURS[LABELS], FOUR)),
], ids=["grey", "grey as RGB", "grey and alpha", "RGBA", "16 bits", "index 26", "palette of greys", "index", "colours",
        "other order of colours", "RGB", "RGB and alpha"])
def test_masks_are_read_exactly(tmp_path, data, make):
    for name in ("m.png", "m.tif"):
        make().save(tmp_path / name)
        assert (read_mask(tmp_path / name, data) == LABELS).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_deep_masks_of_small_whole_numbers_are_read_exactly(tmp_path, dtype):
    Image.fromarray(LABELS.astype(dtype)).save(tmp_path / "m.tif")
    assert (read_mask(tmp_path / "m.tif", THREE) == LABELS).all()


def test_a_bit_is_black_or_white(tmp_path):
    for name in ("m.png", "m.tif"):
        Image.fromarray(LABELS > 0).save(tmp_path / name)
        assert (read_mask(tmp_path / name, BINARY) == (LABELS > 0)).all()


@pytest.mark.parametrize(("data", "make", "expected"), [
    (REPORT, lambda: Image.fromarray(np.where(np.arange(16).reshape(4, 4) < 3, 99, 26).astype(np.uint8)),
     r"99 \(3 pixels\).*data.mask_values.*data.ignore"),
    (COLOURED, lambda: Image.fromarray(np.array([[[0, 0, 0], [1, 2, 255]]], np.uint8)),
     r"0102ff \(1 pixel\).*data.colours"),
    (REPORT, lambda: Image.fromarray(COLOURS[LABELS]), r"ff0000 \(\d+ pixels\).*set data.colours"),
    (THREE, lambda: Image.fromarray(np.array([[0, 300]], np.uint16)), "from 0 to 300"),
    (THREE, lambda: Image.fromarray(np.array([[0, 1.5]], np.float32)), "from 0 to 1.5"),
    (THREE, lambda: Image.fromarray(np.array([[0, np.nan]], np.float32)), "whole numbers"),
    (THREE, lambda: Image.fromarray(np.array([[0, -1]], np.int32)), "from -1 to 0"),
    (REPORT, lambda: with_alpha(GREYS[LABELS], np.where(LABELS, FOUR, 0).astype(np.uint8)), "transparent"),
    (REPORT, lambda: Image.fromarray(COLOURS[LABELS]).convert("CMYK"), "mode CMYK"),
], ids=["value", "colour", "colours for values", "16 bits", "float", "nan", "negative", "alpha", "CMYK"])
def test_what_cannot_be_read_exactly_is_rejected(tmp_path, data, make, expected):
    path = tmp_path / "m.tif"
    make().save(path)
    with pytest.raises(UserError, match=expected) as error:
        read_mask(path, data)
    assert str(path) in str(error.value)


def test_pixels_are_counted_by_class_and_unknown_values_are_named(tmp_path):
    codes, counts = count_codes(np.array([[77, 77, 26]], np.uint8))
    assert count_classes(tmp_path / "m.png", codes, counts, REPORT).tolist() == [1, 0, 2]
    with pytest.raises(UserError, match=r"m.png.* 77 \(2 pixels\).*\[0, 1, 2\]"):
        count_classes(tmp_path / "m.png", codes, counts, THREE)
    codes, counts = count_codes(np.array([[COLOUR + 0xff0000, COLOUR]]))
    assert count_classes(tmp_path / "m.png", codes, counts, COLOURED).tolist() == [1, 1, 0]


@pytest.mark.parametrize("name", ["JPEG", "WEBP"])
def test_formats_that_change_values_are_rejected_unless_there_is_a_threshold(tmp_path, name):
    path, labels = tmp_path / "m.png", np.kron([[0, 1], [1, 0]], np.ones((16, 16), int))
    Image.fromarray((255 * labels).astype(np.uint8)).convert("RGB").save(path, format=name)
    with pytest.raises(UserError, match=name) as error:
        read_mask(path, REPORT)
    assert "threshold" not in str(error.value)
    with pytest.raises(UserError, match="data.threshold"):
        read_mask(path, BINARY)
    assert (read_mask(path, Data(classes=("normal", "gland"), threshold=128)) == labels).all()


def test_a_threshold_divides_all_grey_levels_and_begins_the_second_class(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "m.png")
    for threshold in (1, 128, 255):
        labels = read_mask(tmp_path / "m.png", Data(classes=("a", "b"), threshold=threshold))
        assert (labels == (levels >= threshold)).all()
    Image.fromarray(levels // 16 * 16).quantize(16).save(tmp_path / "m.png")  # a palette of greys in any order
    assert (read_mask(tmp_path / "m.png", Data(classes=("a", "b"), threshold=128)) == (levels >= 128)).all()
    Image.fromarray(COLOURS[LABELS]).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"ff0000.*convert it to grey"):
        read_mask(tmp_path / "m.png", Data(classes=("a", "b"), threshold=128))


@pytest.mark.parametrize(("data", "make"), [
    (Data(mask_values=(0, 1, 2), ignore=(255, 9)), lambda labels: Image.fromarray(labels)),
    (Data(mask_values=(0, 1, 2), ignore=(255, 9)), lambda labels: with_palette(labels, np.zeros((256, 3)))),
    (Data(colours=COLOURED.colours, ignore=("ffffff", "090909")),
     lambda labels: Image.fromarray(np.array([*COLOURS, *[[value] * 3 for value in range(3, 256)]], np.uint8)[labels])),
], ids=["values", "palette", "colours"])
def test_ignored_values_and_colours_have_no_class(tmp_path, data, make):
    labels = LABELS.copy()
    labels[0], labels[-1, :4] = 255, 9
    make(labels).save(tmp_path / "m.png")
    found = read_mask(tmp_path / "m.png", data)
    assert (found == np.where(labels > 2, IGNORE, labels)).all()
    counts = count_classes(tmp_path / "m.png", *count_codes(read_mask_file(tmp_path / "m.png", data).codes), data)
    assert counts.tolist() == [(found == k).sum() for k in range(3)]


@pytest.mark.parametrize("data", [
    REPORT, THREE, COLOURED, Data(colours=COLOURED.colours, ignore=("ffffff",)), Data(classes=("a", "b"), threshold=9),
    Data(classes=("a", "b"), threshold=9, mask_values=(8, 9))])
def test_label_images_are_read_back(tmp_path, data):
    labels = LABELS % len(data.classes)
    label_image(labels, data).save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png", data) == labels).all()


@pytest.mark.parametrize(("settings", "expected"), [
    ({"colours": ("red", "green", "blue")}, "colours such as 00ff00"),
    ({"colours": ("000000", "ff0000")}, "3 different colours"),
    ({"colours": ("000000", "ff0000", "#FF0000")}, "3 different colours"),
    ({"colours": COLOURED.colours, "mask_values": (0, 1, 2)}, "leave out one"),
    ({"colours": COLOURED.colours, "masks_by": "index"}, "leave out one"),
    ({"colours": COLOURED.colours, "ignore": (255,)}, "data.ignore must be colours"),
    ({"ignore": ("ffffff",)}, "data.ignore must be mask values"),
    ({"ignore": (256,)}, "0 to 255"),
    ({"ignore": (51,)}, "51 stands for a class"),
    ({"threshold": 128}, "needs two classes"),
    ({"classes": ("a", "b"), "threshold": 0}, "from 1 to 255"),
    ({"classes": ("a", "b"), "threshold": 128, "mask_values": (0, 1)}, "one value below"),
    ({"classes": ("a", "b"), "threshold": 128, "mask_values": (255, 0)}, "one value below"),
    ({"classes": ("a", "b"), "threshold": 128, "ignore": (9,)}, "leave out.*data.ignore"),
    ({"classes": tuple(map(str, range(255))), "mask_values": tuple(range(255))}, "at most 254"),
])
def test_settings_that_contradict_one_another_are_rejected(settings, expected):
    with pytest.raises(UserError, match=expected):
        Data(**settings)
