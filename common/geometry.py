"""The exact receptive field of a U-Net, computed from its number of levels alone (report, section 6.4).

    field       the input pixels that an output pixel depends on, along one axis: both axes are alike
    alignment   the position of an output pixel modulo 2^(levels - 1); pooling and `up` make the field depend on it
    path        path l crosses from the encoder to the decoder by the skip of level l, the last path by the bottleneck;
                its field contains the fields of the paths above it
    canvas      a tile, mirrored up to the next size that the network takes (evaluation/inference.py)

On the way back from an output pixel to the input, a 3x3 convolution adds one pixel at both ends of the field, `up`
halves the field and pooling doubles it.
"""

from dataclasses import dataclass
from itertools import groupby


def multiple(levels: int) -> int:
    """Return the number of which heights and widths of the input must be multiples; it also counts the alignments."""
    return 2 ** (levels - 1)


def receptive_field(levels: int, position: int, path: int | None = None, ties: bool = False) -> tuple[int, int]:
    """Return the first and last input pixel that the output pixel at `position` sees on an axis, far from borders.

    `path` is the deepest path that is open (default: the bottleneck). With `ties` pooling passes the gradient only to
    the first of two pixels along the axis, as it does on a constant input, where all pixels are equal.
    """
    path = path or levels
    first, last = _decoder_field(position, position, path)
    if path < levels:
        first, last = first - 2, last + 2  # the decoder's block at the skip; the bottleneck has only the next block
    first, last = first - 2, last + 2
    for _ in range(path - 1):
        first, last = 2 * first - 2, 2 * last + (0 if ties else 1) + 2  # pooling, then a block of the encoder
    return first, last


def _decoder_field(first: int, last: int, path: int) -> tuple[int, int]:
    """Return the pixels at the level of `path` on which the output pixels from `first` to `last` depend."""
    for _ in range(path - 1):
        first, last = (first - 2) // 2, (last + 2) // 2  # a block of the decoder, then `up`
    return first, last


def size(levels: int, position: int, path: int | None = None, ties: bool = False) -> int:
    """Return the pixels of the field along one axis."""
    first, last = receptive_field(levels, position, path, ties)
    return last - first + 1


def area(levels: int, path: int | None = None) -> float:
    """Return the pixels of the two-dimensional field, the mean over all alignments."""
    return (sum(size(levels, p, path) for p in range(multiple(levels))) / multiple(levels)) ** 2


def box(levels: int) -> tuple[int, int]:
    """Return the first and last pixel of all fields together, counted from the output pixel: the first is negative."""
    fields = [receptive_field(levels, p) for p in range(multiple(levels))]
    return min(first - p for p, (first, _) in enumerate(fields)), max(last - p for p, (_, last) in enumerate(fields))


def reach(levels: int) -> int:
    """Return the largest distance along an axis, in pixels, at which an output pixel still sees the input."""
    low, high = box(levels)
    return max(-low, high)


def alignments(levels: int) -> list[tuple[list[int], int, int]]:
    """Return the alignments that share a field, and the field's first and last pixel from alignment 0."""
    by_field = groupby(range(multiple(levels)), key=lambda p: receptive_field(levels, p))
    return [(list(members), first, last) for (first, last), members in by_field]


@dataclass(frozen=True)
class Cut:
    """The smallest square input that contains the whole field of one output pixel at any alignment."""

    size: int  # pixels, the side of the square
    origin: int  # position of the output pixel with alignment 0, followed by alignments 1, 2, ...
    decoder: tuple[int, int]  # [start, stop) of the pixels that the decoder needs, multiples of 2^(levels - 1)


def smallest_cut(levels: int) -> Cut:
    """Return the cut for output pixels of every alignment: what lies outside it cannot change their logits.

    It consists of blocks of 2^(levels - 1) pixels, which are single pixels at the deepest level.
    """
    block = multiple(levels)
    fields = [receptive_field(levels, p) for p in range(block)]
    before = -(min(first for first, _ in fields) // block)  # blocks
    behind = max(last for _, last in fields) // block
    first, last = _decoder_field(0, block - 1, levels)
    return Cut((before + 1 + behind) * block, before * block, ((before + first) * block, (before + last + 1) * block))


def unpadded(levels: int, length: int, canvas: bool = True) -> list[bool]:
    """Return which output pixels (length,) of a tile's axis have a field inside the canvas, or else the tile."""
    margin = -length % multiple(levels)
    before = margin // 2
    low, high = (0, length + margin) if canvas else (before, before + length)
    fields = [receptive_field(levels, p + before) for p in range(length)]
    return [low <= first and last < high for first, last in fields]


def padded_share(levels: int, height: int, width: int, canvas: bool = True) -> float:
    """Return the share of a tile's output pixels whose field leaves the canvas, or else the tile."""
    rows, columns = (sum(unpadded(levels, length, canvas)) for length in (height, width))
    return 1 - rows * columns / (height * width)
