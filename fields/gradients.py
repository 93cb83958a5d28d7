"""Measure what a U-Net looks at: gradients of its logits with respect to its input (report, section 6.4).

    path      a connection from encoder to decoder: the skip of each level, and last the bottleneck
    energy    the square of a gradient, summed over the channels of the input
    ring      the input pixels at one distance from the output pixel, in steps of a quarter pixel
    map       the mean |gradient| at each input pixel, with the output pixel in the centre

The encoder computes the whole cut (fields/sampling.py), the decoder only what the central block of pixels needs. The
pixels of a batch share one backward pass, since none depends on the cut of another one. The gradients by all paths add
up to the gradient of the network, so cutting a path subtracts its gradient.

Letters as in unet.py; besides, P is the number of paths, S of measured pixels, D the side of a map.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.console import Progress
from common.devices import autocast, memory_format
from common.geometry import reach, smallest_cut
from common.randomness import torch_seed
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet
from fields import sampling
from fields.sampling import FREE_PIXELS, Inputs, Pixels, batch_ranges
from training.checkpoints import build_model
from unet import UNet

RINGS = 4  # in one pixel of distance


class Condition(NamedTuple):
    weights: str  # trained or untrained
    input: str  # tiles, zeros or noise


TRAINED, UNTRAINED = Condition("trained", "tiles"), Condition("untrained", "tiles")
ZEROS, NOISE = Condition("trained", "zeros"), Condition("trained", "noise")


@dataclass(frozen=True)
class Field:
    """The measured field: energies of each pixel by ring, and maps of all pixels of a class."""

    pixels: Pixels
    maps: np.ndarray  # (true classes, K, D, D)
    energy: np.ndarray  # (S, K, rings) of the whole network
    path_energy: np.ndarray | None = None  # (S, K, P, rings) of the gradient by each path alone
    without: np.ndarray | None = None  # (S, K, P) energy that is left if a path is cut
    importance: np.ndarray | None = None  # (S, K, P) sum of |gradient x activation| where the path enters the decoder

    def map(self, inside: int | None, logit: int | None) -> np.ndarray:
        """Return the map (D, D) of pixels inside a class and of the logit of a class; None: the mean over all."""
        weights = np.bincount(self.pixels.classes, self.pixels.weights(inside), len(self.maps))
        mean = np.tensordot(weights, self.maps, 1)                                   # (K, D, D)
        return mean.mean(0) if logit is None else mean[logit]


def measure_run(candidate: Candidate, test_set: TestSet, pixels: Pixels) -> dict[Condition, Field]:
    """Measure a trained model on tiles, zeros and noise, and the untrained network on tiles."""
    device, levels, seed = candidate.device, len(candidate.config.model.widths), candidate.config.seed
    tiles, free = sampling.tile_inputs(candidate, test_set, pixels), sampling.free_pixels(FREE_PIXELS, levels, seed)
    zeros, noise = sampling.zero_inputs(levels, device), sampling.noise_inputs(levels, device, seed)
    untrained = untrained_model(candidate, tiles, len(pixels))
    with (Progress(f"fields of {candidate.name}", 2 * (len(pixels) + len(free)), "pixel") as progress,
          autocast(device, candidate.precision)):
        return {TRAINED: measure_field(candidate.model, tiles, pixels, True, progress),
                ZEROS: measure_field(candidate.model, zeros, free, False, progress),
                NOISE: measure_field(candidate.model, noise, free, False, progress),
                UNTRAINED: measure_field(untrained, tiles, pixels, False, progress)}


def untrained_model(candidate: Candidate, inputs: Inputs, count: int) -> UNet:
    """Return the network with the weights that training began with, in evaluation mode.

    Its batch norms get their mean and variance from these inputs, with dropout, as in training. With the initial mean 0
    and variance 1, the signal of every level would be fainter than it ever is in training.
    """
    config = candidate.config
    torch.manual_seed(torch_seed(config.seed, 0, 0, "weights"))
    model = build_model(config).to(candidate.device, memory_format=memory_format(candidate.device))
    model.requires_grad_(False).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        for start, stop in batch_ranges(count, len(config.model.widths)):
            model(inputs(start, stop))
    return model.eval()


def measure_field(model: UNet, inputs: Inputs, pixels: Pixels, by_path: bool, progress: Progress) -> Field:
    """Measure the field of every pixel, for the logit of every class; `by_path` fills the last three arrays, too."""
    levels, classes, device = len(model.encoder), model.head.out_channels, model.head.weight.device
    around = rings_around(reach(levels))
    rings, count, side = around.max() + 1, len(pixels), len(around)
    maps = np.zeros((len(pixels.shares), classes, side, side))
    energy, path_energy = np.zeros((count, classes, rings)), np.zeros((count, classes, levels, rings))
    without, importance = np.zeros((2, count, classes, levels))
    for start, stop in batch_ranges(count, levels):
        places = torch.from_numpy(pixels.places[start:stop]).to(device)
        for k, (parts, path_importance) in enumerate(gradients(model, inputs(start, stop), places, by_path)):
            whole = parts.sum(0)                                                     # (B, C, cut, cut)
            strength = whole.abs().sum(1).cpu().numpy()                              # (B, cut, cut)
            squares = whole.cpu().double().square().sum(1).numpy()                   # (B, cut, cut)
            path_squares = ()
            if by_path:
                path_squares = parts.cpu().double().square().sum(2).numpy()          # (P, B, cut, cut)
                without[start:stop, k] = (whole - parts).cpu().double().square().sum((2, 3, 4)).T
                importance[start:stop, k] = path_importance.T.cpu()
            for b, place in enumerate(pixels.places[start:stop]):
                i = start + b
                maps[pixels.classes[i], k] += _centred(strength[b], place, side)
                energy[i, k] = np.bincount(around.ravel(), _centred(squares[b], place, side).ravel())
                for path, square in enumerate(path_squares):
                    path_energy[i, k, path] = np.bincount(around.ravel(), _centred(square[b], place, side).ravel())
            del parts, whole  # before the next gradients need their memory
        progress.advance(stop - start)
    maps /= np.maximum(np.bincount(pixels.classes, minlength=len(maps)), 1)[:, None, None, None]
    return Field(pixels, maps, energy, *((path_energy, without, importance) if by_path else ()))


def rings_around(radius: int) -> np.ndarray:
    """Return the ring of every pixel of a map (D, D): ring i is farther than (i - 1) / 4 pixels and at most i / 4."""
    steps = np.arange(-radius, radius + 1)
    return np.ceil(RINGS * np.hypot(*np.meshgrid(steps, steps, indexing="ij"))).astype(np.int64)


def _centred(values: np.ndarray, place: np.ndarray, side: int) -> np.ndarray:
    """Move values (cut, cut) into a map (side, side) whose centre is the pixel at `place`; zero elsewhere."""
    centred = np.zeros((side, side), values.dtype)
    top, left = side // 2 - place  # of the cut in the map; the field lies inside both
    height, width = values.shape
    centred[max(top, 0):top + height, max(left, 0):left + width] = values[max(-top, 0):side - top,
                                                                          max(-left, 0):side - left]
    return centred


def gradients(model: UNet, images: Tensor, places: Tensor, by_path: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each class d logit / d input by path (P, B, C, cut, cut) and sum |gradient x activation| (P, B).

    `images` (B, C, cut, cut) are normalised cuts with the pixels at `places` (B, 2). The model is in evaluation mode.
    Without `by_path` the first result is the gradient of the whole network (1, B, C, cut, cut), which is faster.
    """
    start, stop = smallest_cut(len(model.encoder)).decoder
    images = images.contiguous(memory_format=memory_format(images.device)).requires_grad_()
    features = [level[..., start >> i:stop >> i, start >> i:stop >> i]
                for i, level in enumerate(model.encode(images))]                     # (B, widths[l], h, h)
    activations = [level.detach().requires_grad_() for level in features]
    rows, columns = (places - start).T
    batch = torch.arange(len(images), device=images.device)
    logits = model.decode(activations)[batch, :, rows, columns]                      # (B, K)
    for logit in logits.unbind(1):
        to_paths = torch.autograd.grad(logit.sum(), activations, retain_graph=True)
        importance = torch.stack([(gradient * activation).abs().sum((1, 2, 3))
                                  for gradient, activation in zip(to_paths, activations, strict=True)])
        if by_path:
            parts = [torch.autograd.grad(level, images, gradient, retain_graph=True)[0]
                     for level, gradient in zip(features, to_paths, strict=True)]
        else:
            parts = torch.autograd.grad(features, images, to_paths, retain_graph=True)
        yield torch.stack([*parts]), importance.detach().float()
