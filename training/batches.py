"""From the packed store to the network's input: copy, cut and normalise on the device."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from common.console import Progress
from common.devices import memory_format
from dataset import Statistics
from training.crops import Crops


def store_on(device: torch.device, store: np.ndarray) -> np.ndarray | Tensor:
    """The store on a GPU where a quarter of its free memory holds it; else the memory-mapped one as it is."""
    if device.type != "cuda" or 4 * store.nbytes > torch.cuda.mem_get_info(device)[0]:
        return store
    return copied_to(device, store)


def copied_to(device: torch.device, store: np.ndarray, at_once: int = 64) -> Tensor:
    """(N, H, W, 4) uint8 on a device, some tiles at a time."""
    copy = torch.empty(store.shape, dtype=torch.uint8, device=device)
    with Progress("copy tiles to the GPU", len(store), "tile") as progress:
        for start in range(0, len(store), at_once):
            tiles = np.array(store[start:start + at_once])
            copy[start:start + at_once] = torch.from_numpy(tiles)
            progress.advance(len(tiles))
    return copy


def batches_on(device: torch.device, crops: Crops, store: np.ndarray | Tensor, batch_size: int) -> Iterator[Tensor]:
    """(B, size, size, 4) uint8 batches in order on a device; the last one may be smaller.

    They are made there where the store lies there, else copied without waiting.
    """
    if isinstance(store, Tensor):
        yield from _gather(crops, store, batch_size)
        return
    page_locked = device.type == "cuda"  # memory that a GPU copies from by itself; torch keeps it until it has
    for part in crops.parts(batch_size):
        batch = torch.empty((len(part), crops.size, crops.size, 4), dtype=torch.uint8, pin_memory=page_locked)
        crops.cut(store, part, batch.numpy())
        yield batch.to(device, non_blocking=page_locked)


def _gather(crops: Crops, store: Tensor, batch_size: int) -> Iterator[Tensor]:
    def lines(first: np.ndarray, flip: np.ndarray) -> Tensor:                        # (n, size) of the tile
        line = np.arange(crops.size)
        return torch.from_numpy(first[:, None] + np.where(flip[:, None], line[::-1], line)).to(store.device)

    pixels = store.view(torch.int32)[..., 0]                                         # (N, H, W)
    rows = torch.from_numpy(crops.rows).to(store.device)[:, None, None]
    y, x = lines(crops.top, crops.flip_vertical)[:, :, None], lines(crops.left, crops.flip_horizontal)[:, None]
    for start in range(0, len(crops), batch_size):
        part = slice(start, start + batch_size)
        yield pixels[rows[part], y[part], x[part]][..., None].view(torch.uint8)


def normalise(pixels: Tensor, statistics: Statistics) -> Tensor:
    """Images (B, H, W, 3) uint8 to the network's input (B, 3, H, W) in the device's memory layout (section 5.1.1)."""
    shares = pixels / 255
    mean, std = _constants(*map(tuple, (statistics.mean, statistics.std)), shares.dtype, shares.device)
    return ((shares - mean) / std).movedim(-1, 1).contiguous(memory_format=memory_format(pixels.device))


@lru_cache(maxsize=16)
def _constants(mean: tuple, std: tuple, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once: a GPU would have to wait for every copy."""
    return torch.tensor(mean, dtype=dtype, device=device), torch.tensor(std, dtype=dtype, device=device)
