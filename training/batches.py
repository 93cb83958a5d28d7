"""From the packed store to the network's input: cut crops, copy them to the device and normalise them."""

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
    """Copy the store to a GPU if it fits into a quarter of the free memory there. Otherwise return it unchanged."""
    fits = device.type == "cuda" and 4 * store.nbytes <= torch.cuda.mem_get_info(device)[0]
    return copy_store(device, store) if fits else store


def copy_store(device: torch.device, store: np.ndarray, tiles_at_once: int = 64) -> Tensor:
    """Copy a store (N, H, W, 4) uint8 to a device in parts of some tiles."""
    copy = torch.empty(store.shape, dtype=torch.uint8, device=device)
    with Progress("copy tiles to the GPU", len(store), "tile") as progress:
        for start in range(0, len(store), tiles_at_once):
            tiles = np.array(store[start:start + tiles_at_once])
            copy[start:start + tiles_at_once] = torch.from_numpy(tiles)
            progress.advance(len(tiles))
    return copy


def batches_on(device: torch.device, crops: Crops, store: np.ndarray | Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield the crops in order as batches (B, size, size, 4) uint8 on a device. The last batch may be smaller.

    A store on the device is cut there. Otherwise the CPU cuts the crops, and a GPU copies them while it computes.
    """
    if isinstance(store, Tensor):
        yield from _gather(crops, store, batch_size)
        return
    pinned = device.type == "cuda"  # a GPU copies from pinned memory by itself; torch keeps it until the copy is done
    for start in range(0, len(crops), batch_size):
        part = range(start, min(start + batch_size, len(crops)))
        batch = torch.empty((len(part), crops.size, crops.size, 4), dtype=torch.uint8, pin_memory=pinned)
        crops.cut(store, part, batch.numpy())
        yield batch.to(device, non_blocking=pinned)


def _gather(crops: Crops, store: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield the batches of a store on the device; one indexing operation cuts and flips all crops of a batch."""
    def positions(start: np.ndarray, flip: np.ndarray) -> Tensor:                    # (n, size) of the tile
        offsets = np.arange(crops.size)
        return torch.from_numpy(start[:, None] + np.where(flip[:, None], offsets[::-1], offsets)).to(store.device)

    pixels = store.view(torch.int32)[..., 0]                                         # (N, H, W)
    rows = torch.from_numpy(crops.rows).to(store.device)[:, None, None]              # (n, 1, 1)
    y = positions(crops.top, crops.flip_vertical)[:, :, None]                        # (n, size, 1)
    x = positions(crops.left, crops.flip_horizontal)[:, None]                        # (n, 1, size)
    for start in range(0, len(crops), batch_size):
        part = slice(start, start + batch_size)
        yield pixels[rows[part], y[part], x[part]][..., None].view(torch.uint8)


def normalise(pixels: Tensor, statistics: Statistics) -> Tensor:
    """Turn images (B, H, W, 3) uint8 into the network's input (B, 3, H, W), laid out for the device (section 5.1.1)."""
    shares = pixels / 255
    mean, std = _constants(tuple(statistics.mean), tuple(statistics.std), shares.dtype, shares.device)
    return ((shares - mean) / std).movedim(-1, 1).contiguous(memory_format=memory_format(pixels.device))


@lru_cache(maxsize=16)  # a new copy for each batch would make a GPU wait
def _constants(mean: tuple, std: tuple, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, dtype=dtype, device=device), torch.tensor(std, dtype=dtype, device=device)
