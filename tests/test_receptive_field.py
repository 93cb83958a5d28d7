"""receptive_field.py, common/geometry.py, fields/measurement.py and fields/report.py."""

import csv
import json
import math
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import REPOSITORY

import receptive_field
import train
from common import geometry
from common.config_files import apply_overrides
from common.console import Progress, UserError
from common.geometry import multiple, smallest_cut
from evaluation import candidates, test_set
from fields import borders, gradients, numbers, published, report, sampling, theory
from training.learner import build_learner
from unet import UNet


def structural(levels: int) -> UNet:
    """Positive weights, average pooling, float64: every pixel that can matter has a positive gradient."""
    model = UNet([1] * levels, dropout=0, classes=1, in_channels=1).double().eval()
    model.pool = torch.nn.AvgPool2d(2)
    for parameter in model.parameters():
        parameter.data.abs_().add_(0.1)
    return model


def random_model(*widths, seed=0):
    """float64, evaluation mode, batch norms that have seen something."""
    torch.manual_seed(seed)
    model = UNet(widths, dropout=0).double().train()
    side = 8 * multiple(len(widths))
    model(torch.randn(4, 3, side, side, dtype=torch.double))
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- theory

@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_theory_equals_structural_autograd_at_every_alignment_by_every_path(levels):
    """Rows and columns have different alignments, so that asymmetry or a swap would show."""
    torch.manual_seed(0)
    model, block = structural(levels), multiple(levels)
    cut = smallest_cut(levels)
    side = cut.size + 2 * block
    for path in range(1, levels + 1):
        image = torch.ones(1, 1, side, side, dtype=torch.double).requires_grad_()
        features = [level if i < path else level.detach() for i, level in enumerate(model.encode(image))]
        logits = model.decode(features)[0, 0]
        for r in range(block):
            place = cut.origin + block + r, cut.origin + block + (r * 7 + 3) % block
            gradient, = torch.autograd.grad(logits[place], image, retain_graph=True)
            for axis, position in enumerate(place):
                seen = gradient[0, 0].any(1 - axis).nonzero().flatten()
                expected = geometry.receptive_field(levels, position, path)
                assert (seen.min().item(), seen.max().item()) == expected, (path, r, axis)
                assert len(seen) == geometry.size(levels, position, path)


def test_the_exact_sizes():
    assert [geometry.size(5, p) for p in range(16)] == [188 if p in (0, 1, 14, 15) else 204 for p in range(16)]
    assert [geometry.size(4, p) for p in range(8)] == [92 if p in (0, 1, 6, 7) else 100 for p in range(8)]
    assert theory.sizes(5, 4) == "124 or 132" and theory.path_names(2) == ["skip of level 1", "bottleneck"]
    assert geometry.area(5) == 200**2


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_reach_and_alignments_are_those_of_the_fields(levels):
    fields = {p: geometry.receptive_field(levels, p) for p in range(multiple(levels))}
    assert geometry.reach(levels) == max(max(p - a, b - p) for p, (a, b) in fields.items())
    listed = {p: (first, last) for members, first, last in geometry.alignments(levels) for p in members}
    assert listed == fields


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_ties_lose_what_a_constant_input_loses(levels):
    torch.manual_seed(0)
    model = UNet([2] * levels, dropout=0).double().eval()
    cut = smallest_cut(levels)
    for p in range(cut.origin, cut.origin + multiple(levels)):
        image = torch.zeros(1, 3, cut.size, cut.size, dtype=torch.double).requires_grad_()
        gradient, = torch.autograd.grad(model(image)[0, 0, p, p], image)
        seen = gradient[0].any(0).any(0).nonzero().flatten()
        assert (seen.min().item(), seen.max().item()) == geometry.receptive_field(levels, p, ties=True)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_no_smaller_input_holds_all_fields(levels):
    cut, block = smallest_cut(levels), multiple(levels)
    fields = [geometry.receptive_field(levels, cut.origin + r) for r in range(block)]
    first, last = min(a for a, _ in fields), max(b for _, b in fields)
    assert 0 <= first < block and cut.size - block <= last < cut.size and cut.size % block == 0


