"""training/learner.py: first weights and Adam, snapshots, checkpoints, the learning rate, and memory."""

import pytest
import torch

import train
from common.config import Loss
from common.config_files import apply_overrides
from losses import make_loss
from training import checkpoints, training_set
from training.learner import build_learner
from unet import UNet


@pytest.fixture
def learner(workplace, tiny):
    return build_learner(tiny, training_set.prepare_data(tiny).statistics)


def make_step(learner):
    learner.optimizer.zero_grad()
    learner.model(torch.randn(2, 3, 16, 16)).sum().backward()
    learner.optimizer.step()


def test_adam_starts_with_the_state_that_its_first_step_creates(learner):
    lazy = torch.optim.Adam(learner.model.parameters(), fused=True)
    learner.model(torch.randn(2, 3, 16, 16)).sum().backward()
    lazy.step()
    for weight, expected in lazy.state.items():
        ours = learner.optimizer.state[weight]
        assert ours.keys() == expected.keys() and all(value.sum() == 0 for value in ours.values())
        assert all(ours[name].dtype == value.dtype and ours[name].stride() == value.stride()
                   for name, value in expected.items())


def test_further_training_does_not_change_a_snapshot(learner):
    make_step(learner)
    snapshot = learner.take_snapshot()
    weights = torch.tensor([value.double().sum() for value in snapshot[0].values()])
    learner.restore_snapshot(snapshot)
    make_step(learner)
    assert torch.equal(weights, torch.tensor([value.double().sum() for value in snapshot[0].values()]))
    adam = [state["exp_avg"].clone() for state in snapshot[1]["state"].values()]
    make_step(learner)
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(adam, snapshot[1]["state"].values(), strict=True))


def test_whether_adam_is_fused_depends_on_the_device_and_not_on_the_checkpoint(workplace, tiny):
    train.start(apply_overrides(tiny, ["train.epochs=1"]))
    checkpoint = checkpoints.load_checkpoint(workplace / "runs/tiny/checkpoints/last.pt")
    assert checkpoint.optimizer["param_groups"][0]["fused"] is True
    learner = build_learner(tiny, checkpoint.statistics)
    learner.optimizer.param_groups[0]["fused"] = None  # as on a device without fused Adam
    learner.restore_checkpoint(checkpoint)
    assert learner.optimizer.param_groups[0]["fused"] is None


def test_the_learning_rate_falls_when_the_ema_of_a_negative_loss_worsens(learner, tiny):
    """With torch's relative threshold a negative loss could worsen for ever."""
    for epoch in range(8):
        learner.scheduler.step(-0.5 + 1e-5 * epoch)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(tiny.optim.lr * 0.2)


def test_the_reports_batch_needs_far_less_memory_than_its_gpu_had():
    """Counted, not measured: what autograd keeps of 16 images until the backward pass, the weights and their copies."""
    model, kept = UNet().to(memory_format=torch.channels_last), {}
    weights = {weight.data_ptr() for weight in model.parameters()}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16)):
        make_loss(Loss(), torch.ones(3))(model(torch.zeros(1, 3, 256, 256)), torch.zeros(1, 256, 256).long())
    bytes_per_image = sum(storage.nbytes() for storage in kept.values())
    bytes_of_weights = sum(weight.nbytes for weight in model.parameters())
    copies = 10  # weights, gradients, Adam's two, and two snapshots of three each
    assert 16 * bytes_per_image + copies * bytes_of_weights < 2.5e9  # the report's GTX 1060 had 6 GB
