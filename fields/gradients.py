"""TODO"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.console import Progress
from common.devices import autocast, memory_format
from common.geometry import reach, smallest_cut
from common.randomness import torch_seed
from evaluation.candidates import Candidate
from evaluation.test_set import TestSet
from fields.sampling import (
    FREE_PIXELS,
    Inputs,
    Pixels,
    batch_ranges,
    free_pixels,
    noise_inputs,
    tile_inputs,
    zero_inputs,
)
from training.checkpoints import build_model
from unet import UNet

RINGS = 4  # for each pixel of distance
TRAINED, UNTRAINED = ("trained", "tiles"), ("untrained", "tiles")
Kind = tuple[str, str]  # weights, trained or untrained, and input: tiles, zeros or noise


def untrained_model(candidate: Candidate, inputs: Inputs, count: int) -> UNet:
    """The network with the weights that training began with, in evaluation mode.

    Its batch norms have seen these inputs, with dropout, as in training. As they are created, with mean 0 and variance
    1, every level would be fainter than it ever is.
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


def gradients(model: UNet, images: Tensor, places: Tensor, by_path: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """For each class d logit / d input (P, B, C, cut, cut) by each path, and sum |gradient x activation| (P, B) there.

    `images` (B, C, cut, cut) are normalised cuts, `places` (B, 2) the pixels in them; the model is in evaluation mode.
    With `by_path` false there is one gradient, of the whole network: P = 1, and of the second result still one a path.
    """
    start, stop = smallest_cut(len(model.encoder)).decoder
    images = images.contiguous(memory_format=memory_format(images.device)).requires_grad_()
    features = [level[..., start >> i:stop >> i, start >> i:stop >> i]
                for i, level in enumerate(model.encode(images))]                     # (B, widths[l], h, h)
    joints = [level.detach().requires_grad_() for level in features]
    rows, columns = (places - start).T
    batch = torch.arange(len(images), device=images.device)
    logits = model.decode(joints)[batch, :, rows, columns]                           # (B, K)
    for logit in logits.unbind(1):
        into = torch.autograd.grad(logit.sum(), joints, retain_graph=True)
        importance = torch.stack([(g * level).abs().sum((1, 2, 3)) for g, level in zip(into, joints, strict=True)])
        if by_path:
            parts = [torch.autograd.grad(level, images, g, retain_graph=True)[0]
                     for level, g in zip(features, into, strict=True)]
        else:
            parts = torch.autograd.grad(features, images, into, retain_graph=True)
        yield torch.stack([*parts]), importance.detach().float()


@dataclass(frozen=True)
class Field:
    """What the pixels' gradients add up to; energies by ring, each pixel on its own."""

    pixels: Pixels
    maps: np.ndarray  # (S's classes, K, D, D) mean |gradient| summed over channels; the pixel is in the centre
    energy: np.ndarray  # (S, K, rings) of the whole network
    path_energy: np.ndarray | None = None  # (S, K, P, rings) that comes by each path alone
    without: np.ndarray | None = None  # (S, K, P) energy that is left when a path is cut
    importance: np.ndarray | None = None  # (S, K, P) sum |gradient x activation|

    def map(self, region: int | None, logit: int | None) -> np.ndarray:
        """(D, D) mean |gradient| over the pixels of a class (None: all) of the logit of a class (None: mean of all)."""
        weights = np.bincount(self.pixels.classes, self.pixels.weights(region), len(self.maps))
        mean = np.tensordot(weights, self.maps, 1)                                   # (K, D, D)
        return mean.mean(0) if logit is None else mean[logit]


def rings_around(radius: int) -> np.ndarray:
    """(D, D) the ring of every pixel of a map: ring i is farther than (i - 1) / 4 pixels and at most i / 4."""
    steps = np.arange(-radius, radius + 1)
    return np.ceil(RINGS * np.hypot(*np.meshgrid(steps, steps, indexing="ij"))).astype(np.int64)


def measure_field(model: UNet, inputs: Inputs, pixels: Pixels, by_path: bool, progress: Progress) -> Field:
    """Measure the field of every pixel, for the logit of every class."""
    levels, classes, device = len(model.encoder), model.head.out_channels, model.head.weight.device
    cut, radius = smallest_cut(levels), reach(levels)
    around, size, count = rings_around(radius), 2 * radius + 1, len(pixels)
    rings = around.max() + 1
    maps = np.zeros((len(pixels.shares), classes, size, size))
    energy = np.zeros((count, classes, rings))
    path_energy = np.zeros((count, classes, levels, rings))
    without, importance = np.zeros((2, count, classes, levels))
    for start, stop in batch_ranges(count, levels):
        places = torch.from_numpy(pixels.places[start:stop]).to(device)
        for k, (parts, important) in enumerate(gradients(model, inputs(start, stop), places, by_path)):
            importance[start:stop, k] = important.T.cpu()
            whole = parts.sum(0)                                                     # (B, C, cut, cut)
            strength = whole.abs().sum(1).cpu().numpy()                              # (B, cut, cut)
            squares = whole.cpu().double().square().sum(1).numpy()                   # (B, cut, cut)
            if by_path:
                of_parts = parts.cpu().double().square().sum(2).numpy()              # (P, B, cut, cut)
                without[start:stop, k] = (whole - parts).cpu().double().square().sum((2, 3, 4)).T
            for i in range(start, stop):
                y, x = radius - pixels.places[i]
                there = np.s_[max(y, 0):y + cut.size, max(x, 0):x + cut.size]
                inner = np.s_[max(-y, 0):size - y, max(-x, 0):size - x]              # of the cut, what the map holds
                maps[pixels.classes[i], k][there] += strength[i - start][inner]
                ring = around[there].ravel()
                energy[i, k] = np.bincount(ring, squares[i - start][inner].ravel(), rings)
                for path in range(levels if by_path else 0):
                    path_energy[i, k, path] = np.bincount(ring, of_parts[path, i - start][inner].ravel(), rings)
            del parts, whole
        progress.advance(stop - start)
    counts = np.bincount(pixels.classes, minlength=len(maps))
    maps /= np.maximum(counts, 1)[:, None, None, None]
    return Field(pixels, maps, energy, *((path_energy, without, importance) if by_path else ()))


def measure_run(candidate: Candidate, test_set: TestSet, pixels: Pixels, dtype: torch.dtype) -> dict[Kind, Field]:
    """The fields of a trained model on tiles, zeros and noise, and on the tiles of the network that it once was."""
    config, device, levels = candidate.config, candidate.device, len(candidate.config.model.widths)
    tiles, free = tile_inputs(candidate, test_set, pixels), free_pixels(FREE_PIXELS, levels, config.seed)
    untrained = untrained_model(candidate, tiles, len(pixels))
    with (Progress(f"fields of {candidate.name}", 2 * (len(pixels) + len(free)), "pixel") as progress,
          autocast(device, dtype)):
        return {
            TRAINED: measure_field(candidate.model, tiles, pixels, True, progress),
            ("trained", "zeros"): measure_field(candidate.model, zero_inputs(levels, device), free, False, progress),
            ("trained", "noise"): measure_field(candidate.model, noise_inputs(levels, device, config.seed), free, False,
                                          progress),
            UNTRAINED: measure_field(untrained, tiles, pixels, False, progress),
        }
