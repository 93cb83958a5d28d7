"""Which device and which precision a script computes with, and how it compiles."""

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from console import UserError


def choose_device(name: str) -> torch.device:
    """The device of a config's `device`: auto = CUDA, else MPS, else CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        usable = device.type in ("cuda", "mps", "cpu") and torch.zeros(1, device=device).item() == 0
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise UserError(f"device '{name}' cannot be used here: expected cuda, cuda:N, mps or cpu, and that this torch "
                        "and this machine have it; try device=auto")
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself. Emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # torch has no public question for this
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return False


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a config's `train.precision`: auto = bfloat16 autocast where the hardware has it, else float32.

    Float32 is float32 from here on: cuDNN's TF32, which has 10 bits of mantissa, is switched off.
    """
    torch.backends.cudnn.allow_tf32 = False
    return torch.bfloat16 if name == "bf16" or (name == "auto" and has_bf16(device)) else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which the network runs; with float32 it changes nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def compile_by_shape(function: Callable, **options: object) -> Callable:
    """`torch.compile`, anew for every shape of the arguments."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA, which is not needed
    return torch.compile(function, dynamic=False, **options)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has used: the GPU's where it computes on one, else the machine's (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if peak:  # getrusage begins with what the process that started this one had
        return int(peak.group(1)) / 1024
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
