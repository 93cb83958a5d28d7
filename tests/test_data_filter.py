import csv
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import GREYS, REPOSITORY, write_pairs
from PIL import Image

import data_filter
from common.config import Config, Data, Filter
from common.console import UserError
from common.result_folders import names_in
from dataset import SPLITS, Tile, read_list, write_tiles
from filtering import pipeline
from filtering.pipeline import FilterResult, filter_tiles, mark_copies
from filtering.registration import Move
from filtering.report import in_words, nearness, remarks, sheets, verdicts


def planted(root):
    """Tiles of which the verdict is plain: good, empty mask, just above and below 1 %, tissue on glass."""
    size = 200
    for folder in ("frames", "masks"):
        (root / folder).mkdir(parents=True)
    dark, glass = np.full((size, size, 3), 120, np.uint8), np.full((size, size, 3), 242, np.uint8)
    tissue, nothing = np.ones((size, size), int), np.zeros((size, size), int)
    below, above, half = nothing.copy(), nothing.copy(), glass.copy()
    below.flat[:399], above.flat[:400] = 2, 2
    half[:100] = 120
    for key, image, mask in (("a-good", dark, tissue), ("a-empty", glass, nothing), ("b-below", dark, below),
                             ("b-above", dark, above), ("c-glass", half, tissue), ("c-good", dark, tissue)):
        Image.fromarray(image).save(root / f"frames/frame#{key}.png")
        Image.fromarray(GREYS[mask]).save(root / f"masks/mask#{key}.png")
    return Config(data=Data(root=str(root), group="^(.)", test_fraction=0.3))


def test_every_tile_stays_listed_with_its_numbers_and_verdict(tmp_path):
    config = planted(tmp_path)
    result = filter_tiles(config)
    found = {tile.key: tile for tile in result.tiles}
    assert {key for key, tile in found.items() if tile.split == "sparse"} == {"a-empty", "b-below"}
    assert {key for key, tile in found.items() if tile.split == "misregistered"} == {"c-glass"}
    assert sorted(found[key].split for key in ("a-good", "b-above", "c-good")) == ["test", "train", "train"]
    assert found["b-above"].foreground == pytest.approx(0.01) and found["b-below"].foreground < 0.01
    assert found["c-glass"].blank == pytest.approx(0.5, abs=0.05) and found["c-good"].blank == 0
    assert found["b-above"].unmarked == pytest.approx(0.99) and found["a-empty"].blank is None
    assert all(tile.proposed == tile.split for tile in result.tiles)
    assert result.pixels.sum(1).tolist() == [40_000] * 6 and (result.sizes == 200).all()
    text = verdicts(result, config.data.classes)
    assert "sparse" in text and text.splitlines()[-1].split()[:2] == ["all", "6"]


def test_groups_of_the_pattern_reach_the_list_and_are_not_cut(tmp_path):
    write_pairs(tmp_path, 20, slides=5)
    for seed in range(5):
        config = Config(seed=seed, data=Data(root=str(tmp_path), group=r"^(s\d+)", test_fraction=0.3))
        tiles = filter_tiles(config).tiles
        sides = [{tile.group for tile in tiles if tile.split == split} for split in ("train", "test")]
        assert sides[0] | sides[1] == {f"s{i}" for i in range(5)} and not sides[0] & sides[1]


def test_the_groups_of_the_test_set_can_be_named(tmp_path):
    write_pairs(tmp_path, 20, slides=5)
    data = Data(root=str(tmp_path), group=r"^(s\d+)", test_groups=("s3", "s1"))
    for seed in range(3):
        tiles = filter_tiles(Config(seed=seed, data=data)).tiles
        assert {tile.key for tile in tiles if tile.split == "test"} == {
            tile.key for tile in tiles if tile.group in ("s1", "s3")}
    with pytest.raises(UserError, match="no tile is of s9; the groups are s0, s1"):
        filter_tiles(Config(data=replace(data, test_groups=("s1", "s9"))))
    with pytest.raises(UserError, match="no tile is of s1; no tile has a group: set data.group"):
        filter_tiles(Config(data=replace(data, test_groups=("s1",), group="")))


@pytest.mark.parametrize(("move", "text"), [
    (Move(41, -64.2, -0.3), "41 px right, 64 px up"), (Move(-79, 10, 1), "79 px left, 10 px down, 1°"),
    (Move(0.2, 0, -21), "-21°"), (Move(0.3, 0.1), "less than 1 px")])
