"""evaluation/metrics.py and common/bootstrap.py against scikit-learn, torchmetrics, MONAI and brute force."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
    precision_recall_fscore_support,
)

from common import bootstrap
from common.masks import IGNORE
from evaluation import metrics

SHAPES = [(7, 5), (1, 1), (2, 9), (24, 31), (40, 40)]


def random_masks(seed, shape, classes=3):
    """Truth and prediction with random classes: noise, blocks, or the same blocks, shifted or with one other pixel."""
    random = np.random.default_rng(seed)
    subsets = [random.choice(classes, random.integers(1, classes + 1), replace=False) for _ in range(2)]
    pattern = random.integers(4)
    if pattern == 0:
        return [random.choice(subset, shape).astype(np.uint8) for subset in subsets]
    blocks = [np.kron(random.choice(subset, (4, 4)), np.ones(shape, int))[:: 4, :: 4] for subset in subsets]
    if pattern == 1:
        return [block.astype(np.uint8) for block in blocks]
    target = blocks[0].astype(np.uint8)
    prediction = np.roll(target, random.integers(0, 4, 2), (0, 1)) if pattern == 2 else target.copy()
    prediction[random.integers(shape[0]), random.integers(shape[1])] = random.integers(classes)
    return [target, prediction]


def count(prediction, target, classes=3):
    """Counts (K, K) of one pair of arrays."""
    both = [torch.tensor(np.asarray(labels).reshape(1, 1, -1)) for labels in (prediction, target)]
    return metrics.confusion(*both, classes)[0].numpy()


def present(target, prediction, classes=3):
    return np.isin(np.arange(classes), np.concatenate([target.ravel(), prediction.ravel()]))


@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_count_scores_equal_scikit_learn(start):
    for seed in range(start, start + 100):
        target, prediction = random_masks(seed, SHAPES[seed % 5])
        counts, truth, guess = count(prediction, target), target.ravel(), prediction.ravel()
        assert (counts == confusion_matrix(truth, guess, labels=[0, 1, 2])).all()
        assert metrics.pixel_accuracy(counts) == pytest.approx(accuracy_score(truth, guess))
        here = present(target, prediction)
        labels = {"labels": [0, 1, 2], "average": None, "zero_division": 0}
        precision, recall, f1, _ = precision_recall_fscore_support(truth, guess, **labels)
        jaccard = jaccard_score(truth, guess, **labels)
        for ours, expected in ((metrics.dice, f1), (metrics.iou, jaccard), (metrics.precision, precision),
                               (metrics.recall, recall)):
            scores = ours(counts)
            assert (np.isnan(scores) == ~here).all()
            assert scores[here] == pytest.approx(expected[here], abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_count_scores_equal_torchmetrics(shape):
    from torchmetrics.functional.classification import (
        multiclass_f1_score,
        multiclass_jaccard_index,
        multiclass_precision,
        multiclass_recall,
    )
    pairs = [random_masks(seed, shape) for seed in range(200)]
    target, prediction = (torch.tensor(np.stack(side)).long() for side in zip(*pairs, strict=True))
    counts = metrics.confusion(prediction, target, 3).numpy()
    here = np.stack([present(*pair) for pair in pairs])
    for ours, theirs in ((metrics.dice, multiclass_f1_score), (metrics.precision, multiclass_precision),
                         (metrics.recall, multiclass_recall)):
        expected = theirs(prediction, target, 3, average="none", multidim_average="samplewise").numpy()
        assert ours(counts)[here] == pytest.approx(expected[here], abs=1e-6)
    expected = np.stack([multiclass_jaccard_index(p, t, 3, average="none").numpy()
                         for p, t in zip(prediction, target, strict=True)])
    assert metrics.iou(counts)[here] == pytest.approx(expected[here], abs=1e-6)


def one_hot(labels):
    return torch.nn.functional.one_hot(torch.tensor(np.stack(labels)).long(), 3).movedim(-1, 1)


@pytest.mark.parametrize("shape", [(7, 5), (2, 9), (24, 31), (40, 40), (33, 6)])
def test_surface_scores_equal_monai_where_both_have_the_class(shape):
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    pairs = [random_masks(seed, shape) for seed in range(40)]
    ours = np.stack([metrics.surfaces(prediction, target, 3, tolerance=1.5) for target, prediction in pairs])
    targets, predictions = (one_hot(side) for side in zip(*pairs, strict=True))
    both = ((targets.sum((2, 3)) > 0) & (predictions.sum((2, 3)) > 0)).numpy()
    assert both.sum() > 30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [compute_hausdorff_distance(predictions, targets, include_background=True),
                  compute_hausdorff_distance(predictions, targets, include_background=True, percentile=95),
                  compute_surface_dice(predictions, targets, [1.5] * 3, include_background=True)]
    for i, expected in enumerate(theirs):
        assert ours[..., i][both] == pytest.approx(expected.double().numpy()[both], abs=5e-5)  # theirs is float32


def brute_force_surfaces(a, b, tolerance):
    """Every surface pixel against every other, from the definition; the masks are of one class."""
    def edge(mask):
        return np.array([(i, j) for i, j in np.argwhere(mask)
                         if any(not (0 <= i + di < mask.shape[0] and 0 <= j + dj < mask.shape[1])
                                or not mask[i + di, j + dj] for di, dj in ((0, 1), (1, 0), (0, -1), (-1, 0)))])
    distances = cdist(edge(a), edge(b))
    there, back = distances.min(1), distances.min(0)
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    return [max(there.max(), back.max()), max(np.percentile(there, 95), np.percentile(back, 95)),
            near / (len(there) + len(back))]


def ignoring(target, seed, shape):
    """Ignore a block, some pixels, both, or nothing."""
    random, target = np.random.default_rng(seed + 1000), target.copy()
    if seed % 4 in (0, 1):
        target[: random.integers(1, shape[0] + 1), : random.integers(1, shape[1] + 1)] = IGNORE
    if seed % 4 in (1, 2):
        target[random.random(shape) < 0.2] = IGNORE
    return target


@pytest.mark.parametrize("shape", SHAPES)
def test_ignored_pixels_are_in_no_count(shape):
    pairs = [random_masks(seed, shape) for seed in range(40)]
    pairs = [(ignoring(target, seed, shape), prediction) for seed, (target, prediction) in enumerate(pairs)]
    target, prediction = (torch.tensor(np.stack(side)).long() for side in zip(*pairs, strict=True))
    logits = torch.randn(len(pairs), 3, *shape, generator=torch.Generator().manual_seed(1))
    counts, bins = metrics.confusion(prediction, target, 3), metrics.calibration(logits, target)
    for i, (truth, guess) in enumerate(pairs):
        here = truth != IGNORE
        assert (counts[i].numpy() == confusion_matrix([*truth[here], 0], [*guess[here], 0], labels=[0, 1, 2])
                - np.diag([1, 0, 0])).all()
        if here.any():  # the labelled pixels alone, as a tile of one row
            alone = metrics.calibration(logits[i][:, torch.tensor(here)][None, :, None], target[i][here][None, None])
            assert torch.allclose(bins[i], alone[0], rtol=1e-6)
        else:
            assert not bins[i].any()


def labelled_edge(mask, labelled):
    """The pixels of a mask with a labelled neighbour outside it, or with none because the tile ends."""
    rows, columns = mask.shape
    return [(y, x) for y, x in np.argwhere(mask & labelled) if any(
        not (0 <= y + dy < rows and 0 <= x + dx < columns)
        or (labelled[y + dy, x + dx] and not mask[y + dy, x + dx]) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)))]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_against_ignored_pixels_is_no_outline(shape):
    seen = set()
    for seed in range(120):
        target, prediction = random_masks(seed, shape)
        target = ignoring(target, seed, shape)
        scores, labelled = metrics.surfaces(prediction, target, 3, tolerance=2), target != IGNORE
        for k in range(3):
            edges = [labelled_edge(labels == k, labelled) for labels in (target, prediction)]
            present = [((labels == k) & labelled).any() for labels in (target, prediction)]
            seen.add((*map(bool, present), *map(bool, edges)))
            if all(present) and not all(edges):
                assert np.isnan(scores[k]).all()
            elif all(edges):
                distances = cdist(*edges)
                there, back = distances.min(1), distances.min(0)
                near = (there <= 2).sum() + (back <= 2).sum()
                assert scores[k].tolist() == pytest.approx(
                    [max(there.max(), back.max()), max(np.percentile(there, 95), np.percentile(back, 95)),
                     near / (len(there) + len(back))], abs=1e-6)
            elif any(present):
                assert scores[k].tolist() == [math.hypot(*shape), math.hypot(*shape), 0]
            else:
                assert np.isnan(scores[k]).all()
    assert len(seen) >= 4


def test_a_class_that_only_ignored_pixels_surround_has_no_surface_score():
    target = np.full((9, 9), IGNORE, np.uint8)
    target[3:6, 3:6] = 1
    assert np.isnan(metrics.surfaces(np.ones((9, 9), np.uint8), target, 2, 1)).all()
    prediction = np.ones((9, 9), np.uint8)
    prediction[4, 4] = 0  # an outline where the truth has none: no distance, but class 0 is falsely predicted
    scores = metrics.surfaces(prediction, target, 2, 1)
    assert np.isnan(scores[1]).all() and scores[0].tolist() == [math.hypot(9, 9)] * 2 + [0]
    target[4, 4] = 0  # and the other way round
    scores = metrics.surfaces(np.ones((9, 9), np.uint8), target, 2, 1)
    assert np.isnan(scores[1]).all() and scores[0].tolist() == [math.hypot(9, 9)] * 2 + [0]


@pytest.mark.parametrize("shape", SHAPES)
def test_surface_scores_equal_brute_force(shape):
    for seed in range(200):
        target, prediction = random_masks(seed, shape)
        scores = metrics.surfaces(prediction, target, 3, tolerance=2)
        for k in range(3):
            masks = target == k, prediction == k
            if all(mask.any() for mask in masks):
                assert scores[k].tolist() == pytest.approx(brute_force_surfaces(*masks, 2), abs=1e-6)
            elif any(mask.any() for mask in masks):
                assert scores[k].tolist() == [math.hypot(*shape), math.hypot(*shape), 0]
            else:
                assert np.isnan(scores[k]).all()


def test_a_missed_class_has_the_worst_distance():
    """No prediction is worse than the tile's diagonal, so missing a class never improves a distance."""
    target = np.zeros((30, 40), np.uint8)
    target[2:5, 3:6] = 1
    wrong, missed = np.zeros_like(target), np.zeros_like(target)
    wrong[28:, 37:] = 1
    far, none = (metrics.surfaces(p, target, 2, 1)[1] for p in (wrong, missed))
    assert none[0] == none[1] == 50 > far[0] >= far[1] and none[2] == far[2] == 0


