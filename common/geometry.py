"""Exact receptive fields of a U-Net, from its number of levels alone (report, section 6.4).

    field       first and last input pixel that an output pixel depends on, along one axis; both axes are alike
    alignment   the output pixel's position modulo 2^(levels - 1): pooling and `up` make its field depend on it
    path        how far down a signal goes: path l crosses to the decoder by the skip of level l, the last path by the
                bottleneck. Each sees all that the paths above it see.
    canvas      a tile, mirrored up to the next size that the network takes (evaluation/inference.py)

Nothing here needs a tensor: on the way from an output pixel back to the input a 3x3 convolution adds one pixel to
either side of the field, `up` halves it and the pooling doubles it.
"""

from dataclasses import dataclass
from itertools import groupby


def receptive_field(levels: int, position: int, path: int | None = None, ties: bool = False) -> tuple[int, int]:
    """First and last input pixel that the output pixel at `position` depends on, along one axis, far from borders.

    `path` is the deepest one that is open (the bottleneck's, `levels`, where none is given). With `ties` the pooling
    passes on nothing but the first of its two pixels: so it does on a constant input, where all are equally large.
    """
    path = path or levels
    first = last = position
    for _ in range(path - 1):
        first, last = (first - 2) // 2, (last + 2) // 2  # a block of the decoder, then `up`
    if path < levels:
        first, last = first - 2, last + 2  # the decoder's block that takes the skip; the bottleneck has only one
    first, last = first - 2, last + 2
    for _ in range(path - 1):
        first, last = 2 * first - 2, 2 * last + (0 if ties else 1) + 2  # the pooling, then a block of the encoder
    return first, last


def multiple(levels: int) -> int:
    """Heights and widths that the network takes are multiples of this; there are as many alignments."""
    return 2 ** (levels - 1)


def size(levels: int, position: int, path: int | None = None, ties: bool = False) -> int:
    """Pixels of the field along one axis."""
    first, last = receptive_field(levels, position, path, ties)
    return last - first + 1


def reach(levels: int, path: int | None = None) -> int:
    """How many pixels to either side, at most, an output pixel sees."""
    fields = [(p, *receptive_field(levels, p, path)) for p in range(multiple(levels))]
    return max(max(p - first, last - p) for p, first, last in fields)


def area(levels: int, path: int | None = None) -> float:
    """Pixels of the two-dimensional field, the mean over all alignments."""
    return (sum(size(levels, p, path) for p in range(multiple(levels))) / multiple(levels)) ** 2


@dataclass(frozen=True)
class Cut:
    """The smallest square input that holds the whole field of one output pixel at any alignment."""

    size: int  # pixels, its side
    origin: int  # where the output pixels of alignment 0, 1, ... begin
    decoder: tuple[int, int]  # [start, stop) of the pixels, multiples of 2^(levels - 1), that the decoder needs


def smallest_cut(levels: int) -> Cut:
    """What lies outside this cut, padding included, changes nothing in the logits of its central pixels.

    In blocks of 2^(levels - 1) pixels: an interval at the deepest level is one of such blocks.
    """
    block = multiple(levels)
    fields = [receptive_field(levels, p) for p in range(block)]
    before = -(min(first for first, _ in fields) // block)
    behind = max(last for _, last in fields) // block
    first, last = 0, block - 1
    for _ in range(levels - 1):
        first, last = (first - 2) // 2, (last + 2) // 2
    if levels == 1:  # no decoder
        first, last = 0, 0
    return Cut((before + 1 + behind) * block, before * block, ((before + first) * block, (before + last + 1) * block))


def unpadded(levels: int, length: int, canvas: bool = True) -> list[bool]:
    """Which output pixels (length,) of a tile's axis see nothing beyond the canvas; or beyond the tile itself."""
    margin = -length % multiple(levels)
    before = margin // 2
    low, high = (0, length + margin) if canvas else (before, before + length)
    fields = [receptive_field(levels, p + before) for p in range(length)]
    return [low <= first and last < high for first, last in fields]


def padded_share(levels: int, height: int, width: int, canvas: bool = True) -> float:
    """Share of a tile's output pixels whose field reaches into the padding; without `canvas`, or what is mirrored."""
    rows, columns = (sum(unpadded(levels, length, canvas)) for length in (height, width))
    return 1 - rows * columns / (height * width)


def alignments(levels: int, path: int | None = None) -> list[tuple[list[int], int, int]]:
    """Alignments that share a field, with its first and last pixel as seen from alignment 0 of their block."""
    fields = [(receptive_field(levels, p, path), p) for p in range(multiple(levels))]
    return [([p for _, p in members], *field) for field, members in groupby(fields, key=lambda pair: pair[0])]
