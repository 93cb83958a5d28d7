"""What can be wrong with the mask of a tile, measured (report, sections 3.2.2 and 6.2.2).

    foreground   share of the mask that is not background (the 1 % rule)
    blank        share of the annotated tissue where the image shows glass (Algorithm 1)
    unmarked     the other direction: share of the tile where the image shows tissue and the mask says background
    shift_x, _y  pixels by which the mask lies too far right and too low, with a confidence

Algorithm 1 calls glass what is pale after a Gaussian of sigma pixels. Here the Gaussian is two products with banded
float32 matrices; the few pixels so close to the threshold that float32 could err are computed again in float64, so
that every pixel is judged as by `scipy.ndimage.gaussian_filter` in float64, in a fraction of its time.
"""

from functools import lru_cache

import numpy as np
from scipy import fft
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from common.config import Filter
from dataset import Tile

BLOCK = 64  # rows of a banded matrix that are multiplied at once
FEW = 40  # pixels that are computed again one by one; more of them cost less with the whole tile
CELLS = 64  # along the shorter side of a tile, when its mask is laid on its image
OVERLAP = 0.5  # share of the tile on which a shifted mask must still lie
FARNESS = 0.05  # by how much a shift across the whole tile must correlate better than none
FLAT_IMAGE, FLAT_MASK = 1.0, 0.01  # deviations, of greys and of shares, below which there is nothing to align
FLAT_PART = 1e-3  # share of the whole tile's sum of squares, below which an overlap shows nothing to align


def verdict(tile: Tile, limits: Filter) -> str:
    """Why a measured tile is to be dropped: sparse, misregistered, unmarked or shifted; "" if it is to be kept."""
    if tile.foreground < limits.min_foreground or tile.foreground == 0:
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


def measure_tile(image: np.ndarray, tissue: np.ndarray, limits: Filter) -> dict[str, float | None]:
    """The columns of tiles.csv for an image (H, W, 3) uint8 and its annotated tissue (H, W) bool, of a pixel or more.

    Line 8 of Algorithm 1 divides the glass under annotated tissue by its own count of pixels, which gives 1 always;
    meant, and done here, is the count of annotated pixels. `unmarked` is a share of the tile, since a share of the
    annotated background would be large wherever there is little background.
    """
    darkness = sum_inverted(image)
    glass = find_glass(darkness, limits)
    shift_x, shift_y, confidence = misalignment(darkness, tissue, limits.sigma) or (None, None, None)
    return {"blank": float(np.count_nonzero(glass & tissue) / np.count_nonzero(tissue)),
            "unmarked": float(np.count_nonzero(~(glass | tissue)) / tissue.size),
            "shift_x": shift_x, "shift_y": shift_y, "confidence": confidence}


def sum_inverted(image: np.ndarray) -> np.ndarray:
    """The darkness of an image (H, W, 3) uint8: 765 less red, green and blue, (H, W) float32, whole numbers."""
    total = image.reshape(-1, 3).astype(np.float32) @ np.ones(3, np.float32)
    return (765 - total).reshape(image.shape[:2])


def find_glass(darkness: np.ndarray, limits: Filter) -> np.ndarray:
    """Where an image of this darkness (H, W) shows glass: (H, W) bool, lines 2 to 6 of Algorithm 1.

    Glass is where the smoothed inverted grey lies below `blank_intensity`; with blank_reference = maximum both are
    divided, by the tile's maximum and by 255, as in the report's code. What is white throughout is glass in both.
    """
    smooth, error = smooth_inverted(darkness, limits.sigma)
    scale, limit = 1.0, limits.blank_intensity
    if limits.blank_reference == "maximum":
        scale, limit = _exact(darkness, smooth >= smooth.max() - 2 * error, limits.sigma).max(), limit / 255
        if scale == 0:
            return np.ones(smooth.shape, bool)
    glass = smooth < limit * scale
    near = np.abs(smooth - limit * scale) <= error
    if near.any():
        glass[near] = _exact(darkness, near, limits.sigma) / scale < limit
    return glass


def smooth_inverted(darkness: np.ndarray, sigma: float) -> tuple[np.ndarray, float]:
    """A third of the darkness (H, W), smoothed by a Gaussian, in float32; and the most that it can be off.

    The bound is that of float32 sums in any order: one rounding of 2^-24 for each term of either product.
    """
    height, width = darkness.shape
    half = _multiply(_banded_gaussian(width, sigma), darkness.T / 3)                     # (W, H)
    error = 255 * 2.0**-24 * (2 * (2 * _radius(sigma) + 1) + 6)
    return _multiply(_banded_gaussian(height, sigma), half.T), error


def _radius(sigma: float) -> int:
    return int(4 * sigma + 0.5)  # where scipy cuts the Gaussian off


@lru_cache(maxsize=8)
def _banded_gaussian(length: int, sigma: float) -> list[tuple[slice, slice, np.ndarray]]:
    """scipy's Gaussian along an axis as a matrix, (length, length), in blocks: output rows, input rows, weights."""
    blocks = []
    for start in range(0, length, BLOCK):
        rows = slice(start, min(start + BLOCK, length))
        band = slice(max(0, start - _radius(sigma)), min(length, rows.stop + _radius(sigma)))
        impulses = np.zeros((length, band.stop - band.start))
        impulses[band] = np.eye(band.stop - band.start)
        blocks.append((rows, band, gaussian_filter1d(impulses, sigma, axis=0)[rows].astype(np.float32)))
    return blocks


def _multiply(blocks: list[tuple[slice, slice, np.ndarray]], values: np.ndarray) -> np.ndarray:
    product = np.empty(values.shape, np.float32)
    for rows, band, weights in blocks:
        np.matmul(weights, values[band], out=product[rows])
    return product


