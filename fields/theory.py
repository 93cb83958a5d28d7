"""Describe the exact receptive field of a network as text; common/geometry.py computes it and explains the terms."""

from common.console import table
from common.geometry import alignments, area, multiple, padded_share, size, smallest_cut

PADDED_SIZES = (256, 500, 512)  # the report's crops, tiles and canvases


def sizes(levels: int, path: int | None = None) -> str:
    """Return the pixels of a field along one axis, e.g. "188 or 204"."""
    return " or ".join(map(str, sorted({size(levels, p, path) for p in range(multiple(levels))})))


def path_names(levels: int) -> list[str]:
    return [*(f"skip of level {level}" for level in range(1, levels)), "bottleneck"]


def describe(name: str, levels: int) -> str:
    """Return field, paths and padding of a network as tables."""
    block = multiple(levels)
    fields = [[_range(members[0], members[-1]), f"{_position(block, first)} to {_position(block, last)}",
               str(last - first + 1), _range(members[0] - first, members[-1] - first),
               _range(last - members[-1], last - members[0])] for members, first, last in alignments(levels)]
    paths = [[path, sizes(levels, number), f"{area(levels, number):,.0f}"]
             for number, path in enumerate(path_names(levels), start=1)]
    padding = [[f"{length} x {length}", *(f"{padded_share(levels, length, length, canvas):.1%}"
                                          for canvas in (True, False))] for length in PADDED_SIZES]
    cut = smallest_cut(levels).size
    noun = "level" if levels == 1 else "levels"
    return "\n".join([
        f"{name}: {levels} {noun}. Along each axis the output pixel p = {block} b + r depends on",
        "", table(["r", "input pixels", "count", "before p", "after p"], fields),
        "", table(["path", "pixels along an axis", "area, mean"], paths),
        "", table(["tile", "pixels that see padding", "padding or mirrored pixels"], padding),
        "", f"An input of {cut} x {cut} contains the whole field of its central {block} x {block} pixels."])


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _position(block: int, offset: int) -> str:
    return f"{block} b {'-' if offset < 0 else '+'} {abs(offset)}"
