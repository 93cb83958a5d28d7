"""Show each training crop in another way: turned, scaled, bent, stained, lit, blurred or noisy (settings `augment`).

    window   what is cut from the store: the crop with a margin around it, from which the view takes what enters
    view     how one crop shows its window; the parameters of all views are drawn before the epoch

Parameters depend only on seed, epoch, fold and the crop's place in the epoch, so a resumed run sees the same images.
Labels are those of the nearest pixel. What enters from outside the tile has no class.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.config import Augment
from common.masks import IGNORE
from common.randomness import generator

# optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001), of length 1 below
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)
GRID = 3  # control points of the elastic deformation along each side (Ronneberger et al. 2015)
FARTHEST = 3  # deviations: so far the margin follows the elastic deformation


@dataclass(frozen=True)
class Views:
    """The parameters of n views, float32."""

    linear: np.ndarray  # (n, 2, 2) from x, y in the crop to x, y in its window, both from the centre
    bends: np.ndarray  # (n, 2, GRID, GRID) pixels by which control points are moved, x and y
    stains: np.ndarray  # (n, 3, 4) from optical densities of red, green, blue and 1 to new optical densities
    brightness: np.ndarray  # (n,) factor
    contrast: np.ndarray  # (n,) factor
    blur: np.ndarray  # (n,) pixels, sigma
    noise: np.ndarray  # (n,) deviation, in grey levels
    seeds: np.ndarray  # (n,) of the noise, int64

    def __getitem__(self, part: slice) -> "Views":
        return Views(*(getattr(self, field.name)[part] for field in fields(self)))


def draw_views(augment: Augment, count: int, seed: int, epoch: int, fold: int) -> Views | None:
    """Draw the views of an epoch's crops; None if no setting asks for one."""
    if not augment.needs_views:
        return None

    def uniform(purpose: str, *shape: int) -> np.ndarray:
        """Return numbers from -1 to 1 that no other setting changes."""
        return generator(seed, epoch, fold, f"augment {purpose}").uniform(-1, 1, (count, *shape))

    angle = np.radians(augment.rotate) * uniform("rotate")
    zoom = (1 + augment.scale) ** uniform("scale")
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    bends = generator(seed, epoch, fold, "augment elastic").normal(0, augment.elastic, (count, 2, GRID, GRID))
    noise = generator(seed, epoch, fold, "augment noise")
    return Views(
        linear=np.stack([cos, -sin, sin, cos], axis=1).reshape(count, 2, 2).astype(np.float32),
        bends=bends.astype(np.float32),
        stains=stain_changes(1 + augment.stain * uniform("stain", 3), augment.stain * uniform("stain shift", 3)),
        brightness=(1 + augment.brightness * uniform("brightness")).astype(np.float32),
        contrast=(1 + augment.contrast * uniform("contrast")).astype(np.float32),
        blur=(augment.blur * abs(uniform("blur"))).astype(np.float32),
        noise=(augment.noise * noise.random(count)).astype(np.float32),
        seeds=noise.integers(0, 2**62, count))


def margin(augment: Augment, size: int) -> int:
    """Return how many pixels a window reaches beyond each side of its crop of `size` pixels."""
    angle = math.radians(min(augment.rotate, 45))  # a square reaches farthest from its centre at 45 degrees
    reach = size / 2 * (math.cos(angle) + math.sin(angle)) * (1 + augment.scale) + FARTHEST * augment.elastic
    return math.ceil(reach - size / 2)


def augmented(windows: Tensor, views: Views, size: int) -> Tensor:
    """Return crops (B, size, size, 4) uint8 as B views show them; windows are (B, W, W, 4) uint8, W >= size."""
    images, labels = moved(windows, views, size)                                     # (B, 3, size, size) float32
    for change in (restained, lit, blurred, with_noise):
        images = change(images, views)
    crops = torch.empty((len(windows), size, size, 4), dtype=torch.uint8, device=windows.device)
    crops[..., :3], crops[..., 3] = images.round_().clamp_(0, 255).movedim(1, -1), labels
    return crops


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(device)


# ---------------------------------------------------------------------------------------------- geometry

