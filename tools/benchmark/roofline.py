"""How fast could it be? What the machine can do at most, and the least time that it would need for a piece of work.

    work    the operations of a task, each with its FLOP and the bytes that it reads and writes
    bound   the sum over operations of FLOP / peak FLOP a second or bytes / peak bytes a second, whichever is longer
            (Williams et al. 2009); a compiler that joins operations may be faster than this
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tools.benchmark.race import Setting

Work = list[tuple[str, float, float]]  # of each operation the dtype, FLOP and bytes


class Operations(TorchDispatchMode):
    """Notes the work of every operation that is called while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Work = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            count = flop_registry.get(function.overloadpacket)
            flop = count(*args, **(kwargs or {}), out_val=result) if count else 0
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32"
            self.work.append((dtype, float(flop), float(sum(tensor.nbytes for tensor in tensors))))
        return result


def work_of(task: Callable[[], Any]) -> Work:
    with Operations() as operations:
        task()
    return operations.work


def flop(work: Work) -> float:
    return sum(flop for _, flop, _ in work)


def bound(work: Work, peaks: dict[str, float]) -> float:
    """Seconds."""
    return sum(max(flop / peaks.get(dtype, peaks["float32"]), size / peaks["bytes"]) for dtype, flop, size in work)


def peaks(setting: Setting) -> dict[str, float]:
    """FLOP a second in float32 and bfloat16, and bytes a second, as measured here: the best of several tries each."""
    device, small = torch.device(setting.device), setting.device == "cpu"

    def best(task: Callable[[], Any], amount: float) -> float:
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            task()
            setting.wait()
            seconds.append(time.perf_counter() - start)
        return amount / min(seconds)

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        side, images = (2048, 8) if small else (8192, 64)
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        x = torch.randn(images, 256, 32, 32, device=device).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        found[str(dtype).removeprefix("torch.")] = max(
            best(lambda a=a, b=b: a @ b, 2 * side**3),
            best(lambda x=x, weight=weight: conv2d(x, weight, padding=1), 2 * x.numel() * 256 * 9))
    source = torch.empty(2**26 if small else 2**28, device=device)
    target = torch.empty_like(source)
    found["bytes"] = best(lambda: target.copy_(source), 2 * source.nbytes)
    return found
