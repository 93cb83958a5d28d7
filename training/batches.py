"""From the packed store to the network's input: cut crops, copy them to the device, augment and normalise them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from common.console import Progress
from common.devices import memory_format
from common.masks import IGNORE
from common.statistics import Statistics
from common.store import Store
from training.augmentation import augmented
from training.crops import Crops, mirrored


def store_on(device: torch.device, store: Store) -> Store:
    """Return the store with its pixels on a GPU if they fit into a quarter of the free memory there, else unchanged."""
    fits = device.type == "cuda" and 4 * store.pixels.nbytes <= torch.cuda.mem_get_info(device)[0]
    return replace(store, pixels=copy_pixels(device, store.pixels)) if fits else store


def copy_pixels(device: torch.device, pixels: np.ndarray, at_once: int = 2**24) -> Tensor:
    """Copy pixels (P, 4) uint8 to a device in parts."""
    copy = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    with Progress("copy tiles to the GPU", len(pixels), "pixel") as progress:
        for start in range(0, len(pixels), at_once):
            part = np.array(pixels[start:start + at_once])
            copy[start:start + at_once] = torch.from_numpy(part)
            progress.advance(len(part))
    return copy


def batches_on(device: torch.device, crops: Crops, store: Store, batch_size: int) -> Iterator[Tensor]:
    """Yield the crops in order as batches (B, size, size, 4) uint8 on a device. The last batch may be smaller."""
    start = 0
    for windows in _windows_on(device, crops, store, batch_size):
        end = start + len(windows)
        yield augmented(windows, crops.views[start:end], crops.size) if crops.views else windows
        start = end


def _windows_on(device: torch.device, crops: Crops, store: Store, batch_size: int) -> Iterator[Tensor]:
    """Yield the windows of the crops in batches (B, window, window, 4) uint8.

    A store on the device is cut there. Otherwise the CPU cuts the windows, and a GPU copies them while it computes.
    """
    if isinstance(store.pixels, Tensor):
        yield from _gather(crops, store, batch_size)
        return
    pinned = device.type == "cuda"  # a GPU copies from pinned memory by itself; torch keeps it until the copy is done
    for start in range(0, len(crops), batch_size):
        part = range(start, min(start + batch_size, len(crops)))
        batch = torch.empty((len(part), crops.window, crops.window, 4), dtype=torch.uint8, pin_memory=pinned)
        crops.cut(store, part, batch.numpy())
        yield batch.to(device, non_blocking=pinned)


def _gather(crops: Crops, store: Store, batch_size: int) -> Iterator[Tensor]:
    """Yield the windows of a store on the device; one indexing operation cuts and turns all windows of a batch."""
    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(store.pixels.device)

    def positions(start: np.ndarray, flip: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.arange(crops.window) - crops.margin
        return mirrored(start[:, None] + np.where(flip[:, None], offsets[::-1], offsets), lengths[:, None])

    heights, widths = store.sizes[crops.rows].T                                      # (n,)
    y, inside_y = positions(crops.top, crops.flip_vertical, heights)                 # (n, window)
    x, inside_x = positions(crops.left, crops.flip_horizontal, widths)               # (n, window)
    starts = on_device(store.starts[crops.rows][:, None] + y * widths[:, None])[:, :, None]  # (n, window, 1) of rows
    columns = on_device(x)[:, None]                                                  # (n, 1, window)
    transpose = on_device(crops.transpose)[:, None, None, None] if crops.transpose.any() else None
    outside = None if inside_y.all() and inside_x.all() else (~on_device(inside_y), ~on_device(inside_x))
    pixels = store.pixels.view(torch.int32)[:, 0]                                    # (P,)
    for start in range(0, len(crops), batch_size):
        part = slice(start, start + batch_size)
        batch = pixels[starts[part] + columns[part]][..., None].view(torch.uint8)  # (B, window, window, 4)
        if outside:
            rows_outside, columns_outside = (sides[part] for sides in outside)
            batch[..., 3].masked_fill_(rows_outside[:, :, None] | columns_outside[:, None], IGNORE)
        yield batch if transpose is None else torch.where(transpose[part], batch.transpose(1, 2), batch)


def normalise(pixels: Tensor, statistics: Statistics) -> Tensor:
    """Turn images (B, H, W, 3) uint8 into the network's input (B, 3, H, W), laid out for the device (section 5.1.1)."""
    shares = pixels / 255
    mean, std = _constants(tuple(statistics.mean), tuple(statistics.std), shares.dtype, shares.device)
    return ((shares - mean) / std).movedim(-1, 1).contiguous(memory_format=memory_format(pixels.device))


@lru_cache(maxsize=16)  # a new copy for each batch would make a GPU wait
def _constants(mean: tuple, std: tuple, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, dtype=dtype, device=device), torch.tensor(std, dtype=dtype, device=device)