def random_logits(seed, shape, scale=2.0):
    random = np.random.default_rng(seed)
    return (torch.tensor(random.normal(size=(4, 3, *shape)) * scale, dtype=torch.float32),
            torch.tensor(random.integers(0, 3, (4, *shape))))


@pytest.mark.parametrize("seed", range(20))
def test_calibration_error_equals_torchmetrics_and_scikit_learn(seed):
    from torchmetrics.functional.classification import multiclass_calibration_error
    logits, target = random_logits(seed, SHAPES[seed % 5], scale=1 + seed)
    bins = metrics.calibration(logits, target)
    probs = torch.softmax(logits.double(), 1)
    expected = multiclass_calibration_error(probs, target, 3, n_bins=15)
    assert metrics.calibration_error(bins.sum(0).numpy()) == pytest.approx(expected.item(), rel=5e-6)  # float32 sums
    confidence, guess = (values.numpy().ravel() for values in probs.max(1))
    right = guess == target.numpy().ravel()
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    pixels = bins.sum(0)[0].numpy()
    assert pixels.sum() == right.size
    error = (pixels[pixels > 0] / right.size) @ np.abs(accuracy - mean)
    assert metrics.calibration_error(bins.sum(0).numpy()) == pytest.approx(error, abs=1e-6)


