"""losses.py against plain loops, finite differences and MONAI."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from common.config import Loss
from common.masks import IGNORE
from losses import LOSSES, class_weights, cross_entropy, make_loss, soft_dice

SHAPE = (2, 3, 5, 4)
NAMES = get_args(Loss.__annotations__["name"])


def test_every_name_in_a_config_has_a_loss():
    assert {*NAMES} == {*LOSSES, "wce"}


def sample(seed=0, target=None):
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(SHAPE, generator=random)
    return logits, torch.randint(0, 3, (2, 5, 4), generator=random) if target is None else target


def plain_loop(name, logits, target, weights=(1, 1, 1)):
    """Equations 2, 3, 6, 7 and 12 with correct signs, as loops over labelled pixels and classes in float64."""
    logits, target = logits.double().numpy(), target.numpy()
    labelled, tiles = (target != IGNORE).sum(), (target != IGNORE).any((1, 2)).sum()
    ce = score = 0.0
    if not labelled:
        return 0.0
    for b in range(SHAPE[0]):
        overlap, truth, predicted = np.zeros(3), np.zeros(3), np.zeros(3)
        for i in range(SHAPE[2]):
            for j in range(SHAPE[3]):
                c = target[b, i, j]
                if c == IGNORE:
                    continue
                e = np.exp(logits[b, :, i, j] - logits[b, :, i, j].max())
                p = e / e.sum()
                ce -= weights[c] * np.log(p[c]) / labelled
                overlap[c] += p[c]
                truth[c] += 1
                predicted += p
        score += np.mean(2 * overlap / (truth + predicted)) / tiles if truth.any() else 0
    return {"ce": ce, "wce": ce, "dice": -score, "dice_ce": ce - score, "log_dice_ce": ce - np.log(score)}[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_the_plain_loop(name, seed):
    logits, target = sample(seed)
    frequencies = torch.tensor([0.525, 0.275, 0.2])
    weights = class_weights(frequencies).tolist() if name == "wce" else (1, 1, 1)
    assert make_loss(name, frequencies)(logits, target).item() == pytest.approx(
        plain_loop(name, logits, target, weights), rel=1e-5)


def with_ignored(target, what):
    """Ignore some pixels, a whole tile and some pixels, or all."""
    target = target.clone()
    target[:, 1:3, ::2] = IGNORE
    if what != "pixels":
        target[1 if what == "a tile" else slice(None)] = IGNORE
    return target


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["pixels", "a tile", "all"])
def test_ignored_pixels_have_no_loss_and_a_gradient_of_exactly_0(name, what):
    logits, target = sample(5)
    target, frequencies = with_ignored(target, what), torch.tensor([0.525, 0.275, 0.2])
    weights = class_weights(frequencies).tolist() if name == "wce" else (1, 1, 1)
    values, gradients = [], []
    for scale in (1, -50, 1e4):  # of the logits of ignored pixels
        changed = torch.where(target[:, None] == IGNORE, scale * logits, logits).requires_grad_()
        loss = make_loss(name, frequencies)(changed, target)
        loss.backward()
        values.append(loss.item())
        gradients.append(changed.grad)
    assert values[0] == pytest.approx(plain_loop(name, logits, target, weights), rel=1e-5)
    assert values[0] == values[1] == values[2]
    for gradient in gradients:
        assert torch.equal(gradient, gradients[0])
        assert (gradient.movedim(1, -1)[target == IGNORE] == 0).all()
    assert bool((gradients[0] != 0).any()) == (what != "all")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name):
    logits, target = sample(4, target=with_ignored(torch.arange(40).reshape(2, 5, 4) % 7 % 2, "pixels"))  # no class 2
    frequencies = torch.tensor([0.5, 0.3, 0.2])
    weights = class_weights(frequencies).tolist() if name == "wce" else (1, 1, 1)
    logits.requires_grad_()
    make_loss(name, frequencies)(logits, target).backward()
    for index in [(0, 0, 0, 0), (0, 1, 2, 3), (1, 2, 4, 1), (1, 0, 3, 3)]:
        step = torch.zeros(SHAPE, dtype=torch.float64)
        step[index] = 1e-5
        up, down = (plain_loop(name, logits.detach().double() + s * step, target, weights) for s in (1, -1))
        assert logits.grad[index].item() == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-6)


def test_soft_dice_equals_monai():
    logits, target = sample(7)
    one_hot = torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
    theirs = DiceLoss(softmax=True, smooth_nr=0, smooth_dr=1e-6, reduction="none")(logits, one_hot)
    assert torch.allclose(soft_dice(logits, target), (1 - theirs).mean((1, 2, 3)), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_on_single_class_tiles_and_saturated_logits(name, scale, dtype):
    """Equation 6 as printed is 0/0 here."""
    target = torch.zeros(2, 5, 4, dtype=torch.int64)
    logits = torch.zeros(SHAPE, dtype=dtype)
    logits[:, 0] = scale
    logits.requires_grad_()
    loss = make_loss(name, torch.tensor([0.5, 0.3, 0.2]))(logits, target)
    loss.backward()
    assert loss.dtype == torch.float32 and math.isfinite(loss.item()) and torch.isfinite(logits.grad).all()


def test_a_perfect_prediction_shows_the_known_defect_of_soft_dice():
    for present, expected in ((3, 1.0), (2, 2 / 3), (1, 1 / 3)):
        target = torch.arange(20).reshape(1, 5, 4) % present
        logits = 100.0 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
        assert soft_dice(logits, target).item() == pytest.approx(expected, abs=1e-6)


def test_weights_scale_the_loss_unlike_those_of_torch():
    logits, target = sample()
    weights = torch.tensor([0.2, 0.3, 0.5])
    assert cross_entropy(logits, target, 2 * weights).item() == pytest.approx(
        2 * cross_entropy(logits, target, weights).item())


def test_log_dice_falls_when_overlap_rises():
    _, target = sample()
    one_hot = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    losses = [LOSSES["log_dice_ce"](scale * one_hot, target).item() for scale in (0, 1, 3, 10)]
    assert losses == sorted(losses, reverse=True)


def test_class_weights_need_every_class():
    with pytest.raises(ValueError, match="every class"):
        class_weights(torch.tensor([0.6, 0.4, 0.0]))
