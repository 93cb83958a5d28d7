"""filtering/registration.py against loops, and against masks that were moved by known distances and angles."""

import numpy as np
import pytest
from helpers import moved_mask, scene
from scipy.ndimage import affine_transform, gaussian_filter

from common.config import Filter
from common.masks import IGNORE
from filtering import registration
from filtering.registration import COARSE, FINE, MIDDLE, Colours, Move, Predictions, misregistration

MOVES = [Move(30, 0, 0), Move(0, -25.5, 0), Move(-40, 20, 0), Move(0, 0, 12), Move(10, -15, -20), Move(55, 60, 5),
         Move(5, -8, 28)]


def error(found, move, shape):
    """The largest distance between where two moves put a corner."""
    corners = np.array([(y, x) for y in (0, shape[0] - 1) for x in (0, shape[1] - 1)], float)
    return np.linalg.norm(found.of_points(corners, shape) - move.of_points(corners, shape), axis=1).max()


@pytest.mark.parametrize("move", MOVES)
def test_undo_brings_every_pixel_back(move):
    labels, _ = scene(0)
    window = (150, 130, 300, 340)
    given = moved_mask(labels, move, window)
    back = move.undo(given)
    inside = back != IGNORE
    truth = labels[150:450, 130:470]
    assert inside.mean() > 0.5 and (back[inside] == truth[inside]).mean() > 0.99  # rounding at borders
    y, x = np.mgrid[:300, :340]
    comes_from = move.of_points(np.stack([y, x], -1), (300, 340))
    expected = ((comes_from >= -0.49) & (comes_from <= np.array([299.49, 339.49]))).all(-1)
    assert (inside == expected).mean() > 0.995
    assert (Move().undo(given) == given).all()


def test_the_length_is_that_of_the_worst_corner():
    assert Move(3, 4, 0).length((100, 200)) == pytest.approx(5)
    assert Move(0, 0, 90).length((101, 101)) == pytest.approx(100)
    assert Move(0, 0, 10).length((201, 101)) == pytest.approx(2 * np.sin(np.radians(5)) * np.hypot(100, 50))


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("criterion", ["colours", "predictions"])
def test_moved_masks_are_found_to_lie_where_they_were_moved(move, criterion):
    labels, image = scene(1)
    window = (150, 140, 300, 320)
    given, shape = moved_mask(labels, move, window), (300, 320)
    tile = np.s_[150:450, 140:460]
    measure = Colours(image[tile], 10.0)
    if criterion == "predictions":
        measure = Predictions(gaussian_filter(np.eye(3, dtype=np.float32)[labels], (3, 3, 0))[tile])
    found, confidence = misregistration(measure, given)
    assert error(found, move, shape) < 4 and confidence > 0.5
    assert misregistration(measure, given) == (found, confidence), "deterministic"


@pytest.mark.parametrize("seed", range(4))
def test_masks_in_place_are_left_there(seed):
    labels, image = scene(seed, 300)
    for measure in (Colours(image, 10.0), Predictions(gaussian_filter(np.eye(3, dtype=np.float32)[labels], (3, 3, 0)))):
        found, confidence = misregistration(measure, labels)
        assert found.length(labels.shape) < 4 and confidence < 0.1


@pytest.mark.parametrize(("down", "right"), [(21, -13), (-7, 45), (31, 31)])
def test_fractions_of_pixels_are_found(down, right):
    """The tile is half as fine as the scene, so that a move of 21 of its pixels is one of 10.5."""
    labels, image = scene(5, 900)
    given = labels[150 - down:750 - down:2, 150 - right:750 - right:2]
    found, _ = misregistration(Colours(image[150:750:2, 150:750:2], 5.0), given)
    assert found.down == pytest.approx(down / 2, abs=0.45) and found.right == pytest.approx(right / 2, abs=0.45)


