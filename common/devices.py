"""Which device, precision and memory layout a script computes with, and how it compiles."""

import logging
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from common.console import UserError, warn

MPS_IS_RIGHT = (2, 14)  # the first torch whose batch norm on MPS has right gradients in every layout


@cache  # a warning is said once
def choose_device(name: str) -> torch.device:
    """The device of a config's `device`: auto = CUDA, else MPS, else CPU, and never one that cannot compute.

    MPS is taken unasked only with a torch from `MPS_IS_RIGHT` on: before it, batch norm of channels-last tensors raised
    there or had wrong gradients without a word (pytorch issue #175189, fixed by #188371).
    """
    if name != "auto":
        problem = _problem(name)
        if problem:
            raise UserError(f"device '{name}' cannot be used here ({problem}): expected cuda, cuda:N, mps or cpu, and "
                            "that this torch and this machine have it; device=auto takes what there is")
        return torch.device(name)
    here = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if here == "mps" and torch.__version__ < MPS_IS_RIGHT:
        warn(f"device=auto computes on the CPU: with torch {torch.__version__} training on MPS can go wrong. Install "
             f"torch {'.'.join(map(str, MPS_IS_RIGHT))} or newer, or set device=mps")
        return torch.device("cpu")
    problem = _problem(here)
    if problem:
        warn(f"device=auto computes on the CPU: '{here}' cannot be used ({problem})")
        return torch.device("cpu")
    return torch.device(here)


def _problem(name: str) -> str:
    """Why a device cannot compute; "" where it can."""
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            return "this project does not know it"
        ones = torch.ones(2, device=device)  # needs a kernel: some GPUs are seen by a torch that has none for them
        return "" if (ones + ones).sum().item() == 4 else "it computes 1 + 1 wrong"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]


def memory_format(device: torch.device) -> torch.memory_format:
    """How images and features (B, C, H, W) lie in memory: channels last is faster, but not right on every MPS."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself. Emulation would be slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch answers for the current one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # torch has no public question for this
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))
    return False


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a config's `train.precision`: auto = bfloat16 autocast where the hardware has it, else float32.

    From here on float32 is float32 (cuDNN's TF32, which has 10 bits of mantissa, is switched off), and cuDNN computes
    the same bits each time.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
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
