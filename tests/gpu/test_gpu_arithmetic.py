"""The GPU computes what the CPU computes: convolutions, gradients, Adam, receptive fields and metrics."""

import numpy as np
import pytest
import torch
from gpu_helpers import (
    KINK,
    crops_for,
    distance_to_kinks,
    exact_learner,
    learner_of,
    loss_of,
    step_losses,
    strides_that_matter,
)
from helpers import numpy_batches
from torch import nn

from common.console import Progress
from common.devices import choose_precision, memory_format
from evaluation import metrics
from fields import gradients, sampling
from training.batches import batches_on, normalise
from unet import UNet

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, in units of the largest exact value."""
    return ((ours.detach().cpu().double() - exact.detach()).abs().max() / exact.abs().max()).item()


# ---------------------------------------------------------------------------------------------- convolutions

CONVOLUTIONS = {"3x3": lambda: nn.Conv2d(64, 64, 3, padding=1),
                "transposed 2x2": lambda: nn.ConvTranspose2d(64, 32, 2, stride=2),
                "1x1": lambda: nn.Conv2d(64, 3, 1)}


def convolution_errors(layer: nn.Module, device: torch.device) -> dict[str, float]:
    """The errors of the output and of both gradients, against float64 on the CPU."""
    images, results = torch.randn(2, 64, 32, 32), []
    for place, dtype in ((CPU, torch.float64), (device, torch.float32)):
        layer = layer.to(place, dtype, memory_format=memory_format(place))
        layer.zero_grad()
        inputs = images.to(place, dtype, memory_format=memory_format(place)).requires_grad_()
        output = layer(inputs)
        output.square().mean().backward()
        results.append({"output": output, "gradient of the input": inputs.grad,
                        "gradient of the weights": layer.weight.grad.clone()})
    exact, ours = results
    return {name: relative_error(ours[name], exact[name]) for name in exact}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_float32_convolutions_equal_float64_to_1e5(any_gpu, name, record):
    choose_precision("float32", any_gpu)
    torch.manual_seed(0)
    for quantity, error in convolution_errors(CONVOLUTIONS[name](), any_gpu).items():
        record(f"{any_gpu.type} {name} convolution, {quantity}: error against float64", error, at_most=1e-5)


def test_tf32_would_break_the_bound_of_float32(cuda_only, record, monkeypatch):
    """So the bound above is tight enough to notice TF32."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.manual_seed(0)
    errors = convolution_errors(CONVOLUTIONS["3x3"](), cuda_only)
    record("cuda 3x3 convolution with TF32 switched on: error against float64", max(errors.values()), at_least=2e-5)


# ---------------------------------------------------------------------------------------------- a step

def gradients_of_a_step(config, learner, data, seed: int) -> dict[str, torch.Tensor]:
    """The gradients of all parameters after one batch."""
    batch = next(batches_on(learner.device, crops_for(data, config, 1, seed), data.store, config.train.batch_size))
    loss_of(learner, data, batch).backward()
    return {name: weight.grad.cpu().double() for name, weight in learner.model.named_parameters()}


def batch_far_from_kinks(config, learner, data) -> int:
    """The seed of a batch whose gradients do not depend on rounding."""
    for seed in range(100):
        batch = next(numpy_batches(crops_for(data, config, 1, seed), data.store, config.train.batch_size))
        images = normalise(torch.from_numpy(batch[..., :3]), data.statistics).double()
        if distance_to_kinks(learner.model.train(), images) > KINK:
            return seed
    raise AssertionError("no such batch")


def gradient_errors(configured, device: torch.device, *changes: str) -> dict[str, float]:
    """The error of every parameter's gradient against float64 on the CPU, in units of its layer's largest gradient.

    The gradient of a bias alone is no measure: the next batch norm removes most or all of it, except for rounding.
    """
    changes = ("model.dropout=0", "data.crop=32", "train.batch_size=2", *changes)
    exact_config, config = configured(CPU, *changes), configured(device, *changes)
    learner, data = exact_learner(exact_config)
    seed = batch_far_from_kinks(exact_config, learner, data)
    exact = gradients_of_a_step(exact_config, learner, data, seed)
    ours = gradients_of_a_step(config, *learner_of(config), seed)
    largest: dict[str, float] = {}
    for name, gradient in exact.items():
        layer = name.rpartition(".")[0]
        largest[layer] = max(largest.get(layer, 0), gradient.abs().max().item())
    return {name: (ours[name] - exact[name]).abs().max().item() / largest[name.rpartition(".")[0]] for name in exact}


@pytest.mark.parametrize("loss", ["dice_ce", "wce", "log_dice_ce"])
def test_gradients_of_all_parameters_equal_those_of_the_cpu_to_1e4(any_gpu, loss, configured, record):
    errors = gradient_errors(configured, any_gpu, f"loss.name={loss}")
    assert len(errors) == 46
    worst = max(errors, key=errors.get)
    record(f"{any_gpu.type} gradients by {loss}: largest error of a tensor ({worst})", errors[worst], at_most=1e-4)


def test_the_loss_of_20_steps_falls_and_follows_that_of_the_cpu(any_gpu, configured, record):
    changes = ("model.dropout=0", "optim.lr=0.001")
    config, exact_config = configured(any_gpu, *changes), configured(CPU, *changes)
    ours = np.array(step_losses(*learner_of(config), config, 20))
    exact = np.array(step_losses(*exact_learner(exact_config), exact_config, 20))
    record(f"{any_gpu.type} 20 steps: fall of the loss", float(ours[0] - ours[-1]), at_least=0.3)
    record(f"{any_gpu.type} 20 steps: largest distance to the CPU's losses, of their fall",
           float(np.abs(ours - exact).max() / (exact[0] - exact[-1])), at_most=0.01)


