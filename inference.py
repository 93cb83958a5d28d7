"""Logits for images of any size: mirrored up to a size the network takes, and cropped back (report, section 6.2.1)."""

import torch
from torch import Tensor

from unet import UNet


def mirrored_indices(size: int, multiple: int) -> Tensor:
    """Indices (size',) into a line of `size` pixels that mirror it, edge pixel repeated, to the next multiple.

    The margin is split evenly, the odd pixel behind; 500 at multiple 16 becomes 512 with 6 pixels on either side.
    """
    margin = -size % multiple
    positions = torch.arange(-(margin // 2), size + margin - margin // 2) % (2 * size)
    return torch.where(positions < size, positions, 2 * size - 1 - positions)


def mirrored_logits(model: UNet, images: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) of any size to logits (B, K, H, W)."""
    height, width = images.shape[-2:]
    rows = mirrored_indices(height, model.multiple).to(images.device)
    columns = mirrored_indices(width, model.multiple).to(images.device)
    logits = model(images[:, :, rows][:, :, :, columns])                             # (B, K, H', W')
    top, left = (len(rows) - height) // 2, (len(columns) - width) // 2
    return logits[..., top:top + height, left:left + width]                          # (B, K, H, W)
