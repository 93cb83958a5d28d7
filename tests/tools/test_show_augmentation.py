"""tools/show_augmentation.py: the sheet shows what training sees of the named tile."""

import numpy as np
import pytest
from PIL import Image

from common.config_files import apply_overrides, to_yaml
from common.console import UserError
from tools.show_augmentation import describe, find_tile, forms_of


def test_the_forms_are_windows_of_the_tile_and_change_with_the_settings(tiny):
    tile = find_tile(tiny, "s3-9")
    assert tile.key == "s3-9"
    whole = np.array(Image.open(f"{tiny.data.root}/{tile.image}"))
    plain = forms_of(tile, apply_overrides(tiny, ["augment.flips=false"]), 6)
    assert plain.shape == (6, 16, 16, 4)
    windows = np.lib.stride_tricks.sliding_window_view(whole, (16, 16), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    assert all((windows == form[..., :3]).all((2, 3, 4)).sum() == 1 for form in plain)
    noisy = forms_of(tile, apply_overrides(tiny, ["augment.flips=false", "augment.noise=30"]), 6)
    assert (noisy[0] == plain[0]).all() and (noisy[..., 3] == plain[..., 3]).all()
    assert all((a != b).any() for a, b in zip(noisy[1:], plain[1:], strict=True))
    with pytest.raises(UserError, match="no kept tile has the key 'nothing'"):
        find_tile(tiny, "nothing")


def test_the_sheet_is_written_and_named(workplace, tiny, here):
    (workplace / "tiny.yaml").write_text(to_yaml(tiny))
    out = here("tools.show_augmentation", "--config", "tiny.yaml", "augment.rotate=45", "--out", "x.png", cwd=workplace)
    assert out.returncode == 0 and "wrote x.png: tile s" in out.stdout, out.stderr
    assert Image.open("x.png").width > 1000
    rotated = apply_overrides(tiny, ["augment.rotate=45"])
    assert describe(rotated) == "flips, rotate 45"
    out = here("tools.show_augmentation", "--config", "tiny.yaml", "--out", "x.jpg", cwd=workplace)
    assert out.returncode == 2 and "ends in .png" in out.stderr
