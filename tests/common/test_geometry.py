"""common/geometry.py: the exact receptive field, against gradients of a real U-Net."""

import numpy as np
import pytest
import torch

from common import geometry
from common.geometry import multiple, smallest_cut
from unet import UNet


def structural(levels: int) -> UNet:
    """A U-Net with positive weights and average pooling: every pixel of the field has a positive gradient."""
    model = UNet([1] * levels, dropout=0, classes=1, in_channels=1).double().eval()
    model.pool = torch.nn.AvgPool2d(2)
    for parameter in model.parameters():
        parameter.data.abs_().add_(0.1)
    return model


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_fields_equal_those_of_gradients_at_every_alignment_and_path(levels):
    """Rows and columns have different alignments, so that swapped axes would fail."""
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


def test_sizes_of_the_reports_networks():
    assert [geometry.size(5, p) for p in range(16)] == [188 if p in (0, 1, 14, 15) else 204 for p in range(16)]
    assert [geometry.size(4, p) for p in range(8)] == [92 if p in (0, 1, 6, 7) else 100 for p in range(8)]
    assert geometry.area(5) == 200**2


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_box_reach_and_alignments_follow_from_the_fields(levels):
    fields = {p: geometry.receptive_field(levels, p) for p in range(multiple(levels))}
    assert geometry.box(levels) == (min(first - p for p, (first, _) in fields.items()),
                                    max(last - p for p, (_, last) in fields.items()))
    assert geometry.reach(levels) == max(max(p - a, b - p) for p, (a, b) in fields.items())
    listed = {p: (first, last) for members, first, last in geometry.alignments(levels) for p in members}
    assert listed == fields


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_fields_with_ties_equal_those_on_a_constant_input(levels):
    torch.manual_seed(0)
    model = UNet([2] * levels, dropout=0).double().eval()
    cut = smallest_cut(levels)
    for p in range(cut.origin, cut.origin + multiple(levels)):
        image = torch.zeros(1, 3, cut.size, cut.size, dtype=torch.double).requires_grad_()
        gradient, = torch.autograd.grad(model(image)[0, 0, p, p], image)
        seen = gradient[0].any(0).any(0).nonzero().flatten()
        assert (seen.min().item(), seen.max().item()) == geometry.receptive_field(levels, p, ties=True)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_no_smaller_input_contains_all_fields(levels):
    cut, block = smallest_cut(levels), multiple(levels)
    fields = [geometry.receptive_field(levels, cut.origin + r) for r in range(block)]
    first, last = min(a for a, _ in fields), max(b for _, b in fields)
    assert 0 <= first < block and cut.size - block <= last < cut.size and cut.size % block == 0


@pytest.mark.parametrize(("levels", "height", "width"), [(2, 18, 31), (3, 60, 53), (3, 52, 41), (4, 120, 107)])
def test_padded_pixels_are_those_that_padding_changes(levels, height, width):
    """On ones, a pixel that sees padding differs from the pixel of its alignment in the middle of a larger canvas."""
    torch.manual_seed(0)
    model, block = structural(levels), multiple(levels)

    def ones(height, width):
        return model(torch.ones(1, 1, height, width, dtype=torch.double))[0, 0].detach()

    top, left = ((-n % block) // 2 for n in (height, width))
    logits = ones(*(-(-n // block) * block for n in (height, width)))[top:top + height, left:left + width]
    cut = smallest_cut(levels)
    inner = ones(cut.size, cut.size)[cut.origin:cut.origin + block, cut.origin:cut.origin + block]
    rows, columns = ((torch.arange(n) + before) % block for n, before in ((height, top), (width, left)))
    padded = (logits - inner[rows][:, columns]).abs() > 1e-13 * logits.abs()
    expected = ~np.outer(*(geometry.unpadded(levels, n) for n in (height, width)))
    assert (padded.numpy() == expected).all() and expected.any()
    assert geometry.padded_share(levels, height, width) == pytest.approx(expected.mean())
    within = [[before <= a and b < before + n for p in range(n)
               for a, b in [geometry.receptive_field(levels, p + before)]]
              for n, before in ((height, top), (width, left))]
    assert geometry.padded_share(levels, height, width, canvas=False) == pytest.approx(1 - np.outer(*within).mean())


def test_shares_of_padded_pixels():
    shares = [round(geometry.padded_share(5, n, n), 3) for n in (256, 512)]
    assert shares == [0.929, 0.6]
    assert geometry.padded_share(5, 500, 500) < geometry.padded_share(5, 500, 500, canvas=False)
