"""The report's own procedure (section 6.4): what it prints, and why."""

import torch

from common import geometry
from common.console import table
from common.geometry import smallest_cut
from fields import theory
from unet import UNet


def as_published(model: UNet, bottleneck: bool = True) -> tuple[int, int]:
    """The report's size of the field, and the output pixel it is of: zeros in, the gradient of the first class's logit
    at one pixel with respect to the first channel, last row that is not zero minus the first one.

    Without `bottleneck` no gradient passes it. The model is moved to the CPU.
    """
    levels = len(model.encoder)
    side = max(256, smallest_cut(levels).size)
    image = torch.zeros(1, 3, side, side).requires_grad_()
    *skips, deepest = model.cpu().eval().encode(image)
    logits = model.decode([*skips, deepest if bottleneck else deepest.detach()])
    gradient, = torch.autograd.grad(logits[0, 0, side // 2, side // 2], image)
    seen = gradient[0, 0].any(1).nonzero().flatten()
    return (seen.max() - seen.min()).item() if len(seen) else 0, side // 2



def describe_published(models: dict[str, UNet]) -> str:
    """What the report's procedure says of these networks, whole and with the bottleneck cut, and why."""
    rows, remarks = [], []
    for name, model in models.items():
        levels = len(model.encoder)
        for path, label in ((levels, name), (levels - 1, "  with the bottleneck cut"))[:2 if levels > 1 else 1]:
            printed, position = as_published(model, bottleneck=path == levels)
            tied = {depth: geometry.size(levels, position, depth, ties=True) for depth in range(path, 0, -1)}
            rows.append([label, str(printed), str(printed + 1), str(tied[path]),
                         str(geometry.size(levels, position, path)), theory.sizes(levels, path)])
            if printed + 1 != tied[path]:
                alike = [depth for depth, size in tied.items() if size == printed + 1]
                why = (f"just what the {theory.path_names(levels)[alike[0] - 1]} gives: no gradient passes what "
                       "lies below it" if alike else "so further gradients are exactly 0 in float32, by weights that "
                       "vanish or by their product")
                remarks.append(f"{label.strip()} ({name}): {printed + 1} pixels are not 0, {tied[path]} were expected; "
                               f"{why}.")
    return "\n".join([
        table(["network", "as published", "+ 1", "first of ties", "exact here", "exact, by position"], rows), "",
        "as published        zeros in, one output pixel, one class, one channel; last row that is not 0, - the first.",
        "                    The report prints 172 (5 levels), 84 (4 levels) and 116 (5 levels, trained on Dice)",
        "+ 1                 how many rows that are: from row 34 to row 206 there are 173",
        "first of ties       by arithmetic, if every pooling passes the gradient to the first of its pixels alone: so",
        "                    it does on a constant input, where they are equally large",
        "exact here          what this output pixel depends on",
        "exact, by position  what any output pixel depends on, by its position (--theory)", "",
        "So 172 and 84 need no rounding of small gradients, by which the report explains its sizes. 116 is what the",
        "skip of level 4 gives, which is consistent with a model whose bottleneck passes no gradient.", *remarks])
