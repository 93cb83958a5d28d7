"""The plain PyTorch way to do the same work, written without regard to speed, as in the report's code.

It uses float32, channels first, Adam with its defaults, the loss read after each step, snapshots by deepcopy, and a
Dataset of compressed npz files whose samples are cropped, flipped and normalised one by one.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.statistics import Statistics
from losses import LOSSES


class NpzTiles(Dataset):
    """Tiles in compressed npz files, two files for each tile, as the report's code writes them."""

    def __init__(self, folder: Path, count: int, size: int, statistics: Statistics):
        self.folder, self.count, self.size = folder, count, size
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (statistics.mean, statistics.std))

    @staticmethod
    def write(folder: Path, store: np.ndarray) -> None:
        for i, tile in enumerate(store):
            np.savez_compressed(folder / f"frame{i}", tile[..., :3])
            np.savez_compressed(folder / f"mask{i}", tile[..., 3])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = (np.load(self.folder / f"{name}{index}.npz")["arr_0"] for name in ("frame", "mask"))
        top, left = (int(torch.randint(0, side - self.size + 1, ())) for side in mask.shape)
        image = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        image = ((image - self.mean) / self.std)[:, top:top + self.size, left:left + self.size]
        target = torch.from_numpy(mask).long()[top:top + self.size, left:left + self.size]
        for axis in (-2, -1):
            if torch.rand(()) < 0.5:
                image, target = image.flip(axis), target.flip(axis)
        return image, target


def loader(dataset: NpzTiles, batch_size: int) -> DataLoader:
    return DataLoader(dataset, batch_size, shuffle=True)


def step(model: nn.Module, images: Tensor, target: Tensor, bf16: bool = False) -> Callable[[], float]:
    """Return a function that makes one training step, with autocast to bfloat16 if `bf16`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, weight_decay=3e-5)
    model.train()

    def run() -> float:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = model(images)
        loss = LOSSES["dice_ce"](logits, target)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def predict(model: nn.Module, tiles: np.ndarray, multiple: int, statistics: Statistics) -> Callable[[], list[Tensor]]:
    """Return a function that predicts the tiles (N, H, W, 3) uint8 one by one."""
    model.eval()
    device = next(model.parameters()).device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (statistics.mean, statistics.std))
    margins = [(side // 2, side - side // 2) for side in (-length % multiple for length in tiles.shape[1:3])]

    def run() -> list[Tensor]:
        predictions = []
        with torch.no_grad():
            for tile in tiles:
                padded = np.pad(tile, [*margins, (0, 0)], mode="symmetric")
                image = (torch.from_numpy(padded).to(device).permute(2, 0, 1).float() / 255 - mean) / std
                height, width = (slice(before, before + length) for (before, _), length in
                                 zip(margins, tile.shape[:2], strict=True))
                predictions.append(model(image[None])[0, :, height, width].argmax(0).cpu())
        return predictions

    return run


def snapshot_and_restore(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, adam = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(adam))