def test_a_certain_prediction_has_calibration_error_0_if_right_and_1_if_wrong():
    logits = torch.tensor([100.0, 0, 0])[None, :, None, None].expand(2, 3, 4, 4)
    target = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).long()
    assert metrics.calibration_error(metrics.calibration(logits, target).numpy()).tolist() == [0, 1]


def test_a_batch_has_the_scores_of_its_tiles():
    pairs = [random_masks(seed, (6, 6)) for seed in range(20)]
    target, prediction = (torch.tensor(np.stack(side)) for side in zip(*pairs, strict=True))
    counts = metrics.confusion(prediction, target, 3).numpy()
    assert (counts == np.stack([count(p, t) for t, p in pairs])).all()
    for score in (*metrics.BY_CLASS.values(), metrics.pixel_accuracy):
        assert np.array_equal(score(counts), np.stack([score(c) for c in counts]), equal_nan=True)
    logits, target = random_logits(0, (5, 4))
    alone = [metrics.calibration(logits[i:i + 1], target[i:i + 1])[0] for i in range(4)]
    assert torch.allclose(metrics.calibration(logits, target), torch.stack(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("here", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)])
def test_a_perfect_prediction_scores_1_except_in_soft_dice(here):
    from losses import soft_dice
    target = np.resize(np.array(here), (4, 5))
    logits = 200.0 * one_hot([target]).float()
    soft = soft_dice(logits, torch.tensor(target)[None]).numpy()
    assert soft == pytest.approx(len(here) / 3, abs=1e-6)  # 1, 2/3 and 1/3
    tally = metrics.Tally(count(target, target)[None], metrics.surfaces(target, target, 3, 0)[None], soft,
                          metrics.calibration(logits, torch.tensor(target)[None]).numpy())
    perfect = dict.fromkeys(["pixel_accuracy", *metrics.BY_CLASS, *(f"tile_{name}" for name in metrics.BY_CLASS),
                             "tile_surface_dice"], 1.0) | {"tile_hausdorff": 0.0, "tile_hd95": 0.0, "ece": 0.0}
    found = metrics.scores(tally, np.ones((1, 1)))
    assert found.keys() == perfect.keys() | {"soft_dice"}
    for name, value in perfect.items():
        assert np.ravel(found[name])[-1] == value
        if found[name].ndim == 2:
            assert (np.isnan(found[name][0, :3]) == ~np.isin(range(3), here)).all()


