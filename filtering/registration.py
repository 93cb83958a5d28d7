"""Measure how a mask lies off, by shift and rotation, and move it back.

A mask that was made by registration may lie off as a whole. A `Move` says how. The search tries rotations in steps and,
with the Fourier transform, all shifts of each at once (Padfield 2012, "Masked object registration in the Fourier
domain"). It works on a coarse grid and refines the best candidates on a fine one. What it minimises is a `Criterion`,
which says how badly classes fit the tile, from 0 (they explain everything) to 1:

    Colours      the share of the variance of colour that the classes leave unexplained: 1 - the correlation ratio
                 (Roche et al. 1998, "The correlation ratio as a new similarity measure for multimodal registration")
    Predictions  how much less likely the classes are than the likeliest ones, according to a model

With L the criterion of the best move and L0 the one in place, the confidence in the move is 1 - L / L0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from scipy import fft, sparse
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.optimize import minimize

from common.masks import IGNORE

COARSE, MIDDLE, FINE = 32, 64, 128  # cells along the shorter side of a tile, about
ANGLES = np.arange(-30, 31, 5)  # degrees
MOST_TURN = ANGLES[-1] + (ANGLES[1] - ANGLES[0]) / 2  # degrees, after the refinement
CANDIDATES = 3  # moves that are refined
LEAST_GAIN = 0.05  # share of the criterion in place by which a candidate must be better
WORST = 2.0  # above every criterion
LEAST_LABELLED = 0.5  # share of a tile; a small part of a mask may seem to fit anywhere
MIN_OVERLAP = 0.65  # share of the labelled pixels that must still lie in the tile
FARTHEST = 1 - MIN_OVERLAP  # share of each side by which the coarse search shifts a mask
SHIFT_PENALTY = 0.05  # by how much a shift across the whole tile must fit better than none
TURN_PENALTY = 0.05  # the same for a rotation by 30 degrees
LEAST_VARIANCE = 1e-3  # of the whole tile's; an overlap with less says nothing
NOISE = 100.0  # variance in grey levels below which a direction of colour counts for less
LEAST_PROBABILITY = 0.01  # of a class at a pixel, so that single pixels cannot decide
BASE = 0.02  # of the criterion of a model where it agrees with every pixel


@dataclass(frozen=True)
class Move:
    """By how many pixels a mask lies too far right and too low, and by how many degrees it is turned clockwise.

    The rotation is around the centre of the tile; the shift is the one of the centre.
    """

    right: float = 0.0
    down: float = 0.0
    clockwise: float = 0.0

    @cached_property
    def matrix(self) -> np.ndarray:
        """The rotation (2, 2) of (y, x)."""
        cos, sin = np.cos(np.radians(self.clockwise)), np.sin(np.radians(self.clockwise))
        return np.array([[cos, sin], [-sin, cos]])

    def of_points(self, points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return where the mask of a tile (height, width) shows what belongs to points (..., 2) y, x."""
        centre = (np.array(shape[:2]) - 1) / 2
        return (points - centre) @ self.matrix.T + centre + (self.down, self.right)

    def length(self, shape: tuple[int, ...]) -> float:
        """Return by how many pixels the corner lies off that lies farthest off."""
        corners = np.array([(y, x) for y in (0, shape[0] - 1) for x in (0, shape[1] - 1)], float)
        return float(np.linalg.norm(self.of_points(corners, shape) - corners, axis=1).max())

    def undo(self, labels: np.ndarray) -> np.ndarray:
        """Return classes (H, W) uint8 moved back to where they belong; what enters from outside is IGNORE."""
        offset = self.of_points(np.zeros(2), labels.shape)
        return affine_transform(labels, self.matrix, offset, order=0, mode="constant", cval=IGNORE)


class Mask:
    """The classes (H, W) uint8 of a mask, looked up in the cells of a grid."""

    def __init__(self, labels: np.ndarray):
        self.shape = labels.shape
        counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)[:IGNORE]
        self.classes = np.flatnonzero(counts).tolist()
        self.labelled = counts.sum() / labels.size
        self._framed = np.pad(labels, 1, constant_values=IGNORE).ravel()

    def moved_back(self, move: Move, cells: int) -> np.ndarray:
        """Return the classes (h, w) that belong to the cells if the mask lies off by a move; IGNORE from outside.

        Each cell gets the class of one pixel, so that no criterion sees a mixture of classes.
        """
        (height, width), matrix = self.shape, move.matrix
        y, x = sample_points(self.shape, cell_size(self.shape, cells))
        top, left = move.of_points(np.zeros(2), self.shape) + 1.5  # 1 for the frame, 0.5 to round
        rows, columns = matrix[0, 0] * y, matrix[1, 1] * x
        rows += matrix[0, 1] * x + top
        columns += matrix[1, 0] * y + left
        places = rows.clip(0, height + 1, out=rows).astype(np.intp)
        places *= width + 2
        places += columns.clip(0, width + 1, out=columns).astype(np.intp)
        return self._framed.take(places)


