"""losses.py against plain loops, finite differences and MONAI."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from common.config import Loss
from common.masks import IGNORE
from losses import (
    LOSSES,
    class_weights,
    cross_entropy,
    generalised_cross_entropy,
    ignore_borders,
    make_loss,
    soft_dice,
    soften_borders,
)

SHAPE = (2, 3, 5, 4)
NAMES = get_args(Loss.__annotations__["name"])


def test_every_name_in_a_config_has_a_loss():
    assert {*NAMES} == {*LOSSES, "wce"}


def sample(seed=0, target=None):
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(SHAPE, generator=random)
    return logits, torch.randint(0, 3, (2, 5, 4), generator=random) if target is None else target


def plain_loop(name, logits, target, weights=(1, 1, 1)):
    """Equations 2, 3, 6, 7 and 12 with correct signs, and gce, as loops over labelled pixels and classes in float64."""
    logits, target = logits.double().numpy(), target.numpy()
    labelled, tiles = (target != IGNORE).sum(), (target != IGNORE).any((1, 2)).sum()
    ce = gce = score = 0.0
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
                gce += (1 - p[c]**0.7) / 0.7 / labelled
                ce -= weights[c] * np.log(p[c]) / labelled
                overlap[c] += p[c]
                truth[c] += 1
                predicted += p
        score += np.mean(2 * overlap / (truth + predicted)) / tiles if truth.any() else 0
    return {"ce": ce, "gce": gce, "wce": ce, "dice": -score, "dice_ce": ce - score,
            "log_dice_ce": ce - np.log(score)}[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_the_plain_loop(name, seed):
    logits, target = sample(seed)
    frequencies = torch.tensor([0.525, 0.275, 0.2])
    weights = class_weights(frequencies).tolist() if name == "wce" else (1, 1, 1)
    assert make_loss(Loss(name), frequencies)(logits, target).item() == pytest.approx(
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
        loss = make_loss(Loss(name), frequencies)(changed, target)
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
    make_loss(Loss(name), frequencies)(logits, target).backward()
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
    loss = make_loss(Loss(name), torch.tensor([0.5, 0.3, 0.2]))(logits, target)
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


def test_gce_goes_from_cross_entropy_to_one_minus_p():
    logits, target = sample(3)
    probs = torch.softmax(logits, 1).gather(1, target[:, None])
    assert generalised_cross_entropy(logits, target, 1.0).item() == pytest.approx((1 - probs).mean().item())
    assert generalised_cross_entropy(logits, target, 1e-4).item() == pytest.approx(
        cross_entropy(logits, target).item(), rel=1e-3)


def neighbours(i, j, radius, shape):
    """The pixels around (i, j), and how far off they are."""
    for y in range(max(0, i - radius), min(shape[0], i + radius + 1)):
        for x in range(max(0, j - radius), min(shape[1], j + radius + 1)):
            yield y, x, (y - i)**2 + (x - j)**2


def classes_with_ignored(seed, size=(2, 9, 8)):
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (size[0], 3, 4), generator=random).repeat_interleave(3, 1).repeat_interleave(2, 2)
    return target.masked_fill(torch.rand(target.shape, generator=random) < 0.2, IGNORE)


@pytest.mark.parametrize("radius", [1, 2])
def test_borders_are_the_pixels_near_another_class(radius):
    target = classes_with_ignored(0)
    found = ignore_borders(target, radius)
    for b, i, j in np.ndindex(*target.shape):
        near = {target[b, y, x].item() for y, x, _ in neighbours(i, j, radius, target.shape[1:])} - {IGNORE}
        is_border = len(near) > 1 or target[b, i, j] == IGNORE
        assert found[b, i, j] == (IGNORE if is_border else target[b, i, j])
    assert (found == IGNORE).sum() > (target == IGNORE).sum() and (ignore_borders(target * 0, 2) == 0).all()


@pytest.mark.parametrize("radius", [1, 2])
def test_soft_borders_are_weighted_means_of_the_neighbours(radius):
    target = classes_with_ignored(1)
    found = soften_borders(target, 3, radius)
    around = [np.exp(-(y * y + x * x) / 2 / radius**2) for y in range(-radius, radius + 1)
              for x in range(-radius, radius + 1) if (y, x) != (0, 0)]
    for b, i, j in np.ndindex(*target.shape):
        shares = np.zeros(3)
        for y, x, square in neighbours(i, j, radius, target.shape[1:]):
            if target[b, y, x] != IGNORE and target[b, i, j] != IGNORE:
                shares[target[b, y, x]] += np.exp(-square / 2 / radius**2) if square else sum(around)
        expected = shares / shares.sum() if shares.any() else shares
        assert found[b, :, i, j].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_losses_take_shares_in_place_of_classes(name):
    """One-hot shares equal classes; with half of each of two classes the pixelwise losses are their mean."""
    logits, target = sample(5)
    target[0, 1] = IGNORE
    frequencies = torch.tensor([0.5, 0.3, 0.2])
    loss = make_loss(Loss(name), frequencies)
    one_hot = torch.nn.functional.one_hot(target.masked_fill(target == IGNORE, 0), 3).movedim(-1, 1).float()
    one_hot *= (target != IGNORE)[:, None]
    assert loss(logits, one_hot).item() == pytest.approx(loss(logits, target).item(), rel=1e-6)
    if name in ("ce", "wce", "gce"):
        other = (target + 1).masked_fill(target == IGNORE, IGNORE) % 3
        other = other.masked_fill(target == IGNORE, IGNORE)
        halves = (one_hot + one_hot.roll(1, dims=1)) / 2
        assert loss(logits, halves).item() == pytest.approx((loss(logits, target) + loss(logits, other)).item() / 2)


@pytest.mark.parametrize("border_as", ["ignore", "soften"])
@pytest.mark.parametrize("name", NAMES)
def test_the_setting_border_changes_only_pixels_near_borders(name, border_as):
    target = torch.zeros(1, 12, 12, dtype=torch.int64)
    target[:, 6:] = 1
    logits = torch.randn((1, 3, 12, 12), generator=torch.Generator().manual_seed(0)).requires_grad_()
    frequencies = torch.tensor([0.5, 0.3, 0.2])
    plain, bordered = (make_loss(settings, frequencies)(logits, target)
                       for settings in (Loss(name), Loss(name, border=2, border_as=border_as)))
    assert plain.item() != pytest.approx(bordered.item(), abs=1e-4)
    bordered.backward()
    at_border = logits.grad[0, :, 4:8].abs()
    assert (at_border == 0).all() if border_as == "ignore" else (at_border > 0).any()
    assert (logits.grad[0, 1, 8:].abs() > 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_softened_borders_have_finite_gradients_on_saturated_logits(name):
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[:, 4:] = 1
    logits = torch.zeros(1, 3, 8, 8)
    logits[:, 0] = 200.0
    logits.requires_grad_()
    loss = make_loss(Loss(name, border=1, border_as="soften"), torch.tensor([0.5, 0.3, 0.2]))(logits, target)
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logits.grad).all()