def test_absent_missed_and_falsely_predicted_classes():
    target = np.zeros((2, 2), int)
    false = np.array([[0, 0], [0, 2]])
    for counts in (count(false, target), count(target, false)):
        for score in metrics.BY_CLASS.values():
            assert np.isnan(score(counts)[1]) and score(counts)[2] == 0
    assert metrics.mean_present(metrics.dice(count(false, target))) == pytest.approx((6 / 7 + 0) / 2)


def test_the_mean_of_no_scores_is_nan():
    assert np.isnan(metrics.mean_present(np.array([np.nan, np.nan])))


def test_best_constant_equals_trying_all():
    target, prediction = random_masks(4, (9, 9))
    tried = [metrics.mean_present(metrics.dice(count(np.full_like(target, k), target))) for k in range(3)]
    assert metrics.best_constant(count(prediction, target)) == (int(np.argmax(tried)), pytest.approx(max(tried)))


# ---------------------------------------------------------------------------------------------- scores of a model

def tally_of(pairs):
    return metrics.Tally(np.stack([count(p, t) for t, p in pairs]),
                         np.stack([metrics.surfaces(p, t, 3, 1) for t, p in pairs]))


def test_scores_of_a_model_equal_a_plain_computation():
    pairs = [random_masks(seed, (9, 9)) for seed in range(30)]
    found = metrics.scores(tally_of(pairs), np.ones((1, 30)))
    truth, guess = (np.concatenate([labels.ravel() for labels in side]) for side in zip(*pairs, strict=True))
    assert found["dice"][0, :3] == pytest.approx(f1_score(truth, guess, labels=[0, 1, 2], average=None))
    assert found["dice"][0, 3] == pytest.approx(found["dice"][0, :3].mean(), abs=1e-12)
    assert found["pixel_accuracy"][0] == pytest.approx(np.mean(truth == guess))
    behind = []
    for k in range(3):
        with_class = [(t, p) for t, p in pairs if k in t or k in p]
        expected = np.mean([f1_score((t == k).ravel(), (p == k).ravel(), zero_division=0) for t, p in with_class])
        assert found["tile_dice"][0, k] == pytest.approx(expected)
        distance = np.mean([metrics.surfaces(p, t, 3, 1)[k, 1] for t, p in with_class])
        assert found["tile_hd95"][0, k] == pytest.approx(distance)
        behind.append(len(with_class))
    assert min(behind) < 30


def test_weights_count_tiles_twice_or_not_at_all():
    pairs = [random_masks(seed, (9, 9)) for seed in range(6)]
    twice = metrics.scores(tally_of([pairs[0], *pairs[:4]]), np.ones((1, 5)))
    weighted = metrics.scores(tally_of(pairs), np.array([[2.0, 1, 1, 1, 0, 0]]))
    for name, values in twice.items():
        assert weighted[name] == pytest.approx(values, nan_ok=True)


