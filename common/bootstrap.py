"""Compute 95 % confidence intervals by the bootstrap: draw whole slides or patients at random, with replacement."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, stdtrit

RESAMPLES = 2000
FEWEST_GROUPS = 5  # with fewer groups, an interval contains the true value less often than 95 %


def resampled_weights(groups: Sequence[str], seed: int = 0) -> np.ndarray:
    """Return weights (1 + RESAMPLES, N) of N tiles: row 0 counts each tile once, the others are bootstrap samples.

    `groups` names the slide or patient of each tile. The tiles of a group are drawn together, since they resemble each
    other. A tile with the name "" is a group of its own. With fewer than `FEWEST_GROUPS` groups there is only row 0.
    """
    names = [group or i for i, group in enumerate(groups)]
    index_of_name = {name: index for index, name in enumerate(dict.fromkeys(names))}
    count = len(index_of_name)
    times_drawn = np.ones((1, count))
    if count >= FEWEST_GROUPS:
        random = np.random.default_rng(seed)
        samples = random.multinomial(count, np.full(count, 1 / count), RESAMPLES)    # (RESAMPLES, groups)
        times_drawn = np.vstack([times_drawn, samples])
    return times_drawn[:, [index_of_name[name] for name in names]]


def interval(values: np.ndarray, groups: int) -> tuple[float, float]:
    """Return the 95 % interval of a score, from its `values` (1 + R,) under the rows of `resampled_weights`.

    `groups` is the number of groups behind the score. The percentiles are widened for few groups, so that for a mean
    they give Student's interval (Hesterberg 2015, section 4.6). Both ends are NaN with fewer than `FEWEST_GROUPS`
    groups, or if the score is NaN in row 0 or in more than one of twenty samples.
    """
    samples = values[1:][~np.isnan(values[1:])]
    if len(values) == 1 or groups < FEWEST_GROUPS or np.isnan(values[0]) or len(samples) < 0.95 * (len(values) - 1):
        return math.nan, math.nan
    tail = ndtr(-math.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, 0.975))
    return tuple(np.quantile(samples, [tail, 1 - tail]).tolist())