def test_the_last_search_is_a_fine_one():
    random, errors = np.random.default_rng(3), []
    for seed in range(20, 27):
        (labels, _), move = scene(seed), Move(*random.uniform((-40, -40, -15), (40, 40, 15)).round(1))
        probs = gaussian_filter(np.eye(3, dtype=np.float32)[labels], (3, 3, 0))[150:450, 140:460]
        found, _ = misregistration(Predictions(probs), moved_mask(labels, move, (150, 140, 300, 320)))
        errors.append(error(found, move, (300, 320)))
    assert np.median(errors) < 0.6


@pytest.mark.parametrize("seed", range(30, 34))
def test_a_mask_that_fits_but_for_two_pixels_has_no_certain_move(seed):
    labels, _ = scene(seed, 300)
    probs = gaussian_filter(np.eye(3, dtype=np.float32)[np.roll(labels, 2, 1)], (2, 2, 0))
    assert misregistration(Predictions(probs), labels)[1] < Filter().min_confidence


class Valleys:
    """A criterion that is 1 but at some shifts (down, right) in cells, for maps that are turned by some angles."""

    def __init__(self, found):
        self.found = found  # {(angle, down, right): value}

    def of_shifts(self, shares, classes):
        shape = (len(registration.ANGLES), 40, 40)
        values = np.ones(shape)
        for (angle, down, right), value in self.found.items():
            values[registration.ANGLES.tolist().index(angle), down, right] = value
        return values, np.full(shape, shares[:, 0].sum())


def chosen(found):
    shares = np.ones((30, 30, 2)) / 2
    return registration.search(Valleys(found), shares, [0, 1], 4)


def test_of_moves_that_fit_about_as_well_the_nearest_is_chosen():
    """A shift across the whole tile or a rotation by 30 degrees must fit better by 0.05."""
    for far, near in (((0, 0, 9), (0, 0, -2)), ((0, -8, 0), (0, 1, 0)), ((25, 0, 0), (-5, 0, 0))):
        for gain, expected in ((0.005, near), (0.05, far)):
            _, found = chosen({far: 0.5 - gain, near: 0.5})
            angle, down, right = expected
            value, move = found[0]
            assert value == (0.5 if expected == near else 0.5 - gain) and move.clockwise == angle
            assert np.hypot(move.right, move.down) == pytest.approx(4 * np.hypot(down, right))


def test_one_move_of_each_neighbourhood_is_refined():
    in_place, found = chosen({(0, 0, 0): 0.9, (0, 2, 0): 0.5, (5, 2, 0): 0.51, (20, 0, 0): 0.6, (-20, 0, 1): 0.7,
                              (30, 3, 3): 0.8})
    assert in_place == 0.9 and [value for value, _ in found] == [0.5, 0.6, 0.7]
    assert found[0][1] == Move(0, -8, 0), "the mask lies too high, since it fits when it is moved down"


def test_ignored_pixels_count_for_nothing():
    labels, image = scene(2)
    move, window = Move(30, -20, 6), (150, 150, 300, 300)
    given = moved_mask(labels, move, window)
    given[:90], given[:, :40] = IGNORE, IGNORE
    found, confidence = misregistration(Colours(image[150:450, 150:450], 10.0), given)
    assert error(found, move, (300, 300)) < 6 and confidence > 0.4
    given[:, :200] = IGNORE
    assert misregistration(Colours(image[150:450, 150:450], 10.0), given) is None, "too little is left to compare"


@pytest.mark.parametrize("seed", range(3))
def test_no_move_leaves_the_range_of_the_search(seed):
    """Masks of other scenes, which may seem to fit anywhere."""
    for other in range(10, 16):
        found, _ = misregistration(Colours(scene(seed, 200)[1], 10.0), scene(other, 200)[0])
        assert abs(found.clockwise) <= 32.5


def test_plain_tiles_and_masks_have_no_move():
    labels, image = scene(3, 200)
    assert misregistration(Colours(image, 10.0), np.ones((200, 200), np.uint8)) is None
    found = misregistration(Colours(np.full((200, 200, 3), 200, np.uint8), 10.0), labels)
    assert found is None or found == (Move(), 0.0)


