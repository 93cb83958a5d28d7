"""evaluation/inference.py: mirrored borders, windows, flips and turns, and the fast forms of a network."""

import shutil

import numpy as np
import pytest
import torch

from common.geometry import reach
from evaluation.inference import Predictor, compiled, folded, in_bf16, mirrored_indices, with_symmetries
from unet import UNet


@pytest.mark.parametrize("size", [1, 3, 5, 16, 17, 31, 224, 500])
@pytest.mark.parametrize("multiple", [1, 2, 8, 16, 32])
def test_mirroring_equals_numpys_symmetric_padding(size, multiple):
    line, margin = np.arange(size), -size % multiple
    expected = np.pad(line, (margin // 2, margin - margin // 2), mode="symmetric")
    assert (line[mirrored_indices(size, multiple).numpy()] == expected).all()


def test_500_becomes_512_with_6_pixels_on_either_side():
    indices = mirrored_indices(500, 16)
    assert len(indices) == 512 and indices[:7].tolist() == [5, 4, 3, 2, 1, 0, 0] and indices[6] == 0


def model_of(*widths, dropout=0):
    """A network in float64 and evaluation mode; its batch norms have statistics and weights."""
    torch.manual_seed(0)
    model = UNet(widths, dropout).double().train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.bias, -0.5, 0.5)
    model(torch.randn(4, 3, 64, 64, dtype=torch.double))
    return model.eval()


def normalise(images):
    return (images.double() / 255 - 0.5).movedim(-1, 1)


def images_of(height, width, count=1):
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(height * width))


