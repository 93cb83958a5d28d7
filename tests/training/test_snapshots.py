"""training/snapshots.py against deepcopy."""

import copy

import torch

from training.snapshots import copy_state, snapshot_of, tensors_of
from unet import UNet


def trained_state(steps: int = 2):
    torch.manual_seed(steps)
    model = UNet((4, 8), dropout=0.5).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for _ in range(steps):
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        optimizer.step()
    return model, optimizer, (model.state_dict(), optimizer.state_dict())


def assert_same(ours, expected):
    for a, b in zip(tensors_of(ours), tensors_of(expected), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    assert ours[0].keys() == expected[0].keys() and ours[1]["param_groups"] == expected[1]["param_groups"]


def test_every_tensor_of_weights_buffers_and_adam_is_copied():
    model, _, state = trained_state()
    assert len(tensors_of(state)) == len(model.state_dict()) + 3 * len(list(model.parameters()))
    assert {tensor.dtype for tensor in tensors_of(state)} == {torch.float32, torch.int64}  # batches counted by norms
    assert_same(snapshot_of(state), copy.deepcopy(state))


def test_a_snapshot_is_filled_in_place_and_shares_nothing():
    _, _, state = trained_state(1)
    _, _, later = trained_state(3)
    kept, expected = snapshot_of(state), copy.deepcopy(later)
    places = [tensor.data_ptr() for tensor in tensors_of(kept)]
    assert snapshot_of(later, into=kept) is kept
    assert [tensor.data_ptr() for tensor in tensors_of(kept)] == places
    for tensor in tensors_of(later):
        tensor.zero_()
    assert_same(kept, expected)


def test_what_is_put_back_lands_in_the_tensors_that_training_changes():
    model, optimizer, state = trained_state()
    start, expected = snapshot_of(state), copy.deepcopy(state)
    places = [tensor.data_ptr() for tensor in tensors_of(state)]
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, start[0]["head.weight"])
    copy_state(start, (model.state_dict(), optimizer.state_dict()))
    now = model.state_dict(), optimizer.state_dict()
    assert_same(now, expected)
    assert [tensor.data_ptr() for tensor in tensors_of(now)] == places
