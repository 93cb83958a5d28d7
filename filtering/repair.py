"""Repair a mask that lies off or contradicts its image, instead of dropping the tile.

A mask that lies off with certainty is moved back. Areas in which it then still contradicts the image, and what enters
from outside, lose their class (IGNORE). With predictions of a model, so do areas in which the model is sure of another
class. What comes out is measured like a given mask, and has to pass the same limits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import distance_transform_edt

from common.config import Filter
from common.masks import IGNORE
from dataset import Tile
from filtering.audit import ask_model, contradicted, disputed, measure_tile, verdict
from filtering.registration import Colours, Mask, Move, fit

MOST_CONTRADICTED = 0.05  # share of the labelled pixels that may contradict the image after a move
WOULD = {  # what is wrong with a new mask, by the verdict on it
    "unlabelled": "have no labelled pixel", "sparse": "have too little tissue",
    "misregistered": "still say tissue where the image shows glass", "unmarked": "still leave out tissue",
    "shifted": "still lie off", "disputed": "still be disputed",
}


@dataclass(frozen=True)
class NewMask:
    """A mask in place of the given one, or why there is none."""

    labels: np.ndarray | None  # (H, W) uint8, classes or IGNORE
    ignored: float | None = None  # share of the pixels that lose their class
    what: str = ""  # what was done, or why nothing was


def repair(image: np.ndarray, labels: np.ndarray, glass: np.ndarray, moves: Sequence[Move], limits: Filter,
           probs: np.ndarray | None = None) -> NewMask:
    """Return a repaired mask for the image (H, W, 3) and its classes (H, W), or none if the limits would drop it, too.

    `glass` (H, W) bool is where the image shows glass, `moves` are those that are certain, the best first, and `probs`
    (H, W, K) what a model says. The first move counts after which the mask fits the image: its classes explain the
    colours no worse than in place, and hardly contradict the glass. If none does, the mask stays in place: tissue that
    was left out may look like a move, which is gone when these areas have no class. Else the mask is not repaired.
    """
    colours, mask = Colours(image, limits.sigma), Mask(labels)
    in_place = fit(colours, mask, Move()) if moves else 0.0
    new, what = labels, ""
    for move in moves:
        moved = move.undo(labels)
        left = np.count_nonzero(moved != IGNORE)
        if (left and np.count_nonzero(contradicted(moved, glass, limits)) <= MOST_CONTRADICTED * left
                and fit(colours, mask, move) <= in_place):
            new, what = moved, _describe(move)
            break
    doubtful = wide_areas(contradicted(new, glass, limits), limits.sigma / 2)  # the borders of glass are smoothed
    if probs is not None:
        doubtful |= wide_areas(disputed(new, probs, limits.sure), limits.sigma / 2)
    new = np.where(doubtful, np.uint8(IGNORE), new)
    if (new == labels).all():
        return NewMask(None, None, "nothing in the mask can be repaired")
    if not moves:  # what is left of a mask in place may be too little to tell that it is
        limits = replace(limits, max_shift=None)
    measured = measure_tile(image, new, limits, glass)
    if probs is not None:
        measured |= ask_model(probs, new, limits)
    return _checked(labels, new, measured, limits, what)


def relabel(labels: np.ndarray, probs: np.ndarray, limits: Filter) -> NewMask:
    """Return what a model predicts by `probs` (H, W, K) where it is sure, IGNORE elsewhere (section 7)."""
    is_sure = (probs.max(-1) >= limits.sure) & (labels != IGNORE)
    predicted = np.where(is_sure, probs.argmax(-1), IGNORE).astype(np.uint8)
    return _checked(labels, predicted, {}, limits, "the model's prediction where it is sure")


def wide_areas(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Return the parts of (H, W) bool into which a disc of this radius fits, with a rim of twice the radius."""
    inner = distance_transform_edt(np.pad(pixels, 1, mode="edge"))[1:-1, 1:-1] > radius
    return distance_transform_edt(~inner) <= 3 * radius if inner.any() else inner


def _checked(given: np.ndarray, labels: np.ndarray, measured: Mapping[str, float | None], limits: Filter,
             what: str) -> NewMask:
    """Return the new mask unless too much of it has no class, or the limits would drop it, too."""
    labelled = labels != IGNORE
    before, left = np.count_nonzero(given != IGNORE), np.count_nonzero(labelled)
    ignored = 1 - left / labels.size
    lost = 1 - left / max(before, 1)
    if lost > limits.max_ignored:
        return NewMask(None, ignored, f"a new mask would lose {lost:.0%} of its pixels to ignore")
    foreground = np.count_nonzero(labels[labelled]) / left if left else None
    problem = verdict(Tile("", "", "", foreground=foreground, **measured), limits)
    if problem:
        return NewMask(None, ignored, f"a new mask would {WOULD[problem]}")
    parts = [what, f"{lost:.1%} ignored" if lost > 0 else ""]  # a rotation may round up
    return NewMask(labels, ignored, ", ".join(part for part in parts if part))


def _describe(move: Move) -> str:
    turned = f", turned by {-move.clockwise:+.1f} degrees" if move.clockwise else ""
    return f"moved by {0 - move.right:+.1f}, {0 - move.down:+.1f} px{turned}"