def test_how_a_mask_lies_off_is_said_without_zeros(move, text):
    assert in_words(move) == text


def test_thresholds_are_those_of_the_config(tmp_path):
    config = planted(tmp_path)
    tiles = filter_tiles(replace(config, filter=Filter(min_foreground=0.005, max_blank=None))).tiles
    assert [tile.key for tile in tiles if tile.split == "sparse"] == ["a-empty"]
    assert not [tile.key for tile in tiles if tile.split == "misregistered"]
    tiles = filter_tiles(replace(config, filter=Filter(max_unmarked=0.5))).tiles
    assert [tile.key for tile in tiles if tile.split == "unmarked"] == ["b-above"]


def test_the_sparse_rule_spares_decoding_the_image(tmp_path, monkeypatch):
    config = planted(tmp_path)
    read, original = [], pipeline.read_pair
    monkeypatch.setattr(pipeline, "read_pair", lambda pair, data: read.append(pair.image) or original(pair, data))
    filter_tiles(config)
    assert sorted(read) == [f"frames/frame#{key}.png" for key in ("a-good", "b-above", "c-glass", "c-good")]


def test_two_processes_find_what_one_finds(tmp_path):
    config = planted(tmp_path)
    ours, theirs = filter_tiles(config, workers=1), filter_tiles(config, workers=2)
    assert ours.tiles == theirs.tiles and ours.copies == theirs.copies
    assert (ours.pixels == theirs.pixels).all() and ours.codes == theirs.codes


# ---------------------------------------------------------------------------------------------- copies

LIST = [Tile(str(i), f"f{i}", f"m{i}") for i in range(4)]


def test_copies_are_found_by_content_and_dropped_where_asked(tmp_path):
    write_pairs(tmp_path, 12, slides=4)
    image = Image.open(tmp_path / "frames/frame#s0-0.png")
    image.save(tmp_path / "frames/frame#s3-7.png", compress_level=1)  # other bytes, same pixels, another group
    config = Config(data=Data(root=str(tmp_path), group=r"^(s\d)"))
    result = filter_tiles(config)
    assert result.copies == [["s0-0", "s3-7"]]
    assert remarks(result) == ["images with several keys: 1, in several groups: 1"]
    copy = next(tile for tile in result.tiles if tile.key == "s3-7")
    assert copy.split in SPLITS and copy.reason == "same image as s0-0"
    config = replace(config, filter=Filter(drop_duplicates=True))
    assert [tile.key for tile in filter_tiles(config).tiles if tile.split == "duplicate"] == ["s3-7"]


def test_of_copies_the_first_one_that_the_filter_keeps_stays():
    verdicts = ("misregistered", "", "", "unmarked")
    tiles = [replace(LIST[i], proposed=verdict, digest="x") for i, verdict in enumerate(verdicts)]
    for drop, expected in ((False, ""), (True, "duplicate")):
        marked, same = mark_copies(tiles, drop)
        assert [tile.proposed for tile in marked] == ["misregistered", "", expected, "unmarked"]
        named = 1 if drop else 0
        assert same == [["0", "1", "2", "3"]]
        assert [tile.reason for tile in marked] == ["" if i == named else f"same image as {named}" for i in range(4)]


# ---------------------------------------------------------------------------------------------- bad input

