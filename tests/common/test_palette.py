"""common/palette.py: each class has one colour in every picture, and figures are saved whole."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from common.files import WriteError
from common.palette import PALETTE, class_colours, class_patches, colour_mask, legend, rgb, save


def test_a_colour_has_three_bytes():
    assert rgb("#0180ff").tolist() == [1, 128, 255] and rgb("#0180ff").dtype == np.uint8


def test_the_colours_of_eight_classes_differ():
    assert len(set(PALETTE)) == len(PALETTE) == 8


def test_the_colour_of_a_class_depends_on_its_index_alone():
    mask = np.array([[0, 2], [2, 2]])
    assert (colour_mask(mask, 3) == colour_mask(mask, 5)).all()
    assert (colour_mask(mask, 3)[0, 1] == rgb(PALETTE[2])).all() and colour_mask(mask, 3).shape == (2, 2, 3)


def test_beyond_eight_classes_the_colours_repeat_without_that_of_the_background():
    colours = [to_hex(colour / 255) for colour in class_colours(16)]
    assert colours[:8] == list(PALETTE) and colours[8:15] == list(PALETTE[1:]) and colours[15] == PALETTE[1]


def test_legends_name_every_class_with_its_colour():
    patches = class_patches(["background", "tissue"])
    assert [(to_hex(patch.get_facecolor()), patch.get_label()) for patch in patches] == [
        (PALETTE[0], "background"), (PALETTE[1], "tissue")]
    names = [text.get_text() for text in legend(["background", "a $ in a name"]).legends[0].get_texts()]
    assert names == ["background", "a $ in a name"]


def test_figures_are_saved_with_names_that_the_font_lacks(tmp_path, recwarn):
    figure = Figure()
    figure.suptitle("\u5927\u8178 $x")
    save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000 and not recwarn.list
    with pytest.raises(WriteError, match="nowhere/x.png"):
        save(figure, tmp_path / "nowhere/x.png")
