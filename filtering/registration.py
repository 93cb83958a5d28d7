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
from functools import cached_property
from typing import Protocol

import numpy as np
from scipy import fft
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.optimize import minimize

from common.masks import IGNORE

COARSE, MIDDLE, FINE = 32, 64, 128  # cells along the shorter side of a tile, about
ANGLES = np.arange(-30, 31, 3)  # degrees
CANDIDATES = 3  # moves that are refined
LEAST_GAIN = 0.05  # share of the criterion in place by which a candidate must be better
MOST_STEPS = 60  # of a refinement
WORST = 2.0  # above every criterion
LEAST_LABELLED = 0.5  # share of a tile; a small part of a mask may seem to fit anywhere
MIN_OVERLAP = 0.65  # share of the labelled pixels that must still lie in the tile
FARTHEST = 1 - MIN_OVERLAP  # share of each side by which a mask is shifted
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

    @property
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


class Criterion(Protocol):
    """How badly classes fit a tile, as maps for all shifts on the coarse grid and as numbers on the fine one."""

    def of_shifts(self, shares: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the criterion and the overlap in cells (h, w) for every cyclic shift of the classes' shares (h, w, n).

        The maps are padded, so the result is larger than they are.
        """

    def of_labels(self, labels: np.ndarray, cells: int) -> float:
        """Return the criterion for the classes, or IGNORE, at the centres (h, w) of the cells of a grid."""


def misregistration(criterion: Criterion, labels: np.ndarray) -> tuple[Move, float] | None:
    """Return how classes (H, W) uint8 lie off and the confidence in it; None if tile or mask are too plain to tell.

    Pixels are moved to the nearest ones, so that the criterion sees no blurred classes.
    """
    classes = [k for k in np.unique(labels) if k != IGNORE]
    if len(classes) < 2 or np.count_nonzero(labels != IGNORE) < LEAST_LABELLED * labels.size:
        return None
    cell = cell_size(labels.shape, COARSE)
    shares = cell_means(np.stack([labels == k for k in classes], axis=-1), cell)  # (h, w, n)
    in_place, candidates = search(criterion, shares, classes, cell)
    if not in_place > 0:
        return None
    promising = [move for value, move in candidates if value < (1 - LEAST_GAIN) * in_place]
    width = cell / 2, (ANGLES[1] - ANGLES[0]) / 2
    refined = [_refine(criterion, labels, move, MIDDLE, *width) for move in promising or [Move()]]
    _, best = min([(_cost(criterion, labels, Move(), MIDDLE), Move()), *refined], key=lambda one: one[0])
    if promising:
        best = _refine(criterion, labels, best, FINE, width[0] / 4, width[1] / 4, penalised=False)[1]
    best = Move(*(round(float(value), 1) + 0.0 for value in (best.right, best.down, best.clockwise)))
    in_place, moved = (fit(criterion, labels, move, FINE) for move in (Move(), best))
    return best, round(float(max(0.0, 1 - moved / in_place if in_place > 0 else 0.0)), 4)


def penalty(shift: float | np.ndarray, angle: float) -> float | np.ndarray:
    """Return what a shift, as a share of the tile's shorter side, and a rotation in degrees must gain."""
    return SHIFT_PENALTY * shift + TURN_PENALTY * abs(angle) / ANGLES.max()


def search(criterion: Criterion, shares: np.ndarray, classes: Sequence[int],
           cell: int) -> tuple[float, list[tuple[float, Move]]]:
    """Return the criterion in place and the moves that fit best on the coarse grid, each with its criterion.

    At most one move of each neighbourhood is returned.
    """
    found, in_place, (height, width, _) = [], np.inf, shares.shape
    for angle in ANGLES:
        values, overlap = criterion.of_shifts(turned(shares, angle), classes)
        if angle == 0:
            in_place = values[0, 0]
        y, x = np.meshgrid(*(fft.fftfreq(length, 1 / length) for length in values.shape), indexing="ij")
        allowed = (overlap >= MIN_OVERLAP * shares.sum()) & (abs(y) <= FARTHEST * height) & (abs(x) <= FARTHEST * width)
        costs = np.where(allowed, values + penalty(np.hypot(y, x) / min(height, width), angle), np.inf)
        best = costs.argmin()
        turn = Move(clockwise=float(angle))
        down, right = -turn.matrix @ (y.flat[best], x.flat[best]) * cell  # this step moves the turned mask back
        found.append((costs.flat[best], values.flat[best], Move(right, down, turn.clockwise)))
    chosen: list[tuple[float, Move]] = []
    for _, value, move in sorted(found, key=lambda one: one[0]):
        if len(chosen) < CANDIDATES and all(_are_apart(move, other, cell) for _, other in chosen):
            chosen.append((value, move))
    return in_place, chosen


def _are_apart(move: Move, other: Move, cell: int) -> bool:
    return (abs(move.clockwise - other.clockwise) > 2 * (ANGLES[1] - ANGLES[0])
            or np.hypot(move.right - other.right, move.down - other.down) > 3 * cell)


def turned(shares: np.ndarray, angle: float) -> np.ndarray:
    """Return shares (h, w, K) of classes turned back by an angle; nothing enters from outside."""
    if angle == 0:
        return shares
    move = Move(clockwise=angle)
    offset = move.of_points(np.zeros(2), shares.shape)
    return np.stack([affine_transform(shares[..., k], move.matrix, offset, order=1, mode="constant")
                     for k in range(shares.shape[-1])], axis=-1)


def _refine(criterion: Criterion, labels: np.ndarray, start: Move, cells: int, step: float,
            turn: float, penalised: bool = True) -> tuple[float, Move]:
    """Return the cost and the move that the simplex search of Nelder and Mead finds from a start.

    Penalties choose between moves. They would pull the one that is chosen towards no move.
    """
    cost = _cost if penalised else fit
    first = np.array([start.right, start.down, start.clockwise])
    simplex = first + np.array([[0, 0, 0], [step, 0, 0], [0, step, 0], [0, 0, turn]])
    found = minimize(lambda values: cost(criterion, labels, Move(*values), cells), first, method="Nelder-Mead",
                     options={"initial_simplex": simplex, "xatol": 0.1, "fatol": 1e-5, "maxfev": MOST_STEPS})
    return float(found.fun), Move(*found.x)


def _cost(criterion: Criterion, labels: np.ndarray, move: Move, cells: int) -> float:
    shift = np.hypot(move.right, move.down) / min(labels.shape)
    return fit(criterion, labels, move, cells) + penalty(shift, move.clockwise)


def fit(criterion: Criterion, labels: np.ndarray, move: Move, cells: int = MIDDLE) -> float:
    """Return the criterion of classes (H, W) that are moved back; WORST if too few of them stay in the tile."""
    cell, matrix = cell_size(labels.shape, cells), move.matrix
    y, x = (np.arange(length // cell) * cell for length in labels.shape)
    top, left = move.of_points(np.full(2, (cell - 1) / 2), labels.shape)
    rows = np.rint((top + matrix[0, 0] * y)[:, None] + matrix[0, 1] * x).astype(np.intp)
    columns = np.rint((left + matrix[1, 0] * y)[:, None] + matrix[1, 1] * x).astype(np.intp)
    height, width = labels.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    moved = labels.take(np.where(inside, rows * width + columns, 0))
    moved[~inside] = IGNORE
    labelled = np.count_nonzero(labels != IGNORE) / labels.size
    if np.count_nonzero(moved != IGNORE) < MIN_OVERLAP * labelled * moved.size:
        return WORST
    return criterion.of_labels(moved, cells)


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

    @cached_property
    def spectra(self) -> tuple[list[int], np.ndarray]:
        """The spectra of 1, of the colours, and of the sum of their squares, with the shape of the padded maps."""
        maps = np.moveaxis(self.grids[COARSE], -1, 0)
        maps = np.concatenate([np.ones((1, *maps.shape[1:])), maps, (maps**2).sum(0, keepdims=True)])
        shape = padded(maps.shape[1:])
        return shape, fft.rfft2(maps.astype(np.float32), shape)

    def of_shifts(self, shares: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        shape, spectra = self.spectra
        of_classes = fft.rfft2(np.moveaxis(shares, -1, 0).astype(np.float32), shape).conj()                 # (K, ...)
        counts = np.maximum(fft.irfft2(spectra[0] * of_classes, shape), 0)               # (K, h, w)
        sums = fft.irfft2(spectra[1:-1, None] * of_classes, shape)                       # (3, K, h, w)
        squares = fft.irfft2(spectra[-1] * of_classes.sum(0), shape)                     # (h, w)
        return _unexplained(counts, sums, squares), counts.sum(0)

    def of_labels(self, labels: np.ndarray, cells: int) -> float:
        flat, colours = labels.ravel(), self.grids[cells].reshape(-1, 3)
        counts = np.bincount(flat, minlength=256)[:IGNORE]
        classes = np.flatnonzero(counts)
        sums = np.stack([np.bincount(flat, colour, minlength=256)[classes] for colour in colours.T])  # (3, K)
        squares = self.squares[cells][flat != IGNORE].sum()
        return float(_unexplained(counts[classes].astype(float), sums, squares))

    @cached_property
    def squares(self) -> dict[int, np.ndarray]:
        return {cells: (colours**2).sum(-1).ravel() for cells, colours in self.grids.items()}


def _unexplained(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return the variance within classes over all variance, from pixels (K, ...) and sums of colours (3, K, ...).

    It is 1 where all variance of the overlap is less than LEAST_VARIANCE per pixel.
    """
    total = np.maximum(counts.sum(0), 1)
    of_mean = (sums.sum(1)**2).sum(0) / total
    between = np.divide(sums**2, counts, out=np.zeros_like(sums), where=counts > 0.5).sum((0, 1)) - of_mean
    variance = squares - of_mean
    return 1 - np.divide(between, variance, out=np.zeros_like(variance), where=variance > LEAST_VARIANCE * total)


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

    @cached_property
    def spectra(self) -> tuple[list[int], np.ndarray]:
        """The spectra of the criterion of each class and of 1, with the shape of the padded maps."""
        maps = np.moveaxis(self.grids[COARSE], -1, 0)
        maps = np.concatenate([maps, np.ones((1, *maps.shape[1:]))])
        shape = padded(maps.shape[1:])
        return shape, fft.rfft2(maps.astype(np.float32), shape)

    def of_shifts(self, shares: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        shape, spectra = self.spectra
        of_classes = fft.rfft2(np.moveaxis(shares, -1, 0).astype(np.float32), shape).conj()                 # (n, ...)
        overlap = np.maximum(fft.irfft2(spectra[-1] * of_classes.sum(0), shape), 0)      # (h, w)
        total = fft.irfft2((spectra[list(classes)] * of_classes).sum(0), shape)          # (h, w)
        return total / np.maximum(overlap, 1), overlap

    def of_labels(self, labels: np.ndarray, cells: int) -> float:
        labelled = labels != IGNORE
        of_classes = np.take_along_axis(self.grids[cells], np.where(labelled, labels, 0)[..., None], -1)[..., 0]
        return float(of_classes[labelled].mean()) if labelled.any() else WORST


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
    return rows.reshape(height, width, cell, -1).sum(axis=2) / cell**2


def padded(shape: tuple[int, ...]) -> list[int]:
    """Return the size at which cyclic shifts of maps by up to FARTHEST of each side do not wrap around."""
    return [fft.next_fast_len(length + int(FARTHEST * length), real=True) for length in shape]
