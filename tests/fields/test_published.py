"""fields/published.py: the report's procedure gives the report's numbers."""

import torch

import receptive_field
from fields import published
from unet import UNet


def test_the_procedure_gives_172_84_and_116():
    rows = receptive_field.published_procedure(receptive_field.architectures([], None, []), []).splitlines()[1:5]
    found = [[int(number) for number in row.replace("or", " ").split()[-(6 if " or " in row else 5):]] for row in rows]
    assert found == [[172, 173, 173, 188, 188, 204], [116, 117, 117, 124, 124, 132], [84, 85, 85, 92, 92, 100],
                     [56, 57, 57, 60, 60]]


def test_a_dead_bottleneck_is_explained():
    torch.manual_seed(0)
    model = UNet((4, 8, 8, 8, 8), dropout=0)
    model.up[-1].weight.data.zero_()
    text = published.describe_published({"dice": model})
    assert "116" in text.splitlines()[1].split()
    remark = text.splitlines()[-1]
    assert all(part in remark for part in ("dice", "117", "173", "skip of level 4"))
    model.up[0].weight.data.zero_()
    model.head.weight.data.zero_()
    assert published.as_published(model)[0] == 0
