"""Repair a mask that lies off or contradicts its image, instead of dropping the tile.

A mask that lies off with certainty is moved back. Areas in which it then still contradicts the image, and what enters
from outside, lose their class (IGNORE). With predictions of a model, so do areas in which the model is sure of another
class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt

from common.config import Filter
from common.masks import IGNORE
from filtering.audit import compare_with_glass, contradicted, disputed, reaches
from filtering.registration import Colours, Mask, Move, fit

MOST_CONTRADICTED = 0.05  # share of the labelled pixels that may contradict the image after a move


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
    colours no worse than in place, and hardly contradict the glass. A mask that lies off with certainty, but fits
    nowhere, is not repaired.
    """
    colours, mask = Colours(image, limits.sigma), Mask(labels)
    in_place = fit(colours, mask, Move()) if moves else 0.0
    for move in moves:
        moved = move.undo(labels)
        left = np.count_nonzero(moved != IGNORE)
        if (left and np.count_nonzero(contradicted(moved, glass, limits)) <= MOST_CONTRADICTED * left
                and fit(colours, mask, move) <= in_place):
            return _without_doubt(labels, moved, glass, limits, probs, _describe(move))
    is_off = any(reaches(move.length(labels.shape), limits.max_shift) for move in moves)
    if is_off and not _contradicts(labels, glass, limits):  # else tissue that was left out may look like a move
        return NewMask(None, None, "the mask lies off, but fits nowhere")
    return _without_doubt(labels, labels, glass, limits, probs, "")


def relabel(labels: np.ndarray, probs: np.ndarray, limits: Filter) -> NewMask:
    """Return what a model predicts by `probs` (H, W, K) where it is sure, IGNORE elsewhere (section 7)."""
    is_sure = (probs.max(-1) >= limits.sure) & (labels != IGNORE)
    predicted = np.where(is_sure, probs.argmax(-1), IGNORE).astype(np.uint8)
    return _checked(labels, predicted, None, limits, "the model's prediction where it is sure")


def wide_areas(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Return the parts of (H, W) bool into which a disc of this radius fits, with a rim of twice the radius."""
    inner = distance_transform_edt(np.pad(pixels, 1, mode="edge"))[1:-1, 1:-1] > radius
    return distance_transform_edt(~inner) <= 3 * radius if inner.any() else inner


def _without_doubt(given: np.ndarray, labels: np.ndarray, glass: np.ndarray, limits: Filter,
                   probs: np.ndarray | None, what: str) -> NewMask:
    """Return classes (H, W) without those in doubt: the borders of glass are known to about half of sigma."""
    doubtful = wide_areas(contradicted(labels, glass, limits), limits.sigma / 2)
    if probs is not None:
        doubtful |= wide_areas(disputed(labels, probs, limits.sure), limits.sigma / 2)
    return _checked(given, np.where(doubtful, np.uint8(IGNORE), labels), glass, limits, what, probs)


def _checked(given: np.ndarray, labels: np.ndarray, glass: np.ndarray | None, limits: Filter, what: str,
             probs: np.ndarray | None = None) -> NewMask:
    """Return the new mask unless too much of it has no class, or the limits would drop it, too."""
    if (labels == given).all():
        return NewMask(None, None, "nothing in the mask can be repaired")
    labelled = labels != IGNORE
    before, left = np.count_nonzero(given != IGNORE), np.count_nonzero(labelled)
    ignored = 1 - left / labels.size
    lost = 1 - left / max(before, 1)
    if lost > limits.max_ignored:
        return NewMask(None, ignored, f"a new mask would lose {lost:.0%} of its pixels to ignore")
    if np.count_nonzero(labels[labelled]) < limits.min_foreground * left:
        return NewMask(None, ignored, "a new mask would have too little tissue")
    if glass is not None and _contradicts(labels, glass, limits):
        return NewMask(None, ignored, "a new mask would still contradict the image too much")
    if glass is not None and probs is not None and reaches(
            np.count_nonzero(disputed(labels, probs, limits.sure)) / left, limits.max_disagreement):
        return NewMask(None, ignored, "a new mask would still be disputed too much")
    parts = [what, f"{lost:.1%} ignored" if lost else ""]
    return NewMask(labels, ignored, ", ".join(part for part in parts if part))


def _contradicts(labels: np.ndarray, glass: np.ndarray, limits: Filter) -> bool:
    """Return whether the limits of Algorithm 1 or of unmarked tissue would drop classes (H, W)."""
    shares = compare_with_glass(labels, glass)
    return reaches(shares["blank"], limits.max_blank) or reaches(shares["unmarked"], limits.max_unmarked)


def _describe(move: Move) -> str:
    turned = f", turned by {-move.clockwise:+.1f} degrees" if move.clockwise else ""
    return f"moved by {0 - move.right:+.1f}, {0 - move.down:+.1f} px{turned}"
