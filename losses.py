"""The loss functions of the report's section 6.1 and a robust one, by the names that configs use.

    p   softmax of the logits                         probs   (B, K, H, W)
    t   one-hot target                                target  (B, H, W) int64 holds the class of each pixel
    w   class weights, equation 4                     weights (K,)

In place of classes, the target may hold the share of each class in each pixel, (B, K, H, W) with sums 1, or 0 for an
ignored pixel; `soften_borders` makes such targets.

Every loss maps logits (B, K, H, W) and target (B, H, W) to a scalar. It is computed in float32, whatever the precision
of the network. Pixels whose target is IGNORE are left out of every sum and number, and have no gradient; without others
the loss is 0. The report prints equations 2 and 3 without their minus sign, equation 6 without an epsilon, and
equation 12 with the wrong sign of the Dice term. They are corrected here.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Loss
from common.masks import IGNORE

EPSILON = 1e-6


def true_log_probs(logits: Tensor, target: Tensor) -> Tensor:
    """Return the logarithm of the probability of the true class (B, H, W), or 0 for an ignored pixel."""
    ignored = target == IGNORE                                                       # (B, H, W)
    log_probs = torch.log_softmax(logits.float(), dim=1)                             # (B, K, H, W)
    of_truth = log_probs.gather(1, target.masked_fill(ignored, 0)[:, None])[:, 0]    # (B, H, W)
    return of_truth.masked_fill(ignored, 0)


def cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return equation 2, or with weights 3 (negated): the weighted sum over pixels divided by their NUMBER.

    `torch.nn.CrossEntropyLoss(weight)` divides by the sum of the weights instead, so their scale has no effect there.
    """
    if target.dim() == 4:
        terms = target * torch.log_softmax(logits.float(), dim=1)                    # (B, K, H, W)
        log_probs = (terms if weights is None else terms * weights[:, None, None]).sum(dim=1)
    else:
        log_probs = true_log_probs(logits, target)                                   # (B, H, W)
        if weights is not None:
            log_probs = log_probs * weights[target.masked_fill(target == IGNORE, 0)]
    return -_mean(log_probs, labelled(target))


def generalised_cross_entropy(logits: Tensor, target: Tensor, q: float = 0.7) -> Tensor:
    """Return the mean over pixels of (1 - p^q) / q, with p the probability of the true class.

    From Zhang and Sabuncu 2018. Near q = 0 it is the cross-entropy, at q = 1 one minus p. The larger q, the less weight
    has a label that the network finds unlikely, such as a wrong one.
    """
    if target.dim() == 4:
        powers = torch.exp(q * torch.log_softmax(logits.float(), dim=1))             # (B, K, H, W)
        losses = (target * (1 - powers)).sum(dim=1) / q
    else:
        losses = (1 - torch.exp(q * true_log_probs(logits, target))) / q             # (B, H, W)
    return _mean(losses, labelled(target))


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Return equation 9 for each tile: (B,), the mean over ALL classes of 2 sum(t p) / (sum t + sum p).

    A class that is absent from the target scores 0. So a perfect prediction of a tile with two of three classes has
    0.667. The absent class's term has no gradient: a falsely predicted class costs only what it takes from the other
    classes. Epsilon stands only in the denominator, where it prevents 0/0. A tile of ignored pixels has 0.
    """
    counts = labelled(target)[:, None]                                               # (B, 1, H, W)
    probs = torch.softmax(logits.float(), dim=1) * counts                            # (B, K, H, W)
    shares = target
    if target.dim() == 3:
        classes = target[:, None].masked_fill(~counts, 0)                            # (B, 1, H, W)
        shares = torch.zeros_like(probs).scatter_(1, classes, counts.to(probs.dtype))  # (B, K, H, W)
    overlap = (shares * probs).sum(dim=(2, 3))                                       # (B, K)
    total = shares.sum(dim=(2, 3)) + probs.sum(dim=(2, 3))                           # (B, K)
    return (2 * overlap / (total + EPSILON)).mean(dim=1)                             # (B,)


def labelled(target: Tensor) -> Tensor:
    """Return which pixels of a target have a class (B, H, W) bool."""
    return target != IGNORE if target.dim() == 3 else target.sum(dim=1) > 0


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of the values that count, a bool for each; the others must be 0. Without any it is 0."""
    return values.mean() * (values.numel() / counts.sum().clamp(min=1))  # the factor is exactly 1 if all count


