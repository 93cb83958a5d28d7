"""Measure how well the mask of a tile fits its image, and decide whether to drop it (report, sections 3.2.2 and 6.2.2).

`dataset.Tile` lists the measurements, from `foreground` to `model_confidence`.
"""

import numpy as np
from scipy.ndimage import gaussian_filter

from common.config import Filter
from common.masks import IGNORE
from dataset import Tile
from filtering.registration import Colours, Move, Predictions, misregistration

TEMPERATURE = 0.1  # of the softmin that gives the quality of labels


def verdict(tile: Tile, limits: Filter) -> str:
    """Return why a measured tile is dropped: the name of the first limit that it misses; "" if it is kept."""
    if tile.foreground is None:  # no pixel has a class
        return "unlabelled"
    if tile.foreground < limits.min_foreground:
        return "sparse"
    if reaches(tile.blank, limits.max_blank):
        return "misregistered"
    if reaches(tile.unmarked, limits.max_unmarked):
        return "unmarked"
    if any(reaches(shift, limits.max_shift) for shift in certain_shifts(tile, limits)):
        return "shifted"
    if reaches(tile.disagreement, limits.max_disagreement):
        return "disputed"
    return ""


def reaches(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value >= limit


def certain_shifts(tile: Tile, limits: Filter) -> list[float]:
    """Return the shifts that were measured, by the image and by a model; 0 for those that are not certain."""
    found = ((tile.shift, tile.confidence), (tile.model_shift, tile.model_confidence))
    return [shift if (confidence or 0) >= limits.min_confidence else 0.0
            for shift, confidence in found if shift is not None]


def certain_moves(tile: Tile, limits: Filter) -> list[Move]:
    """Return how the mask lies off with certainty: according to a model, if one was asked, and to the image."""
    found = [(tile.model_shift_x, tile.model_shift_y, tile.model_angle, tile.model_confidence),
             (tile.shift_x, tile.shift_y, tile.angle, tile.confidence)]
    return [Move(right, down, angle) for right, down, angle, confidence in found
            if confidence is not None and confidence >= limits.min_confidence and any((right, down, angle))]


def measure_tile(image: np.ndarray, labels: np.ndarray, limits: Filter,
                 glass: np.ndarray | None = None) -> dict[str, float | None]:
    """Return the measurements for tiles.csv of an image (H, W, 3) and its classes (H, W), both uint8.

    `glass` is that of `find_glass`, if it is known. Pixels without a class (IGNORE) do not count. Line 8 of Algorithm 1
    divides by the number of glass pixels, which always gives 1. The number of annotated pixels is meant and used here;
    without any, `blank` is None. `unmarked` is a share of all labelled pixels, because a share of the annotated
    background would be large in every tile with little background.
    """
    glass = find_glass(inverted_grey(image), limits) if glass is None else glass
    return {**compare_with_glass(labels, glass),
            **_measured_move("", misregistration(Colours(image, limits.sigma), labels), labels.shape)}


def compare_with_glass(labels: np.ndarray, glass: np.ndarray) -> dict[str, float | None]:
    """Return the shares `blank` and `unmarked` of classes (H, W) uint8; `glass` is (H, W) bool."""
    labelled = labels != IGNORE
    annotated = (labels > 0) & labelled
    unmarked = ~glass & ~annotated & labelled  # the image shows tissue, the mask says background
    return {"blank": np.count_nonzero(glass & annotated) / np.count_nonzero(annotated) if annotated.any() else None,
            "unmarked": np.count_nonzero(unmarked) / max(1, np.count_nonzero(labelled))}


def ask_model(probs: np.ndarray, labels: np.ndarray, limits: Filter) -> dict[str, float | None]:
    """Return the measurements of classes (H, W) uint8 against the probabilities (H, W, K) that a model predicts.

    The quality is the softmin over the pixels of the probability of the given class, which a few bad areas lower much
    more than its mean (Lad and Mueller 2023, "Estimating label quality and errors in semantic segmentation data via any
    model").
    """
    labelled = labels != IGNORE
    given = np.take_along_axis(probs, np.where(labelled, labels, 0)[..., None], axis=-1)[..., 0][labelled]
    if not given.size:
        return {}
    weights = np.exp((1 - given) / TEMPERATURE)
    wrong = np.count_nonzero(disputed(labels, probs, limits.sure))
    return {"quality": float((given * weights).sum() / weights.sum()), "disagreement": wrong / given.size,
            **_measured_move("model_", misregistration(Predictions(probs), labels), labels.shape)}


def disputed(labels: np.ndarray, probs: np.ndarray, sure: float) -> np.ndarray:
    """Return where a model is sure of another class than (H, W) say: (H, W) bool."""
    return (labels != IGNORE) & (probs.argmax(-1) != labels) & (probs.max(-1) >= sure)


def contradicted(labels: np.ndarray, glass: np.ndarray, limits: Filter) -> np.ndarray:
    """Return where classes (H, W) say tissue and the image shows glass, or the other way round: (H, W) bool.

    A contradiction counts only if it has a limit. Without `max_unmarked`, for example, background may mean more than
    glass, such as everything outside glands.
    """
    on_glass, left_out = (labels > 0) & glass, (labels == 0) & ~glass
    return (labels != IGNORE) & ((on_glass & (limits.max_blank is not None))
                                 | (left_out & (limits.max_unmarked is not None)))


def _measured_move(prefix: str, found: tuple[Move, float] | None, shape: tuple[int, ...]) -> dict[str, float | None]:
    names = [f"{prefix}{name}" for name in ("shift_x", "shift_y", "angle", "shift", "confidence")]
    if found is None:
        return dict.fromkeys(names)
    move, confidence = found
    values = (move.right, move.down, move.clockwise, round(move.length(shape), 1), confidence)
    return dict(zip(names, values, strict=True))


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