def moved(windows: Tensor, views: Views, size: int) -> tuple[Tensor, Tensor]:
    """Turn, scale and bend windows (B, W, W, 4) uint8 in one interpolation.

    Return images (B, 3, size, size) float32 from 0 to 255, and labels (B, size, size) of the nearest pixels.
    """
    images = windows[..., :3].movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format)
    labels = windows[..., 3]
    if windows.shape[1] == size and not (views.linear != np.eye(2)).any() and not views.bends.any():
        return images, labels
    places = sampled_places(views, size, windows.device) * (2 / windows.shape[1])  # from -1 to 1 across a window
    images = functional.grid_sample(images, places, "bilinear", padding_mode="reflection", align_corners=False)
    # 1 is added because what lies outside becomes 0
    labels = functional.grid_sample(labels[:, None].float() + 1, places, "nearest", align_corners=False)[:, 0]
    return images, torch.where(labels == 0, IGNORE, labels - 1)


def sampled_places(views: Views, size: int, device: torch.device) -> Tensor:
    """Return where each pixel of a crop comes from, x and y in pixels from the centre of its window (B, size, size, 2).

    The displacements of the control points, which span the crop, are interpolated by cubic polynomials (section 5.1.1;
    Ronneberger et al. 2015).
    """
    line = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    linear = _on(device, views.linear)
    x, y = line[:, None] * linear[:, None, :, 0], line[:, None] * linear[:, None, :, 1]  # (B, size, 2)
    places = x[:, None] + y[:, :, None]                                              # (B, size, size, 2)
    if views.bends.any():
        places += functional.interpolate(_on(device, views.bends), (size, size), mode="bicubic",
                                         align_corners=True).movedim(1, -1)
    return places


# ---------------------------------------------------------------------------------------------- colour

def stain_changes(factors: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Return what multiplies and shifts the amount of each stain (n, 3), as maps of optical density (n, 3, 4).

    The amounts are those of colour deconvolution (Ruifrok and Johnston 2001), with natural logarithms. Factors and
    shifts are alpha and beta of Tellez et al. 2019.
    """
    linear = np.einsum("sc,ns,ds->ncd", STAINS, factors, np.linalg.inv(STAINS))
    return np.concatenate([linear, (shifts @ STAINS)[..., None]], axis=2).astype(np.float32)


def restained(images: Tensor, views: Views) -> Tensor:
    """Change the amounts of the stains in images (B, 3, H, W) from 0 to 255."""
    if (views.stains == np.eye(3, 4, dtype=np.float32)).all():
        return images
    changes = _on(images.device, views.stains)
    density = images.flatten(2).add_(1).div_(256).log_().neg_()                      # (B, 3, H W)
    density = torch.baddbmm(changes[..., 3:], changes[..., :3], density)
    return density.neg_().exp_().mul_(256).sub_(1).clamp_(0, 255).view(images.shape)


def lit(images: Tensor, views: Views) -> Tensor:
    """Change contrast, around the mean of each image (B, 3, H, W), and brightness."""
    if (views.brightness == 1).all() and (views.contrast == 1).all():
        return images
    brightness, contrast = (_on(images.device, values)[:, None, None, None]
                            for values in (views.brightness, views.contrast))
    mean = images.mean((1, 2, 3), keepdim=True)
    return images.mul_(contrast * brightness).add_(mean * (1 - contrast) * brightness).clamp_(0, 255)


def blurred(images: Tensor, views: Views) -> Tensor:
    """Blur each image (B, 3, H, W) by its own Gaussian; borders are mirrored."""
    if not views.blur.any():
        return images
    count, _, height, width = images.shape
    radius = min(math.ceil(3 * views.blur.max()), height - 1, width - 1)
    places, sigma = abs(np.arange(-radius, radius + 1)), np.maximum(views.blur, 1e-3)[:, None]
    weights = np.exp(-places ** 2 / (2 * sigma ** 2)) * (places <= np.ceil(3 * sigma))  # whatever the others' sigma
    kernels = _on(images.device, (weights / weights.sum(1, keepdims=True)).astype(np.float32)).repeat_interleave(3, 0)
    padded = functional.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, B 3, H', W')
    for shape in ((-1, 1, 2 * radius + 1, 1), (-1, 1, 1, 2 * radius + 1)):
        padded = functional.conv2d(padded, kernels.view(shape), groups=3 * count)
    return padded.view(images.shape)


def with_noise(images: Tensor, views: Views) -> Tensor:
    """Add noise of a normal distribution to images (B, 3, H, W)."""
    if not views.noise.any():
        return images
    random = torch.Generator(images.device)
    for image, deviation, seed in zip(images, views.noise.tolist(), views.seeds.tolist(), strict=True):
        image.add_(torch.empty_like(image).normal_(0, deviation, generator=random.manual_seed(seed)))
    return images
