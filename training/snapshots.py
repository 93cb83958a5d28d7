"""Copies in memory of weights and Adam state: every fold of an epoch starts from one, and the survivor is one.

The state dicts of model and optimizer hold the very tensors that training changes. A snapshot has the same structure
with tensors of its own. Copying back changes values in place, and no tensor of model or optimizer moves.
"""

import torch
from torch import Tensor

State = tuple[dict, dict]  # the state dicts of model and optimizer


def tensors_of(state: State) -> list[Tensor]:
    """Return all tensors of a state, in the order of its dicts."""
    model, optimizer = state
    return [*model.values(), *(value for moments in optimizer["state"].values() for value in moments.values())]


def copy_state(source: State, target: State) -> None:
    """Copy every tensor of a state in place, with one operation for each dtype."""
    pairs = list(zip(tensors_of(source), tensors_of(target), strict=True))
    for dtype in {value.dtype for value, _ in pairs}:
        values, places = zip(*[(value, place) for value, place in pairs if value.dtype == dtype], strict=True)
        torch._foreach_copy_(places, values)