@pytest.mark.parametrize("size", [(50, 38), (32, 48), (5, 3), (1, 1)])
def test_an_image_is_mirrored_and_its_logits_are_cropped_back(size):
    model, images = model_of(4, 8, 16), images_of(*size, count=2)
    margins = [-n % 4 for n in size]
    pads = [(m // 2, m - m // 2) for m in margins]
    padded = torch.from_numpy(np.pad(images.numpy(), [(0, 0), *pads, (0, 0)], mode="symmetric"))
    expected = model(normalise(padded))[:, :, pads[0][0]:pads[0][0] + size[0], pads[1][0]:pads[1][0] + size[1]]
    assert torch.equal(Predictor.of(model, normalise, flips=False).logits(images), expected)


@pytest.mark.parametrize(("size", "flips"), [((150, 200), False), ((97, 333), False), ((500, 31), False),
                                             ((48, 161), True), ((161, 40), True)])
def test_windows_have_the_logits_of_the_whole_image(size, flips):
    whole = Predictor.of(model_of(4, 4, 8), normalise, flips)
    windowed = Predictor(whole.network, whole.multiple, whole.margin, window=96)
    images = images_of(*size)
    assert len(list(windowed.pieces(images))) > 1 == len(list(whole.pieces(images)))
    assert torch.allclose(windowed.logits(images), whole.logits(images), rtol=0, atol=1e-9)
    assert (windowed.labels(images[0]) == whole.logits(images)[0].argmax(0).numpy()).all()


def test_windows_with_a_smaller_margin_have_other_logits():
    """So the equality above does not come from a network with a small receptive field."""
    whole = Predictor.of(model_of(4, 4, 8), normalise, flips=False)
    assert whole.margin == 24 and reach(3) == 23
    narrow = Predictor(whole.network, whole.multiple, margin=8, window=96)
    images = images_of(150, 200)
    assert not torch.allclose(narrow.logits(images), whole.logits(images), rtol=0, atol=1e-9)


def test_a_receptive_field_larger_than_the_window():
    whole = Predictor.of(model_of(*[2] * 6), normalise, flips=False)
    windowed = Predictor(whole.network, whole.multiple, whole.margin, window=64)
    images = images_of(64, 700)
    assert whole.margin == 224 and torch.allclose(windowed.logits(images), whole.logits(images), rtol=0, atol=1e-9)


def test_predictions_with_flips_turn_with_the_image():
    predictor = Predictor.of(model_of(4, 8, 8), normalise, flips=True)
    plain = Predictor.of(model_of(4, 8, 8), normalise, flips=False)
    images = images_of(48, 64)
    probs = torch.softmax(predictor.logits(images), 1)
    assert torch.allclose(probs.sum(1), torch.ones(1, 48, 64).double())
    for turned, back in ((images.flip(1), lambda x: x.flip(2)), (images.flip(2), lambda x: x.flip(3)),
                         (images.rot90(1, (1, 2)), lambda x: x.rot90(-1, (2, 3)))):
        assert torch.allclose(back(torch.softmax(predictor.logits(turned), 1)), probs)
        assert not torch.allclose(back(torch.softmax(plain.logits(turned), 1)),
                                  torch.softmax(plain.logits(images), 1), atol=1e-3)


def test_the_symmetries_are_eight_different_views():
    views = []

    def network(images):
        views.append(images[0, ..., 0].clone())
        return torch.stack([images[..., 0], images[..., 1]], 1).double()

    images = images_of(4, 4)
    expected = torch.log_softmax(network(images), 1)
    views.clear()
    assert torch.allclose(with_symmetries(network)(images), expected)  # this network looks at one pixel
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8


def test_probabilities_of_0_are_averaged_without_nan():
    network = with_symmetries(lambda images: torch.tensor([0.0, 500.0])[:, None, None].expand(1, 2, *images.shape[1:3]))
    logits = network(images_of(4, 4))
    assert torch.softmax(logits, 1)[0, 1].eq(1).all() and not logits.isnan().any()


# ---------------------------------------------------------------------------------------------- fast forms

@pytest.mark.parametrize("dropout", [0, 0.5])
def test_folding_changes_only_rounding(dropout):
    model = model_of(4, 8, 16, dropout=dropout)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast, images = folded(model), torch.randn(2, 3, 32, 24, dtype=torch.double)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in fast.modules())
    assert torch.allclose(fast(images), model(images), rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_returns_almost_the_same_logits_in_float32():
    torch.manual_seed(0)
    model = UNet((8, 16), dropout=0).train()
    model(torch.randn(4, 3, 64, 64))
    images = torch.randn(2, 3, 32, 24)
    exact, fast = model.eval()(images), in_bf16(model)(images)
    assert fast.dtype == torch.float32 and torch.allclose(fast, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(fast, exact)


def coloured_maps(count, seed):
    """Images (count, 3, 64, 64) with noise, in which each of the classes (count, 64, 64) has a colour."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.interpolate(torch.randn(count, 3, 9, 9, generator=generator), size=64,
                                             mode="bicubic").argmax(1)
    colours = torch.tensor([[0.3, 0.3, 0.3], [0.2, -0.1, 0.1], [-0.1, -0.3, 0.0]])
    return (colours[target] + 0.05 * torch.randn(count, 64, 64, 3, generator=generator)).movedim(-1, 1), target


def test_a_trained_network_predicts_the_same_in_bfloat16():
    torch.manual_seed(0)
    model = UNet((8, 16, 32), dropout=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(100):
        images, target = coloured_maps(8, step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()
    images, target = coloured_maps(32, 1000)
    with torch.no_grad():
        exact, fast = model.eval()(images).argmax(1), in_bf16(model)(images).argmax(1)
    assert (exact == target).float().mean() > 0.95
    assert (exact == fast).float().mean() >= 0.999
    for k in range(3):
        dice = [2 * ((predicted == k) & (target == k)).sum() / ((predicted == k).sum() + (target == k).sum())
                for predicted in (exact, fast)]
        assert abs(dice[0] - dice[1]) < 1e-3


def test_only_the_first_shape_is_compiled(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: lambda x: seen.append(x.shape) or network(x) + 1)
    network = compiled(lambda x: 2 * x)
    assert [network(torch.ones(n)).sum().item() for n in (4, 2, 4)] == [12, 4, 12]
    assert seen == [torch.Size([4])] * 2


def test_turned_images_are_compiled_once(monkeypatch):
    seen = set()
    monkeypatch.setattr(torch, "compile", lambda network, **options: lambda x: seen.add(x.stride()) or network(x))
    images = images_of(16, 16, count=2)
    Predictor.of(model_of(4, 8).float(), lambda x: normalise(x).float(), True, torch.bfloat16, many=True).logits(images)
    assert len(seen) == 1


def test_without_a_compiler_there_is_a_warning_and_the_same_result(monkeypatch, capsys):
    def no_compiler(network, **options):
        def fast(x):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand so on")
        return fast

    monkeypatch.setattr(torch, "compile", no_compiler)
    network = compiled(lambda x: 2 * x)
    assert [network(torch.ones(n)).sum().item() for n in (4, 2, 4)] == [8, 4, 8]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "compilation failed" in said and said.endswith("no C++ compiler\n")


def test_a_compiled_network_returns_almost_the_same_logits(capsys):
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    model = UNet((4, 8), dropout=0).train()
    model(torch.randn(4, 3, 64, 64))
    model = model.eval().requires_grad_(False)
    images = images_of(24, 20, count=3)

    def shifted(images):
        return (images / 255 - 0.5).movedim(-1, 1)

    plain, fast = (Predictor.of(model, shifted, False, torch.bfloat16, many) for many in (False, True))
    for part in images.split(2):
        assert torch.allclose(fast.logits(part), plain.logits(part), rtol=0.02, atol=0.02)
    assert "compilation failed" not in capsys.readouterr().err
