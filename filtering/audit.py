"""Measure how well the mask of a tile fits its image, and decide whether to drop it (report, sections 3.2.2 and 6.2.2).

`dataset.Tile` lists the measurements, from `foreground` to `confidence`.
"""

import numpy as np
from scipy import fft
from scipy.ndimage import gaussian_filter

from common.config import Filter
from dataset import Tile

CELLS = 64  # along the shorter side of a tile, when its mask is aligned with its image
MIN_OVERLAP = 0.5  # share of the tile that a shifted mask must still cover
SHIFT_PENALTY = 0.05  # by how much a shift across the whole tile must correlate better than no shift
FLAT_IMAGE, FLAT_MASK = 1.0, 0.01  # standard deviations of grey and of mask shares; below them nothing can be aligned
FLAT_OVERLAP = 1e-3  # share of the whole tile's variance; an overlap with less cannot be aligned
NO_CORRELATION = -2.0  # marks shifts that cannot be judged; others have at least -1


def verdict(tile: Tile, limits: Filter) -> str:
    """Return why a measured tile is dropped: the name of the first limit that it misses; "" if it is kept."""
    if tile.foreground is None:  # no pixel has a class
        return "unlabelled"
    if tile.foreground < limits.min_foreground:
        return "sparse"
    if _reaches(tile.blank, limits.max_blank):
        return "misregistered"
    if _reaches(tile.unmarked, limits.max_unmarked):
        return "unmarked"
    if _reaches(tile.shift, limits.max_shift) and tile.confidence >= limits.min_confidence:
        return "shifted"
    return ""


