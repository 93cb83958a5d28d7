"""What a U-Net looks at: gradients of its logits with respect to its input (report, section 6.4).

    pixel     an output pixel whose whole field lies inside its tile, so that no padding is seen
    cut       the part of a tile that is computed for a pixel: the smallest input that holds the whole field
    path      what joins encoder and decoder: the skip of each level, and last the bottleneck
    energy    the square of a gradient, summed over the input's channels
    ring      the input pixels of one distance to the pixel, in quarters of a pixel

The encoder computes the cut, the decoder only what it needs of it for the central block of pixels. All pixels of a
batch go backward together, since none depends on the input of another. The gradients that come by the paths add up to
the gradient of the whole network, so cutting one is taking its part away.

Letters as in unet.py; besides P paths, S pixels that are measured, D the side of a map around its pixel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.console import Progress, UserError
from common.devices import autocast, memory_format
from common.geometry import multiple, reach, smallest_cut, unpadded
from dataset import generator, normalise, torch_seed
from evaluation import metrics
from evaluation.entries import Entry, Questions
from training.runs import build_model
from unet import UNet

RINGS = 4  # for each pixel of distance
PIXELS_AT_ONCE = 2**18  # of the input: six cuts of the report's network
BORDER_TILES = 100  # at most
DISTANCES = (0, 4, 8, 16, 32, 64, 128, 256)  # pixels from a tile's border
FREE_PIXELS = 32  # of inputs that are no tiles
TRAINED, UNTRAINED = ("trained", "tiles"), ("untrained", "tiles")

Kind = tuple[str, str]  # weights, trained or untrained, and input: tiles, zeros or noise
Inputs = Callable[[int, int], Tensor]  # the pixels [start, stop) to the network's input (B, C, cut, cut)


# ---------------------------------------------------------------------------------------------- which pixels

@dataclass(frozen=True)
class Pixels:
    """Output pixels, and where their cuts lie."""

    tiles: np.ndarray  # (S,) numbers of their tiles
    corners: np.ndarray  # (S, 2) top and left of the cut in its tile
    places: np.ndarray  # (S, 2) row and column of the pixel in its cut
    classes: np.ndarray  # (S,) the truth there
    shares: np.ndarray  # (K,) how often each class occurs in the tiles

    def __len__(self) -> int:
        return len(self.classes)

    def weights(self, region: int | None) -> np.ndarray:
        """(S,) of a mean over the pixels of a class; over all, each class as often as it occurs."""
        counts = np.bincount(self.classes, minlength=len(self.shares))
        shares = self.shares if region is None else np.eye(len(self.shares))[region]
        weights = (shares / np.maximum(counts, 1))[self.classes]
        return weights / weights.sum()


def _alignments(random: np.random.Generator, count: int, levels: int) -> np.ndarray:
    """(count, 2) alignments of rows and columns: all of each in every `multiple` pixels, all pairs in its square."""
    block, i = multiple(levels), np.arange(count)
    rows, columns = random.permutation(block), random.permutation(block)
    return np.stack([rows[i % block], columns[(i + i // block) % block]], 1)


def draw_pixels(entry: Entry, questions: Questions, count: int) -> Pixels:
    """`count` pixels of each class (by the truth), from as many tiles as there are, and none of a class that lies
    nowhere far enough from the borders.

    Raises `UserError` where the tiles are smaller than the cut.
    """
    levels, classes, seed = len(entry.config.model.widths), len(entry.config.data.classes), entry.config.seed
    store, rows = questions.store, questions.rows
    cut, found = smallest_cut(levels), []
    height, width = store.shape[1:3]
    if min(height, width) < cut.size:
        raise UserError(f"{entry.name}: the tiles of {questions.config.data.root} are {height} x {width} pixels, too "
                        f"small to hold the field of {levels} levels: give tiles of at least {cut.size} x {cut.size} "
                        "with data.root=FOLDER, or train a model with fewer model.widths")
    pixels = np.zeros(classes, np.int64)
    with Progress("count classes", len(rows), "tile") as progress:
        for row in rows:
            pixels += np.bincount(store[row, ..., 3].ravel(), minlength=classes)[:classes]
            progress.advance()
    for k in range(classes):
        random = generator(seed, 0, k, "receptive field")
        order, places = random.permutation(len(rows)), cut.origin + _alignments(random, count, levels)
        turn = 0
        for y, x in places if pixels[k] else ():
            for tried in range(turn, turn + len(order)):  # the next tile that has the class where this alignment fits
                tile = order[tried % len(order)]
                target = store[rows[tile], y:y + height - cut.size + 1, x:x + width - cut.size + 1, 3]
                there = np.flatnonzero(target == k)
                if len(there):
                    corner = np.unravel_index(random.choice(there), target.shape)
                    found.append((tile, *corner, y, x, k))
                    turn = tried + 1
                    break
    drawn = generator(seed, 0, classes, "receptive field").permutation(np.array(found).reshape(-1, 6))
    return Pixels(drawn[:, 0], drawn[:, 1:3], drawn[:, 3:5], drawn[:, 5], pixels / pixels.sum())


def free_pixels(count: int, levels: int, seed: int) -> Pixels:
    """Pixels of inputs that are no tiles."""
    places = smallest_cut(levels).origin + _alignments(generator(seed, 0, 0, "receptive field"), count, levels)
    none = np.zeros(count, np.int64)
    return Pixels(none, np.zeros((count, 2), np.int64), places, none, np.ones(1))


# ---------------------------------------------------------------------------------------------- what is fed

def tile_inputs(entry: Entry, questions: Questions, pixels: Pixels) -> Inputs:
    size = smallest_cut(len(entry.config.model.widths)).size

    def inputs(start: int, stop: int) -> Tensor:
        places = zip(pixels.tiles[start:stop], pixels.corners[start:stop], strict=True)
        cuts = np.stack([questions.store[questions.rows[tile], top:top + size, left:left + size, :3]
                         for tile, (top, left) in places])                           # (B, cut, cut, 3)
        return normalise(torch.from_numpy(cuts).to(entry.device), entry.statistics)
    return inputs


def zero_inputs(levels: int, device: torch.device) -> Inputs:
    """The report's input: every pixel has the mean colour."""
    size = smallest_cut(levels).size
    return lambda start, stop: torch.zeros(stop - start, 3, size, size, device=device)


