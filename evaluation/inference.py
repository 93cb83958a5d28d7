"""What a trained network says of images of any size (report, section 6.2.1).

    canvas   the image, mirrored up to the next size that the network takes; its answer is cropped back
    window   a part of a canvas that is too large to be computed at once, with a margin around what it answers
    folded   batch norm, which only scales and shifts once training is over, made part of the convolution before it

The margin is as wide as the network sees, so what the windows answer is what the whole canvas would. In float32 the
network is computed as it was trained; bfloat16 is for speed, and computes it folded.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.console import warn
from common.devices import compile_by_shape, memory_format
from common.geometry import reach
from unet import UNet

WINDOW = 1024  # pixels, the side of what is computed at once

Network = Callable[[Tensor], Tensor]  # images (B, H, W, 3) uint8 to logits (B, K, H, W)


def mirrored_indices(size: int, multiple: int) -> Tensor:
    """Indices (size',) into a line of `size` pixels that mirror it, edge pixel repeated, to the next multiple.

    The margin is split evenly, the odd pixel behind; 500 at multiple 16 becomes 512 with 6 pixels on either side.
    """
    margin = -size % multiple
    positions = torch.arange(-(margin // 2), size + margin - margin // 2) % (2 * size)
    return torch.where(positions < size, positions, 2 * size - 1 - positions)


def folded(model: UNet) -> UNet:
    """A copy in evaluation mode, folded: the same function, but for rounding."""
    model = copy.deepcopy(model).eval()
    for block in [*model.encoder, *model.decoder]:
        for i, layer in enumerate(block):
            if isinstance(layer, nn.Conv2d):
                place = i
            elif isinstance(layer, nn.BatchNorm2d):
                block[place], block[i] = fuse_conv_bn_eval(block[place], layer), nn.Identity()
    return model


def in_bf16(model: UNet) -> Callable[[Tensor], Tensor]:
    """The network folded and in bfloat16, with its input (B, 3, H, W) and its logits in float32."""
    layout = memory_format(next(model.parameters()).device)
    fast = folded(model).to(torch.bfloat16, memory_format=layout)
    return lambda images: fast(images.to(torch.bfloat16)).float()


def compiled(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Compile for inputs of the shape that comes first; others, the last batch say, are computed as before.

    Compiling takes seconds and is for many inputs. Where it cannot be done, for want of a compiler, all is as before.
    """
    fast, shape = compile_by_shape(network, options={"freezing": True}), None

    def answer(images: Tensor) -> Tensor:
        nonlocal fast, shape
        shape = shape or images.shape
        if images.shape != shape:
            return network(images)
        try:
            return fast(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            warn(f"compilation failed, computing without it (same results, slower): {reason}")
            fast = network
            return fast(images)

    return answer


def with_symmetries(network: Network) -> Network:
    """The network's mean probability, as a logarithm, over the 8 symmetries of the square: flips and right angles."""
    def averaged(images: Tensor) -> Tensor:
        probs = 0
        for turns in range(4):
            for swapped in (False, True):
                turned = torch.rot90(images.flip(2) if swapped else images, turns, (1, 2))
                answer = torch.rot90(torch.softmax(network(turned), dim=1), -turns, (2, 3))
                probs = probs + (answer.flip(3) if swapped else answer)              # (B, K, H, W)
        return torch.log(probs / 8)
    return averaged


@dataclass(frozen=True)
class Predictor:
    """A network that answers images of any size."""

    network: Network
    multiple: int  # the network takes heights and widths that are multiples of it
    margin: int  # pixels, a multiple of `multiple`, at least as many as the network sees to either side
    window: int = WINDOW

    @classmethod
    def of(cls, model: UNet, normalise: Callable[[Tensor], Tensor], flips: bool,
           precision: torch.dtype = torch.float32, many: bool = False) -> "Predictor":
        """Of a U-Net; `normalise` maps images (B, H, W, 3) uint8 to its input.

        With `precision` bfloat16 it is folded, and with `many` compiled: worth it for a thousand images of one size.
        """
        compute = in_bf16(model) if precision == torch.bfloat16 else model
        if many:
            compute = compiled(compute)

        def network(images: Tensor) -> Tensor:
            return compute(normalise(images.contiguous()))  # turned views would be compiled once more

        margin = -(-reach(len(model.encoder)) // model.multiple) * model.multiple
        return cls(with_symmetries(network) if flips else network, model.multiple, margin)

    @torch.no_grad()
    def pieces(self, images: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Logits (B, K, h, w) for parts of the images (B, H, W, 3) uint8, with each part's top and left."""
        height, width = images.shape[1:3]
        rows, columns = (mirrored_indices(size, self.multiple).to(images.device) for size in (height, width))
        over, aside = (len(rows) - height) // 2, (len(columns) - width) // 2         # the canvas begins so far outside
        for start, stop, first, last in self._windows(len(rows)):
            for left_start, left_stop, left_first, left_last in self._windows(len(columns)):
                window = images[:, rows[start:stop]][:, :, columns[left_start:left_stop]]
                top, bottom = max(first, over), min(last, over + height)
                left, right = max(left_first, aside), min(left_last, aside + width)
                logits = self.network(window)[..., top - start:bottom - start, left - left_start:right - left_start]
                yield top - over, left - aside, logits

    def _windows(self, size: int) -> Iterator[tuple[int, int, int, int]]:
        """Windows [start, stop) along a canvas of `size`, and the part [first, last) that each one answers."""
        widest = size if size <= self.window else max(self.window - 2 * self.margin, self.margin)
        parts = -(-size // widest)
        step = -(-size // (parts * self.multiple)) * self.multiple  # of nearly one width
        for first in range(0, size, step):
            last = min(first + step, size)
            yield max(first - self.margin, 0), min(last + self.margin, size), first, last

    def logits(self, images: Tensor) -> Tensor:
        """(B, K, H, W) of images (B, H, W, 3) uint8."""
        pieces = list(self.pieces(images))
        whole = pieces[0][2].new_empty((len(images), pieces[0][2].shape[1], *images.shape[1:3]))
        for top, left, logits in pieces:
            whole[..., top:top + logits.shape[2], left:left + logits.shape[3]] = logits
        return whole

    def labels(self, image: Tensor) -> np.ndarray:
        """Class indices (H, W) uint8 of one image (H, W, 3) uint8; logits are never held for more than a window."""
        whole = np.empty(image.shape[:2], np.uint8)
        for top, left, logits in self.pieces(image[None]):
            part = logits[0].argmax(0).to(torch.uint8).cpu().numpy()
            whole[top:top + part.shape[0], left:left + part.shape[1]] = part
        return whole
