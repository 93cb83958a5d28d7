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

from common.config import Filter
from common.config_files import leaves
from evaluation.candidates import Candidate

SEED = re.compile(r"[-_.]?seed[-_.]?(\d+)")  # in the name of a run or of a folder of label images
Samples = dict[str, np.ndarray]  # every score under the bootstrap's weights: (R,) or (R, K + 1); row 0 is the score


@dataclass(frozen=True)
class Experiment:
    """A config with its runs, or any other candidate by itself."""

    name: str
    members: tuple[int, ...]  # places of its candidates, by their seeds
    seeds: tuple[int, ...] = ()  # of its runs, if there are several


def experiments_of(candidates: Sequence[Candidate]) -> list[Experiment]:
    """Find runs whose configs differ only in name, seed, device and place of the data, with a seed each.

    Label images of another tool are seeds of one experiment if their names say so, such as other-seed0 and other-seed1.
    """
    found: dict[object, list[int]] = {}
    for i, candidate in enumerate(candidates):
        found.setdefault(_without_seed(candidate), []).append(i)
    experiments = []
    for members in found.values():
        members = sorted(members, key=lambda i: _seed(candidates[i]))
        seeds = [_seed(candidates[i]) for i in members]
        if 1 < len(members) == len(set(seeds)):
            name = _common_name([candidates[i].name for i in members])
            if any(candidate.name == name for candidate in candidates):
                name += f" ({len(seeds)} seeds)"
            experiments.append(Experiment(name, tuple(members), tuple(seeds)))
        else:
            experiments += [Experiment(candidates[i].name, (i,)) for i in members]
    return sorted(experiments, key=lambda experiment: min(experiment.members))


def _seed(candidate: Candidate) -> int:
    number = SEED.search(candidate.name)
    return int(number.group(1)) if candidate.label_images and number else candidate.config.seed


def _without_seed(candidate: Candidate) -> tuple:
    """Return all that runs of one experiment have in common; tiles.csv says what came of the filter's settings."""
    if candidate.label_images:
        return "label images", _without_number(candidate.name)
    if not candidate.run:
        return "ensemble", candidate.name
    config = candidate.config
    data = replace(config.data, root="", cache="")
    return (replace(config, name="-", seed=0, device="auto", data=data, filter=Filter()), candidate.tiles_identity,
            candidate.source.name)


def explain_separate_seeds(candidates: Sequence[Candidate]) -> list[str]:
    """Say why runs are not one row although their names differ only in a seed."""
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.run and (name := _without_number(candidate.name)) != candidate.name:
            found.setdefault(name, []).append(candidate)
    reasons = []
    for first, *others in found.values():
        for other in others:
            ours, theirs = (dict(leaves(_without_seed(candidate)[0])) for candidate in (first, other))
            reason = next((f"{name} is {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]),
                          "tiles.csv or the checkpoints are others" if _without_seed(first) != _without_seed(other) else
                          f"both have seed={first.config.seed}" if first.config.seed == other.config.seed else "")
            if reason:
                reasons.append(f"{first.name} and {other.name} are not seeds of one config: {reason}")
    return reasons


def _without_number(name: str) -> str:
    return SEED.sub("", name)


def _common_name(names: Sequence[str]) -> str:
    """Return the name that they have without their seed: demo-seed0 and demo-seed1 are called demo."""
    common = {_without_number(name) for name in names}
    return common.pop() if len(common) == 1 and "" not in common else f"{names[0]} and {len(names) - 1} more"


def mean_samples(samples: Sequence[Samples]) -> Samples:
    """Average every score over the runs of an experiment."""
    return {name: np.mean([of_run[name] for of_run in samples], axis=0) for name in samples[0]}


def seed_margins(samples: Sequence[Samples]) -> Samples:
    """Return how far each score's mean over seeds may lie off because of the seeds, with 95 %; 0 for a single run."""
    return {name: _margin([of_run[name][0] for of_run in samples]) for name in samples[0]}


def seed_margins_of_difference(first: Sequence[Samples], other: Sequence[Samples], are_pairs: bool,
                               are_runs: bool) -> Samples:
    """Return the same for the difference of two experiments.

    With `are_pairs`, both have the same seeds in one order, and the differences of each seed count. Otherwise the
    experiments vary independently; if both `are_runs`, a single one is taken to vary like those of the other.
    """
    names = [name for name in other[0] if name in first[0]]
    if are_pairs:
        return {name: _margin([b[name][0] - a[name][0] for a, b in zip(first, other, strict=True)]) for name in names}
    margins = {}
    for name in names:
        a, b = ([of_run[name][0] for of_run in samples] for samples in (first, other))
        margins[name] = np.hypot(_margin(a, like=b if are_runs else ()), _margin(b, like=a if are_runs else ()))
    return margins


def _margin(values: Sequence[np.ndarray], like: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Return Student's margin of the mean of `values` with 95 %; a single one varies like the others, if there are."""
    known = values if len(values) > 1 else like
    if len(known) < 2:
        return np.zeros_like(values[0])
    return stdtrit(len(known) - 1, 0.975) * np.std(known, axis=0, ddof=1) / len(values) ** 0.5
