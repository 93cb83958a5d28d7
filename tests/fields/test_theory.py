"""fields/theory.py: the exact receptive field as text."""

from fields import theory


def test_sizes_and_paths_have_names():
    assert theory.sizes(5) == "188 or 204" and theory.sizes(5, 4) == "124 or 132"
    assert theory.path_names(2) == ["skip of level 1", "bottleneck"]


def test_tables_name_every_alignment_path_and_the_smallest_input():
    text = theory.describe("large", 5)
    assert "p = 16 b + r" in text and "208 x 208" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "2 to 13 16 b - 94 to 16 b + 109 204 96 to 107 96 to 107" in lines
    assert "skip of level 4 124 or 132 16,384" in lines and "256 x 256 92.9% 92.9%" in lines
    assert "1 level." in theory.describe("flat", 1)
