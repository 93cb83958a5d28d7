"""fields/numbers.py: radii, fits and rows, against counting and loops."""

import math
import warnings

import numpy as np
import pytest

import receptive_field
from fields import gradients, numbers
from fields.gradients import TRAINED
from fields.theory import path_names


def test_radii_equal_those_by_counting():
    random, around = np.random.default_rng(0), gradients.rings_around(9)
    squares = random.random((19, 19)) ** 8
    energy = np.bincount(around.ravel(), squares.ravel())
    for share in (0.5, 0.9, 0.95):
        radius = numbers.radii(energy, share)
        steps = np.arange(-9, 10)
        inside = [squares[np.hypot.outer(steps, steps) <= r + 1e-9].sum() for r in (radius - 0.25, radius)]
        assert inside[0] < share * squares.sum() <= inside[1] * (1 + 1e-12)
    assert np.isnan(numbers.radii(np.zeros(5), 0.5))


def test_the_fit_finds_a_gaussian_and_the_misfit_of_other_maps():
    steps = np.arange(-30, 31)
    distance = np.hypot.outer(steps, steps)
    height, sigma, error, misfit = numbers.fit_gaussian(7 * np.exp(-distance**2 / (2 * 4.5**2)))
    assert (height, sigma) == pytest.approx((7, 4.5)) and error < 1e-6 and misfit < 1e-6
    noise = np.random.default_rng(0).normal(0, 0.01, distance.shape)
    _, sigma, error, misfit = numbers.fit_gaussian(np.exp(-distance**2 / (2 * 4.5**2)) + noise)
    assert abs(sigma - 4.5) < 4 * error < 0.1
    spike = np.exp(-distance)
    _, sigma, _, misfit = numbers.fit_gaussian(spike)
    best = min(np.linalg.norm(spike - a * np.exp(-distance**2 / (2 * sigma**2))) for a in np.linspace(0.1, 1, 1000))
    assert misfit == pytest.approx(best / np.linalg.norm(spike), rel=1e-4) and misfit > 0.1
    assert all(map(math.isnan, numbers.fit_gaussian(np.zeros((5, 5)))))
    with warnings.catch_warnings(action="error"):
        assert not numbers.fit_gaussian(np.eye(9)[4] * np.eye(9)[4][:, None])[1] > 0.7  # one pixel: tiny or none


def test_the_extent_is_where_the_map_is_not_zero():
    strength = np.zeros((11, 11))
    strength[2, 6] = strength[5, 9] = 1e-300
    assert numbers.extent(strength) == (-3, 0, 1, 4) and numbers.extent(np.zeros((3, 3))) is None


def test_rows_describe_their_pixels_and_logits(candidate):
    run, = receptive_field.measure_runs([candidate], "all", 5)
    field, classes = run.fields[TRAINED], candidate.config.data.classes
    rows = {(row["inside"], row["logit"]): row for row in numbers.field_rows(run) if row["input"] == "tiles"
            and row["weights"] == "trained"}
    for inside, name in enumerate(classes):
        for logit, other in enumerate(classes):
            energy = sum(field.energy[i, logit] for i in range(len(field.pixels)) if field.pixels.classes[i] == inside)
            for column, share in numbers.ENERGIES.items():
                assert rows[name, other][column] == numbers.radii(energy, share)
                even = sum(field.energy[i, logit] / field.energy[i, logit].sum()
                           for i in np.flatnonzero(field.pixels.classes == inside))
                assert rows[name, other][f"{column}_even"] == numbers.radii(even, share)
            each = [field.energy[i, logit].sum() for i in np.flatnonzero(field.pixels.classes == inside)]
            assert rows[name, other]["effective_pixels"] == pytest.approx(sum(each) ** 2 / sum(e * e for e in each))
            fit = numbers.fit_gaussian(field.maps[inside, logit])
            assert (rows[name, other]["sigma"], rows[name, other]["misfit"]) == fit[1::2]
    assert len({row["sigma"] for row in rows.values()}) == 16
    paths = {(row["inside"], row["path"]): row for row in numbers.path_rows(run)}
    for inside, name in enumerate(classes):
        chosen = field.pixels.classes == inside
        whole, left = field.energy[chosen].sum(), field.without[chosen].sum((0, 1))
        alone, important = field.path_energy[chosen].sum((0, 1, 3)), field.importance[chosen].sum((0, 1))
        for path, label in enumerate(path_names(2)):
            row = paths[name, label]
            assert row["energy_without"] == pytest.approx(left[path] / whole)
            assert row["energy_alone"] == pytest.approx(alone[path] / whole)
            assert row["gradient_x_activation"] == pytest.approx(important[path] / important.sum())
