"""Races of the network: training step, inference, snapshots and crops, against the plain way and other libraries.

Our side is what train.py and evaluate.py run: a training step includes reading its batch from the store, and inference
includes copying tiles to the device. The plain training step gets its batch for free. On a GPU the plain side computes
float32 as PyTorch does by default: convolutions in TF32.
"""

import tempfile
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from common.config import Config, Model, Train
from common.config_files import load_config
from common.devices import choose_precision
from common.statistics import Statistics
from common.store import Store
from dataset import Tile
from evaluation.candidates import Candidate, predictor_of
from evaluation.scoring import tiles_at_once
from tools.benchmark import plain
from tools.benchmark.race import Lap, Race, Setting
from tools.benchmark.roofline import work_of
from training import epochs, training_set
from training.batches import batches_on, normalise, store_on
from training.crops import Crops, training_crops
from training.learner import build_learner
from unet import UNet

STATISTICS = Statistics([0.75, 0.55, 0.7], [0.15, 0.2, 0.15], [0.4, 0.4, 0.2])
CLASSES, TILE, CROP = 3, 500, 256
SILENT = SimpleNamespace(advance=lambda *_, **__: None)  # replaces a progress bar
SNAPSHOTS = 10  # in each lap
CONFIGS = Path(__file__).parents[2] / "configs"
PEERS = {"monai": "monai", "smp": "segmentation_models_pytorch"}


def random_tiles(count: int, size: int = TILE) -> np.ndarray:
    """Return tiles (count, size, size, 4) uint8 of noise, which cannot be compressed."""
    tiles = np.random.default_rng(0).integers(0, 256, (count, size, size, 4), np.uint8)
    tiles[..., 3] %= CLASSES
    return tiles


def store_of(tiles: np.ndarray) -> Store:
    """Return tiles (N, H, W, 4) of one size as a store without sums."""
    return Store(tiles.reshape(-1, 4), np.full((len(tiles), 2), tiles.shape[1:3]), np.zeros((len(tiles), 6 + CLASSES)))


def batch_size(setting: Setting) -> int:
    return 4 if setting.quick else Train.batch_size


def peer(name: str) -> nn.Module:
    """Build a U-Net of another library: MONAI's with the report's widths, or segmentation_models_pytorch's default."""
    if name == "monai":
        from monai.networks.nets import BasicUNet
        return BasicUNet(spatial_dims=2, in_channels=3, out_channels=CLASSES, features=(*Model.widths, Model.widths[0]))
    from segmentation_models_pytorch import Unet
    return Unet("resnet34", encoder_weights=None, in_channels=3, classes=CLASSES)


# ---------------------------------------------------------------------------------------------- training

def trainer(device: str, batch: int, steps: int, size: int = CROP, widths: tuple[int, ...] = Model.widths,
            compiled: bool = False) -> partial:
    """Return a function that trains our network for `steps` steps as train.py does."""
    config = Config(device=device, model=Model(widths=widths), train=Train(compile=compiled))
    learner = build_learner(config, STATISTICS)
    store = store_on(learner.device, store_of(random_tiles(16, max(size, TILE))))
    rows = [np.arange(batch * steps) % len(store), np.array([], int)]
    crops = training_crops(rows, 1, store.sizes, size, 0, 1)
    data = training_set.TrainingSet(store, rows[0], [Tile("", "", "")], STATISTICS, "")
    return partial(epochs.run_pass, learner, data, crops, batch, True, SILENT)


def steps_of_a_lap(setting: Setting) -> int:
    return 50 if setting.device == "cuda" else 1


def our_steps(setting: Setting, compiled: bool = Train.compile) -> Lap:
    batch, steps = batch_size(setting), steps_of_a_lap(setting)
    work = work_of(trainer(setting.device, batch, 1))
    run = trainer(setting.device, batch, steps, compiled=compiled)

    def lap() -> None:
        run()
        setting.wait()

    return Lap(lap, steps, {"work": steps * work, "batch": batch})


