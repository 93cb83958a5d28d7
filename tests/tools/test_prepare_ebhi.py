"""tools/prepare_ebhi.py: labels become masks of three classes, keys hold the patient, the folder appears whole."""

import numpy as np
import pytest
from PIL import Image

from common.console import UserError
from tools.prepare_ebhi import find_sources, key_of

VALUES = {"Normal": 51, "Polyp": 51, "Low-grade IN": 51, "Serrated adenoma": 51, "High-grade IN": 77,
          "Adenocarcinoma": 77}  # of glands in the masks: non-malignant or malignant (Shi et al. 2023)
LABEL = np.array([[0, 100, 127], [128, 200, 255]], np.uint8)  # antialiased


def publish(root, name, stem, channels=1):
    """Write an image and its label as EBHI-Seg is published; return the path of the label."""
    image = np.random.default_rng(len(stem)).integers(0, 256, (*LABEL.shape, 3), np.uint8)
    label = LABEL if channels == 1 else np.stack([LABEL] * 3, -1)
    for folder, pixels in (("image", image), ("label", label)):
        path = root / name / folder / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return path


def test_published_pairs_become_tiles(tmp_path, here):
    for channels, (name, stem) in zip((1, 3, 1, 3, 1, 3), zip(VALUES, "abcdef", strict=True), strict=True):
        publish(tmp_path / "source", name, f"gt{stem}-1", channels)
    out = here("tools.prepare_ebhi", "source", "data/ebhi", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[1].split() == ["6", "6", "50.0%", "33.3%", "16.7%"]
    assert "next:  python data_filter.py --config configs/ebhi.yaml" in out.stdout
    root = tmp_path / "data/ebhi"
    for (name, value), letter in zip(VALUES.items(), "ABCDEF", strict=True):
        key = f"GT{letter}-1_{name.lower().replace(' ', '-')}"
        assert np.asarray(Image.open(root / f"masks/mask#{key}.png")).tolist() == [[26] * 3, [value] * 3]
        source = tmp_path / f"source/{name}/image/gt{letter.lower()}-1.png"
        assert (np.asarray(Image.open(root / f"frames/frame#{key}.png")) == np.asarray(Image.open(source))).all()
    assert len(list(root.rglob("*.png"))) == 12 and [path.name for path in root.parent.iterdir()] == ["ebhi"]
    out = here("tools.prepare_ebhi", "source", "data/ebhi", cwd=tmp_path)
    assert out.returncode == 2 and "data/ebhi exists" in out.stderr


def test_keys_hold_the_patient_in_capitals(tmp_path):
    for name, stem in (("Normal", "gt2012-1-400-002"), ("High-grade IN", "GT2012-1-400-002")):
        publish(tmp_path, name, stem)
    keys = [key_of(name, image) for name, image, _ in find_sources(tmp_path)]
    assert sorted(keys) == ["GT2012-1-400-002_high-grade-in", "GT2012-1-400-002_normal"]


def test_a_file_without_its_partner_is_named(tmp_path):
    publish(tmp_path, "Polyp", "GT1-1").unlink()
    with pytest.raises(UserError, match="Polyp.*'GT1-1'.*label"):
        find_sources(tmp_path)


def test_a_label_of_another_size_is_named_and_the_folder_does_not_appear(tmp_path, here):
    label = publish(tmp_path / "source", "Polyp", "GT1-1")
    Image.fromarray(LABEL[:1]).save(label)
    out = here("tools.prepare_ebhi", "source", "data/ebhi", cwd=tmp_path)
    assert out.returncode == 2 and "GT1-1.png" in out.stderr and not (tmp_path / "data/ebhi").exists()
