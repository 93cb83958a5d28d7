"""The loss functions of the report's section 6.1, by the names that configs use.

    p   softmax of the logits                         probs   (B, K, H, W)
    t   one-hot target                                target  (B, H, W) int64 holds the class of each pixel
    w   class weights, equation 4                     weights (K,)

Every loss maps logits (B, K, H, W) and target (B, H, W) to a scalar. It is computed in float32, whatever the precision
of the network. Pixels whose target is IGNORE are left out of every sum and number, and have no gradient; without others
the loss is 0. The report prints equations 2 and 3 without their minus sign, equation 6 without an epsilon, and
equation 12 with the wrong sign of the Dice term. They are corrected here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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
    log_probs = true_log_probs(logits, target)                                       # (B, H, W)
    if weights is not None:
        log_probs = log_probs * weights[target.masked_fill(target == IGNORE, 0)]     # (B, H, W)
    return -_mean(log_probs, target != IGNORE)


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Return equation 9 for each tile: (B,), the mean over ALL classes of 2 sum(t p) / (sum t + sum p).

    A class that is absent from the target scores 0. So a perfect prediction of a tile with two of three classes has
    0.667. The absent class's term has no gradient: a falsely predicted class costs only what it takes from the other
    classes. Epsilon stands only in the denominator, where it prevents 0/0. A tile of ignored pixels has 0.
    """
    labelled = (target != IGNORE)[:, None]                                           # (B, 1, H, W)
    classes = target[:, None].masked_fill(~labelled, 0)                              # (B, 1, H, W)
    probs = torch.softmax(logits.float(), dim=1) * labelled                          # (B, K, H, W)
    one_hot = torch.zeros_like(probs).scatter_(1, classes, labelled.to(probs.dtype))  # (B, K, H, W)
    overlap = (one_hot * probs).sum(dim=(2, 3))                                      # (B, K)
    total = one_hot.sum(dim=(2, 3)) + probs.sum(dim=(2, 3))                          # (B, K)
    return (2 * overlap / (total + EPSILON)).mean(dim=1)                             # (B,)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of the values that count, a bool for each; the others must be 0. Without any it is 0."""
    return values.mean() * (values.numel() / counts.sum().clamp(min=1))  # the factor is exactly 1 if all count


def _mean_soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean soft Dice over the tiles that have a labelled pixel."""
    return _mean(soft_dice(logits, target), (target != IGNORE).flatten(1).any(dim=1))


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
    return cross_entropy(logits, target) - log_dice * (target != IGNORE).any()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": cross_entropy,
    "dice": dice,
    "dice_ce": dice_ce,
    "log_dice_ce": log_dice_ce,
}  # and "wce" of `make_loss`, the only one that needs class weights


def class_weights(frequencies: Tensor) -> Tensor:
    """Return equation 4: weights (K,) with sum 1, inversely proportional to the class frequencies (K,).

    The report's .525 .275 .200 give .181 .345 .474. Raises `ValueError` if a class does not occur.
    """
    if not bool((frequencies > 0).all()):
        raise ValueError(f"class weights need every class to occur; the frequencies are {frequencies.tolist()}")
    inverse = 1 / frequencies.double()
    return (inverse / inverse.sum()).float()


def make_loss(name: str, frequencies: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function of the setting `loss.name`. "wce" uses the class frequencies (K,), on their device."""
    if name != "wce":
        return LOSSES[name]
    weights = class_weights(frequencies.cpu()).to(frequencies.device)
    return lambda logits, target: cross_entropy(logits, target, weights)