def test_groups_are_resampled_whole():
    groups = ["a", "b", "a", "", "b", "", "c"]
    weights = bootstrap.resampled_weights(groups)
    assert weights.shape == (1 + bootstrap.RESAMPLES, 7) and (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, 3] != weights[:, 5]).any()  # each tile without a group is a group
    assert (weights[:, [0, 1, 3, 5, 6]].sum(1) == 5).all()
    assert np.array_equal(weights, bootstrap.resampled_weights(groups))
    assert bootstrap.resampled_weights([*"aabbccdd"]).tolist() == [[1] * 8]  # four groups are too few


def test_intervals_over_groups_contain_the_truth_about_95_times_in_100_and_over_tiles_do_not(monkeypatch):
    """The 24 slides of 10 tiles each differ in difficulty, so the tiles of a slide are not independent samples."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 500)
    random, covered = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(60):
        slide = np.repeat(random.uniform(0.4, 0.8, 24), 10)  # accuracy of each tile's slide; its mean is 0.6
        right = random.binomial(100, slide)
        counts = np.zeros((240, 2, 2))
        counts[:, 0, 0], counts[:, 0, 1] = right, 100 - right
        tally = metrics.Tally(counts, np.full((240, 2, 3), np.nan))
        for grouped in covered:
            weights = bootstrap.resampled_weights([str(i // 10) if grouped else "" for i in range(240)])
            low, high = bootstrap.interval(metrics.scores(tally, weights)["pixel_accuracy"], 24 if grouped else 240)
            covered[grouped] += low <= 0.6 <= high
    assert 0.88 <= covered[True] / 60 <= 0.99 and covered[False] / 60 < 0.7


@pytest.mark.parametrize("groups", [5, 8, 15])
def test_intervals_of_few_groups_contain_the_truth_about_95_times_in_100(groups):
    """The plain percentile interval of five groups contains it 83 times in 100."""
    random, covered = np.random.default_rng(1), 0
    for _ in range(400):
        values = random.normal(size=groups)
        drawn = random.multinomial(groups, np.full(groups, 1 / groups), bootstrap.RESAMPLES) / groups
        low, high = bootstrap.interval(np.array([values.mean(), *(drawn @ values)]), groups)
        covered += low <= 0 <= high
    assert 0.89 <= covered / 400 <= 0.98


def test_the_interval_of_a_mean_is_students():
    """Normal samples with the spread of the bootstrap give the ends of the t-interval."""
    for groups in (6, 12, 50):
        values = np.random.default_rng(groups).normal(size=groups)
        spread = values.std() / math.sqrt(groups)  # the bootstrap divides by n, not n - 1
        samples = values.mean() + spread * stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
        expected = stats.t.interval(0.95, groups - 1, values.mean(), stats.sem(values))
        assert bootstrap.interval(np.array([0, *samples]), groups) == pytest.approx(expected, abs=2e-3)


def test_no_interval_if_a_score_does_not_exist():
    assert np.isnan(bootstrap.interval(np.array([0.5]), 9)).all()
    assert np.isnan(bootstrap.interval(np.full(101, np.nan), 9)).all()
    values = np.linspace(0, 1, 101)
    assert bootstrap.interval(np.array([0.5, *values]), 10**6) == pytest.approx((0.025, 0.975), abs=1e-4)
    assert np.isnan(bootstrap.interval(np.array([0.5, *values[:50], *[np.nan] * 50]), 10**6)).all()


def test_the_mean_over_classes_is_always_over_the_same_classes():
    """One group of ten has the third class. Samples without this group have no mean, so the mean has no interval."""
    counts = np.zeros((10, 3, 3))
    counts[:, 0, 0], counts[:, 1, 1], counts[:, 0, 1] = 90, 50, 5
    counts[0, 2, 2], counts[0, 2, 0] = 1, 30
    weights = bootstrap.resampled_weights([""] * 10)
    dice = metrics.scores(metrics.Tally(counts, np.full((10, 3, 3), np.nan)), weights)["dice"]
    assert dice[0, 3] == pytest.approx(metrics.dice(counts.sum(0)).mean())
    assert (np.isnan(dice[:, 3]) == (weights[:, 0] == 0)).all()
    assert np.isnan(bootstrap.interval(dice[:, 3], 10)).all() and np.isfinite(bootstrap.interval(dice[:, 0], 10)).all()