def noise_inputs(levels: int, device: torch.device, seed: int) -> Inputs:
    """Independent normal numbers with the mean and variance of normalised tiles."""
    size = smallest_cut(levels).size

    def inputs(start: int, stop: int) -> Tensor:
        noise = [generator(seed, 0, i, "noise").standard_normal((3, size, size), np.float32)
                 for i in range(start, stop)]
        return torch.from_numpy(np.stack(noise)).to(device)
    return inputs


def batches(count: int, levels: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIXELS_AT_ONCE // smallest_cut(levels).size ** 2)
    for start in range(0, count, step):
        yield start, min(start + step, count)


def initial(entry: Entry, inputs: Inputs, count: int) -> UNet:
    """The network with the weights that training began with, in evaluation mode.

    Its batch norms have seen these inputs, with dropout, as in training. As they are created, with mean 0 and variance
    1, every level would be fainter than it ever is.
    """
    config = entry.config
    torch.manual_seed(torch_seed(config.seed, 0, 0, "weights"))
    model = build_model(config).to(entry.device, memory_format=memory_format(entry.device))
    model.requires_grad_(False).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        for start, stop in batches(count, len(config.model.widths)):
            model(inputs(start, stop))
    return model.eval()


# ---------------------------------------------------------------------------------------------- gradients

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


def measure(model: UNet, inputs: Inputs, pixels: Pixels, by_path: bool, progress: Progress) -> Field:
    """Measure the field of every pixel, for the logit of every class."""
    levels, classes, device = len(model.encoder), model.head.out_channels, model.head.weight.device
    cut, radius = smallest_cut(levels), reach(levels)
    around, size, count = rings_around(radius), 2 * radius + 1, len(pixels)
    rings = around.max() + 1
    maps = np.zeros((len(pixels.shares), classes, size, size))
    energy = np.zeros((count, classes, rings))
    path_energy = np.zeros((count, classes, levels, rings))
    without, importance = np.zeros((2, count, classes, levels))
    for start, stop in batches(count, levels):
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


def measure_run(entry: Entry, questions: Questions, pixels: Pixels, dtype: torch.dtype) -> dict[Kind, Field]:
    """The fields of a trained model on tiles, zeros and noise, and on the tiles of the network that it once was."""
    config, device, levels = entry.config, entry.device, len(entry.config.model.widths)
    tiles, free = tile_inputs(entry, questions, pixels), free_pixels(FREE_PIXELS, levels, config.seed)
    untrained = initial(entry, tiles, len(pixels))
    with (Progress(f"fields of {entry.name}", 2 * (len(pixels) + len(free)), "pixel") as progress,
          autocast(device, dtype)):
        return {
            TRAINED: measure(entry.model, tiles, pixels, True, progress),
            ("trained", "zeros"): measure(entry.model, zero_inputs(levels, device), free, False, progress),
            ("trained", "noise"): measure(entry.model, noise_inputs(levels, device, config.seed), free, False,
                                          progress),
            UNTRAINED: measure(untrained, tiles, pixels, False, progress),
        }


# ---------------------------------------------------------------------------------------------- the report's way

def as_published(model: UNet, bottleneck: bool = True) -> tuple[int, int]:
    """The report's size of the field, and the output pixel it is of: zeros in, the gradient of the first class's logit
    at one pixel with respect to the first channel, last row that is not zero minus the first one.

    Without `bottleneck` no gradient passes it. The model is moved to the CPU.
    """
    levels = len(model.encoder)
    side = max(256, smallest_cut(levels).size)
    image = torch.zeros(1, 3, side, side).requires_grad_()
    *skips, deepest = model.cpu().eval().encode(image)
    logits = model.decode([*skips, deepest if bottleneck else deepest.detach()])
    gradient, = torch.autograd.grad(logits[0, 0, side // 2, side // 2], image)
    seen = gradient[0, 0].any(1).nonzero().flatten()
    return (seen.max() - seen.min()).item() if len(seen) else 0, side // 2


# ---------------------------------------------------------------------------------------------- borders of tiles

@dataclass(frozen=True)
class Border:
    """Pixels that are right, near the border of their tiles and far from it."""

    tiles: list[int]  # numbers of the N tiles
    confusion: np.ndarray  # (N, 2, K, K) where the field leaves the tile, and where it does not
    by_distance: np.ndarray  # (N, distances, 2) right and all pixels, by distance to the tile's border
    crop: int | None  # pixels, the side of the tile's centre that is predicted alone; None: the tile is too small
    moved: np.ndarray | None  # (N, distances, 3) from the crop's border: all pixels, right alone, right in the tile


def measure_border(entry: Entry, questions: Questions) -> Border:
    """Predict tiles whole, and besides the crops at their centres alone, whose surroundings are then missing."""
    config, (height, width) = entry.config, questions.store.shape[1:3]
    levels, classes, crop = len(config.model.widths), len(config.data.classes), config.data.crop
    order = generator(config.seed, 0, 0, "border").permutation(len(questions.rows))
    chosen = sorted(order[:BORDER_TILES].tolist())
    inside = np.outer(*(unpadded(levels, length, canvas=False) for length in (height, width)))
    bins, crop_bins = _bands(height, width), _bands(crop, crop)
    top, left = (_centred(levels, length, crop) for length in (height, width))
    has_crop = min(top, left) > 0
    inner = np.s_[top:top + crop, left:left + crop]
    counts, right_by_distance, moved = [], [], []
    with Progress(f"borders of {entry.name}", len(chosen), "tile") as progress:
        for tile in chosen:
            pixels = questions.store[questions.rows[tile]]
            image, target = torch.from_numpy(np.ascontiguousarray(pixels[..., :3])).to(entry.device), pixels[..., 3]
            labels = entry.predictor.labels(image)
            counts.append([metrics.confusion(*(torch.from_numpy(array[where].astype(np.int64)).reshape(1, -1, 1)
                                               for array in (labels, target)), classes)[0].numpy()
                           for where in (~inside, inside)])
            right = labels == target
            right_by_distance.append([np.bincount(bins[which], minlength=len(DISTANCES))
                                      for which in (right, np.ones_like(right))])
            if has_crop:
                alone = entry.predictor.labels(image[inner]) == target[inner]
                moved.append([np.bincount(crop_bins[which], minlength=len(DISTANCES))
                              for which in (np.ones_like(alone), alone, right[inner])])
            progress.advance()
    return Border(chosen, np.array(counts), np.array(right_by_distance).swapaxes(1, 2),
                  crop if has_crop else None, np.array(moved).swapaxes(1, 2) if has_crop else None)


def _bands(height: int, width: int) -> np.ndarray:
    """(height, width) which of `DISTANCES` a pixel is at least away from the border."""
    rows, columns = (np.minimum(np.arange(n), np.arange(n)[::-1]) for n in (height, width))
    return np.digitize(np.minimum.outer(rows, columns), DISTANCES) - 1


def _centred(levels: int, length: int, crop: int) -> int:
    """Where a crop at the centre begins so that its pixels keep their alignment; 0 or less where it does not fit."""
    before = (-length % multiple(levels)) // 2
    return (before + (length - crop) // 2) // multiple(levels) * multiple(levels) - before

