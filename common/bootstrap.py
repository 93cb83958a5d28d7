"""Confidence intervals: bootstrap over whole slides or patients."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, stdtrit

RESAMPLES = 2000
FEWEST_GROUPS = 5  # with fewer, no interval covers the truth as often as it says


def resampled_weights(groups: Sequence[str], seed: int = 0) -> np.ndarray:
    """Weights (1 + RESAMPLES, N) of the tiles: first the tiles as they are, then bootstrap samples of whole groups.

    Tiles of one slide or patient resemble each other: they are drawn together or not at all ("" = the tile alone).
    With fewer groups than `FEWEST_GROUPS` there is the first row only.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(group or i for i, group in enumerate(groups)))}
    member = [names[group or i] for i, group in enumerate(groups)]                   # (N,)
    drawn = np.ones((1, len(names)))
    if len(names) >= FEWEST_GROUPS:
        random = np.random.default_rng(seed)
        drawn = np.vstack([drawn, random.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)])
    return drawn[:, member]


def interval(values: np.ndarray, groups: int) -> tuple[float, float] | None:
    """The 95 % interval of a score whose (1 + R,) values, by `resampled_weights`, rest on so many groups.

    The percentile interval, expanded for few groups (Hesterberg 2015, section 4.6): its ends are those percentiles
    that would make it Student's interval for a mean. None with fewer than `FEWEST_GROUPS`, and where the
    score does not exist, or in more than one of twenty samples does not.
    """
    samples = values[1:][~np.isnan(values[1:])]
    if len(values) == 1 or groups < FEWEST_GROUPS or np.isnan(values[0]) or len(samples) < 0.95 * (len(values) - 1):
        return None
    end = ndtr(-math.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, 0.975))
    return tuple(np.quantile(samples, [end, 1 - end]).tolist())