def _mean_soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean soft Dice over the tiles that have a labelled pixel."""
    return _mean(soft_dice(logits, target), labelled(target).flatten(1).any(dim=1))


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Return equation 6: the negated soft Dice, from -1 (best) to 0."""
    return -_mean_soft_dice(logits, target)


def dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Return equation 7: cross-entropy plus Dice loss."""
    return cross_entropy(logits, target) + dice(logits, target)


def log_dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Return equation 12, corrected: cross-entropy minus the logarithm of the soft Dice score.

    As printed, log(-DICE) + CE falls without bound as the overlap vanishes. The logarithm is of the batch's mean, as in
    equation 6, so unlike the other losses this one is not a mean over tiles.
    """
    log_dice = torch.log(_mean_soft_dice(logits, target).clamp(min=EPSILON))
    return cross_entropy(logits, target) - log_dice * labelled(target).any()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": cross_entropy,
    "dice": dice,
    "dice_ce": dice_ce,
    "log_dice_ce": log_dice_ce,
    "gce": generalised_cross_entropy,
}  # and "wce" of `make_loss`, the only one that needs class weights


def ignore_borders(target: Tensor, radius: int) -> Tensor:
    """Return a target (B, H, W) without the classes of pixels that have another class at most `radius` px away.

    Distances are those of squares: a pixel's neighbours are the (2 radius + 1)^2 pixels around it.
    """
    ignored = target == IGNORE
    classes = target.float()[:, None]                                                # (B, 1, H, W)
    size = 2 * radius + 1
    highest, lowest = (F.max_pool2d(values.masked_fill(ignored[:, None], -1000), size, 1, radius)[:, 0]
                       for values in (classes, -classes))                            # lowest is negated
    return target.masked_fill(highest != -lowest, IGNORE)


def soften_borders(target: Tensor, classes: int, radius: int) -> Tensor:
    """Return the shares (B, K, H, W) of the classes around each pixel of a target (B, H, W).

    Spatially varying label smoothing of Islam and Glocker 2021: a Gaussian of sigma = `radius` px, cut off at `radius`,
    in which the pixel itself weighs as much as all its neighbours together. Pixels that are ignored or outside do not
    count.
    """
    steps = torch.arange(-radius, radius + 1, device=target.device, dtype=torch.float32)
    line = torch.exp(-0.5 * (steps / radius)**2)
    kernel = line[:, None] * line                                                    # (2 radius + 1,) * 2
    kernel[radius, radius] = kernel.sum() - 1
    counts = labelled(target)[:, None].float()                                       # (B, 1, H, W)
    one_hot = F.one_hot(target.masked_fill(target == IGNORE, 0), classes).movedim(-1, 1) * counts
    sums = F.conv2d(one_hot.flatten(0, 1)[:, None], kernel[None, None], padding=radius).view_as(one_hot)
    return sums / sums.sum(dim=1, keepdim=True).clamp(min=EPSILON) * counts          # (B, K, H, W)


def class_weights(frequencies: Tensor) -> Tensor:
    """Return equation 4: weights (K,) with sum 1, inversely proportional to the class frequencies (K,).

    The report's .525 .275 .200 give .181 .345 .474. Raises `ValueError` if a class does not occur.
    """
    if not bool((frequencies > 0).all()):
        raise ValueError(f"class weights need every class to occur; the frequencies are {frequencies.tolist()}")
    inverse = 1 / frequencies.double()
    return (inverse / inverse.sum()).float()


def make_loss(settings: Loss, frequencies: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function of the settings `loss`. "wce" uses the class frequencies (K,), on their device."""
    loss = LOSSES.get(settings.name)
    if settings.name == "wce":
        loss = partial(cross_entropy, weights=class_weights(frequencies.cpu()).to(frequencies.device))
    elif settings.name == "gce":
        loss = partial(generalised_cross_entropy, q=settings.q)
    if not settings.border:
        return loss
    if settings.border_as == "ignore":
        return lambda logits, target: loss(logits, ignore_borders(target, settings.border))
    return lambda logits, target: loss(logits, soften_borders(target, logits.shape[1], settings.border))