def of_config(setting: Setting, config_file: str) -> Config:
    """Return the network and batches of a config, or without one those of the report."""
    if config_file:
        return load_config(CONFIGS / config_file)
    return replace(Config(), train=replace(Train(), batch_size=batch_size(setting)))


def augmented_batches(setting: Setting, config_file: str = "") -> Lap:
    """Cut batches from the store and augment them as configs/augmented.yaml says."""
    config, count = of_config(setting, config_file), 10
    store = store_on(torch.device(setting.device), store_of(random_tiles(16)))
    rows = [np.arange(config.train.batch_size * count) % len(store), np.array([], int)]
    augment = load_config(CONFIGS / "augmented.yaml").augment
    crops = training_crops(rows, 1, store.sizes, config.data.crop, 0, 1, augment)

    def lap() -> None:
        for _ in batches_on(torch.device(setting.device), crops, store, config.train.batch_size):
            pass
        setting.wait()

    return Lap(lap, count, {"batch": config.train.batch_size})


def steps_without_augmentation(setting: Setting, config_file: str = "") -> Lap:
    config, steps = of_config(setting, config_file), 20 if config_file else steps_of_a_lap(setting)
    run = trainer(setting.device, config.train.batch_size, steps, config.data.crop, config.model.widths)

    def lap() -> None:
        run()
        setting.wait()

    return Lap(lap, steps, {"batch": config.train.batch_size})


def plain_steps(setting: Setting, network: str = "", channels_last: bool = False, bf16: bool = False) -> Lap:
    batch, steps = batch_size(setting), steps_of_a_lap(setting)
    torch.manual_seed(0)
    model = (peer(network) if network else UNet()).to(setting.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    step = plain.step(model, torch.randn(batch, 3, CROP, CROP, device=setting.device),
                      torch.randint(0, CLASSES, (batch, CROP, CROP), device=setting.device), bf16)
    work = work_of(step)

    def lap() -> None:
        for _ in range(steps):
            step()

    return Lap(lap, steps, {"work": steps * work, "batch": batch,
                            "parameters": sum(weight.numel() for weight in model.parameters())})


# ---------------------------------------------------------------------------------------------- inference

def trained_network() -> UNet:
    """Return a U-Net whose batch norms have statistics."""
    torch.manual_seed(0)
    model = UNet().train()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    return model.eval().requires_grad_(False)


def tiles_of_a_lap(setting: Setting) -> int:
    return 64 if setting.device == "cuda" else 1 if setting.quick else 4


def our_inference(setting: Setting, many: bool = False, compiled: bool = False, precision: str = "auto") -> Lap:
    """Predict as evaluate.py does for `many` tiles or for few; `compiled` also compiles where evaluate.py would not."""
    device, count = torch.device(setting.device), tiles_of_a_lap(setting)
    model = trained_network().to(device, memory_format=torch.channels_last)
    dtype = choose_precision(precision, device)
    images = torch.from_numpy(random_tiles(count)[..., :3].copy())

    def candidate(compiled: bool) -> Candidate:
        return Candidate("ours", Config(), Path(), device, "", predictor_of(model, STATISTICS, False, dtype, compiled),
                     model, STATISTICS, precision=dtype)

    def lap(candidate: Candidate) -> list[torch.Tensor]:
        return [candidate.predict(part.to(device), [])[0].cpu() for part in images.split(tiles_at_once(TILE, TILE))]

    ours = candidate(compiled).for_many() if many else candidate(compiled)
    return Lap(partial(lap, ours), count, {"work": work_of(partial(lap, candidate(compiled=False)))})


def plain_inference(setting: Setting, network: str = "") -> Lap:
    count = tiles_of_a_lap(setting)
    model = (peer(network) if network else trained_network()).to(setting.device)
    run = plain.predict(model, random_tiles(count)[..., :3], 32 if network else UNet().multiple, STATISTICS)
    return Lap(run, count, {"work": work_of(run)})


# ---------------------------------------------------------------------------------------------- crops and snapshots

def random_crops(count: int, tiles: int, size: int = TILE) -> Crops:
    rows = [np.arange(count) % tiles, np.array([], int)]
    return training_crops(rows, 1, np.full((tiles, 2), size), CROP, 0, 1)


def our_crops(setting: Setting, normalised: bool = False) -> Lap:
    """Cut crops from the memory-mapped store as uint8, which is the CPU's part of the work when a GPU trains."""
    tiles, count = 32, 3200
    folder = tempfile.TemporaryDirectory()
    pixels = np.memmap(Path(folder.name) / "tiles.u8", np.uint8, "w+", shape=(tiles, TILE, TILE, 4))
    pixels[:] = random_tiles(tiles)
    store = store_of(pixels)
    crops = random_crops(count, tiles)

    def run() -> int:
        assert folder  # keeps the folder until the lap is deleted
        count = 0
        for batch in batches_on(torch.device("cpu"), crops, store, Train.batch_size):
            count += len(normalise(batch[..., :3], STATISTICS) if normalised else batch)
        return count

    return Lap(run, count)


def plain_crops(setting: Setting) -> Lap:
    count = 64
    folder = tempfile.TemporaryDirectory()
    plain.NpzTiles.write(Path(folder.name), random_tiles(count))
    loader = plain.loader(plain.NpzTiles(Path(folder.name), count, CROP, STATISTICS), Train.batch_size)

    def run() -> int:
        assert folder
        return sum(len(images) for images, _ in loader)

    return Lap(run, count)


def our_snapshot(setting: Setting) -> Lap:
    learner = build_learner(Config(device=setting.device), STATISTICS)
    kept = learner.take_snapshot()

    def run() -> None:
        for _ in range(SNAPSHOTS):
            learner.take_snapshot(into=kept)
            learner.restore_snapshot(kept)
        setting.wait()

    return Lap(run, SNAPSHOTS)


def plain_snapshot(setting: Setting) -> Lap:
    model = UNet().to(setting.device)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(1, 3, 32, 32, device=setting.device)).sum().backward()
    optimizer.step()

    def run() -> None:
        for _ in range(SNAPSHOTS):
            plain.snapshot_and_restore(model, optimizer)
        setting.wait()

    return Lap(run, SNAPSHOTS)