def spoil(root):
    """Six ways in which a file can be broken; the keys and a word of each reason."""
    def cut(path):
        path.write_bytes(path.read_bytes()[:-200])

    cut(root / "frames/frame#1.png")
    (root / "masks/mask#2.png").write_bytes(b"not an image")
    grey = np.full((48, 40), 26, np.uint8)
    grey[0, 0] = 99
    Image.fromarray(grey).save(root / "masks/mask#3.png")
    Image.new("L", (40, 47), 51).save(root / "masks/mask#4.png")
    Image.new("RGBA", (40, 48), (9, 9, 9, 9)).save(root / "frames/frame#5.png")
    Image.fromarray(np.full((48, 40), 9999, np.uint16)).save(root / "frames/frame#6.png")
    return {"1": "not a readable image", "2": "not a readable image", "3": "99 (1 pixel)", "4": "47 x 40",
            "5": "mode RGBA", "6": "16 bits"}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_corrupt_tiles_are_listed_and_stop_the_run_after_all_were_judged(tmp_path, workers, here):
    write_pairs(tmp_path / "tiles", 20)
    reasons = spoil(tmp_path / "tiles")
    (tmp_path / "x.yaml").write_text("data: {root: tiles}\n")
    run = ["data_filter.py", "--config", "x.yaml", "--workers", workers]
    out = here(*run, cwd=tmp_path)
    assert out.returncode == 2 and "error: 6 of 20 tiles are corrupt" in out.stderr
    for key, reason in reasons.items():
        assert [line for line in out.stderr.splitlines() if f"#{key}.png" in line and reason in line], key
    assert "pairs: 20, of 48 x 40 pixels (height x width); 3 of them corrupt" in out.stdout, "the masks tell so far"
    assert ", unknown 99 0.00%" in out.stdout
    assert not (tmp_path / "tiles/tiles.csv").exists()
    out = here(*run, "--skip-corrupt", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    tiles = {tile.key: tile for tile in read_list(tmp_path / "tiles/tiles.csv")}
    assert {key for key, tile in tiles.items() if tile.split == "corrupt"} == set(reasons)
    assert all(reason in tiles[key].reason for key, reason in reasons.items())
    assert sum(tile.split in SPLITS for tile in tiles.values()) == 14


def test_masks_in_other_greys_are_the_configs_fault_and_counted(tmp_path):
    write_pairs(tmp_path, 8)
    for path in (tmp_path / "masks").iterdir():
        mask = np.zeros((48, 40), np.uint8)
        mask[:24] = 255
        mask[:12] = 128
        Image.fromarray(mask).save(path)
    with pytest.raises(UserError, match=r"8 of 8 masks hold values .* 0 \(50.0% of the pixels, in 8 masks\), 128 "
                                        r"\(25.0%.*Try data.mask_values=\[0,128,255\]"):
        filter_tiles(Config(data=Data(root=str(tmp_path))))


def test_when_nothing_can_be_read_one_line_says_so(tmp_path):
    write_pairs(tmp_path, 3)
    for path in (tmp_path / "masks").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 3 pairs can be read; the first: .*mask#0.png"):
        filter_tiles(Config(data=Data(root=str(tmp_path))))


def test_nothing_kept_is_an_error_with_pictures_to_look_at(tmp_path, here):
    planted(tmp_path / "tiles")
    (tmp_path / "x.yaml").write_text("data: {root: tiles}\nfilter: {min_foreground: 1.0, max_blank: 0.0}\n")
    out = here("data_filter.py", "--config", "x.yaml", cwd=tmp_path)
    assert out.returncode == 2 and "none of 6 tiles passes" in out.stderr
    assert (tmp_path / "tiles/filter/dropped_misregistered.png").exists()
    assert not (tmp_path / "tiles/tiles.csv").exists()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_the_data_folder_are_refused(tmp_path, what):
    write_pairs(tmp_path / "elsewhere", 3)
    root = tmp_path / "tiles"
    if what == "folder":
        root.mkdir()
        for name in ("frames", "masks"):
            (root / name).symlink_to(tmp_path / "elsewhere" / name)
    else:
        write_pairs(root, 3)
        (root / "frames/frame#1.png").unlink()
        (root / "frames/frame#1.png").symlink_to(tmp_path / "elsewhere/frames/frame#1.png")
    with pytest.raises(UserError, match="leads out of the data folder"):
        filter_tiles(Config(data=Data(root=str(root))))


def test_a_link_inside_the_data_folder_and_a_linked_root_are_fine(tmp_path):
    write_pairs(tmp_path / "disk/deep", 3)
    (tmp_path / "disk/frames").symlink_to("deep/frames")
    (tmp_path / "disk/masks").symlink_to("deep/masks")
    (tmp_path / "tiles").symlink_to("disk")
    assert len(filter_tiles(Config(data=Data(root=str(tmp_path / "tiles")))).tiles) == 3


def heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells start background jobs, these tests perhaps, with it ignored


HELD = """
import sys, time
from common import console
from filtering import pipeline, report
import data_filter

class Progress(console.Progress):
    def advance(self, *args):
        super().advance(*args)
        if self.title == WHEN and self.done == 3:
            print("held", flush=True)
            time.sleep(10**6)

if __name__ == "__main__":
    WHEN = sys.argv.pop(1)
    pipeline.Progress = report.Progress = Progress
    console.run(data_filter.main)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("when", ["judge images", "draw sheets"])
def test_interrupted_the_old_list_stays_whole(tmp_path, here, how, when):
    write_pairs(tmp_path / "tiles", 12)
    (tmp_path / "x.yaml").write_text("data: {root: tiles}\n")
    (tmp_path / "tiles/tiles.csv").write_text("key,image,mask,split\n0,frames/frame#0.png,masks/mask#0.png,test\n")
    (tmp_path / "held.py").write_text(HELD)
    before = (tmp_path / "tiles/tiles.csv").read_bytes()
    process = subprocess.Popen([sys.executable, "held.py", when, "--config", "x.yaml", "--workers", "2"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=heed_interrupts, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert "held\n" in iter(process.stdout.readline, "")
    os.killpg(process.pid, how)
    _, message = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -9) and "Traceback" not in message
    assert (tmp_path / "tiles/tiles.csv").read_bytes() == before
    assert here("data_filter.py", "--config", "x.yaml", cwd=tmp_path).returncode == 0
    assert not list((tmp_path / "tiles").glob(".*.being-*")) and not list((tmp_path / "tiles").glob(".*.tmp"))


def test_a_list_that_is_edited_while_the_filter_runs_is_left_alone(tmp_path, here, monkeypatch):
    """At the last moment: when all pictures are drawn."""
    write_pairs(tmp_path / "tiles", 12)
    (tmp_path / "x.yaml").write_text("data: {root: tiles}\n")
    path, write = tmp_path / "tiles/tiles.csv", data_filter.report.write
    assert here("data_filter.py", "--config", "x.yaml", cwd=tmp_path).returncode == 0
    pictures = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "tiles/filter").iterdir()}

    def edited(*args):
        write(*args)
        edit(path, **{"3": "excluded"})

    monkeypatch.setattr(data_filter.report, "write", edited)
    out = here("data_filter.py", "--config", "x.yaml", cwd=tmp_path)
    assert out.returncode == 2 and "was changed while the tiles were judged" in out.stderr
    assert next(tile.split for tile in read_list(path) if tile.key == "3") == "excluded"
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "tiles/filter").iterdir()} == pictures


def test_empty_sides_and_absent_classes_are_said(tmp_path, here):
    write_pairs(tmp_path / "tiles", 6)
    for path in (tmp_path / "tiles/masks").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)) == 77, 51, 26).astype(np.uint8)).save(path)
    (tmp_path / "x.yaml").write_text("data: {root: tiles}\n")
    out = here("data_filter.py", "--config", "x.yaml", cwd=tmp_path)
    assert out.returncode == 0 and "no pixel of tumour in the tiles that are kept" in out.stderr
    assert "tiles smaller than data.crop=256 on a side: 6 of 6." in out.stderr and "data.crop=32" in out.stderr
    tests = [tile.key for tile in read_list(tmp_path / "tiles/tiles.csv") if tile.split == "test"]
    edit(tmp_path / "tiles/tiles.csv", **dict.fromkeys(tests, "excluded"))
    out = here("data_filter.py", "--config", "x.yaml", cwd=tmp_path)
    assert out.returncode == 0 and "no tile has split = test" in out.stderr


def test_pixels_of_corrupt_tiles_count_nowhere(tmp_path):
    write_pairs(tmp_path, 6)
    spoiled = tmp_path / "frames/frame#2.png"
    spoiled.write_bytes(spoiled.read_bytes()[:-200])
    result = filter_tiles(Config(data=Data(root=str(tmp_path))))
    assert [i for i, tile in enumerate(result.tiles) if tile.split == "corrupt"] == [2] and not result.pixels[2].any()


# ---------------------------------------------------------------------------------------------- set by hand

def edit(path, **splits):
    """Set verdicts as a person with a spreadsheet does."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["split"] = splits.get(row["key"].replace("-", "_"), row["split"])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_verdicts_set_by_hand_survive_every_later_run(tmp_path, here):
    planted(tmp_path / "tiles")
    (tmp_path / "x.yaml").write_text("data: {root: tiles, group: '^(.)', test_fraction: 0.3}\n")
    run, path = ["data_filter.py", "--config", "x.yaml"], tmp_path / "tiles/tiles.csv"
    assert here(*run, cwd=tmp_path).returncode == 0
    side = {tile.group: tile.split for tile in read_list(path) if tile.split in SPLITS}
    edit(path, c_glass=side["c"], b_above="excluded")
    for _ in range(3):
        out = here(*run, cwd=tmp_path)
        assert out.returncode == 0, out.stderr
        tiles = {tile.key: tile for tile in read_list(path)}
        assert (tiles["c-glass"].split, tiles["c-glass"].proposed) == (side["c"], "misregistered")
        assert (tiles["b-above"].split, tiles["b-above"].proposed) == ("excluded", side["b"])
        assert {tile.group: tile.split for tile in tiles.values() if tile.split in SPLITS}.items() <= side.items()
        assert f"set by hand and kept (2): b-above ({side['b']} -> excluded), c-glass" in out.stdout
    assert f"| b-above | {side['b']} | excluded |" in (tmp_path / "tiles/filter/summary.md").read_text()


def test_an_old_list_that_cannot_be_read_is_not_overwritten(tmp_path, here):
    planted(tmp_path / "tiles")
    (tmp_path / "x.yaml").write_text("data: {root: tiles, group: '^(.)'}\n")
    (tmp_path / "tiles/tiles.csv").write_text("key,split\na-good,train\n")
    out = here("data_filter.py", "--config", "x.yaml", cwd=tmp_path)
    assert out.returncode == 2 and "fix it, or delete it" in out.stderr
    assert (tmp_path / "tiles/tiles.csv").read_text() == "key,split\na-good,train\n"


# ---------------------------------------------------------------------------------------------- what a person looks at

def test_the_report_shows_counts_groups_and_every_reason(tmp_path, here):
    planted(tmp_path / "tiles")
    (tmp_path / "x.yaml").write_text("data: {root: tiles, group: '^(.)', test_fraction: 0.3}\n")
    for _ in range(2):
        out = here("data_filter.py", "--config", "x.yaml", cwd=tmp_path)
        assert out.returncode == 0, out.stderr
    folder = tmp_path / "tiles/filter"
    assert set(names_in(folder).split(", ")) == {
        "summary.md", "settings.yaml", "histograms.png", "kept_near_threshold.png", "kept_most_unmarked.png",
        "dropped_sparse.png", "dropped_misregistered.png", "tiles_before.csv"}
    text = (folder / "summary.md").read_text()
    assert "| misregistered | 1 | 16.7% |" in text and "| sparse | 2 | 33.3% |" in text
    assert "3 of 6 tiles are kept" in text and "| max_unmarked | off |" in text
    assert "| b | train | 2 | 50% |" in text or "| b | test | 2 | 50% |" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (folder / line.rpartition("(")[2].rstrip(")")).stat().st_size > 5000
    assert "images with several keys: 1, in several groups: 1" in text
    assert "warning: kept images with several keys: 1, for example a-good = b-above = c-good" in out.stderr


def test_sheets_go_from_the_threshold_outwards():
    limits = Filter(max_shift=30.0)
    tiles = [Tile(str(i), "f", "m", foreground=0.5, blank=i / 100, unmarked=0.0, shift=float(i), confidence=0.9,
                  split="misregistered" if i >= 8 else "train") for i in range(60)]
    tiles.append(replace(tiles[0], key="far", shift=29.9))
    tiles.append(replace(tiles[0], key="unsure", shift=29.9, confidence=0.1))
    found = sheets(FilterResult(tiles, np.zeros((62, 3)), np.zeros(256), (9, 9)), limits)
    near, dropped = found["kept_near_threshold.png"][1], found["dropped_misregistered.png"][1]
    assert [tile.key for tile in near[:3]] == ["far", "7", "6"]
    assert [dropped[0].key, dropped[-1].key, len(dropped)] == ["8", "59", 24]
    assert nearness(tiles[-1], limits) < 0.1 and "kept_most_unmarked.png" not in found
    assert nearness(replace(tiles[0], foreground=0.005), limits) == pytest.approx(2)


def test_the_list_of_an_earlier_version_is_read(tmp_path):
    """Without the measurements that were added since."""
    write_pairs(tmp_path, 2)
    (tmp_path / "tiles.csv").write_text("key,image,mask,group,foreground,blank,split\n" + "".join(
        f"{i},frames/frame#{i}.png,masks/mask#{i}.png,,0.5,0.01,{split}\n" for i, split in enumerate(SPLITS)))
    tiles = read_list(tmp_path / "tiles.csv")
    assert [tile.split for tile in tiles] == list(SPLITS) and not any(tile.manual_verdict for tile in tiles)
    write_tiles(tmp_path / "tiles.csv", tiles)
    assert read_list(tmp_path / "tiles.csv") == tiles
