import itertools

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

import metrics


def random_masks(seed, shape, classes=3):
    """Truth and prediction with random subsets of the classes present."""
    random = np.random.default_rng(seed)
    subsets = [random.choice(classes, random.integers(1, classes + 1), replace=False) for _ in range(2)]
    return [random.choice(subset, shape).astype(np.uint8) for subset in subsets]


@pytest.mark.parametrize("seed", range(60))
def test_scores_equal_scikit_learn(seed):
    target, prediction = random_masks(seed, [(7, 5), (1, 1), (2, 9)][seed % 3])
    counts = metrics.confusion(prediction, target, 3)
    truth, guess = target.ravel(), prediction.ravel()
    assert (counts == confusion_matrix(truth, guess, labels=[0, 1, 2])).all()
    assert metrics.pixel_accuracy(counts) == pytest.approx(accuracy_score(truth, guess))
    present = np.isin(np.arange(3), np.concatenate([truth, guess]))
    for ours, theirs in ((metrics.dice, f1_score), (metrics.iou, jaccard_score)):
        scores = ours(counts)
        assert (np.isnan(scores) == ~present).all()
        expected = theirs(truth, guess, labels=[0, 1, 2], average=None, zero_division=0)
        assert scores[present] == pytest.approx(expected[present])


def test_confusions_of_many_tiles_at_once_equal_one_by_one():
    counts = np.stack([metrics.confusion(*random_masks(seed, (6, 6))[::-1], 3) for seed in range(20)])
    for score in (metrics.dice, metrics.iou, metrics.pixel_accuracy):
        assert np.array_equal(score(counts), np.stack([score(c) for c in counts]), equal_nan=True)


@pytest.mark.parametrize("present", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)])
def test_a_perfect_prediction_scores_one_whatever_is_absent(present):
    target = np.resize(np.array(present), (4, 5))
    counts = metrics.confusion(target, target, 3)
    for score in (metrics.dice, metrics.iou):
        assert metrics.mean_present(score(counts)) == 1
        assert np.isnan(score(counts)).sum() == 3 - len(present)
    assert metrics.pixel_accuracy(counts) == 1


def test_the_absent_class_rule():
    target = np.zeros((2, 2), int)
    invented = np.array([[0, 0], [0, 2]])
    assert metrics.dice(metrics.confusion(invented, target, 3)).tolist()[1:] != [0, 0]
    scores = metrics.dice(metrics.confusion(invented, target, 3))
    assert np.isnan(scores[1]) and scores[2] == 0
    assert metrics.mean_present(scores) == pytest.approx((6 / 7 + 0) / 2)


def test_mean_of_nothing_is_nothing():
    assert np.isnan(metrics.mean_present(np.array([np.nan, np.nan])))


def test_best_constant_equals_trying_all():
    target, prediction = random_masks(3, (9, 9))
    counts = metrics.confusion(prediction, target, 3)
    tried = [metrics.mean_present(metrics.dice(metrics.confusion(np.full_like(target, k), target, 3)))
             for k in range(3)]
    assert metrics.best_constant(counts) == (int(np.argmax(tried)), pytest.approx(max(tried)))
