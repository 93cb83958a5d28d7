"""Choose a device, its precision and its memory layout, compile functions for it, and read its peak memory."""

import logging
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from common import ranks
from common.console import UserError, warn
from common.workers import processor

SAFE_ON_MPS = (2, 14)  # the first torch whose batch norm on MPS has correct gradients in every memory layout
GPU_COMPILER_OPTIONS = {
    "triton.cudagraphs": True,  # one launch for all kernels of a pass
    "deterministic": True,  # otherwise kernels are chosen by their measured time, and another kernel rounds differently
}


@cache  # so that each warning appears once
def choose_device(name: str) -> torch.device:
    """Return the device of the setting `device`. "auto" means CUDA, else MPS, else the CPU, if it can compute.

    "auto" takes MPS only from torch `SAFE_ON_MPS` on: before, batch norm of channels-last tensors on MPS failed or had
    wrong gradients (pytorch issue #175189, fixed by #188371).
    """
    if name != "auto":
        reason = _why_unusable(name)
        if reason:
            raise UserError(f"device '{name}' cannot be used here ({reason}): set device to cuda, cuda:N, mps or cpu, "
                            "if this machine and this torch support it, or to auto")
        return _of_this_rank(torch.device(name))
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    reason = _why_unusable(best)
    if best == "mps" and torch.__version__ < SAFE_ON_MPS:
        reason = f"training with torch {torch.__version__} on MPS can go wrong; install a newer one, or set device=mps"
    if reason:
        warn(f"device=auto uses the CPU instead of {best}: {reason}")
        best = "cpu"
    return _of_this_rank(torch.device(best))


def _of_this_rank(device: torch.device) -> torch.device:
    """Return the GPU of this rank if several work on this machine, each with a GPU of its own."""
    number, count = ranks.on_this_machine()
    if device.type == "mps" and ranks.count() > 1:
        raise UserError("torchrun cannot share the one GPU of a Mac: leave out torchrun, or set device=cpu")
    if device.type != "cuda" or ranks.count() == 1:
        return device
    if device.index is not None and count > 1:
        raise UserError(f"device '{device}' would be that of all {count} ranks on this machine; set device=cuda or "
                        "auto, and each takes one")
    if number >= (found := torch.cuda.device_count()):
        raise UserError(f"this machine has GPUs: {found}, but torchrun starts {count} ranks here, which need one each; "
                        f"give it --nproc-per-node {found}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def device_name(device: torch.device) -> str:
    """Return the type of a device and the name of its hardware."""
    return f"{device.type} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else processor()})"


def _why_unusable(name: str) -> str:
    """Return why a device cannot compute, or "" if it can."""
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            return "this project does not support it"
        ones = torch.ones(2, device=device)  # the sum needs a kernel: torch lists some GPUs for which it has none
        return "" if (ones + ones).sum().item() == 4 else "it computes 1 + 1 wrong"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the memory layout of images and features (B, C, H, W): channels last is faster, but not safe on MPS."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware itself multiplies bfloat16. Emulation would be slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # the check is for the current device
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # torch has no public check for CPUs
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))
    return False


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the setting `train.precision`. "auto" means bfloat16 if the hardware has it, else float32.

    Also set cuDNN to full float32 (its TF32 has only 10 bits of mantissa) and to kernels that repeat every bit.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    return torch.bfloat16 if name == "bf16" or (name == "auto" and has_bf16(device)) else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which the network runs; with float32 it changes nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def compile_by_shape(function: Callable, options: dict[str, object] | None = None) -> Callable:
    """Compile a function with options of torch's inductor; it compiles again for each new shape of its arguments."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a missing CUDA toolkit
    return torch.compile(function, dynamic=False, options=options)


def compile_for_training(function: Callable, device: torch.device) -> Callable:
    """Compile a training step so that every process on the same machine computes the same bits."""
    return compile_by_shape(function, GPU_COMPILER_OPTIONS if device.type == "cuda" else None)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process in MB: GPU memory on CUDA, else main memory (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if peak:  # getrusage would also count the process that started this one
        return int(peak.group(1)) / 1024
    if sys.platform == "win32":
        return 0.0
    import resource
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