def unexplained(colours, labels):
    """1 - the correlation ratio: the variance within classes over all variance, with loops."""
    points = [(tuple(colour), label) for colour, label in zip(colours.reshape(-1, 3), labels.ravel(), strict=True)
              if label != IGNORE]
    def spread(chosen):
        chosen = np.array(chosen)
        return ((chosen - chosen.mean(0))**2).sum()
    within = sum(spread([colour for colour, label in points if label == k]) for k in {label for _, label in points})
    return within / spread([colour for colour, _ in points])


def regret(maps, labels):
    return np.mean([maps[y, x, labels[y, x]] for y, x in np.ndindex(labels.shape) if labels[y, x] != IGNORE])


@pytest.mark.parametrize("cells", [COARSE, MIDDLE, FINE])
def test_the_criteria_of_labels_equal_loops(cells):
    labels, image = scene(4, 128)
    colours = Colours(image, 5.0)
    height, width, _ = colours.grids[cells].shape
    points = labels[:height, :width].copy()
    points[:3] = IGNORE
    assert colours.of_labels(points, [0, 1, 2], cells) == pytest.approx(unexplained(colours.grids[cells], points))
    predictions = Predictions(np.random.default_rng(0).dirichlet((1, 1, 1), (128, 128)))
    expected = regret(predictions.grids[cells], points)
    assert predictions.of_labels(points, [0, 1, 2], cells) == pytest.approx(expected, rel=1e-5)


def test_the_criteria_of_all_shifts_equal_those_of_each():
    """The Fourier transform against moving whole cells of one class each."""
    _, image = scene(6, 64)
    colours, random = Colours(image, 2.0), np.random.default_rng(0)
    predictions = Predictions(random.dirichlet((1, 1, 1), (64, 64)))
    size = colours.grids[COARSE].shape[0]
    cells = random.integers(0, 3, (size, size)).astype(np.uint8)
    cells[:2, 3:9] = IGNORE
    shares = np.stack([cells == k for k in range(3)])[:, None].astype(np.float32)
    for criterion in (colours, predictions):
        (values,), (overlap,) = criterion.of_shifts(shares, [0, 1, 2])
        for down, right in ((0, 0), (3, -2), (-5, 4), (0, 7)):
            moved = np.full_like(cells, IGNORE)
            y, x = np.mgrid[:size, :size]
            inside = (y - down >= 0) & (y - down < size) & (x - right >= 0) & (x - right < size)
            moved[inside] = cells[(y - down)[inside], (x - right)[inside]]
            assert overlap[down, right] == pytest.approx((moved != IGNORE).sum(), rel=1e-4)
            assert values[down, right] == pytest.approx(criterion.of_labels(moved, [0, 1, 2], COARSE), rel=1e-4)


def test_maps_of_shares_are_turned_as_scipy_turns_them():
    shape = (14, 19)
    shares = np.random.default_rng(0).random(shape)
    turned = (registration.rotations(shape) @ shares.ravel()).reshape(-1, *shape)
    for angle, found in zip(registration.ANGLES, turned, strict=True):
        move = Move(clockwise=float(angle))
        padded = np.pad(shares, 20)
        expected = affine_transform(padded, move.matrix, move.of_points(np.zeros(2), padded.shape), order=1)
        assert found == pytest.approx(expected[20:-20, 20:-20])


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (33, 65), (150, 90), (700, 500)])
def test_cells_of_coarser_grids_hold_whole_cells_of_finer_ones(shape):
    fine, middle, coarse = (registration.cell_size(shape, cells) for cells in (FINE, MIDDLE, COARSE))
    assert middle % fine == coarse % middle == 0 and 1 <= coarse <= min(shape)
    random = np.random.default_rng(0)
    image, labels = random.integers(0, 256, (*shape, 3)).astype(np.uint8), random.integers(0, 3, shape).astype(np.uint8)
    found = misregistration(Colours(image, 10.0), labels)
    assert found is None or 0 <= found[1] <= 1