@lru_cache(maxsize=8)
def sample_points(shape: tuple[int, int], cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Return y and x (h, w) of a point in each cell of a grid over a tile (H, W).

    The points lie at quasi-random places of their cells (Roberts 2018, "The unreasonable effectiveness of quasirandom
    sequences"). At their centres, all of them would round to the next pixel at once, and fractions would be lost.
    """
    y, x = (cell * places.astype(float) for places in np.indices([length // cell for length in shape]))
    number = np.arange(y.size).reshape(y.shape)
    return tuple(corner + number * step % 1 * cell - 0.5 for corner, step in ((y, 0.7548776662466927),
                                                                              (x, 0.5698402909980532)))


class Criterion(Protocol):
    """How badly classes fit a tile, as maps for all shifts on the coarse grid and as numbers on the fine one."""

    def of_shifts(self, shares: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the criterion and the overlap in cells (n, h, w) for every cyclic shift of n maps of shares.

        `shares` (K, n, h, w) are those of the classes. The maps are padded, so the result is larger than they are.
        """

    def of_labels(self, labels: np.ndarray, classes: Sequence[int], cells: int) -> float:
        """Return the criterion for labels (h, w), these classes or IGNORE, in the cells of a grid."""


def misregistration(criterion: Criterion, labels: np.ndarray) -> tuple[Move, float] | None:
    """Return how classes (H, W) uint8 lie off and the confidence in it; None if tile or mask are too plain to tell."""
    mask = Mask(labels)
    if len(mask.classes) < 2 or mask.labelled < LEAST_LABELLED:
        return None
    cell = cell_size(labels.shape, COARSE)
    shares = cell_means(np.stack([labels == k for k in mask.classes], axis=-1), cell)  # (h, w, K)
    in_place, candidates = search(criterion, shares, mask.classes, cell)
    if not in_place > 0:
        return None
    promising = [move for value, move in candidates if value < (1 - LEAST_GAIN) * in_place]
    width = cell / 2, (ANGLES[1] - ANGLES[0]) / 2
    refined = [_refine(criterion, mask, move, MIDDLE, *width) for move in promising or [Move()]]
    _, best = min([(_cost(criterion, mask, Move(), MIDDLE), Move()), *refined], key=lambda one: one[0])
    if promising:
        best = _refine(criterion, mask, best, FINE, width[0] / 4, width[1] / 4, is_last=True)[1]
    best = Move(*(round(float(value), 1) + 0.0 for value in (best.right, best.down, best.clockwise)))
    in_place, moved = (fit(criterion, mask, move, FINE) for move in (Move(), best))
    return best, round(float(max(0.0, 1 - moved / in_place if in_place > 0 else 0.0)), 4)


def penalty(shift: float | np.ndarray, angle: float) -> float | np.ndarray:
    """Return what a shift, as a share of the tile's shorter side, and a rotation in degrees must gain."""
    return SHIFT_PENALTY * shift + TURN_PENALTY * abs(angle) / ANGLES.max()


def search(criterion: Criterion, shares: np.ndarray, classes: Sequence[int],
           cell: int) -> tuple[float, list[tuple[float, Move]]]:
    """Return the criterion in place and the moves that fit best on the coarse grid, each with its criterion.

    At most one move of each neighbourhood is returned.
    """
    height, width, number = shares.shape
    maps = (rotations((height, width)) @ shares.reshape(-1, number)).T.reshape(number, len(ANGLES), height, width)
    values, overlap = criterion.of_shifts(maps.astype(np.float32), classes)
    y, x = (fft.fftfreq(length, 1 / length) for length in values.shape[1:])
    y, x = y[:, None], x[None, :]
    allowed = (overlap >= MIN_OVERLAP * shares.sum()) & (abs(y) <= FARTHEST * height) & (abs(x) <= FARTHEST * width)
    length = np.hypot(y, x) / min(height, width)
    costs = np.where(allowed, values + penalty(length, ANGLES[:, None, None]), np.inf).reshape(len(ANGLES), -1)
    found = []
    for i, (angle, best) in enumerate(zip(ANGLES, costs.argmin(1), strict=True)):
        row, column = np.unravel_index(best, length.shape)
        turn = Move(clockwise=float(angle))
        down, right = -turn.matrix @ (y[row, 0], x[0, column]) * cell  # this step moves the turned mask back
        found.append((costs[i, best], values[i].flat[best], Move(right, down, turn.clockwise)))
    in_place = values[ANGLES == 0, 0, 0].item()
    chosen: list[tuple[float, Move]] = []
    for _, value, move in sorted(found, key=lambda one: one[0]):
        if len(chosen) < CANDIDATES and all(_are_apart(move, other, cell) for _, other in chosen):
            chosen.append((value, move))
    return in_place, chosen


def _are_apart(move: Move, other: Move, cell: int) -> bool:
    return (abs(move.clockwise - other.clockwise) > 2 * (ANGLES[1] - ANGLES[0])
            or np.hypot(move.right - other.right, move.down - other.down) > 3 * cell)


@lru_cache(maxsize=8)
def rotations(shape: tuple[int, int]) -> sparse.csr_array:
    """Return the matrix (n h w, h w) that turns a map (h w) back by each of the n ANGLES, bilinearly.

    Nothing enters from outside.
    """
    size = np.array(shape)
    cells = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 2)
    points = np.concatenate([Move(clockwise=float(angle)).of_points(cells, shape) for angle in ANGLES]).round(9)
    rows, columns, weights = [], [], []
    for corner in np.ndindex(2, 2):
        neighbours = np.floor(points).astype(np.intp) + corner
        weight = (1 - abs(points - neighbours)).prod(axis=1)
        inside = np.flatnonzero(((neighbours >= 0) & (neighbours < size)).all(axis=1) & (weight > 0))
        rows.append(inside)
        columns.append(neighbours[inside] @ (shape[1], 1))
        weights.append(weight[inside])
    places = np.concatenate(rows), np.concatenate(columns)
    return sparse.csr_array((np.concatenate(weights), places), shape=(len(points), len(cells)))


def _refine(criterion: Criterion, mask: Mask, start: Move, cells: int, step: float,
            turn: float, is_last: bool = False) -> tuple[float, Move]:
    """Return the cost and the move that the simplex search of Nelder and Mead finds from a start.

    Penalties choose between moves. They would pull the one that is chosen towards no move, so the last search, which is
    a finer one, does without.
    """
    cost, steps, pixels, costs = (fit, 60, 0.1, 1e-5) if is_last else (_cost, 50, 0.2, 1e-4)
    first = np.array([start.right, start.down, start.clockwise])
    simplex = first + np.array([[0, 0, 0], [step, 0, 0], [0, step, 0], [0, 0, turn]])
    found = minimize(lambda values: cost(criterion, mask, Move(*values), cells), first, method="Nelder-Mead",
                     options={"initial_simplex": simplex, "xatol": pixels, "fatol": costs, "maxfev": steps})
    return float(found.fun), Move(*found.x)


def _cost(criterion: Criterion, mask: Mask, move: Move, cells: int) -> float:
    shift = np.hypot(move.right, move.down) / min(mask.shape)
    return fit(criterion, mask, move, cells) + penalty(shift, move.clockwise)


def fit(criterion: Criterion, mask: Mask, move: Move, cells: int = MIDDLE) -> float:
    """Return the criterion of a mask that is moved back.

    It is WORST if too little of the mask stays in the tile, or if the rotation lies outside the range of the search.
    """
    if abs(move.clockwise) > MOST_TURN:
        return WORST
    moved = mask.moved_back(move, cells)
    if np.count_nonzero(moved != IGNORE) < MIN_OVERLAP * mask.labelled * moved.size:
        return WORST
    return criterion.of_labels(moved, mask.classes, cells)


@dataclass(frozen=True)
class Colours:
    """The criterion of an image: the share of the variance of its colours that classes do not explain."""

    image: np.ndarray  # (H, W, 3) uint8
    sigma: float  # pixels, of the Gaussian that closes the gaps in tissue

    @cached_property
    def grids(self) -> dict[int, np.ndarray]:
        """Smoothed colours (h, w, 3) of each grid, along the axes of their variation and divided by it."""
        cells = {count: cell_size(self.image.shape, count) for count in (FINE, MIDDLE, COARSE)}
        colours = cell_means(self.image, cells[FINE])
        colours = gaussian_filter(colours, self.sigma / cells[FINE] / 2, axes=(0, 1))
        colours -= colours.mean((0, 1))
        variances, axes = np.linalg.eigh(np.cov(colours.reshape(-1, 3).T))
        colours = colours @ axes / np.sqrt(np.maximum(variances, 0) + NOISE)
        return {count: cell_means(colours, cell // cells[FINE]) for count, cell in cells.items()}

    def of_shifts(self, shares: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        height, width, _ = self.grids[COARSE].shape
        maps = self.columns[COARSE].reshape(-1, 1, 1, height, width).astype(np.float32)
        shape = padded((height, width))
        ones, *colours, squares = fft.rfft2(maps, shape)                                 # (1, 1, ...) each
        of_classes = fft.rfft2(shares, shape).conj()                                     # (K, n, ...)
        counts = np.maximum(fft.irfft2(ones * of_classes, shape), 0)                     # (K, n, h, w)
        sums = np.stack([fft.irfft2(colour * of_classes, shape) for colour in colours])  # (3, K, n, h, w)
        squares = fft.irfft2(squares[0] * of_classes.sum(0), shape)                      # (n, h, w)
        return _unexplained(counts, sums, squares), counts.sum(0)

    def of_labels(self, labels: np.ndarray, classes: Sequence[int], cells: int) -> float:
        where = np.equal.outer(np.array(classes, np.uint8), labels.ravel()).astype(float)  # (K, h * w)
        sums = np.einsum("kn,cn->ck", where, self.columns[cells])                        # (5, K)
        return float(_unexplained(sums[0], sums[1:-1], sums[-1].sum()))

    @cached_property
    def columns(self) -> dict[int, np.ndarray]:
        """1, the colours, and the sum of their squares (5, h * w) for each grid."""
        maps = {cells: colours.reshape(-1, 3).T for cells, colours in self.grids.items()}
        return {cells: np.stack([np.ones(colours.shape[1]), *colours, (colours**2).sum(0)])
                for cells, colours in maps.items()}


def _unexplained(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return the variance within classes over all variance, from pixels (K, ...) and sums of colours (3, K, ...).

    It is 1 where all variance of the overlap is less than LEAST_VARIANCE per pixel.
    """
    total = np.maximum(counts.sum(0), 1)
    of_mean = (sums.sum(1)**2).sum(0) / total
    between = (sums**2 / np.maximum(counts, 0.5)).sum((0, 1)) - of_mean
    variance = squares - of_mean
    return np.where(variance > LEAST_VARIANCE * total, 1 - between / np.maximum(variance, LEAST_VARIANCE), 1.0)


@dataclass(frozen=True)
class Predictions:
    """The criterion of a model: the mean of log(p of the likeliest class / p of the class), over its largest value.

    p is at least LEAST_PROBABILITY. BASE is added, so that a mask that fits well has no certain move.
    """

    probs: np.ndarray  # (H, W, K)

    @cached_property
    def grids(self) -> dict[int, np.ndarray]:
        """The criterion of each class (h, w, K) in each grid."""
        log_probs = np.log(np.maximum(self.probs, LEAST_PROBABILITY, dtype=np.float32))
        regret = (log_probs.max(-1, keepdims=True) - log_probs) / -np.log(LEAST_PROBABILITY) + BASE
        return {count: cell_means(regret, cell_size(self.probs.shape, count)) for count in (COARSE, MIDDLE, FINE)}

    def of_shifts(self, shares: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        maps = np.moveaxis(self.grids[COARSE], -1, 0)[classes, None].astype(np.float32)  # (K, 1, h, w)
        shape = padded(maps.shape[-2:])
        of_classes = fft.rfft2(shares, shape).conj()                                     # (K, n, ...)
        ones = fft.rfft2(np.ones_like(maps[0]), shape)
        overlap = np.maximum(fft.irfft2(ones * of_classes.sum(0), shape), 0)             # (n, h, w)
        total = fft.irfft2((fft.rfft2(maps, shape) * of_classes).sum(0), shape)          # (n, h, w)
        return total / np.maximum(overlap, 1), overlap

    def of_labels(self, labels: np.ndarray, classes: Sequence[int], cells: int) -> float:
        where = np.equal.outer(np.array(classes, np.uint8), labels)                      # (K, h, w)
        total = np.einsum("khw,hwk->", where.astype(float), self.grids[cells][..., classes])
        return float(total / where.sum()) if where.any() else WORST


def cell_size(shape: tuple[int, ...], cells: int) -> int:
    """Return the side in pixels of a grid's cells; cells of a coarser grid hold whole cells of a finer one."""
    finest = max(1, round(min(shape[:2]) / FINE))
    return finest * max(1, min(FINE // cells, min(shape[:2]) // finest))


def cell_means(values: np.ndarray, cell: int) -> np.ndarray:
    """Return means over squares of `cell` pixels of (H, W, C), float64; the lower and right remainder is cut off."""
    height, width = (length // cell for length in values.shape[:2])
    cut = values[:height * cell, :width * cell]
    dtype = np.float64 if cut.dtype.kind == "f" else np.uint32
    rows = cut.reshape(height, cell, width * cell, -1).sum(axis=1, dtype=dtype)
    return np.einsum("hwpc->hwc", rows.reshape(height, width, cell, -1)) / cell**2  # .sum(axis=2), but faster


def padded(shape: tuple[int, ...]) -> list[int]:
    """Return the size at which cyclic shifts of maps by up to FARTHEST of each side do not wrap around."""
    return [fft.next_fast_len(length + int(FARTHEST * length), real=True) for length in shape]
