"""unet.py: parameter counts, sizes, and the forward pass against the figure of the report."""

import pytest
import torch
import torch.nn.functional as F

from unet import UNet


@pytest.mark.parametrize(("widths", "parameters"), [((32, 64, 128, 256, 512), 7_766_051),
                                                    ((32, 64, 128, 256), 1_928_483)])
def test_parameter_counts_of_the_reports_networks(widths, parameters):
    assert sum(p.numel() for p in UNet(widths=widths).parameters()) == parameters


def test_parameter_count_by_hand():
    """Two levels of widths a, b, counted from the figure of the U: an oracle for any change of structure."""
    a, b, k = 5, 7, 4
    convolutions = sum(9 * i * o + o for i, o in [(3, a), (a, a), (a, b), (b, b), (2 * a, a), (a, a)])
    norms = sum(2 * o for o in (a, a, b, b, a, a))
    assert sum(p.numel() for p in UNet((a, b), classes=k).parameters()) == (
        convolutions + norms + (4 * b * a + a) + (a * k + k))


@pytest.mark.parametrize("widths", [(4,), (4, 8), (4, 8, 16), (2, 3, 4, 5, 6, 7)])
def test_logits_have_the_size_of_the_image_at_any_depth(widths):
    model = UNet(widths, classes=5).eval()
    size = (2 * model.multiple, 3 * model.multiple)
    assert model(torch.randn(2, 3, *size)).shape == (2, 5, *size)


def test_a_size_that_the_levels_cannot_halve_names_the_multiple():
    with pytest.raises(ValueError, match="multiples of 16.*500 x 512"):
        UNet((2, 2, 2, 2, 2))(torch.zeros(1, 3, 500, 512))


def test_each_convolution_has_its_own_batch_norm_and_dropout_and_the_head_has_none():
    model = UNet((4, 8), dropout=0.5)
    layers = [type(layer).__name__ for layer in model.encoder[0]]
    assert layers == ["Conv2d", "Dropout2d", "BatchNorm2d", "LeakyReLU"] * 2
    assert len(set(map(id, model.encoder[0]))) == 8
    assert isinstance(model.head, torch.nn.Conv2d) and model.head.kernel_size == (1, 1)
    assert sum(isinstance(m, torch.nn.Dropout2d) for m in model.modules()) == 6  # two in each block, also in the first
    assert not any(isinstance(m, torch.nn.Dropout2d) for m in UNet((4, 8), dropout=0).modules())


def test_batch_norm_statistics_are_those_of_the_layer():
    """With shared norms, as in the original code, evaluation and training outputs differ even after long averaging."""
    torch.manual_seed(0)
    model, x = UNet((8, 16), dropout=0).train(), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for _ in range(200):
            trained = model(x)
        assert torch.allclose(model.eval()(x), trained, atol=0.02)


def test_forward_equals_the_figure_written_out():
    """Three levels from the state dict alone: max-pool, and the skip in front of the upsampled features."""
    torch.manual_seed(0)
    model, x = UNet((3, 4, 5), dropout=0.5).eval(), torch.randn(2, 3, 16, 24)
    w = {name: torch.randn_like(value).abs() if "running_var" in name else value
         for name, value in model.state_dict().items()}
    model.load_state_dict(w)

    def block(name, x):
        for i in (0, 4):
            x = F.conv2d(x, w[f"{name}.{i}.weight"], w[f"{name}.{i}.bias"], padding=1)
            norm = [w[f"{name}.{i + 2}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
            x = F.leaky_relu(F.batch_norm(x, *norm), 0.01)
        return x

    def up(level, x):
        return F.conv_transpose2d(x, w[f"up.{level}.weight"], w[f"up.{level}.bias"], stride=2)

    first = block("encoder.0", x)
    second = block("encoder.1", F.max_pool2d(first, 2))
    third = block("encoder.2", F.max_pool2d(second, 2))
    second = block("decoder.1", torch.cat([second, up(1, third)], 1))
    first = block("decoder.0", torch.cat([first, up(0, second)], 1))
    expected = F.conv2d(first, w["head.weight"], w["head.bias"])
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    model = UNet((4, 8, 16))
    model(torch.randn(2, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