def test_gradients_and_adam_state_have_the_strides_of_weights_and_fused_adam_equals_plain(device, configured, record):
    """Fused Adam reads the memory of all four in the same order."""
    config = configured(device, "optim.lr=0.0005", "optim.weight_decay=0.00003")
    learner, data = learner_of(config)
    assert learner.optimizer.param_groups[0]["fused"]
    weights = dict(learner.model.named_parameters())
    plain_weights = [nn.Parameter(weight.detach().clone()) for weight in weights.values()]
    plain = torch.optim.Adam(plain_weights, lr=5e-4, weight_decay=3e-5, foreach=False, fused=False)
    unlike = set()
    for batch in batches_on(device, crops_for(data, config, 3), data.store, config.train.batch_size):
        loss_of(learner, data, batch).backward()
        for (name, weight), twin in zip(weights.items(), plain_weights, strict=True):
            twin.grad = weight.grad.clone()
            state = learner.optimizer.state[weight]
            four = (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])
            assert len({tuple(strides_that_matter(tensor)) for tensor in four}) == 1, name
            if len({tensor.stride() for tensor in four}) > 1:
                unlike.add(name)
        learner.optimizer.step()
        plain.step()
        learner.optimizer.zero_grad()
    record("eager step: parameters whose strides differ where they mean nothing", ", ".join(sorted(unlike)) or "none")
    difference = max((weight - twin).abs().max().item() for weight, twin in
                     zip(weights.values(), plain_weights, strict=True))
    record("fused Adam, 3 steps: largest difference to the plain one, of a step's length", difference / 5e-4,
           at_most=0.005)


# ---------------------------------------------------------------------------------------------- receptive fields

@pytest.mark.parametrize("by_path", [True, False])
def test_receptive_fields_equal_those_of_the_cpu_to_1e4(any_gpu, by_path, record):
    torch.manual_seed(0)
    model = UNet((4, 8, 16), dropout=0).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the statistics of what it has seen
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    model.double().eval().requires_grad_(False)
    pixels, fields = sampling.free_pixels(3, 3, seed=0), []
    seed = next(seed for seed in range(100) if distance_to_kinks(
        model, sampling.noise_inputs(3, CPU, seed)(0, len(pixels)).double()) > KINK)
    for place, dtype in ((any_gpu, torch.float32), (CPU, torch.float64)):
        model = model.to(place, dtype, memory_format=memory_format(place))
        noise = sampling.noise_inputs(3, place, seed)
        with Progress("", len(pixels)) as progress:
            fields.append(gradients.measure_field(
                model, lambda start, stop, noise=noise, dtype=dtype: noise(start, stop).to(dtype), pixels, by_path,
                progress))
    ours, exact = fields
    names = ("maps", "energy", "path_energy", "without", "importance") if by_path else ("maps", "energy")
    for name in names:
        a, b = getattr(ours, name), getattr(exact, name)
        error = float(np.abs(a - b).max() / np.abs(b).max())
        record(f"{any_gpu.type} receptive field, {name}{' by path' if by_path else ''}: error", error, at_most=1e-4)


# ---------------------------------------------------------------------------------------------- metrics

def test_confusion_and_calibration_equal_those_of_the_cpu_exactly(any_gpu, monkeypatch):
    """Without the softmax, whose rounding depends on the device. The sums are as large as those of a batch of tiles."""
    generator = torch.Generator().manual_seed(0)
    target, prediction = torch.randint(0, 3, (2, 4, 512, 512), generator=generator)
    assert torch.equal(metrics.confusion(prediction.to(any_gpu), target.to(any_gpu), 3).cpu(),
                       metrics.confusion(prediction, target, 3))
    confidence = 1 - 0.6 * torch.rand(4, 512, 512, generator=generator) ** 4
    probs = torch.full((4, 3, 512, 512), 0.25).scatter_(1, prediction[:, None], confidence[:, None])
    monkeypatch.setattr(torch, "softmax", lambda logits, dim: logits)
    ours, exact = metrics.calibration(probs.to(any_gpu), target.to(any_gpu)), metrics.calibration(probs, target)
    assert exact[:, 0].sum() == 4 * 512 * 512 and exact[:, 1].max() * 2**24 > 2**31
    assert torch.equal(ours, exact)
    assert torch.equal(exact[:, 2].sum(1), (prediction == target).sum((1, 2)).double())


def test_calibration_of_logits_equals_that_of_the_cpu_except_for_the_rounding_of_softmax(any_gpu, record):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 3, 256, 256, generator=generator)
    target = torch.randint(0, 3, (4, 256, 256), generator=generator)
    ours, exact = metrics.calibration(logits.to(any_gpu), target.to(any_gpu)), metrics.calibration(logits, target)
    assert torch.equal(ours[:, [0, 2]].sum(2), exact[:, [0, 2]].sum(2))
    errors = [metrics.calibration_error(bins.sum(0).numpy()) for bins in (ours, exact)]
    record(f"{any_gpu.type} calibration error: difference to the CPU's", float(abs(errors[0] - errors[1])),
           at_most=1e-5)
