"""Measure how fast this machine can be at most, and estimate the shortest possible time of a task (its roofline).

    work    the operations of a task, each with its FLOP and the bytes that it must read and write
    bound   the sum over operations of FLOP / peak FLOP a second or bytes / peak bytes a second, whichever is longer
            (Williams et al. 2009); a compiler that joins operations may be faster
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

from common.devices import has_bf16
from tools.benchmark.race import Setting

Work = list[tuple[str, float, float]]  # dtype, FLOP and bytes of each operation

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # move no bytes
OVERWRITES = {"copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_", "bernoulli_", "normal_", "random_",
              "uniform_"}  # do not read the tensor that they write
LOOKUPS = {"index", "index_select", "gather"}  # read only as much of their first argument as they return


class Operations(TorchDispatchMode):
    """A context that records the work of every operation in it."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Work = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            count = flop_registry.get(function.overloadpacket)
            flop = count(*args, **(kwargs or {}), out_val=result) if count else 0
            found = _tensors((args, kwargs, result))
            dtype = str(found[0].dtype).removeprefix("torch.") if found else "float32"
            self.work.append((dtype, float(flop), float(moved(function, args, kwargs or {}, result))))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def moved(function: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Return the bytes that an operation must move: arguments read, arguments written, and results."""
    name = function._schema.name.removeprefix("aten::")
    if name in ALLOCATIONS:
        return 0
    read, written = [], []
    for i, argument in enumerate(function._schema.arguments):
        tensors = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        written += tensors if changed else []
        read += [] if changed and name in OVERWRITES else tensors
    known = {id(tensor) for tensor in written}
    returned = [tensor for tensor in _tensors(result) if id(tensor) not in known]
    if name in LOOKUPS:
        read[0] = returned[0]
    return sum(tensor.nbytes for tensor in [*read, *written, *returned])


def work_of(task: Callable[[], Any]) -> Work:
    """Run a task and return its work."""
    with Operations() as operations:
        task()
    return operations.work


def flop(work: Work) -> float:
    return sum(flop for _, flop, _ in work)


def bound(work: Work, peaks: dict[str, float]) -> float:
    """Return the shortest possible seconds of a work."""
    return sum(max(flop / peaks.get(dtype, peaks["float32"]), size / peaks["bytes"]) for dtype, flop, size in work)


def peaks(setting: Setting) -> dict[str, float]:
    """Measure FLOP a second in float32 (not TF32) and in bfloat16 if the hardware has it, and bytes a second.

    Each is the best of several tries. Emulated bfloat16 does not count, because it is a hundred times slower.
    """
    torch.backends.cudnn.allow_tf32 = False
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
    for dtype in [torch.float32, torch.bfloat16] if has_bf16(device) else [torch.float32]:
        side, images = (2048, 8) if small else (8192, 64)
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        x = torch.randn(images, 256, 32, 32, device=device).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        found[str(dtype).removeprefix("torch.")] = max(
            best(lambda a=a, b=b: a @ b, 2 * side**3),
            best(lambda x=x, weight=weight: conv2d(x, weight, padding=1), 2 * x.numel() * 256 * 9))
    source = torch.ones(2**26 if small else 2**28, device=device)  # written: memory exists from then on
    target = torch.ones_like(source)
    found["bytes"] = best(lambda: target.copy_(source), 2 * source.nbytes)
    return found
