import numpy as np
import pytest
from PIL import Image

from common.console import UserError
from tools.prepare_ebhi import GLAND, find_sources, key_of, read_label


def publish(root, name, stem, channels=1):
    label = np.array([[0, 100, 127], [128, 200, 255]], np.uint8)
    for kind, pixels in (("image", np.zeros((2, 3, 3), np.uint8)),
                         ("label", label if channels == 1 else np.stack([label] * 3, -1))):
        path = root / name / kind / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root / name / "label" / f"{stem}.png"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "gland"), GLAND.items())
def test_antialiased_labels_become_three_classes(tmp_path, name, gland, channels):
    label = publish(tmp_path, name, "GT1-1", channels)
    assert read_label(label, GLAND[name]).tolist() == [[0, 0, 0], [gland] * 3]


def test_keys_hold_the_patient_whatever_the_case(tmp_path):
    for name, stem in (("Normal", "gt2012-1-400-002"), ("High-grade IN", "GT2012-1-400-002")):
        publish(tmp_path, name, stem)
    keys = [key_of(name, image) for name, image, _ in find_sources(tmp_path)]
    assert sorted(keys) == ["GT2012-1-400-002_high-grade-in", "GT2012-1-400-002_normal"]


def test_a_file_without_its_partner_is_named(tmp_path):
    publish(tmp_path, "Polyp", "GT1-1").unlink()
    with pytest.raises(UserError, match="'GT1-1' has no label"):
        find_sources(tmp_path)
