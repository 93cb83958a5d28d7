"""Copies of weights and Adam state in memory, from which every fold of an epoch starts and of which one survives.

State dicts are live views of the tensors that training changes. A snapshot has their shape and tensors of its own,
which can be filled again in place; no tensor of model or optimizer ever moves.
"""

import copy

import torch
from torch import Tensor

Snapshot = tuple[dict, dict]  # the state dicts of model and optimizer


def tensors_of(state: Snapshot) -> list[Tensor]:
    """In one order, that of the dicts."""
    model, optimizer = state
    return [*model.values(), *(value for moments in optimizer["state"].values() for value in moments.values())]


def snapshot_of(state: Snapshot, into: Snapshot | None = None) -> Snapshot:
    """A copy, in the place of an earlier one where there is one."""
    if into is None:
        return copy.deepcopy(state)
    copy_state(state, into)
    return into


def copy_state(source: Snapshot, target: Snapshot) -> None:
    """Copy every tensor in place, all of one dtype at once."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for value, place in zip(*map(tensors_of, (source, target)), strict=True):
        values, places = by_dtype.setdefault(value.dtype, ([], []))
        values.append(value)
        places.append(place)
    for values, places in by_dtype.values():
        torch._foreach_copy_(places, values)
