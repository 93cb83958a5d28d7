"""Measure the speed of receptive fields: gradients of logits with respect to the input, of the report's network."""

from functools import partial

import torch

from common.devices import autocast, choose_precision
from common.geometry import smallest_cut
from fields.gradients import gradients
from fields.sampling import batch_ranges
from tools.benchmark.race import Lap, Race, Setting
from unet import UNet


def network() -> UNet:
    torch.manual_seed(0)
    return UNet().eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 256, 256, generator=torch.Generator().manual_seed(0))


def ours(setting: Setting, count: int, precision: str) -> Lap:
    """Measure on the smallest input that contains the field, several pixels in one backward pass."""
    device = torch.device(setting.device)
    model = network().to(device, memory_format=torch.channels_last).requires_grad_(False)
    cut, count = smallest_cut(len(model.encoder)), min(count, 16) if setting.quick else count
    cuts = images(count)[..., :cut.size, :cut.size].contiguous().to(device)
    places = torch.full((count, 2), cut.origin, device=device)

    def run() -> None:
        with autocast(device, choose_precision(precision, device)):
            for start, stop in batch_ranges(count, len(model.encoder)):
                next(gradients(model, cuts[start:stop].clone(), places[start:stop], by_path=False))
        setting.wait()

    return Lap(run, count)


def plain(setting: Setting, count: int) -> Lap:
    """Measure in float32 on 256 x 256 pixels, one backward pass for each pixel."""
    device = torch.device(setting.device)
    model, count = network().to(device), min(count, 16) if setting.quick else count
    whole = images(count).to(device)

    def run() -> None:
        for image in whole[:, None]:
            image = image.clone().requires_grad_()
            torch.autograd.grad(model(image)[0, 0, 128, 128], image)
        setting.wait()

    return Lap(run, count)


def race(count: int, precision: str = "auto") -> Race:
    return Race(partial(ours, count=count, precision=precision), partial(plain, count=count), "ms a map")


RACES = {"field_map": race(1), "field_maps": race(64), "field_float32": race(64, "float32")}