def _exact(darkness: np.ndarray, where: np.ndarray, sigma: float) -> np.ndarray:
    """The smoothed inverted grey at the pixels `where` (H, W) bool, as scipy gives it in float64: lines 2 to 4."""
    pixels = np.flatnonzero(where)
    if len(pixels) > FEW:
        return gaussian_filter(_inverted(darkness), sigma)[where]
    values, radius = np.empty(len(pixels)), _radius(sigma)
    for i, (y, x) in enumerate(zip(*divmod(pixels, where.shape[1]), strict=True)):
        # what the Gaussian sees from this pixel; at the tile's edge scipy mirrors
        top, left = max(0, y - radius), max(0, x - radius)
        seen = _inverted(darkness[top:y + radius + 1, left:x + radius + 1])
        row = gaussian_filter1d(seen, sigma, axis=0)[y - top]
        values[i] = gaussian_filter1d(row, sigma)[x - left]
    return values


def _inverted(darkness: np.ndarray) -> np.ndarray:
    """255 - the mean of red, green and blue, to the last bit of float64."""
    return 255.0 - (765.0 - darkness.astype(np.float64)) / 3.0


def misalignment(darkness: np.ndarray, tissue: np.ndarray, sigma: float) -> tuple[float, float, float] | None:
    """How far the mask's tissue (H, W) bool lies off the image's: pixels to the right, pixels down, and a confidence
    from 0 to 1; None where either is flat.

    The image's tissue is its darkness (H, W), smoothed as in Algorithm 1. The shift is the one with the highest
    normalised cross-correlation on the part where tile and shifted mask overlap (Padfield 2012, "Masked object
    registration in the Fourier domain"), on cells of about 1/64 of the tile, refined by a parabola; of two that are
    nearly as good it is the nearer one. With r the correlation there and r0 the one without a shift, the confidence is
    1 - (1 - r^2) / (1 - r0^2): the share of what the mask does not explain of the image that it explains once shifted.
    """
    cell = max(1, round(min(tissue.shape) / CELLS))
    of_image = gaussian_filter(_cells(darkness, cell) / 3, sigma / cell)
    of_mask = _cells(tissue, cell)
    if of_image.std() < FLAT_IMAGE or of_mask.std() < FLAT_MASK:
        return None
    correlation = _correlation(of_image, of_mask)
    steps = np.meshgrid(*(np.fft.fftfreq(length, 1 / length) for length in correlation.shape), indexing="ij")
    penalty = FARNESS * np.hypot(*steps) * cell / min(tissue.shape)
    best = np.unravel_index((correlation - penalty).argmax(), correlation.shape)
    shift = []
    for axis in (0, 1):
        before, after = (correlation[tuple(np.add(best, step) % correlation.shape)]
                         for step in (-np.eye(2, dtype=int)[axis], np.eye(2, dtype=int)[axis]))
        curvature = before - 2 * correlation[best] + after
        inner = min(before, after) >= -1 and curvature < 0
        moved = steps[axis][best] + ((before - after) / (2 * curvature) if inner else 0)
        shift.append(round(float(-moved * cell), 1) + 0.0)  # the mask moves back by what it lies off; no -0.0
    aligned, as_is = min(correlation[best], 1), np.clip(correlation[0, 0], 0, 1)
    confidence = 1 - (1 - aligned**2) / (1 - as_is**2) if as_is < 1 else 0.0
    return shift[1], shift[0], round(float(max(0.0, confidence)), 4) + 0.0


def _cells(values: np.ndarray, cell: int) -> np.ndarray:
    """Means of whole numbers (H, W) over squares of `cell` pixels, float64; the lower and right remainder is cut off.

    The sums are exact, so that the number of threads changes no measurement.
    """
    height, width = (length // cell for length in values.shape)
    rows = values[:height * cell, :width * cell].reshape(height, cell, -1).sum(axis=1, dtype=np.float32)
    return rows.reshape(height, width, cell).sum(axis=2, dtype=np.float64) / cell**2


def _overlap(length: int, padded: int) -> np.ndarray:
    """Cells that two rows of cells share, for every cyclic shift of one of them; at least 1."""
    return np.maximum(1, length - np.abs(np.fft.fftfreq(padded, 1 / padded)))


def _correlation(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Normalised cross-correlation of two maps (h, w) for every shift of the mask, cyclic; -2 where there is none."""
    shape = [fft.next_fast_len(2 * length - 1, real=True) for length in image.shape]
    image, mask = image - image.mean(), mask - mask.mean()

    def spectrum(values: np.ndarray) -> np.ndarray:
        return fft.rfft2(values, shape)

    def sums(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """For every shift the sum of left times shifted right over the overlap."""
        return fft.irfft2(left * right.conj(), shape)

    everywhere, of_image, of_mask = (spectrum(values) for values in (np.ones_like(image), image, mask))
    count = np.outer(*(_overlap(length, padded) for length, padded in zip(image.shape, shape, strict=True)))
    image_sum, mask_sum = sums(of_image, everywhere), sums(everywhere, of_mask)
    image_variance = sums(spectrum(image**2), everywhere) - image_sum**2 / count
    mask_variance = sums(everywhere, spectrum(mask**2)) - mask_sum**2 / count
    covariance = sums(of_image, of_mask) - image_sum * mask_sum / count
    usable = ((count >= OVERLAP * image.size) & (image_variance > FLAT_PART * image_variance[0, 0])
              & (mask_variance > FLAT_PART * mask_variance[0, 0]))
    correlation = np.full(shape, -2.0)
    np.divide(covariance, np.sqrt(np.maximum(image_variance * mask_variance, 0)), out=correlation, where=usable)
    return correlation
