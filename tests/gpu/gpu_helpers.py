"""Helpers of the GPU tests: small learnable tiles, training steps, and comparisons of tensors."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from helpers import GREYS, checkpoint_contents
from PIL import Image
from torch import Tensor, nn

from common.config import Config
from common.console import Progress
from dataset import TILE_LIST, Tile, write_tiles
from training import epochs, training_set
from training.batches import batches_on, normalise
from training.crops import Crops
from training.learner import Learner, build_learner
from unet import UNet

COLOURS = np.array([[225, 215, 225], [190, 110, 170], [110, 60, 130]])
TINY = ["data.crop=64", "model.widths=[8,16,32]", "model.dropout=0.2", "optim.lr=0.002", "train.epochs=3",
        "train.folds=2", "train.images_per_epoch=48", "train.batch_size=8", "train.precision=float32"]


def write_coloured_tiles(root: Path, count: int = 48, size: tuple[int, int] = (96, 80), slides: int = 12) -> None:
    """Write tiles with one colour for each class, and noise; five of twelve slides are in the test split.

    A network learns them within a few epochs. Then its predictions are certain enough to be compared.
    """
    random, tiles = np.random.default_rng(0), []
    for folder in ("frames", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        labels = np.kron(random.integers(0, 3, (size[0] // 16, size[1] // 16)), np.ones((16, 16), int))
        image = np.clip(COLOURS[labels] + random.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
        slide = i % slides
        tile = Tile(f"s{slide}-{i}", f"frames/{i}.png", f"masks/{i}.png", f"s{slide}",
                    split="test" if slide >= slides - 5 else "train")
        Image.fromarray(image).save(root / tile.image)
        Image.fromarray(GREYS[labels]).save(root / tile.mask)
        tiles.append(tile)
    write_tiles(root / TILE_LIST, tiles)


KINK = 1e-5  # about ten times what float32 rounding adds to activations, which are about 1


def learner_of(config: Config) -> tuple[Learner, training_set.TrainingSet]:
    """Return the learner of a config, with its first weights, and its training set."""
    data = training_set.prepare_data(config)
    return build_learner(config, data.statistics), data


def exact_learner(config: Config) -> tuple[Learner, training_set.TrainingSet]:
    """The same in float64, channels first and with plain Adam, without any optimisation. The config is for the CPU."""
    learner, data = learner_of(config)
    learner.model.double().to(memory_format=torch.contiguous_format)
    optim = config.optim
    return replace(learner, optimizer=torch.optim.Adam(learner.model.parameters(), lr=optim.lr, foreach=False,
                                                       weight_decay=optim.weight_decay, fused=False)), data


def random_crops(rows: np.ndarray, tile_size: Sequence[int], size: int, count: int, seed: int = 0) -> Crops:
    """Draw random windows of these rows of a store whose tiles have one size, randomly flipped and turned."""
    random = np.random.default_rng(seed)
    top, left = (random.integers(0, length - size + 1, count) for length in tile_size)
    turns = random.random((3, count)) < 0.5
    return Crops(random.choice(rows, count), top, left, *turns, size)


def crops_for(data: training_set.TrainingSet, config: Config, batches: int, seed: int = 0) -> Crops:
    return random_crops(data.rows, data.store.sizes[0], config.data.crop, batches * config.train.batch_size, seed)


def loss_of(learner: Learner, data: training_set.TrainingSet, batch: Tensor) -> Tensor:
    """Return the loss of a batch (B, size, size, 4) uint8, in the precision of the weights."""
    weight = next(learner.model.parameters())
    images = normalise(batch[..., :3], data.statistics).to(weight.dtype)
    return learner.batch_loss(images if weight.dtype == torch.float32 else images.contiguous(), batch[..., 3].long())


def step_losses(learner: Learner, data: training_set.TrainingSet, config: Config, batches: int) -> list[float]:
    """Return the loss of each step; `run_pass` returns only the mean."""
    losses = []
    for batch in batches_on(learner.device, crops_for(data, config, batches), data.store, config.train.batch_size):
        loss = loss_of(learner, data, batch)
        loss.backward()
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_pass(learner: Learner, data: training_set.TrainingSet, config: Config, batches: int, training: bool = True,
              seed: int = 0) -> float:
    """Make a pass over random crops with the loop of train.py, and return the mean loss."""
    with Progress("", 1) as progress:
        crops = crops_for(data, config, batches, seed)
        return epochs.run_pass(learner, data, crops, config.train.batch_size, training, progress)


def distance_to_kinks(model: UNet, images: Tensor) -> float:
    """Return how close the network comes to a point where rounding decides on a gradient.

    Such points are the zeros of LeakyReLU, and pooling windows whose two largest pixels are equal.
    """
    nearest = []

    def at_relu(_, inputs: tuple[Tensor]) -> None:
        nearest.append(inputs[0].abs().min().item())

    def at_pool(_, inputs: tuple[Tensor]) -> None:
        before = torch.where(inputs[0] < 0, inputs[0] / 0.01, inputs[0])             # before LeakyReLU
        windows = nn.functional.unfold(before.flatten(0, 1)[:, None], 2, stride=2)   # (B C, 4, windows)
        first, second = windows.topk(2, dim=1).values.unbind(1)
        nearest.append((first - second).min().item())

    hooks = [layer.register_forward_pre_hook(at_relu if isinstance(layer, nn.LeakyReLU) else at_pool)
             for layer in model.modules() if isinstance(layer, nn.LeakyReLU | nn.MaxPool2d)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return min(nearest)


def without_gradient(model: UNet) -> set[str]:
    """The biases that the next batch norm subtracts again. Their gradients are zero except for rounding.

    Adam divides by the size of the gradient, so it makes whole steps from this rounding.
    """
    return {f"{name}.bias" for name, layer in model.named_modules()
            if isinstance(layer, nn.Conv2d) and name.startswith(("encoder", "decoder"))}


def strides_that_matter(tensor: Tensor) -> list[int]:
    """Strides of the dimensions of more than one element; the others have no meaning."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def largest_difference(ours: object, theirs: object) -> float:
    """Compare two trees of tensors and numbers: 0 if all bits are equal, infinity if they cannot be compared."""
    if isinstance(ours, Tensor):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return float("inf")
        ours, theirs = ours.cpu(), theirs.cpu()
        if torch.equal(ours, theirs):
            return 0.0
        difference = (ours.double() - theirs.double()).abs().max().item()
        return difference if difference > 0 else float("inf")  # NaN
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return float("inf")
        return max((largest_difference(ours[key], theirs[key]) for key in ours), default=0.0)
    if isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return float("inf")
        return max(map(largest_difference, ours, theirs), default=0.0)
    if ours == theirs:
        return 0.0
    return abs(ours - theirs) if isinstance(ours, int | float) and isinstance(theirs, int | float) else float("inf")


def contents(checkpoint: Path) -> dict:
    """All that a checkpoint holds, except measured times and memory and the run's name."""
    found = checkpoint_contents(checkpoint.parent.parent, checkpoint.stem)
    del found["config"]["name"]
    return found
