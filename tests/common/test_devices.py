"""common/devices.py: "auto" never takes a device that cannot compute, and the memory layout changes no result."""

import contextlib

import pytest
import torch

from common import devices
from common.config import Loss
from common.console import UserError
from common.devices import (
    autocast,
    choose_device,
    choose_precision,
    compile_for_training,
    has_bf16,
    memory_format,
    peak_memory_mb,
)
from losses import make_loss
from unet import UNet


@pytest.fixture(autouse=True)
def no_cached_device():
    choose_device.cache_clear()
    yield
    choose_device.cache_clear()


def test_devices_and_precisions():
    cpu = choose_device("cpu")
    assert choose_precision("float32", cpu) == torch.float32 and choose_precision("bf16", cpu) == torch.bfloat16
    assert choose_precision("auto", cpu) == (torch.bfloat16 if has_bf16(cpu) else torch.float32)
    torch.backends.cudnn.allow_tf32 = True
    assert choose_precision("float32", cpu) == torch.float32 and not torch.backends.cudnn.allow_tf32
    assert choose_device("auto").type in ("cuda", "mps", "cpu")
    layer = torch.nn.Linear(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(cpu, dtype):
            assert layer(torch.zeros(1, 2)).dtype == dtype
    assert 1 < peak_memory_mb(cpu) < 1e6


def fake_machine(monkeypatch, cuda=False, mps=False, version="2.14.1", problem=""):
    """A machine with these devices; all but the CPU have this problem."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(devices, "_why_unusable", lambda name: "" if name == "cpu" else problem)


@pytest.mark.parametrize(("machine", "expected", "reason"), [
    ({}, "cpu", ""), ({"cuda": True}, "cuda", ""), ({"mps": True}, "mps", ""),
    ({"cuda": True, "problem": "CUDA error: no kernel image is available for execution on the device"}, "cpu",
     "no kernel image"),
    ({"cuda": True, "problem": "CUDA error: out of memory"}, "cpu", "out of memory"),
    ({"mps": True, "version": "2.13.0"}, "cpu", "torch 2.13.0 on MPS"),
    ({"mps": True, "version": "2.14.0+cpu"}, "mps", ""), ({"mps": True, "version": "3.0.0"}, "mps", ""),
])
def test_auto_takes_what_can_compute_and_warns_once_if_a_gpu_cannot(monkeypatch, capsys, machine, expected, reason):
    fake_machine(monkeypatch, **machine)
    assert choose_device("auto").type == choose_device("auto").type == expected
    warning = capsys.readouterr().err
    assert reason in warning and warning.count("warning") == bool(reason)


def test_a_named_device_is_used_or_rejected_with_the_reason(monkeypatch):
    fake_machine(monkeypatch, mps=True, version="2.10.0")
    assert choose_device("mps").type == "mps"
    fake_machine(monkeypatch, cuda=True, problem="CUDA error: no kernel image")
    with pytest.raises(UserError, match="'cuda'.*CUDA error: no kernel image"):
        choose_device("cuda")
    monkeypatch.undo()
    with pytest.raises(UserError, match="'abacus'"):
        choose_device("abacus")


def test_bfloat16_depends_on_the_device_that_computes(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1].index == 1)
    assert has_bf16(torch.device("cuda:1")) and not has_bf16(torch.device("cuda:0"))
    assert not has_bf16(torch.device("mps"))


@pytest.mark.parametrize(("device", "expected"), [
    ("cpu", {}), ("cuda", {"triton.cudagraphs": True, "deterministic": True})])
def test_training_is_compiled_with_cuda_graphs_and_kernels_that_no_timing_chooses(monkeypatch, device, expected):
    """Timed choices differ between processes, and another kernel rounds differently. torch knows the options."""
    from torch._inductor import config

    seen = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.update(options) or function)
    compile_for_training(len, torch.device(device))
    assert (seen["options"] or {}) == expected and seen["dynamic"] is False
    assert expected.keys() <= config.get_config_copy().keys()


def gradients(device, layout):
    torch.manual_seed(0)
    model = UNet((4, 8, 16), dropout=0).to(device, memory_format=layout)
    images = torch.randn(2, 3, 32, 32).to(device).contiguous(memory_format=layout)
    target = torch.randint(0, 3, (2, 32, 32)).to(device)
    make_loss(Loss(), torch.ones(3))(model(images), target).backward()
    return {name: weight.grad.cpu() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_gradients_in_the_layout_of_the_device_are_those_of_the_cpu(device):
    if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
        pytest.skip(f"no {device} here")
    choose_precision("float32", torch.device(device))
    found, expected = gradients(device, memory_format(torch.device(device))), gradients("cpu", torch.contiguous_format)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5 * largest), name


def test_on_mps_images_and_network_are_channels_first():
    """Channels last has wrong gradients there in the versions of torch that are admitted (pytorch issue #175189)."""
    assert memory_format(torch.device("mps")) == torch.contiguous_format
    assert memory_format(torch.device("cpu")) == memory_format(torch.device("cuda:1")) == torch.channels_last