def races(device: str) -> dict[str, Race]:
    """Return the races by name, including those against other libraries if they are installed."""
    step, tile = "ms a step", "ms a tile"

    def network_race(ours: partial, baseline: partial, unit: str) -> Race:
        return Race(ours, baseline, unit, keeps_memory=device == "cpu")

    found = {
        "train_step": network_race(our_steps, plain_steps, step),
        "inference_512": network_race(partial(our_inference, many=True), plain_inference, tile),
        "inference_512_few": network_race(our_inference, plain_inference, tile),
        "inference_512_float32": network_race(partial(our_inference, precision="float32"), plain_inference, tile),
        "crops": Race(our_crops, plain_crops, "ms a crop", one_thread=True),
        "crops_normalised": Race(partial(our_crops, normalised=True), plain_crops, "ms a crop", one_thread=True),
        "snapshot": network_race(our_snapshot, plain_snapshot, "ms"),
    }
    for name, config_file in (("augmentation", ""), ("augmentation_demo", "demo.yaml")):
        found[name] = Race(partial(augmented_batches, config_file=config_file),
                           partial(steps_without_augmentation, config_file=config_file), "ms a batch")
    for part in ("channels_last", "bf16", "both"):
        found[f"train_step_{part}"] = network_race(
            partial(plain_steps, channels_last=part != "bf16", bf16=part != "channels_last"), plain_steps, step)
    if device == "cuda":  # to show whether compiling is faster there
        found["train_step_compiled"] = network_race(partial(our_steps, compiled=True), plain_steps, step)
        found["inference_512_compiled"] = network_race(partial(our_inference, compiled=True), plain_inference, tile)
    for name, package in PEERS.items():
        if find_spec(package):
            found[f"train_step_{name}"] = network_race(our_steps, partial(plain_steps, network=name), step)
            found[f"inference_512_{name}"] = network_race(partial(our_inference, many=True),
                                                          partial(plain_inference, network=name), tile)
    return found
