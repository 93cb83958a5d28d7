"""Repeat the report's own measurement of receptive fields (section 6.4), and say why it prints the numbers it prints.

`receptive_field.py --as-published` prints the text. A tie is a pooling of equal pixels: it passes the gradient only to
the first of them. On the report's constant input every pooling is a tie.
"""

import torch

from common import geometry
from common.console import table
from fields import theory
from unet import UNet


def as_published(model: UNet, bottleneck: bool = True) -> tuple[int, int]:
    """Return the size that the report's procedure gives, and the position (row and column) of its output pixel.

    The input is zero, and the gradient is that of the first class's logit with respect to the first channel. The size
    is the last row where it is not zero minus the first such row. Without `bottleneck` no gradient passes the
    bottleneck. The model is moved to the CPU.
    """
    levels = len(model.encoder)
    side = max(256, geometry.smallest_cut(levels).size)
    image = torch.zeros(1, 3, side, side).requires_grad_()
    *skips, deepest = model.cpu().eval().encode(image)
    logits = model.decode([*skips, deepest if bottleneck else deepest.detach()])
    gradient, = torch.autograd.grad(logits[0, 0, side // 2, side // 2], image)
    rows = gradient[0, 0].any(1).nonzero().flatten()
    return (rows.max() - rows.min()).item() if len(rows) else 0, side // 2


def describe_published(models: dict[str, UNet]) -> str:
    """Return what the report's procedure prints for these networks, whole and with the bottleneck cut, and why."""
    rows, remarks = [], []
    for name, model in models.items():
        levels = len(model.encoder)
        for path in [levels, levels - 1] if levels > 1 else [1]:
            cut = " with the bottleneck cut" if path < levels else ""
            printed, position = as_published(model, bottleneck=path == levels)
            paths_by_size = {geometry.size(levels, position, depth, ties=True): path_name
                             for depth, path_name in enumerate(theory.path_names(levels)[:path], start=1)}
            *_, expected = paths_by_size
            rows.append([f" {cut}" if cut else name, str(printed), str(printed + 1), str(expected),
                         str(geometry.size(levels, position, path)), theory.sizes(levels, path)])
            if printed + 1 != expected:
                reason = "further gradients are exactly 0 in float32, because weights or their products are too small"
                if printed + 1 in paths_by_size:
                    reason = f"the {paths_by_size[printed + 1]} gives these; no gradient passes the paths below it"
                remarks.append(f"{name}{cut}: {printed + 1} rows are not 0, but {expected} were expected: {reason}.")
    return "\n".join([
        table(["network", "as published", "+ 1", "first of ties", "exact here", "exact, by position"], rows), "",
        "as published        input of zeros, one output pixel, one class, one channel; the last row with a gradient",
        "                    minus the first. The report prints 172 (5 levels), 84 (4 levels) and 116 (5 levels, Dice)",
        "+ 1                 the number of these rows: from row 34 to row 206 there are 173",
        "first of ties       by arithmetic, if every pooling passes the gradient only to the first of its pixels; on a",
        "                    constant input it does, because its pixels are equal",
        "exact here          what this output pixel depends on",
        "exact, by position  what any output pixel depends on, by its position (--theory)", "",
        "172 and 84 do not need the report's explanation, that small gradients are rounded to 0. 116 is what the skip",
        "of level 4 gives, which is consistent with a model whose bottleneck passes no gradient.", *remarks])
