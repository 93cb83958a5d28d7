"""training/snapshots.py by way of `Learner`, against deepcopy."""

import copy

import torch

from training.learner import Learner
from training.snapshots import tensors_of
from unet import UNet

CPU = torch.device("cpu")


def trained_learner(steps: int = 2) -> Learner:
    torch.manual_seed(steps)
    model = UNet((4, 8), dropout=0.5).to(memory_format=torch.channels_last)
    learner = Learner(model, torch.optim.Adam(model.parameters(), fused=True), None, None, CPU, torch.float32)
    for _ in range(steps):
        make_step(learner)
    return learner


def make_step(learner: Learner) -> None:
    learner.model(torch.randn(2, 3, 16, 16)).sum().backward()
    learner.optimizer.step()


def addresses(state) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors_of(state)]


def assert_same(ours, expected):
    for a, b in zip(tensors_of(ours), tensors_of(expected), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    assert ours[0].keys() == expected[0].keys() and ours[1]["param_groups"] == expected[1]["param_groups"]


def test_every_tensor_of_weights_buffers_and_adam_is_copied():
    learner = trained_learner()
    tensors = tensors_of(learner.state)
    assert len(tensors) == len(learner.model.state_dict()) + 3 * len(list(learner.model.parameters()))
    assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}  # batch norms count their batches
    assert_same(learner.take_snapshot(), copy.deepcopy(learner.state))


def test_a_snapshot_is_overwritten_in_place_and_shares_nothing():
    kept, later = trained_learner(1).take_snapshot(), trained_learner(3)
    expected, before = copy.deepcopy(later.state), addresses(kept)
    assert later.take_snapshot(into=kept) is kept
    assert addresses(kept) == before
    with torch.no_grad():
        for tensor in tensors_of(later.state):
            tensor.zero_()
    assert_same(kept, expected)


def test_a_snapshot_is_restored_into_the_tensors_that_training_changes():
    learner = trained_learner()
    start, expected, before = learner.take_snapshot(), copy.deepcopy(learner.state), addresses(learner.state)
    make_step(learner)
    assert not torch.equal(learner.model.head.weight, start[0]["head.weight"])
    learner.restore_snapshot(start)
    assert_same(learner.state, expected)
    assert addresses(learner.state) == before
