"""fields/gradients.py: gradients, maps and energies, against plain backward passes and loops."""

import math

import numpy as np
import pytest
import torch

import train
from common.config_files import apply_overrides
from common.console import Progress
from common.geometry import multiple, reach, smallest_cut
from evaluation.candidates import candidate_of_run
from evaluation.test_set import open_test_set
from fields import gradients, sampling
from training.learner import build_learner
from unet import UNet


def random_model(*widths, seed=0):
    """A float64 U-Net in evaluation mode whose batch norms have seen images."""
    torch.manual_seed(seed)
    model = UNet(widths, dropout=0).double().train()
    side = 8 * multiple(len(widths))
    model(torch.randn(4, 3, side, side, dtype=torch.double))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("widths", [(4,), (4, 5), (3, 4, 5), (2, 3, 4, 5)])
def test_gradients_of_cuts_equal_those_on_a_larger_image(widths):
    """Many pixels at once, one at each alignment, against one plain backward pass for each."""
    model, levels = random_model(*widths), len(widths)
    cut, block = smallest_cut(levels), multiple(levels)
    torch.manual_seed(1)
    image = torch.randn(1, 3, cut.size + 2 * block, cut.size + 3 * block, dtype=torch.double).requires_grad_()
    logits = model(image)
    places = torch.tensor([[cut.origin + r, cut.origin + (3 * r + 1) % block] for r in range(block)])
    cuts = image.detach()[:, :, block:block + cut.size, 2 * block:2 * block + cut.size].repeat(block, 1, 1, 1)
    by_path = list(gradients.gradients(model, cuts.clone(), places))
    whole = list(gradients.gradients(model, cuts.clone(), places, by_path=False))
    assert len(by_path) == len(whole) == 3
    for k in range(3):
        assert torch.allclose(by_path[k][0].sum(0), whole[k][0][0], rtol=1e-9, atol=1e-15)
        for i, (y, x) in enumerate(places.tolist()):
            expected, = torch.autograd.grad(logits[0, k, y + block, x + 2 * block], image, retain_graph=True)
            assert expected.abs().max() > 0
            got = torch.zeros_like(expected)
            got[0, :, block:block + cut.size, 2 * block:2 * block + cut.size] = by_path[k][0].sum(0)[i]
            assert torch.allclose(got, expected, rtol=1e-9, atol=1e-15)


def test_the_gradient_by_a_path_is_what_is_left_if_all_others_are_cut():
    model, (cut, levels) = random_model(3, 4, 5), (smallest_cut(3), 3)
    torch.manual_seed(1)
    image = torch.randn(1, 3, cut.size, cut.size, dtype=torch.double)
    place = torch.tensor([[cut.origin + 1, cut.origin + 2]])
    got = list(gradients.gradients(model, image.clone(), place))
    for k in range(3):
        for path in range(levels):
            leaf = image.clone().requires_grad_()
            features = model.encode(leaf)
            features = [level if i == path else level.detach() for i, level in enumerate(features)]
            at = [level.detach().requires_grad_() for level in features]
            expected, = torch.autograd.grad(model.decode(features)[0, k, place[0, 0], place[0, 1]], leaf)
            into, = torch.autograd.grad(model.decode(at)[0, k, place[0, 0], place[0, 1]], at[path])
            assert torch.allclose(got[k][0][path], expected, rtol=1e-9, atol=1e-15)
            assert got[k][1][path, 0].item() == pytest.approx((into * at[path]).abs().sum().item(), rel=1e-6)


def pixels_of(levels, classes=(0, 1, 1, 0, 1)):
    cut, random = smallest_cut(levels), np.random.default_rng(0)
    places = cut.origin + random.integers(0, multiple(levels), (len(classes), 2))
    return sampling.Pixels(np.arange(len(classes)), np.zeros((len(classes), 2), int), places, np.array(classes),
                           np.array([0.75, 0.25]))


@pytest.mark.parametrize("widths", [(4, 5), (3, 4, 5)])
def test_maps_and_energies_equal_naive_loops(widths, monkeypatch):
    model, levels = random_model(*widths), len(widths)
    cut, radius = smallest_cut(levels), reach(levels)
    monkeypatch.setattr(sampling, "PIXELS_AT_ONCE", 2 * cut.size**2)
    torch.manual_seed(2)
    pixels = pixels_of(levels)
    images = torch.randn(len(pixels), 3, cut.size, cut.size, dtype=torch.double)
    with Progress("", len(pixels)) as progress:
        field = gradients.measure_field(model, lambda a, b: images[a:b].clone(), pixels, True, progress)
    maps = np.zeros((2, 3, 2 * radius + 1, 2 * radius + 1))
    for i, (y, x) in enumerate(pixels.places):
        parts = list(gradients.gradients(model, images[i:i + 1].clone(), torch.tensor([[y, x]])))
        for k in range(3):
            part = parts[k][0][:, 0].numpy()                                         # (P, C, cut, cut)
            whole, rings = part.sum(0), np.zeros((levels + 1, field.energy.shape[-1]))
            for row in range(cut.size):
                for column in range(cut.size):
                    dy, dx = row - y, column - x
                    if max(abs(dy), abs(dx)) > radius:
                        assert not whole[:, row, column].any()
                        continue
                    maps[pixels.classes[i], k, radius + dy, radius + dx] += np.abs(whole[:, row, column]).sum()
                    ring = math.ceil(4 * math.sqrt(dy * dy + dx * dx))
                    rings[0, ring] += (whole[:, row, column] ** 2).sum()
                    rings[1:, ring] += (part[:, :, row, column] ** 2).sum(1)
            assert np.allclose(field.energy[i, k], rings[0], rtol=1e-9)
            assert np.allclose(field.path_energy[i, k], rings[1:], rtol=1e-9)
            assert np.allclose(field.without[i, k], [((whole - p) ** 2).sum() for p in part], rtol=1e-9)
            assert np.allclose(field.importance[i, k], parts[k][1][:, 0], rtol=1e-6)
    maps /= np.array([2, 3])[:, None, None, None]
    assert np.allclose(field.maps, maps, rtol=1e-9)
    assert np.allclose(field.map(1, 2), maps[1, 2])
    assert np.allclose(field.map(None, None), (0.75 * maps[0] + 0.25 * maps[1]).mean(0))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_untrained_model_has_the_first_weights_of_training(tmp_path, tiny, monkeypatch, dropout):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "PIXELS_AT_ONCE", 4 * 18**2)  # three batches
    train.start(apply_overrides(tiny, ["train.epochs=1", f"model.dropout={dropout}"]))
    candidate = candidate_of_run(tmp_path / "runs/tiny", "best", [], flips=False, precision="float32")
    tiles = open_test_set([candidate], "all")
    pixels = sampling.draw_pixels(candidate, tiles, 4)
    inputs = sampling.tile_inputs(candidate, tiles, pixels)
    model = gradients.untrained_model(candidate, inputs, len(pixels))
    first = build_learner(candidate.config, candidate.statistics).model
    assert not model.training and all(map(torch.equal, model.parameters(), first.parameters()))
    norm, convolution = model.encoder[0][2], first.encoder[0][0]
    seen = torch.nn.functional.conv2d(inputs(0, len(pixels)), convolution.weight, convolution.bias, padding=1)
    if dropout:  # half of the images lose a channel, the others have it doubled
        kept = norm.running_mean / seen.mean((0, 2, 3)) / 2 * len(pixels)  # roughly how many of the 12 images
        assert kept.min() > 0 and kept.max() < len(pixels)
    else:
        assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5)