def _reaches(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value >= limit


def measure_tile(image: np.ndarray, annotated: np.ndarray, limits: Filter,
                 labelled: np.ndarray | None = None) -> dict[str, float | None]:
    """Return the measurements for tiles.csv of an image (H, W, 3) uint8; `annotated` (H, W) bool is not background.

    `labelled` (H, W) bool is where the mask gives a class; None: everywhere. Line 8 of Algorithm 1 divides by the
    number of glass pixels, which always gives 1. The number of annotated pixels is meant and used here; without any,
    `blank` is None. `unmarked` is a share of all labelled pixels, because a share of the annotated background would be
    large in every tile with little background.
    """
    inverted = inverted_grey(image)
    glass = find_glass(inverted, limits)
    shift_x, shift_y, confidence = misalignment(inverted, annotated, limits.sigma, labelled) or (None, None, None)
    unmarked = ~glass & ~annotated  # the image shows tissue, the mask says background
    pixels = unmarked.size
    if labelled is not None:
        unmarked, pixels = unmarked & labelled, np.count_nonzero(labelled)
    return {"blank": np.count_nonzero(glass & annotated) / np.count_nonzero(annotated) if annotated.any() else None,
            "unmarked": np.count_nonzero(unmarked) / pixels,
            "shift_x": shift_x, "shift_y": shift_y, "confidence": confidence}


def inverted_grey(image: np.ndarray) -> np.ndarray:
    """Return 255 minus the mean of red, green and blue of an image (H, W, 3) uint8, float64 (H, W)."""
    return 255 - image @ np.ones(3) / 3  # ten times as fast as image.mean(axis=2), and equal in every bit


def find_glass(inverted: np.ndarray, limits: Filter) -> np.ndarray:
    """Return where an image with this inverted grey (H, W) shows glass: (H, W) bool, lines 2 to 6 of Algorithm 1.

    Glass is where the smoothed inverted grey lies below `blank_intensity`. With blank_reference = maximum the grey is
    first divided by the tile's maximum and the limit by 255, as in the report's code. A white image is all glass.
    """
    smooth = gaussian_filter(inverted, limits.sigma)
    if limits.blank_reference == "absolute":
        return smooth < limits.blank_intensity
    if smooth.max() == 0:
        return np.ones(smooth.shape, bool)
    return smooth / smooth.max() < limits.blank_intensity / 255


def misalignment(inverted: np.ndarray, tissue: np.ndarray, sigma: float,
                 labelled: np.ndarray | None = None) -> tuple[float, float, float] | None:
    """Return by how many pixels the annotated tissue (H, W) bool lies too far right and too low, and a confidence.

    The result is None if the image or its annotation is flat. The inverted grey (H, W) of the image, smoothed as in
    Algorithm 1, stands for its tissue. The shift is the one with the highest normalised cross-correlation on the
    overlap of tile and shifted mask (Padfield 2012, "Masked object registration in the Fourier domain"), minus a small
    penalty for long shifts. It is found on cells of about 1/64 of the tile and refined by a parabola. With r the
    correlation at this shift and r0 the one without a shift, the confidence is 1 - (1 - r^2) / (1 - r0^2): of the
    variance that the mask does not explain in place, the share that it explains when shifted. Cells of which less than
    half is `labelled` (H, W) bool count as if the mask ended there.
    """
    cell = max(1, round(min(tissue.shape) / CELLS))
    sums = np.rint(3 * inverted)  # of three channels: whole numbers, whose means are exact
    darkness = gaussian_filter(_cell_means(sums, cell) / 3, sigma / cell)
    annotated = _cell_means(tissue, cell)
    usable = np.ones(annotated.shape, bool)
    if labelled is not None:
        share = _cell_means(labelled, cell)
        usable = share >= 0.5
        annotated = np.divide(annotated, share, out=np.zeros_like(annotated), where=usable)
        if usable.mean() < MIN_OVERLAP:
            return None
    if darkness.std() < FLAT_IMAGE or annotated[usable].std() < FLAT_MASK:
        return None
    correlation = _cross_correlation(darkness, annotated, usable)
    steps_y, steps_x = np.meshgrid(*map(_cyclic_steps, correlation.shape), indexing="ij")
    penalty = SHIFT_PENALTY * np.hypot(steps_y, steps_x) * cell / min(tissue.shape)
    y, x = np.unravel_index((correlation - penalty).argmax(), correlation.shape)
    correction_y = steps_y[y, x] + _vertex(correlation[:, x].take([y - 1, y, y + 1], mode="wrap"))
    correction_x = steps_x[y, x] + _vertex(correlation[y].take([x - 1, x, x + 1], mode="wrap"))
    # the correction moves the mask back, so the mask lies off in the other direction; + 0.0 turns -0.0 into 0.0
    shift_y, shift_x = (round(float(-correction * cell), 1) + 0.0 for correction in (correction_y, correction_x))
    aligned, unshifted = min(correlation[y, x], 1), np.clip(correlation[0, 0], 0, 1)
    confidence = 1 - (1 - aligned**2) / (1 - unshifted**2) if unshifted < 1 else 0.0
    return shift_x, shift_y, round(float(max(0.0, confidence)), 4) + 0.0


def _cell_means(values: np.ndarray, cell: int) -> np.ndarray:
    """Return the means of (H, W) over squares of `cell` pixels, float64; the lower and right remainder is cut off."""
    height, width = (length // cell for length in values.shape)
    rows = values[:height * cell, :width * cell].reshape(height, cell, -1).sum(axis=1, dtype=np.float64)
    return rows.reshape(height, width, cell).sum(axis=2) / cell**2


def _cyclic_steps(length: int) -> np.ndarray:
    """Return the shift in cells that each index of a cyclic axis stands for: 0, 1, 2, ..., -2, -1."""
    return np.fft.fftfreq(length, 1 / length)


def _vertex(values: np.ndarray) -> float:
    """Return where the parabola through values at -1, 0 and 1 is largest; 0 if nowhere or if a value is missing."""
    before, peak, after = values
    curvature = before - 2 * peak + after
    has_maximum = min(before, after) >= -1 and curvature < 0
    return (before - after) / (2 * curvature) if has_maximum else 0


def _cross_correlation(image: np.ndarray, mask: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Return the normalised cross-correlation of two maps (h, w) for every cyclic shift of the mask.

    Only the `labelled` (h, w) bool part of the mask counts. The maps are padded, so the result is larger than they are.
    It is NO_CORRELATION where the overlap is too small or one of the maps is flat on it.
    """
    shape = [fft.next_fast_len(2 * length - 1, real=True) for length in image.shape]
    image, mask = image - image.mean(), np.where(labelled, mask - mask[labelled].mean(), 0)
    ones, f_labelled, f_image, f_image2, f_mask, f_mask2 = (
        fft.rfft2(values, shape)
        for values in (np.ones_like(image), labelled.astype(float), image, image**2, mask, mask**2))
    count = np.maximum(1, np.rint(_overlap_sums(ones, f_labelled, shape)))
    image_sum, mask_sum = _overlap_sums(f_image, f_labelled, shape), _overlap_sums(ones, f_mask, shape)
    image_variance = _overlap_sums(f_image2, f_labelled, shape) - image_sum**2 / count
    mask_variance = _overlap_sums(ones, f_mask2, shape) - mask_sum**2 / count
    covariance = _overlap_sums(f_image, f_mask, shape) - image_sum * mask_sum / count
    usable = ((count >= MIN_OVERLAP * np.count_nonzero(labelled))
              & (image_variance > FLAT_OVERLAP * image_variance[0, 0])
              & (mask_variance > FLAT_OVERLAP * mask_variance[0, 0]))
    correlation = np.full(shape, NO_CORRELATION)
    np.divide(covariance, np.sqrt(np.maximum(image_variance * mask_variance, 0)), out=correlation, where=usable)
    return correlation


def _overlap_sums(left: np.ndarray, right: np.ndarray, shape: list[int]) -> np.ndarray:
    """Return, for every shift of `right`, the sum of left * right over the overlap; both are given as spectra."""
    return fft.irfft2(left * right.conj(), shape)
