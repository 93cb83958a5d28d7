"""tools/move_masks.py: copies of tiles with masks that lie off by known moves."""

import csv

import numpy as np
import pytest
from helpers import GREYS, scene, script
from PIL import Image

from common.masks import IGNORE
from filtering.registration import Move
from tools.move_masks import largest_angle


def make_tiles(root, pattern, shape):
    for i in range(8):
        labels, image = scene(i, max(shape))
        for kind, pixels in (("frame", image), ("mask", GREYS[labels])):
            path = root / pattern.format(kind=kind, slide=f"s{i // 4}", key=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[:shape[0], :shape[1]]).save(path)


@pytest.mark.parametrize(("pattern", "settings", "shape"), [
    ("{kind}s/{kind}#{slide}-{key}.png", ["data.group=^(s\\d)"], (240, 240)),
    ("{slide}/{kind}/{key}.png", ["data.images={group}/frame/{key}.png", "data.masks={group}/mask/{key}.png"],
     (120, 360)),
])
def test_moving_the_masks_back_gives_the_truth(pattern, settings, shape, tmp_path):
    make_tiles(tmp_path / "tiles", pattern, shape)
    (tmp_path / "any.yaml").write_text("data:\n  root: tiles\n")
    out = script("tools.move_masks", "--config", "any.yaml", "moved", *settings, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    rows = list(csv.DictReader((tmp_path / "moved/truth.csv").open(newline="")))
    assert [row["defect"] for row in rows] == ["none", "rotated", "none", "none", "none", "shifted", "none", "none"]
    inner = tuple(length - 2 * (length // 6) for length in shape)
    for row in rows:
        name = row["key"] if "{group}" not in settings[0] else f"{row['slide']}/mask#{row['key'].partition('-')[2]}"
        path = f"masks/{name}.png" if "/" in name else f"masks/mask#{name}.png"
        given, clean = (np.searchsorted(GREYS, np.array(Image.open(tmp_path / "moved" / where))).astype(np.uint8)
                        for where in (path, f"truth/mask#{row['key']}.png"))
        assert clean.shape == given.shape == inner
        if row["defect"] == "none":
            assert (given == clean).all() and float(row["wrong"]) == 0
            continue
        back = Move(float(row["dx"]), float(row["dy"]), float(row["angle"])).undo(given)
        inside = back != IGNORE
        assert inside.mean() > 0.5 and (back == clean)[inside].mean() > 0.97
        assert float(row["wrong"]) == pytest.approx((given != clean).mean(), abs=1e-6) and (given != clean).any()
    # the command that it prints works
    words = out.stdout.partition("next:  python ")[2].replace("'", "").split()
    out = script(*words, "filter.max_shift=15", "--workers", "1", cwd=tmp_path)
    assert out.returncode == 0 and (tmp_path / "moved/tiles.csv").exists(), out.stderr


def test_nothing_is_left_of_tiles_that_cannot_be_moved(tmp_path):
    make_tiles(tmp_path / "tiles", "{kind}s/{kind}#{slide}-{key}.png", (60, 60))
    (tmp_path / "any.yaml").write_text("data:\n  root: tiles\n  ignore: 77\n  classes: [a, b]\n"
                                       "  mask_values: [26, 51]\n")
    out = script("tools.move_masks", "--config", "any.yaml", "moved", cwd=tmp_path)
    assert out.returncode == 2 and "some pixels have no class" in out.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["any.yaml", "tiles"]


@pytest.mark.parametrize("shape", [(200, 200), (100, 400), (400, 100), (30, 600)])
def test_no_corner_is_turned_out_of_the_margin(shape):
    margin = shape[0] // 4, shape[1] // 4
    angle = largest_angle(shape, margin)
    corners = np.array([(y, x) for y in (0, shape[0] - 1) for x in (0, shape[1] - 1)], float)
    def leaves(angle):
        moved = Move(clockwise=angle).of_points(corners, shape)
        return ((moved < -np.array(margin) - 1e-6) | (moved > np.array(shape) - 1 + margin + 1e-6)).any()
    assert 0 < angle <= 25 and not leaves(angle) and not leaves(-angle)
    assert angle == 25 or leaves(angle + 0.2)
