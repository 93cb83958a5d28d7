"""Take the runs of one config that differ only in their seed as one row: an experiment.

The interval of an experiment's score holds two sources of chance: which slides are in the test set (bootstrap), and
which seeds were trained (Student's interval of the mean over seeds). Their margins add in squares (MOVER, Zou and
Donner 2008), so that the interval stays lopsided where the bootstrap is. With few seeds it is wide, as it should be.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from evaluation.candidates import Candidate

Samples = dict[str, np.ndarray]  # every score under the bootstrap's weights: (R,) or (R, K + 1); row 0 is the score


@dataclass(frozen=True)
class Experiment:
    """A config with its runs, or any other candidate by itself."""

    name: str
    members: tuple[int, ...]  # places of its candidates
    seeds: tuple[int, ...] = ()  # of its runs, in the same order, if there are several


def experiments_of(candidates: Sequence[Candidate]) -> list[Experiment]:
    """Find runs whose configs differ only in name, seed, device and place of the data, with a seed each."""
    found: dict[object, list[int]] = {}
    for i, candidate in enumerate(candidates):
        found.setdefault(_without_seed(candidate) if candidate.run else i, []).append(i)
    experiments = []
    for members in found.values():
        seeds = [candidates[i].config.seed for i in members]
        if 1 < len(members) == len(set(seeds)):
            names = [candidates[i].name for i in members]
            experiments.append(Experiment(_common_name(names), tuple(members), tuple(seeds)))
        else:
            experiments += [Experiment(candidates[i].name, (i,)) for i in members]
    return sorted(experiments, key=lambda experiment: experiment.members[0])


def _without_seed(candidate: Candidate) -> tuple:
    config = candidate.config
    data = replace(config.data, root="", cache="")
    return replace(config, name="-", seed=0, device="auto", data=data), candidate.source.name


def _common_name(names: Sequence[str]) -> str:
    """Return the name that they have without their seed: demo-seed0 and demo-seed1 are called demo."""
    common = {re.sub(r"[-_.]?seed[-_.]?\d+", "", name) for name in names}
    return common.pop() if len(common) == 1 and "" not in common else f"{names[0]} and {len(names) - 1} more"


def mean_samples(samples: Sequence[Samples]) -> Samples:
    """Average every score over the runs of an experiment."""
    return {name: np.mean([of_run[name] for of_run in samples], axis=0) for name in samples[0]}


def seed_margins(samples: Sequence[Samples]) -> Samples:
    """Return how far each score's mean over seeds may lie off because of the seeds, with 95 %; 0 for a single run."""
    return {name: _margin([of_run[name][0] for of_run in samples]) for name in samples[0]}


def seed_margins_of_difference(first: Sequence[Samples], other: Sequence[Samples], are_pairs: bool) -> Samples:
    """Return the same for the difference of two experiments.

    With `are_pairs`, both have the same seeds in one order, and the differences of each seed count. Otherwise the
    experiments vary independently. A single run is then taken to vary like the runs of the other experiment.
    """
    names = [name for name in other[0] if name in first[0]]
    if are_pairs:
        return {name: _margin([b[name][0] - a[name][0] for a, b in zip(first, other, strict=True)]) for name in names}
    margins = {}
    for name in names:
        a, b = ([of_run[name][0] for of_run in samples] for samples in (first, other))
        margins[name] = np.hypot(_margin(a, like=b), _margin(b, like=a))
    return margins


def _margin(values: Sequence[np.ndarray], like: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Return Student's margin of the mean of `values` with 95 %; a single one varies like the others, if there are."""
    known = values if len(values) > 1 else like
    if len(known) < 2:
        return np.zeros_like(values[0])
    return stdtrit(len(known) - 1, 0.975) * np.std(known, axis=0, ddof=1) / len(values) ** 0.5