@pytest.mark.parametrize(("levels", "height", "width"), [(2, 18, 31), (3, 60, 53), (3, 52, 41), (4, 120, 107)])
def test_padded_pixels_are_those_that_padding_changes(levels, height, width):
    """On a canvas of ones, a pixel that sees padding differs from one in the middle of a huge canvas of ones."""
    torch.manual_seed(0)
    model, block = structural(levels), multiple(levels)

    def ones(height, width):
        return model(torch.ones(1, 1, height, width, dtype=torch.double))[0, 0].detach()

    over, aside = ((-n % block) // 2 for n in (height, width))
    logits = ones(*(-(-n // block) * block for n in (height, width)))[over:over + height, aside:aside + width]
    far = smallest_cut(levels)
    inner = ones(far.size, far.size)[far.origin:far.origin + block, far.origin:far.origin + block]
    rows, columns = ((torch.arange(n) + before) % block for n, before in ((height, over), (width, aside)))
    padded = (logits - inner[rows][:, columns]).abs() > 1e-13 * logits.abs()
    expected = ~np.outer(*(geometry.unpadded(levels, n) for n in (height, width)))
    assert (padded.numpy() == expected).all() and expected.any()
    assert geometry.padded_share(levels, height, width) == pytest.approx(expected.mean())
    within = [[before <= a and b < before + n for p in range(n)
               for a, b in [geometry.receptive_field(levels, p + before)]]
              for n, before in ((height, over), (width, aside))]
    assert geometry.padded_share(levels, height, width, canvas=False) == pytest.approx(1 - np.outer(*within).mean())


def test_the_shares_of_padded_pixels():
    shares = [round(geometry.padded_share(5, n, n), 3) for n in (256, 512)]
    assert shares == [0.929, 0.6]
    assert geometry.padded_share(5, 500, 500) < geometry.padded_share(5, 500, 500, canvas=False)


def test_theory_is_printed_without_torch(tmp_path):
    code = ("import sys; sys.argv = ['receptive_field.py', '--theory', '--config', "
            f"{str(REPOSITORY / 'configs/dice_ce.yaml')!r}, 'model.widths=[8, 16, 32, 64, 128, 256]']\n"
            "import receptive_field; receptive_field.main(); assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 levels" in done.stdout and "380 or 412" in done.stdout
    assert {geometry.size(6, p) for p in range(32)} == {380, 412}


# ---------------------------------------------------------------------------------------------- gradients

@pytest.mark.parametrize("widths", [(4,), (4, 5), (3, 4, 5), (2, 3, 4, 5)])
def test_gradients_of_cuts_are_those_of_the_whole_network_on_a_larger_image(widths):
    """At every alignment: encoder on the cut, decoder on less, many pixels at once; against one plain backward each."""
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


def test_the_gradient_by_a_path_is_what_cutting_all_others_leaves():
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


def pixels_of(levels, classes=(0, 1, 1, 0, 1), shares=(0.75, 0.25)):
    cut, random = smallest_cut(levels), np.random.default_rng(0)
    places = cut.origin + random.integers(0, multiple(levels), (len(classes), 2))
    return sampling.Pixels(np.arange(len(classes)), np.zeros((len(classes), 2), int), places,
                                    np.array(classes), np.array(shares))


@pytest.mark.parametrize("widths", [(4, 5), (3, 4, 5)])
def test_maps_and_energies_equal_naive_loops(widths, monkeypatch):
    model, levels = random_model(*widths), len(widths)
    cut, reach = smallest_cut(levels), geometry.reach(levels)
    monkeypatch.setattr(sampling, "PIXELS_AT_ONCE", 2 * cut.size**2)
    torch.manual_seed(2)
    pixels = pixels_of(levels)
    images = torch.randn(len(pixels), 3, cut.size, cut.size, dtype=torch.double)
    with Progress("", len(pixels)) as progress:
        field = gradients.measure_field(model, lambda a, b: images[a:b].clone(), pixels, True, progress)
    maps = np.zeros((2, 3, 2 * reach + 1, 2 * reach + 1))
    for i, (y, x) in enumerate(pixels.places):
        parts = list(gradients.gradients(model, images[i:i + 1].clone(), torch.tensor([[y, x]])))
        for k in range(3):
            part = parts[k][0][:, 0].numpy()                                         # (P, C, cut, cut)
            whole, rings = part.sum(0), np.zeros((levels + 1, field.energy.shape[-1]))
            for row in range(cut.size):
                for column in range(cut.size):
                    dy, dx = row - y, column - x
                    if max(abs(dy), abs(dx)) > reach:
                        assert not whole[:, row, column].any()
                        continue
                    maps[pixels.classes[i], k, reach + dy, reach + dx] += np.abs(whole[:, row, column]).sum()
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


def test_all_pixels_weigh_as_their_class_occurs():
    pixels = pixels_of(2)
    assert pixels.weights(None).tolist() == pytest.approx([0.375, 0.25 / 3, 0.25 / 3, 0.375, 0.25 / 3])
    assert pixels.weights(1).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])
    alone = pixels_of(2, classes=(1, 1), shares=(0.75, 0.25))  # a class that no pixel has
    assert alone.weights(None).tolist() == [0.5, 0.5]


# ---------------------------------------------------------------------------------------------- numbers

def test_radii_by_counting():
    random, around = np.random.default_rng(0), gradients.rings_around(9)
    squares = random.random((19, 19)) ** 8
    energy = np.bincount(around.ravel(), squares.ravel())
    for share in (0.5, 0.9, 0.95):
        radius = numbers.radii(energy, share)
        steps = np.arange(-9, 10)
        inside = [squares[np.hypot.outer(steps, steps) <= r + 1e-9].sum() for r in (radius - 0.25, radius)]
        assert inside[0] < share * squares.sum() <= inside[1] * (1 + 1e-12)
    assert np.isnan(numbers.radii(np.zeros(5), 0.5))


def test_the_fit_finds_a_gaussian_and_says_how_far_others_are_from_one():
    steps = np.arange(-30, 31)
    distance = np.hypot.outer(steps, steps)
    height, sigma, error, misfit = numbers.fit_gaussian(7 * np.exp(-distance**2 / (2 * 4.5**2)))
    assert (height, sigma) == pytest.approx((7, 4.5)) and error < 1e-6 and misfit < 1e-6
    noise = np.random.default_rng(0).normal(0, 0.01, distance.shape)
    _, sigma, error, misfit = numbers.fit_gaussian(np.exp(-distance**2 / (2 * 4.5**2)) + noise)
    assert abs(sigma - 4.5) < 4 * error < 0.1
    spike = np.exp(-distance)
    _, sigma, _, misfit = numbers.fit_gaussian(spike)
    best = min(np.linalg.norm(spike - a * np.exp(-distance**2 / (2 * sigma**2))) for a in np.linspace(0.1, 1, 1000))
    assert misfit == pytest.approx(best / np.linalg.norm(spike), rel=1e-4) and misfit > 0.1
    assert all(map(math.isnan, numbers.fit_gaussian(np.zeros((5, 5)))))
    with warnings.catch_warnings(action="error"):
        assert not numbers.fit_gaussian(np.eye(9)[4] * np.eye(9)[4][:, None])[1] > 0.7  # one pixel: tiny or none


def test_the_extent_is_where_the_map_is_not_zero():
    strength = np.zeros((11, 11))
    strength[2, 6] = strength[5, 9] = 1e-300
    assert numbers.extent(strength) == (-3, 0, 1, 4) and numbers.extent(np.zeros((3, 3))) is None


# ---------------------------------------------------------------------------------------------- the report's way

def test_the_reports_172_84_and_116():
    rows = receptive_field.published_procedure(receptive_field.architectures([], None, []), []).splitlines()[1:5]
    found = [[int(number) for number in row.replace("or", " ").split()[-(6 if " or " in row else 5):]] for row in rows]
    assert found == [[172, 173, 173, 188, 188, 204], [116, 117, 117, 124, 124, 132], [84, 85, 85, 92, 92, 100],
                     [56, 57, 57, 60, 60]]


def test_a_dead_bottleneck_is_found_by_the_reports_procedure():
    torch.manual_seed(0)
    model = UNet((4, 8, 8, 8, 8), dropout=0)
    model.up[-1].weight.data.zero_()
    text = published.describe_published({"dice": model})
    assert "116" in text.splitlines()[1].split()
    assert "117 pixels are not 0, 173 were expected; just what the skip of level 4 gives" in text
    model.up[0].weight.data.zero_()
    model.head.weight.data.zero_()
    assert published.as_published(model)[0] == 0


# ---------------------------------------------------------------------------------------------- on tiles

@pytest.fixture
def command(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["receptive_field.py", *map(str, arguments)])
        receptive_field.main()
    return call


def entry_of(run):
    candidate = candidates.candidate_of_run(run, "best", [], flips=False, precision="float32")
    return candidate, test_set.open_test_set([candidate], "all")


def test_pixels_lie_where_they_should(trained):
    candidate, test_set = entry_of(trained)
    pixels = sampling.draw_pixels(candidate, test_set, 12)
    cut, store = smallest_cut(2), test_set.store
    assert np.bincount(pixels.classes).tolist() == [12, 12, 12]
    for tile, corner, place, k in zip(pixels.tiles, pixels.corners, pixels.places, pixels.classes, strict=True):
        assert (corner >= 0).all() and (corner + cut.size <= store.shape[1:3]).all()
        assert store[(test_set.rows[tile], *(corner + place), 3)] == k
    assert len(set(pixels.tiles)) == len(test_set.tiles)
    for k in range(3):  # the four pairs of alignments, three times each
        _, counts = np.unique(pixels.places[pixels.classes == k] - cut.origin, axis=0, return_counts=True)
        assert counts.tolist() == [3, 3, 3, 3]
    shares = np.bincount(store[test_set.rows][..., 3].ravel()) / store[test_set.rows][..., 3].size
    assert np.allclose(pixels.shares, shares)
    again = sampling.draw_pixels(candidate, test_set, 12)
    for levels in (1, 3, 5):
        block = 2 ** (levels - 1)
        drawn = sampling._alignments(np.random.default_rng(1), 2 * block**2, levels)
        assert all(sorted(drawn[i:i + block, axis]) == list(range(block)) for i in range(0, len(drawn), block)
                   for axis in (0, 1)) and len(np.unique(drawn[:block**2], axis=0)) == block**2
    assert (again.corners == pixels.corners).all() and (again.tiles == pixels.tiles).all()


def test_a_class_that_is_nowhere_has_no_pixels(trained):
    candidate, test_set = entry_of(trained)
    store = np.array(test_set.store)
    store[..., 3] = np.minimum(store[..., 3], 1)
    store[0, 0, 0, 3] = 2  # in a corner no field fits around it
    changed = SimpleNamespace(store=store, rows=test_set.rows, config=test_set.config)
    pixels = sampling.draw_pixels(candidate, changed, 5)
    assert np.bincount(pixels.classes, minlength=3).tolist() == [5, 5, 0] and pixels.shares[2] > 0
    store[0, 8, 8, 3] = 2  # one of the four alignments reaches it
    pixels = sampling.draw_pixels(candidate, changed, 8)
    assert pixels.places[pixels.classes == 2].tolist() == [[8, 8], [8, 8]]


def test_inputs_are_the_normalised_cuts(trained):
    candidate, test_set = entry_of(trained)
    pixels = sampling.draw_pixels(candidate, test_set, 4)
    batch = sampling.tile_inputs(candidate, test_set, pixels)(3, 9)
    for i in range(3, 9):
        top, left = pixels.corners[i]
        cut = test_set.store[test_set.rows[pixels.tiles[i]], top:top + 18, left:left + 18, :3] / 255
        expected = (cut - candidate.statistics.mean) / candidate.statistics.std
        assert np.allclose(batch[i - 3].movedim(0, -1), expected, atol=1e-5)
    device = torch.device("cpu")
    noise = sampling.noise_inputs(2, device, 0)
    assert torch.equal(noise(0, 4)[2], noise(2, 3)[0]) and not torch.equal(noise(0, 2)[0], noise(0, 2)[1])
    assert abs(noise(0, 32).mean()) < 0.02 and abs(noise(0, 32).std() - 1) < 0.02
    assert sampling.zero_inputs(2, device)(0, 3).eq(0).all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_untrained_network_is_the_one_that_training_began_with(tmp_path, tiny, monkeypatch, dropout):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "PIXELS_AT_ONCE", 4 * 18**2)  # three batches
    train.start(apply_overrides(tiny, ["train.epochs=1", f"model.dropout={dropout}"]))
    candidate, test_set = entry_of(tmp_path / "runs/tiny")
    pixels = sampling.draw_pixels(candidate, test_set, 4)
    inputs = sampling.tile_inputs(candidate, test_set, pixels)
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


@pytest.mark.parametrize("levels", [1, 2, 4, 5])
@pytest.mark.parametrize(("length", "crop"), [(500, 256), (224, 192), (331, 64), (192, 192), (200, 192)])
def test_the_crop_that_is_predicted_alone_is_central_and_keeps_the_alignment(levels, length, crop):
    start, block = borders._centred(levels, length, crop), multiple(levels)
    assert (start + (-length % block) // 2) % block == 0  # of the canvas, which begins before the tile
    assert 0 <= (length - crop) / 2 - start < block + 1


def test_borders_are_counted_pixel_by_pixel(trained):
    candidate, test_set = entry_of(trained)
    border = borders.measure_border(candidate, test_set)
    store, levels = test_set.store, 2
    height, width = store.shape[1:3]
    assert border.tiles == list(range(len(test_set.tiles))) and border.crop == 16
    for number, tile in enumerate(border.tiles[:3]):
        image = torch.from_numpy(np.array(store[test_set.rows[tile]][..., :3]))
        target, labels = store[test_set.rows[tile]][..., 3], candidate.predictor.labels(image)
        confusion, distances, moved = np.zeros((2, 3, 3), int), np.zeros((8, 2), int), np.zeros((8, 3), int)
        alone = candidate.predictor.labels(image[16:32, 12:28])
        for y in range(height):
            for x in range(width):
                fields = [geometry.receptive_field(levels, p) for p in (y, x)]
                inside = all(a >= 0 and b < n for (a, b), n in zip(fields, (height, width), strict=True))
                confusion[int(inside), target[y, x], labels[y, x]] += 1
                distance = min(y, x, height - 1 - y, width - 1 - x)
                band = max(i for i, start in enumerate(borders.DISTANCES) if start <= distance)
                distances[band] += [labels[y, x] == target[y, x], 1]
                if 16 <= y < 32 and 12 <= x < 28:
                    band = 1 if min(y - 16, x - 12, 31 - y, 27 - x) >= 4 else 0
                    moved[band] += [1, alone[y - 16, x - 12] == target[y, x], labels[y, x] == target[y, x]]
        assert (border.confusion[number] == confusion).all()
        assert (border.by_distance[number] == distances).all()
        assert (border.moved[number] == moved).all() and moved.sum(0)[0] == 256


def kill(run, change):
    """Change the weights of a run's best.pt."""
    file = run / "checkpoints/best.pt"
    contents = torch.load(file, weights_only=True)
    change(contents["model"])
    torch.save(contents, file)


def test_a_run_and_its_numbers(trained, command, capsys):
    command(trained, "--pixels", 6, "--format", "png", "svg", "pdf", "--precision", "float32")
    folder = trained / "receptive_field-float32-pixels-6"
    drawn = {f"{name}.{kind}" for name in ("fields", "profiles", "inputs", "paths", "border")
             for kind in ("png", "svg", "pdf")}
    assert {path.name for path in folder.iterdir()} - {".written.json"} == drawn | {"fields.csv", "paths.csv",
                                                                                    "fields.json"}
    rows = list(csv.DictReader((folder / "fields.csv").open()))
    kinds = {(row["weights"], row["input"]) for row in rows}
    assert kinds == {("trained", "tiles"), ("trained", "zeros"), ("trained", "noise"), ("untrained", "tiles")}
    on_tiles = {(row["inside"], row["logit"]): row["pixels"] for row in rows
                if (row["weights"], row["input"]) == ("trained", "tiles")}
    assert len(on_tiles) == 16 and on_tiles["tumour", "all"] == "6" and on_tiles["all", "tissue"] == "18"
    for row in rows:
        assert float(row["r50"]) <= float(row["r90"]) <= float(row["r95"]) <= 13
        assert float(row["area_share"]) == pytest.approx(math.pi * float(row["r95"]) ** 2 / 18**2, rel=1e-4)
        assert -9 <= int(row["first_row"]) <= 0 <= int(row["last_row"]) <= 9
    contents = json.loads((folder / "fields.json").read_text())["runs"][0]
    assert contents["theory"]["padded_share"]["256"] == pytest.approx(geometry.padded_share(2, 256, 256), rel=1e-5)
    paths = list(csv.DictReader((folder / "paths.csv").open()))
    shares = [float(row["gradient_x_activation"]) for row in paths if row["inside"] == "all"]
    assert sum(shares) == pytest.approx(1, abs=1e-4) and {row["dead"] for row in paths} == {"False"}
    out = capsys.readouterr().out
    assert "skip of level 1" in out and "wrote" in out and "dead" not in out
    command(trained, "--pixels", 6, "--precision", "float32")  # replaces its own
    assert not (folder / "fields.svg").exists()


def test_what_is_measured_otherwise_has_a_folder_of_its_own(trained):
    candidate, _ = entry_of(trained)
    parser = receptive_field.parser_of_arguments()
    folders = [receptive_field.default_folder([candidate], parser.parse_args(arguments)).name for arguments in (
        [], ["--split", "all"], ["--pixels", "64"], ["--pixels", "64", "--precision", "float32"])]
    assert folders == ["receptive_field", "receptive_field-all", "receptive_field-pixels-64",
                       "receptive_field-float32-pixels-64"]


def test_the_rows_are_of_their_pixels_and_their_logits(trained):
    candidate, _ = entry_of(trained)
    run, = receptive_field.measured([candidate], "all", 5)
    field = run.fields[report.TRAINED]
    rows = {(row["inside"], row["logit"]): row for row in numbers.field_rows(run) if row["input"] == "tiles"
            and row["weights"] == "trained"}
    for inside, name in enumerate(run.classes):
        for logit, other in enumerate(run.classes):
            energy = sum(field.energy[i, logit] for i in range(len(field.pixels)) if field.pixels.classes[i] == inside)
            for column, share in numbers.ENERGIES.items():
                assert rows[name, other][column] == numbers.radii(energy, share)
                even = sum(field.energy[i, logit] / field.energy[i, logit].sum()
                           for i in np.flatnonzero(field.pixels.classes == inside))
                assert rows[name, other][f"{column}_even"] == numbers.radii(even, share)
            each = [field.energy[i, logit].sum() for i in np.flatnonzero(field.pixels.classes == inside)]
            assert rows[name, other]["effective_pixels"] == pytest.approx(sum(each) ** 2 / sum(e * e for e in each))
            fit = numbers.fit_gaussian(field.maps[inside, logit])
            assert (rows[name, other]["sigma"], rows[name, other]["misfit"]) == fit[1::2]
    assert len({row["sigma"] for row in rows.values()}) == 16
    paths = {(row["inside"], row["path"]): row for row in numbers.path_rows(run)}
    for inside, name in enumerate(run.classes):
        chosen = field.pixels.classes == inside
        whole, left = field.energy[chosen].sum(), field.without[chosen].sum((0, 1))
        alone, important = field.path_energy[chosen].sum((0, 1, 3)), field.importance[chosen].sum((0, 1))
        for path, label in enumerate(theory.path_names(2)):
            row = paths[name, label]
            assert row["energy_without"] == pytest.approx(left[path] / whole)
            assert row["energy_alone"] == pytest.approx(alone[path] / whole)
            assert row["gradient_x_activation"] == pytest.approx(important[path] / important.sum())


def test_intervals_hold_all_groups_and_need_enough_of_them(trained, command):
    """Of split all: six slides; the test split has one."""
    command(trained, "--pixels", 12, "--split", "all", "--precision", "float32")
    rows = list(csv.DictReader((trained / "receptive_field-all-float32-pixels-12/fields.csv").open()))
    row = next(row for row in rows if row["input"] == "tiles" and row["inside"] == "all")
    assert row["groups"] == "6" and float(row["r95_low"]) <= float(row["r95"]) <= float(row["r95_high"])
    assert next(row for row in rows if row["input"] == "zeros")["r95_low"] == ""
    command(trained, "--pixels", 12, "--precision", "float32")
    few = list(csv.DictReader((trained / "receptive_field-float32-pixels-12/fields.csv").open()))
    assert few[0]["groups"] == "1" and few[0]["r95_low"] == ""


def test_a_dead_level_is_said_clearly(trained, command, capsys):
    kill(trained, lambda weights: weights["up.0.weight"].zero_())
    command(trained, "--pixels", 6, "--precision", "float32")
    assert ("tiny: the bottleneck is dead, no gradient passes it. What is left is the field of the skip of level 1, "
            "9 px in the place of 18." in capsys.readouterr().out)
    folder = trained / "receptive_field-float32-pixels-6"
    rows = [row for row in csv.DictReader((folder / "fields.csv").open()) if row["weights"] == "trained"]
    assert all((row["first_row"], row["last_column"]) == ("-4", "4") for row in rows)
    dead = {row["path"]: row["dead"] for row in csv.DictReader((folder / "paths.csv").open())}
    assert dead == {"skip of level 1": "False", "bottleneck": "True"}


def test_a_dead_skip_is_said_and_the_field_stays(trained, command, capsys):
    kill(trained, lambda weights: weights["decoder.0.0.weight"][:, :4].zero_())
    command(trained, "--pixels", 6)
    out = capsys.readouterr().out
    assert "tiny: the skip of level 1 is dead, no gradient passes it.\n" in out and "What is left" not in out


def test_a_faint_level_is_as_good_as_dead(trained, command, capsys):
    kill(trained, lambda weights: weights["up.0.weight"].mul_(1e-9))
    command(trained, "--pixels", 6, "--precision", "float32")
    out = capsys.readouterr().out
    assert "the bottleneck is as good as dead, only " in out and "What is left" not in out


def test_results_of_other_tools_are_not_replaced(trained, command, tmp_path):
    from common.result_folders import replacing_folder
    with replacing_folder(tmp_path / "evaluation") as partial:
        (partial / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="holds results of something else"):
        command(trained, "--out", tmp_path / "evaluation")
    assert (tmp_path / "evaluation/scores.json").exists()


def test_runs_of_other_shapes_side_by_side(trained, tiny, command, capsys):
    train.start(apply_overrides(tiny, ["train.epochs=1", "name=deep", "model.widths=[4,4,4]"]))
    with pytest.raises(UserError, match="deep: the tiles of .* are 48 x 40 pixels, too small to hold the field of 3 "
                                        "levels: give tiles of at least 52 x 52"):
        command(trained, trained.parent / "deep")
    assert not (trained.parent / "receptive_field-tiny-deep").exists()
    train.start(apply_overrides(tiny, ["train.epochs=1", "name=flat", "model.widths=[4]"]))
    command(trained, trained.parent / "flat", "--pixels", 3)
    folder = trained.parent / "receptive_field-tiny-flat-pixels-3"
    found = json.loads((folder / "fields.json").read_text())["runs"]
    assert [run["theory"]["area"] for run in found] == [18**2, 5**2] and (folder / "fields.png").exists()
    assert "flat  " in capsys.readouterr().out
    command("--theory", trained, trained.parent / "flat")
    assert "2 levels" in (out := capsys.readouterr().out) and "1 level." in out
    command("--as-published", trained)
    assert "tiny, epoch 1" in capsys.readouterr().out


def test_what_cannot_be_measured_is_one_line(trained, command, tmp_path):
    for arguments, message in (
            ([], "no run given"), (["runs/nothing"], "no such checkpoint"),
            (["--theory", "runs/nothing"], "no such run"), ([trained, "--config", "x.yaml"], "--config has no effect"),
            ([trained, "--pixels", 0], "at least 1"),
            ([trained, "--theory", "--as-published"], "--as-published has no effect with --theory"),
            ([trained, "model.dropout=0.1"], "belongs to"),
            (["--theory", "model.widths=[4,8]"], "name one with --config"),
            (["--theory", "--pixels", 4], "--pixels has no effect with --theory"),
            (["--as-published", trained, "--out", tmp_path / "x"], "--out has no effect with --as-published"),
            ([trained, f"data.root={tmp_path / 'none'}"], "list of tiles is missing"),
            ([trained, trained], "would have the same name"), ([trained, "--out", tmp_path / "runs"], "would replace")):
        with pytest.raises(UserError, match=message):
            command(*arguments)
    listed = tmp_path / "tiles/tiles.csv"
    text = listed.read_text()
    listed.write_text(text.replace(",test", ",train"))
    with pytest.raises(UserError, match="no tile has split = test"):
        command(trained)
    listed.write_text(text)
    kill(trained, lambda weights: weights["head.bias"].fill_(math.nan))
    with pytest.raises(UserError, match="'head.bias' holds numbers that are not finite"):
        command(trained)


def test_a_model_that_answers_nothing_is_said_to(trained, command, capsys):
    kill(trained, lambda weights: weights["head.weight"].zero_())
    command(trained, "--pixels", 3)
    assert "tiny: no gradient reaches the input at all." in capsys.readouterr().out
