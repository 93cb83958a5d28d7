"""Predict images of any size with a trained network (report, section 6.2.1).

    canvas   the image, mirrored at its borders up to the next size that the network takes
    window   the part of a canvas that is computed at once; the windows of a large canvas overlap
    margin   the outer part of a window, whose logits are not used. It is as wide as the receptive field reaches, so
             windows give the logits that the whole canvas would give.
    folded   a network whose batch norms, which only scale and shift after training, are part of the convolutions

In float32 the network computes as it was trained. In bfloat16, which is faster, it is folded.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.console import warn
from common.devices import compile_by_shape, memory_format
from common.geometry import reach
from training.crops import mirrored
from unet import UNet

WINDOW = 1024  # pixels, the longest side of a window

Network = Callable[[Tensor], Tensor]  # images (B, H, W, 3) uint8 to logits (B, K, H, W)


@dataclass(frozen=True)
class Predictor:
    """A network that predicts images of any size."""

    network: Network
    multiple: int  # the network takes heights and widths that are multiples of it
    margin: int  # pixels, a multiple of `multiple`, at least as far as the receptive field reaches
    window: int = WINDOW

    @classmethod
    def of(cls, model: UNet, normalise: Callable[[Tensor], Tensor], flips: bool,
           precision: torch.dtype = torch.float32, many: bool = False) -> "Predictor":
        """Make a predictor of a U-Net. `normalise` maps images (B, H, W, 3) uint8 to the input of the U-Net.

        `flips` averages over the symmetries. `many` compiles, which pays for a thousand images of one size.
        """
        compute = in_bf16(model) if precision == torch.bfloat16 else model
        if many:
            compute = compiled(compute)

        def network(images: Tensor) -> Tensor:
            return compute(normalise(images.contiguous()))  # the compiler would compile turned views again

        margin = -(-reach(len(model.encoder)) // model.multiple) * model.multiple
        return cls(with_symmetries(network) if flips else network, model.multiple, margin)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, K, H, W) of images (B, H, W, 3) uint8."""
        pieces = list(self.pieces(images))
        whole = pieces[0][2].new_empty((len(images), pieces[0][2].shape[1], *images.shape[1:3]))
        for top, left, logits in pieces:
            whole[..., top:top + logits.shape[2], left:left + logits.shape[3]] = logits
        return whole

    def labels(self, image: Tensor) -> np.ndarray:
        """Return class indices (H, W) uint8 of one image (H, W, 3) uint8; memory holds the logits of one window."""
        whole = np.empty(image.shape[:2], np.uint8)
        for top, left, logits in self.pieces(image[None]):
            part = most_likely(logits)[0].to(torch.uint8).cpu().numpy()
            whole[top:top + part.shape[0], left:left + part.shape[1]] = part
        return whole

    @torch.no_grad()
    def pieces(self, images: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield top, left and logits (B, K, h, w) of the parts of images (B, H, W, 3) uint8."""
        height, width = images.shape[1:3]
        rows, columns = (mirrored_indices(size, self.multiple).to(images.device) for size in (height, width))
        above, before = (len(rows) - height) // 2, (len(columns) - width) // 2       # mirrored pixels
        for start, stop, first, last in self._windows(len(rows)):
            for left_start, left_stop, left_first, left_last in self._windows(len(columns)):
                window = images[:, rows[start:stop]][:, :, columns[left_start:left_stop]]
                top, bottom = max(first, above), min(last, above + height)
                left, right = max(left_first, before), min(left_last, before + width)
                logits = self.network(window)[..., top - start:bottom - start, left - left_start:right - left_start]
                yield top - above, left - before, logits

    def _windows(self, size: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield windows [start, stop) along a canvas of `size`, and the part [first, last) whose logits are used."""
        widest = size if size <= self.window else max(self.window - 2 * self.margin, self.margin)
        parts = -(-size // widest)
        step = -(-size // (parts * self.multiple)) * self.multiple  # all parts but the last have this size
        for first in range(0, size, step):
            last = min(first + step, size)
            yield max(first - self.margin, 0), min(last + self.margin, size), first, last


def most_likely(logits: Tensor) -> Tensor:
    """Return the class (B, H, W) int64 with the highest of the logits (B, K, H, W), the first one of equals."""
    return logits.contiguous(memory_format=torch.channels_last).argmax(1)  # 6 times as fast on a CPU as without


def mirrored_indices(size: int, multiple: int) -> Tensor:
    """Return the indices (size',) that mirror a line of `size` pixels up to the next multiple, edge pixels repeated.

    Both ends get the same number of pixels; an odd one goes to the end. 500 at multiple 16 becomes 6 + 500 + 6 = 512.
    """
    margin = -size % multiple
    return torch.from_numpy(mirrored(np.arange(-(margin // 2), size + margin - margin // 2), size)[0])


def averaged(predictors: Sequence[Predictor]) -> Predictor:
    """Return a predictor whose logits are the logarithm of the mean probability of several predictors."""
    def network(images: Tensor) -> Tensor:
        return torch.log(sum(torch.softmax(each.network(images), dim=1) for each in predictors) / len(predictors))

    return replace(max(predictors, key=lambda each: each.margin), network=network)


def with_symmetries(network: Network) -> Network:
    """Average the probabilities over the eight flips and turns of the square, and return their logarithm."""
    def averaged(images: Tensor) -> Tensor:
        total = 0
        for turns in range(4):
            for flipped in (False, True):
                turned = torch.rot90(images.flip(2) if flipped else images, turns, (1, 2))
                probs = torch.rot90(torch.softmax(network(turned), dim=1), -turns, (2, 3))
                total = total + (probs.flip(3) if flipped else probs)                # (B, K, H, W)
        return torch.log(total / 8)
    return averaged


def folded(model: UNet) -> UNet:
    """Return a folded copy in evaluation mode: the same function except for rounding."""
    model = copy.deepcopy(model).eval()
    for block in [*model.encoder, *model.decoder]:
        for i, layer in enumerate(block):
            if isinstance(layer, nn.Conv2d):
                place = i
            elif isinstance(layer, nn.BatchNorm2d):
                block[place], block[i] = fuse_conv_bn_eval(block[place], layer), nn.Identity()
    return model


def in_bf16(model: UNet) -> Callable[[Tensor], Tensor]:
    """Return the folded network in bfloat16. Its input (B, 3, H, W) and its logits stay float32."""
    layout = memory_format(next(model.parameters()).device)
    fast = folded(model).to(torch.bfloat16, memory_format=layout)
    return lambda images: fast(images.to(torch.bfloat16)).float()


def compiled(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Compile for the shape of the first input. Other shapes, such as a smaller last batch, are computed uncompiled.

    If compilation fails, for example without a C++ compiler, a warning says so and nothing is compiled.
    """
    fast, shape = compile_by_shape(network, options={"freezing": True}), None

    def compute(images: Tensor) -> Tensor:
        nonlocal fast, shape
        shape = shape or images.shape
        if images.shape != shape:
            return network(images)
        try:
            return fast(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            warn(f"compilation failed, continuing without it (same results, slower): {reason}")
            fast = network
            return fast(images)

    return compute
